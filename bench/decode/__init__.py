"""`python -m bench.decode`: whole models, time to the first token and tokens a second after it.

models           dense models of known shapes with random weights, and what is made of a dense model
random_adapters  adapters for random weights
steps            a prompt and the tokens after it, through a static cache
measure          contenders take turns; how the time of a token is divided; speculative decoding with RaNA as
                 the draft of its own dense model
rivals           whole programs in one table: transformers, llama.cpp, torchao, ours (`widths`)
gguf_files       the files for llama.cpp; `llama_cpp` is the process that reads them
"""
