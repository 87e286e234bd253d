"""Texts for calibration and evaluation: files of every kind, read and tokenised piece by piece."""

import csv
import io
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from rana_kernels.cli import texts
from rana_kernels.cli.texts import read_pieces
from rana_kernels.cli.tokens import read_token_ids
from tests.test_cli import TEXT, VOCABULARY, folder  # noqa: F401 - a fixture


def test_many_blank_lines_and_padding_are_warned_of(folder, tmp_path, capsys):  # noqa: F811
    tokenizer, path = PreTrainedTokenizerFast.from_pretrained(folder), tmp_path / "text.txt"
    read_token_ids(folder / "text.txt", tokenizer, VOCABULARY, length=32)
    assert not capsys.readouterr().err
    path.write_text("a word and then\n" + "\n" * 3000)
    read_token_ids(path, tokenizer, VOCABULARY, length=32)
    assert f"of the tokens of {path} are the same, '\\n" in capsys.readouterr().err
    save_file({"input_ids": torch.zeros(4, 64, dtype=torch.int64)}, tmp_path / "padding.safetensors")
    read_token_ids(tmp_path / "padding.safetensors", None, VOCABULARY, length=32)
    assert "100% of the tokens" in capsys.readouterr().err


DOCUMENTS = ["def main():\n    return 1", 'the second, with "quotes", a comma\tand a tab']


def as_table(delimiter: str) -> str:
    text = io.StringIO()
    table = csv.writer(text, delimiter=delimiter)
    table.writerows([["id", "text"], *enumerate(DOCUMENTS)])
    return "\ufeff" + text.getvalue()  # as spreadsheets begin them


AS_LINES = "\n\n".join(json.dumps({"id": 1, "text": text}) for text in DOCUMENTS)
FILES = {
    "a.jsonl": AS_LINES, "b.json": AS_LINES, "c.json": json.dumps([{"text": text} for text in DOCUMENTS]),
    "d.json": json.dumps(DOCUMENTS), "e.csv": as_table(","), "f.tsv": as_table("\t"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), FILES.items(), ids=FILES.keys())
def test_documents_are_the_fields_named_text(name, content, tmp_path):
    path = tmp_path / name
    path.write_text(content, newline="")
    assert "".join(read_pieces(path)) == "".join(f"{text}\n\n" for text in DOCUMENTS)


NO_TEXTS = {
    "lines.txt": (AS_LINES, "lines.txt holds JSON lines, .*call it .jsonl"),
    "fields.jsonl": (
        '{"text": "a"}\n{"prompt": "b", "answer": "c"}',
        "line 2 has the fields prompt, answer, wanted",
    ),
    "prose.jsonl": ("some prose", "line 1 has no object of JSON"),
    "prose.json": ("some prose", "line 1 has no object of JSON"),
    "nested.json": ('{"data": [{"text": "a"}]}', "entry 1 has the fields data"),
    "columns.csv": ("id,content\n1,a", "has the columns id, content, wanted a column `text`"),
    "empty.csv": ("", "has the columns nothing"),
}


@pytest.mark.parametrize("name", NO_TEXTS)
def test_files_without_texts_are_not_read_as_prose(name, tmp_path):
    content, message = NO_TEXTS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_pieces(tmp_path / name))


def test_a_text_is_tokenised_as_far_as_it_is_needed(folder, tmp_path, monkeypatch):  # noqa: F811
    """The tokens are those of the whole text, but for the token at a cut."""
    tokenizer, seen = PreTrainedTokenizerFast.from_pretrained(folder), []
    plain = type(tokenizer).__call__
    count = lambda self, text, **options: seen.append(len(text)) or plain(self, text, **options)  # noqa: E731
    whole = read_token_ids(folder / "text.txt", tokenizer, VOCABULARY, length=32)
    monkeypatch.setattr(type(tokenizer), "__call__", count)
    monkeypatch.setattr(texts, "PIECE", 1000)
    cut = read_token_ids(folder / "text.txt", tokenizer, VOCABULARY, length=32)
    assert sum(seen) == len(TEXT) and max(seen) <= 1000
    assert TEXT.startswith(tokenizer.decode(cut.flatten()))
    assert cut.numel() == pytest.approx(whole.numel(), rel=0.01)
    seen.clear()
    few = read_token_ids(folder / "text.txt", tokenizer, VOCABULARY, length=32, tokens=128)
    assert torch.equal(few, whole[:4]) and sum(seen) <= 1000


@pytest.mark.parametrize("text", ["x" * 2500, "word " * 500], ids=["one word", "one line"])
def test_a_text_of_one_line_is_cut_too(text, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 1000)
    (tmp_path / "a.txt").write_text(text)
    parts = list(read_pieces(tmp_path / "a.txt"))
    assert "".join(parts) == text and all(0 < len(part) <= 1000 for part in parts)
