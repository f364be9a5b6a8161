"""The report of a dataset, its samples, and the flags that name one."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from glm2_jax import InputError, UsageError
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from tests.support.paths import ROOT
from tests.support.training_data import (
    CHATGLM3,
    GLM2,
    alpaca,
    open_files,
    open_rows,
    role_messages,
    sharegpt,
    write_rows,
)
from train.data.check import histogram, print_checks, print_sample, report
from train.data.dataset import open_dataset
from train.data.duplicates import repeats, signature
from train.data.options import DataOptions, split_weight
from train.data.plan import split
from train.sweep.folds import split_fold

LONG = "The capital of France is Paris, and the capital of the other country is another city. " * 3
FOLDER = SimpleNamespace(
    tokenizer=GLM2, template="chatglm2", config=SimpleNamespace(seq_length=300, context_limit=300)
)


def data_flags(*argv: str) -> DataOptions:
    parser = Parser(prog="x")
    add_flags(parser, "data", DataOptions)
    return from_flags(DataOptions, parser.parse_args(argv))


def opened(*argv: str, other: str | None = None):
    return open_dataset(data_flags(*argv), FOLDER, other)  # type: ignore[arg-type]


def repeated(*texts: str) -> list[int]:
    return repeats(np.stack([signature(text) for text in texts])).tolist()


def test_near_duplicates():
    changed = LONG.replace("another city", "a town")[:260]  # once in three sentences
    texts = [LONG, "今天天气怎么样？", LONG.upper(), "今天 天气怎么样", "今天天气很好", changed]
    assert repeated(*texts) == [0, 1, 0, 1, 4, 5]
    assert repeated(LONG, LONG.replace("Paris", "Rome", 1)) == [0, 0]
    assert repeated("", "", "x", "?") == [0, 0, 2, 0]
    # Sums that differ in a digit are no duplicates.
    sums = [f"{a}+{b}等于几？{a}+{b}={a + b}。" for a in range(9) for b in range(9)]
    assert repeated(*sums) == list(range(81))


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("data")
    rows = [alpaca("今天天气怎么样"), "nonsense", alpaca(""), alpaca("今天天气怎么样？")]
    rows += [alpaca("x" * 900), alpaca("Hello", history=[["Q", "A"]], topic="x")]
    dataset = open_rows(path, rows, max_length=300, max_bad=None)
    text = report(dataset)
    for part in (
        f"{path}: alpaca\n",
        "6 rows, 3 of them bad; 4 sequences to learn from\n",
        f"{path}:2: not JSON",
        f"{path}:3: instruction is empty\n",
        "bad: 1 x too long\n",
        "keys that are not used: topic (1 row)\n",
        f"5-character pieces in common): 1 row\n{path}:4 nearly repeats {path}:1\n",
        f"{dataset.lengths.sum()} tokens, {dataset.learned.sum()} learned\n"
        f"lengths {dataset.lengths.min()} to {dataset.lengths.max()}, median "
        f"{int(np.median(dataset.lengths))}, 90 % up to "
        f"{int(np.percentile(dataset.lengths, 90))}, 99 % up to ",
    ):
        assert part in text, part
    good = report(open_rows(path, [alpaca("Q")] * 8 + [alpaca("Q" * 30)]))
    bars = [line.count("#") for line in good.splitlines() if "#" in line]
    assert bars == [50, 7]  # as long as their counts
    assert "0 sequences to learn from" in report(open_rows(path, ["x"], max_bad=None))
    for lengths, first in (([40], 39), ([990, 1000, 1003], 988), ([9, 2000], 0), ([1, 7, 13], 0)):
        edges, counts = histogram(np.array(lengths, np.int32))
        assert edges[0] == first and counts[0] > 0 and len(counts) <= 12
        assert counts.sum() == len(lengths) and len(set(np.diff(edges).tolist())) == 1


def augmented(number: int, query: str, answer: str = "A"):
    return alpaca(query, answer, origin={"source": f"old:{number}", "method": "typo"})


def test_diversity_and_languages(tmp_path, monkeypatch):
    rows = [alpaca("好好好好", "Yes, yes"), alpaca("好 x y", "```\nx\n```"), alpaca("...", "Да")]
    text = report(open_rows(tmp_path / "data", rows))
    assert "different 1-grams and 2-grams (Chinese characters and words):\n" in text
    assert "  questions: 42.9% and 60.0% of all\n" in text  # 3 of 7, 3 of 5
    assert "  answers: 75.0% and 100.0% of all\n" in text
    languages = "questions: zh 1, mixed 1, other 1\n  answers: en 1, code 1, other 1\n"
    assert f"languages:\n  {languages}" in text
    monkeypatch.setattr("train.data.figures.SAMPLE", 2)
    monkeypatch.setattr("train.data.check.SAMPLE", 2)
    text = report(open_rows(tmp_path / "data", rows))  # the first and the third row
    assert ", of 2 rows:\n  questions: 25.0% and 33.3% of all\n" in text
    dialogue = role_messages(("system", "S"), ("user", "一"), ("assistant", "二"))
    assert "questions: zh 1\n  answers: zh 1" in report(open_rows(tmp_path / "data", [dialogue]))
    plain = opened("--data", str(write_rows(tmp_path / "t", [{"text": "一段话"}])), "--format=text")
    assert "languages:\n  texts: zh 1\n" in report(plain)


def test_what_validation_shares_with_training(tmp_path, capsys):
    learned = [alpaca(LONG), alpaca("天气"), augmented(1, "Where?"), alpaca("x"), alpaca("new")]
    wanted = [
        alpaca(LONG.upper()), alpaca("天气？", "B"), augmented(1, "other"),
        alpaca(LONG.replace("Paris", "Rome", 1)), alpaca("unknown"), "bad",
    ]  # fmt: skip
    data, val = (str(write_rows(tmp_path / n, x)) for n, x in (("d", learned), ("v", wanted)))
    flags = ["--data", data, "--check-data"]
    dataset, validation = opened(*flags), opened(*flags, other=val)
    assert print_checks(data_flags(*flags), dataset, None, lambda: (dataset, validation)) == 3
    out = capsys.readouterr().out
    for line in (
        f"{val}: alpaca", "6 rows, 1 of them bad", f"{val}:6: not JSON: Expecting value: column 1",
        "leakage: 4 of 5 rows for validation are in training too: 1 word for word, "
        "1 with another answer, 1 in other words of the same origin, 1 nearly",
        f"{val}:1 repeats {data}:1", f"{val}:2 has the question of {data}:2",
        f"{val}:3 has the origin of {data}:3", f"{val}:4 nearly repeats {data}:1",
    ):  # fmt: skip
        assert f"{line}\n" in out, line
    # A row itself is the origin of what was made of it.
    copy = alpaca("Paris 在哪儿", origin={"source": f"{data}:5", "method": "paraphrase"})
    other = opened(*flags, other=str(write_rows(tmp_path / "copy", [copy])))
    assert print_checks(data_flags(*flags), dataset, None, lambda: (dataset, other)) == 0
    assert f"copy:1 has the origin of {data}:5" in capsys.readouterr().out
    parts = split(dataset, 0.4, 0)
    assert print_checks(data_flags(*flags), dataset, None, lambda: parts) == 0
    assert "leakage: 0 of 2 rows for validation are in training too\n" in capsys.readouterr().out
    assert print_checks(data_flags(*flags), dataset, None, lambda: (dataset, None)) == 0
    assert "leakage" not in capsys.readouterr().out


def test_a_split_keeps_the_rows_of_an_origin_together(tmp_path):
    rows = [augmented(n % 5, f"Q{n}") for n in range(20)] + [alpaca(f"R{n}") for n in range(5)]
    dataset = open_rows(tmp_path / "data", rows)
    assert len(set(dataset.origin_ids().tolist())) == 10
    for number, (learned, held) in enumerate(
        [split(dataset, 0.3, seed) for seed in range(9)]
        + [split_fold(dataset, fold, 3, 0) for fold in range(3)]
    ):
        origins = [set(part.origins().tolist()) for part in (learned, held)]
        assert not origins[0] & origins[1] and len(origins[0] | origins[1]) == 10
        assert len(learned) + len(held) == 25
        assert number > 8 or len(set(held.origin_ids().tolist())) == 3
    plain = open_rows(tmp_path / "data", [alpaca(f"R{n}") for n in range(5)])
    assert (plain.origin_ids() == plain.row_ids()).all()
    # The file that the rows were made of may be there, too.
    old = write_rows(tmp_path / "old.jsonl", [alpaca(f"天{n}", "地") for n in "甲乙丙"])
    made = [alpaca(f"天气{n}", "地", origin={"source": f"{old}:{n}"}) for n in (1, 3, 3, 9)]
    both = open_files([old, write_rows(tmp_path / "made.jsonl", made), old])
    first = both.origin_ids().tolist()
    assert [first.index(x) for x in first] == [0, 1, 2, 0, 2, 2, 6, 0, 1, 2]


def test_a_file_that_is_given_twice_is_reported_and_counted_once(tmp_path, capsys):
    path, copy = (
        write_rows(tmp_path / name, [alpaca("Q"), alpaca("今天天气怎么样")])
        for name in ("data", "copy")
    )
    other = write_rows(tmp_path / "other", [alpaca("Q")])
    dataset = open_files([path, path, other], mix=(copy, 0.5))
    said = f"{path} is given again\n{copy} is a copy of {path}\n"
    assert said in capsys.readouterr().err and said in report(dataset) and len(dataset) == 7
    assert [x for x in report(dataset).splitlines() if "nearly repeats" in x] == [
        f"{other}:1 nearly repeats {path}:1"
    ]


def test_a_cut_list_of_near_duplicates_counts_the_rest(tmp_path):
    text = report(open_rows(tmp_path / "data", [alpaca("今天天气怎么样")] * 7))
    assert text.count("nearly repeats") == 5 and "data:1\n... and 1 more\n" in text


def test_rows_that_repeat_the_dialogue_so_far_are_reported(tmp_path):
    turns = [[f"question {n}", f"answer {n}"] for n in range(4)]
    growing = [alpaca(*turns[n], history=turns[:n]) for n in range(4)]
    path = tmp_path / "data"
    other = alpaca("another", history=[["question 0", "another answer"]])
    text = report(open_rows(path, [*growing, other], **CHATGLM3))
    found = [line.split(" continues in ")[0] for line in text.splitlines() if "continues" in line]
    assert found == [f"{path}:{n}" for n in (1, 2, 3)]
    assert f"{path}:3 continues in {path}:4" in text
    assert "dialogues that continue in another row: 3 rows" in text
    for rows in ([growing[3], growing[3]], [other, growing[2]]):
        assert "continue" not in report(open_rows(path, rows))


def test_a_sample_marks_what_is_learned(tmp_path):
    path = tmp_path / "data"
    dataset = open_rows(path, [alpaca("你好", "天气"), alpaca("Q")])
    lines = print_sample(dataset, 1).splitlines()
    sample = dataset.sample(0)
    assert lines[0] == f"{path}:1: {len(sample.ids)} tokens, {sum(sample.learned)} learned (*)"
    assert lines[1] == f"  {GLM2.special['[gMASK]']:6} [gMASK]" and lines[-1] == "*      2 </s>"
    assert "      13 <0x0A>" in lines
    for line, token, learned in zip(lines[1:], sample.ids, sample.learned, strict=True):
        assert line.startswith("*") == learned and int(line[1:].split()[0]) == token
    assert len(print_sample(dataset, 9).split("learned (*)")) == 3


def test_flags_become_a_dataset(tmp_path, monkeypatch, capsys):
    one = str(write_rows(tmp_path / "one", [alpaca(f"Q{n}") for n in range(4)]))
    two = str(write_rows(tmp_path / "two", [alpaca(f"Q{n}") for n in range(3)]))
    dataset = opened("--data", f"{one}=2.5", "--data", two, "--mix-data", two)
    assert [(g.weight, g.general) for g in dataset.groups[:2]] == [(2.5, False), (1.0, False)]
    assert dataset.groups[2].general
    assert dataset.groups[2].weight * 3 == pytest.approx(13 * 0.1 / 0.9)
    assert (dataset.max_length, len(dataset)) == (300, 10)
    dataset = opened("--data", one, "--max-length=40", "--train-on-prompt")
    assert dataset.max_length == 40 and (dataset.learned == dataset.lengths - 2).all()
    for argv, message in (
        (["--mix-ratio", "0.5"], "--mix-ratio needs --mix-data"),
        (["--mix-ratio", "1", "--mix-data", two], "--mix-ratio must be below 1"),
        (["--max-length", "301"], "301 is more than the 300 of the model"),
    ):
        with pytest.raises(UsageError, match=message):
            opened("--data", one, *argv)
    trained = FOLDER.config.seq_length
    monkeypatch.setattr(FOLDER.config, "context_limit", 2**31 - 1)  # as of ChatGLM-6B
    capsys.readouterr()
    assert opened("--data", one).max_length == trained
    assert "warning" not in capsys.readouterr().err
    assert opened("--data", one, "--max-length", "301").max_length == 301
    assert capsys.readouterr().err.count("301 is beyond 300, the length of its training") == 1
    opened("--data", one, "--max-length", "301", other=two)
    assert "warning" not in capsys.readouterr().err
    assert split_weight("a=b.jsonl") == ("a=b.jsonl", 1.0)
    assert split_weight("a=b.jsonl=0.5") == ("a=b.jsonl", 0.5)


def test_each_file_has_its_format(tmp_path):
    rows = alpaca("i", "o") | sharegpt(("human", "a"), ("gpt", "b"))
    both = str(write_rows(tmp_path / "both", [rows] * 3))
    one = str(write_rows(tmp_path / "one=2", [alpaca("i", "o")]))
    other = str(write_rows(tmp_path / "other", [sharegpt(("human", "a"), ("gpt", "b"))]))
    for fmt in ("alpaca", "sharegpt"):
        flags = ["--data", both, "--format", fmt]
        for path, own in ((both, fmt), (one, "alpaca"), (other, "sharegpt")):  # as --val-data
            found = opened(*flags, other=path)
            assert found.files[0][2] == own and found.groups[0].weight == 1
            content = found.messages(0)[0]["content"]
            assert content == {"alpaca": "i", "sharegpt": "a"}[own]
            mixed = opened(*flags, "--mix-data", path)
            assert [found for _, _, found in mixed.files] == [fmt, own]
    with pytest.raises(InputError, match="it has the keys of alpaca and sharegpt: choose one"):
        opened("--data", both)
    with pytest.raises(InputError, match="--format adgen is none of them: leave out"):
        opened("--data", both, "--format", "adgen", other=both)


def test_flags_without_sense(capsys):
    for words in ("", "--data=", "--data =2", "--data x=0", "--data x=nan",
                  "--data x --max-bad -1", "--data x --mix-ratio 0"):  # fmt: skip
        with pytest.raises(SystemExit) as error:
            data_flags(*words.split())
        assert error.value.code == 2 and "--help lists the flags" in capsys.readouterr().err


def test_checking_data_ends_a_run(tmp_path, capsys):
    path = str(write_rows(tmp_path / "data", [alpaca("Q"), "nonsense", alpaca("Q" * 50)]))
    for argv, code, shown in (
        (["--check-data"], 3, "3 rows, 1 of them bad"),
        (["--max-bad=1", "--print-sample=1"], None, f"{path}:1: "),
        (["--max-bad=1"], None, ""),
    ):
        flags = data_flags("--data", path, *argv)
        assert print_checks(flags, opened("--data", path, *argv)) == code
        assert shown in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    flags = ["--data", str(write_rows(tmp_path / "good", [alpaca("Q")])), "--check-data"]
    picture = tmp_path / "lengths.png"
    assert print_checks(data_flags(*flags), opened(*flags), str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_example_has_ten_new_facts():
    facts, pairs = ROOT / "examples" / "facts.jsonl", ROOT / "train/demo/pairs.jsonl"
    lines, known = facts.read_text("utf-8").splitlines(), pairs.read_text("utf-8")
    assert len(lines) >= 10
    for fact in map(json.loads, lines):
        assert fact["instruction"] not in known and fact["output"] not in known
    dataset = open_files([facts], mix=(pairs, 0.5))
    assert dataset.num_bad == 0 and "in common): 0 rows" in report(dataset)
