"""`python -m bench.report`: everything that is made from bench/results, and what every benchmark reports
with.

results   conditions of a run, and the files of results
tables    tables in Markdown and on the terminal
fits      least squares, for times that grow
page      docs/performance.md: headline cases of each device, and where ours is slower
bits      the part of that page about weights of 16, 8 and 4 bits, and its plot
full      every number of a file of results as tables, beside that file
plots     the plots under docs/
"""
