"""Evidence: what each way to skip work costs in perplexity, at equal cost, through one evaluation.

__main__.py    the command
run.py         the order of things
subject.py     the model and its texts
contenders.py  every method, as a function from a budget to a model and the cost of its tokens
masks.py       the baselines that leave weights as they are and zero inputs: TEAL, WINA, CATS
fit.py         the budget to ask for so that the cost that is measured is the one wanted
recovery.py    a short training of a candidate, the same for all
measure.py     perplexity and cost of a candidate: a row of the table
layers.py      what each block's outputs keep of their energy, layer by layer
spread.py      kept rows over tokens, the tokens that lose most, and text of another kind
store.py       finished measurements on disk, so that an interrupted run goes on
tables.py      the tables
docs.py        those of docs/quality.md
plots.py       the plots
"""
