"""The demo: compress a small model, measure what that costs, generate from it, time it, write a report.

__main__.py      the command
run.py           the order of the demo
results.py       all results: report.json has them
model.py         the model folder: weights, tokenizer, tokens
quality.py       compression at several budgets, with the perplexity and live rows of each
bits.py          one budget in 16 and in 4 bits
texts.py         save, load, and continue a prompt with each model
decode_step.py   times of the linears of real block shapes, dense and RaNA
tables.py        the tables, for the terminal and the page
figures.py       the plots
captions.py      the words
page.py          report.html

Timing and the conditions of a run come from `bench`.
"""
