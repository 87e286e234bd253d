"""The demo: compress a small model, see what it costs, generate from it, time it, write a report.

__main__.py      the command
run.py           the order of things
results.py       everything that is found out: report.json is this
provenance.py    what machine, versions and revision stand behind the numbers
model.py         the model folder: weights, tokenizer, tokens
quality.py       compress at several budgets; perplexity and kept rows of each
texts.py         save, load, and continue a prompt with each
decode_step.py   the linears of real block shapes, dense and RaNA, to be timed
tables.py        the tables, for the terminal and the page
figures.py       the plots
captions.py      the words
page.py          report.html

How things are timed, and the conditions of a run, are those of `bench`.
"""
