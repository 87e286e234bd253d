"""`python -m bench.decode`: whole models, time to the first token and tokens a second after it.

shapes       dense models with random weights, by name
contenders   what is made of a dense model: static low rank, RaNA, and itself with our dense product
steps        a prompt and the tokens after it, through a static cache; contenders taking turns
profile      what the time of a token goes to
drafts       speculative decoding, with RaNA as the draft of its own dense model
"""
