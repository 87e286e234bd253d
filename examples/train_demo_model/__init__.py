"""Train the small Llama model in `examples/demo_model/` on the source of Python's standard library.

With `--architecture gpt_neox`, train a model of another kind on the same text. The text is on every machine
that can run this program, so nothing is downloaded.

text.py         read and split the text, train a tokenizer, pack tokens into rows
model.py        the models, and a step of training
checkpoints.py  the checkpoint and the log
__main__.py     the command: train, measure, save

Letters: V vocabulary size, T row length in tokens, n rows.
"""

from examples.train_demo_model.text import pack, read_library, split_library

__all__ = ["pack", "read_library", "split_library"]
