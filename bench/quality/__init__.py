"""`python -m bench.quality`: what every way to skip work loses, at equal cost, by one evaluation.

__main__.py    the command
run.py         the order of a run
smollm2.py     a real model and English text for it, downloaded and checked
subject.py     the model, its texts, and a candidate made of it
contenders.py  every method, as a function from a budget to a model and the costs of its tokens
masks.py       the baselines that keep weights and zero inputs: TEAL, WINA, CATS
greedy.py      the share of each linear, by TEAL's search
recovery.py    a short training of a candidate, the same for all
measure.py     faithfulness, perplexity, cost and kept energy of a candidate, and the budget that gives the
               wanted cost
spread.py      live rows token by token, the tokens that lose most, and another kind of text
store.py       finished measurements on disk, so that an interrupted run goes on
tables.py      the tables
docs.py        the tables within docs/quality.md
plots.py       the plots
"""
