"""Plain texts: their windows, in which each token is learned once, files of them, and bad rows."""

import gzip
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm2_jax.datasets import tables
from glm2_jax.datasets.encode import Encoder
from glm2_jax.datasets.texts import Texts
from glm2_jax.errors import InputError, UsageError
from tests.support.checkpoints import TINY
from tests.support.training_data import GLM2, alpaca, learned_of, write_rows
from train import lora
from train.data.batches import Batches
from train.data.dataset import Dataset, Source, open_dataset
from train.data.options import DataOptions

START, EOS = GLM2.start_ids, GLM2.eos_id
LONG = "山下有一间小屋，屋里住着一个老人。" * 12
DOCUMENTS = ["好", LONG, "What is it? A test.", LONG[:90] + "完"]


def open_texts(paths, length=32, stride=None, **options) -> Dataset:
    encoder = Encoder(GLM2, "chatglm2", texts=Texts(GLM2, length, stride))
    return Dataset([Source(path, "text") for path in paths], encoder, length, **options)


@pytest.mark.parametrize("stride", [None, 1, 7, 30])
def test_each_token_is_learned_once_after_what_comes_before_it(tmp_path, stride):
    path = write_rows(tmp_path / "d.jsonl", [{"text": text} for text in DOCUMENTS])
    dataset = open_texts([path], stride=stride)
    expected = [[*GLM2.encode(text), EOS] for text in DOCUMENTS]
    found: list[list[int]] = [[] for _ in DOCUMENTS]
    for index in range(len(dataset)):
        sample, line = dataset.sample(index), int(dataset.source(index).rpartition(":")[2]) - 1
        assert len(sample.ids) <= 32 and sample.ids[: len(START)] == START
        new = learned_of(sample)
        before = sample.ids[len(START) : len(sample.ids) - len(new)]
        assert before == found[line][len(found[line]) - len(before) :]
        found[line] += new
        assert dataset.learned[index] == len(new) and dataset.lengths[index] == len(sample.ids)
    assert found == expected
    batches = Batches(dataset, batch_size=2, pack=True)
    steps = [batches.at(0, step).batch for step in range(batches.steps_per_epoch(0))]
    assert sum(int(x.learned.sum()) for x in steps) == sum(map(len, expected))
    if stride is None:
        rows = sum(len(x.tokens[0]) for x in steps)
        assert rows < len(dataset), "short texts share a row"


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_a_file_of_text_is_read_in_pieces(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tables, "PIECE", 100)
    lines = [f"{n}. {LONG[: 10 + n]}\n" for n in range(20)] + ["\n", " \n"]
    text = "".join(lines)
    data = ("\ufeff" + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    dataset = open_texts([tmp_path / name])
    assert dataset.rows > 3 and dataset.source(0).endswith(f"{name}:1")
    found = [token for n in range(len(dataset)) for token in learned_of(dataset.sample(n))]
    assert found.count(EOS) == 1 and found[-1] == EOS
    places = {int(dataset.source(n).rpartition(":")[2]) - 1 for n in range(len(dataset))}
    starts = [*sorted(places), len(lines)]
    pieces = ["".join(lines[a:b]) for a, b in zip(starts, starts[1:], strict=False)]
    assert [GLM2.encode(piece) for piece in pieces] and "".join(pieces) == text
    assert found[:-1] == [token for piece in pieces for token in GLM2.encode(piece)]
    assert [m["content"] for m in dataset.messages(0)] == pieces[:1]
    (tmp_path / "bad.txt").write_bytes(b"one\n\xff\n")
    with pytest.raises(InputError, match=r"bad\.txt:2: not UTF-8"):
        open_texts([tmp_path / "bad.txt"])


def test_bad_rows_have_their_lines(tmp_path, capsys):
    rows = [{"text": "好"}, {"text": "  "}, {"text": 3}, {"txt": "好"}, {"text": None}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(InputError, match="4 of 5 rows cannot be used"):
        open_texts([path])
    shown = capsys.readouterr().err
    for line, why in (
        (2, "text is empty"),
        (3, "text is not a string: it is of type int"),
        (4, "no text: is txt meant?"),
        (5, "text is not a string: it is of type NoneType"),
    ):
        assert f"{path}:{line}: {why}" in shown


def opened(tmp_path, *flags: str, other=None, rows=None) -> Dataset:
    path = write_rows(tmp_path / "d.jsonl", rows or [{"text": text} for text in DOCUMENTS])
    args = lora.parser().parse_args(["--data", str(path), *flags])
    options: DataOptions = lora.make_recipe(args).data
    folder: Any = SimpleNamespace(tokenizer=GLM2, template="chatglm2", config=TINY)
    return open_dataset(options, folder, other)


def test_flags(tmp_path):
    text = ["--format", "text", "--max-length", "32"]
    assert int(opened(tmp_path, *text, "--stride", "8").lengths.max()) == 32
    for flags, said in (
        (["--stride", "8"], "--stride needs --format text"),
        ([*text, "--stride", "31"], r"--stride must be at most 30, got 31"),
        ([*text[:3], "3"], "--max-length must be at least 4 with --format text"),
    ):
        with pytest.raises(UsageError, match=said):
            opened(tmp_path, *flags)
    with pytest.raises(InputError, match="no known format.*(?s:.)*--format text"):
        opened(tmp_path, "--max-bad", "9")  # texts are only read where they are asked for


@pytest.mark.parametrize("flags", [[], ["--check-data"], ["--max-bad", "9"]])
def test_a_text_that_is_not_read_as_one(flags, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time\nthere was a row.\n")
    args = lora.parser().parse_args(["--data", str(tmp_path / "a.txt"), *flags])
    folder: Any = SimpleNamespace(tokenizer=GLM2, template="chatglm2", config=TINY)
    said = r"a.txt does not hold rows\nline 1: not JSON: .*\nFor plain text, use --format text\.$"
    with pytest.raises(InputError, match=said):
        open_dataset(lora.make_recipe(args).data, folder)
    (tmp_path / "a.txt").write_text('{"prompt": "Q", "response": "A"}\nno row\n')
    args.max_bad = 1
    assert len(open_dataset(lora.make_recipe(args).data, folder)) == 1  # rows, too


def test_other_files_are_texts_or_conversations(tmp_path):
    """Of a row with the keys of a conversation a text is only a comment."""
    rows = [alpaca("Q", "A", text="both")] * 2
    chat = write_rows(tmp_path / "chat.jsonl", rows)
    general = opened(
        tmp_path, "--format", "text", "--max-length", "32", "--mix-data", str(chat),
        "--mix-ratio", "0.5",
    )  # fmt: skip
    assert [fmt for _, _, fmt in general.files] == ["text", "alpaca"]
    other = write_rows(tmp_path / "v.jsonl", [{"text": "好"}])
    flags = ["--format", "text", "--max-length", "32"]
    assert opened(tmp_path, *flags, other=other).files[0][2] == "text"
    assert opened(tmp_path, *flags, other=chat).files[0][2] == "alpaca"
    (tmp_path / "v.txt").write_text("好\n", encoding="utf-8")
    sample = opened(tmp_path, *flags, other=tmp_path / "v.txt").sample(0)
    np.testing.assert_array_equal(sample.ids, [*START, *GLM2.encode("好\n"), EOS])
