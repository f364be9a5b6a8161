"""The report of a dataset, its samples, and the flags that name one."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from glm2_jax import InputError, UsageError
from glm2_jax.cli.parser import Parser
from tests.support.paths import ROOT
from tests.support.training_data import GLM2, open_files, open_rows, write_rows
from train.data.check import Report, check, print_sample
from train.data.duplicates import repeats, signature
from train.data.options import add_data_options, look_at, open_dataset, split_weight

LONG = "The capital of France is Paris, and the capital of the other country is another city. " * 3


def row(query: str, answer: str = "A", **more):
    return {"instruction": query, "output": answer, **more}


def repeated(*texts: str) -> list[int]:
    return repeats(np.stack([signature(text) for text in texts])).tolist()


def test_near_duplicates():
    changed = LONG.replace("another city", "a town")  # once in three sentences
    texts = [
        LONG,
        "今天天气怎么样？",
        LONG.upper(),
        "今天 天气怎么样",
        "今天天气很好",
        changed[:260],
    ]
    assert repeated(*texts) == [0, 1, 0, 1, 4, 5]
    assert repeated(LONG, LONG.replace("Paris", "Rome", 1)) == [0, 0]
    assert repeated("", "", "x", "?") == [0, 0, 2, 0]
    # Sums that differ in a digit are no duplicates.
    assert repeated(*(f"{a}+{b}等于几？{a}+{b}={a + b}。" for a in range(9) for b in range(9))) == (
        list(range(81))
    )


def test_signatures_estimate_what_is_common():
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 12)) for _ in range(60)]
    whole, half = " ".join(words), " ".join(words[:30])
    share = (signature(whole) == signature(half)).mean()
    assert 0.3 < share < 0.7  # half of the pieces are common to both


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("data")
    rows = [row("今天天气怎么样"), "nonsense", row(""), row("今天天气怎么样？"), row("x" * 900)]
    rows += [row("Hello", history=[["Q", "A"]], topic="x")]
    dataset = open_rows(path, rows, max_length=300, max_bad=None)
    report = check(dataset)
    assert (report.rows, len(report.lengths), report.exit_code) == (6, 4, 3)
    assert report.repeats == [(f"{path}:4", f"{path}:1")]
    assert report.learned == int(dataset.learned.sum())
    text = report.text(60)
    assert 50 < max(map(len, text.splitlines())) <= 60
    joined = " ".join(text.split())
    for part in (
        f"{path}: alpaca",
        "6 rows, 3 of them bad; 4 sequences to learn from",
        f"{path}:2: not JSON",
        f"{path}:3: instruction is empty",
        "bad: 1 x too long",
        "keys that are not used: topic (1 row)",
        "5-character pieces in common): 1 row",
        f"{path}:4 nearly repeats {path}:1",
        f"{dataset.lengths.sum()} tokens, {report.learned} learned",
        f"lengths {dataset.lengths.min()} to {dataset.lengths.max()}",
        "allowed 300",
    ):
        assert part in joined, part


def test_a_report_of_good_rows_and_one_of_none(tmp_path):
    good = check(open_rows(tmp_path / "data", [row("Q")]))
    assert good.exit_code == 0 and "1 row, 0 of them bad; 1 sequence to" in good.text()
    nothing = check(open_rows(tmp_path / "data", ["x"], max_bad=None))
    assert nothing.exit_code == 3 and "0 sequences to learn from" in nothing.text()


@pytest.mark.parametrize("longest", [1, 12, 13, 59, 60, 61, 2048])
def test_the_histogram_holds_every_length_once(longest):
    lengths = np.array([1, longest // 2 + 1, longest, longest], np.int32)
    report = Report([], 4, [], {}, lengths, 4, 4096, [], {})  # type: ignore[arg-type]
    edges, counts = report.bins()
    assert counts.sum() == 4 and len(counts) <= 12 and len(set(np.diff(edges).tolist())) == 1
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        assert count == ((lengths > low) & (lengths <= high)).sum()


def test_the_histogram_begins_at_the_shortest():
    for lengths, first in (([40], 39), ([21, 40], 20), ([990, 1000, 1003], 988), ([9, 2000], 0)):
        lengths = np.array(lengths, np.int32)
        report = Report([], 4, [], {}, lengths, 4, 4096, [], {})  # type: ignore[arg-type]
        edges, counts = report.bins()
        assert edges[0] == first and counts[0] > 0 and len(counts) <= 12
        assert counts.sum() == len(lengths)


def test_a_file_that_is_given_twice_is_said_and_counted_once(tmp_path):
    path = write_rows(tmp_path / "data", [row("Q"), row("今天天气怎么样")])
    copy = write_rows(tmp_path / "copy", [row("Q"), row("今天天气怎么样")])
    other = write_rows(tmp_path / "other", [row("Q")])
    notes: list[str] = []
    dataset = open_files([path, path, other], mix=(copy, 0.5), on_note=notes.append)
    said = [f"{path} is given again", f"{copy} holds the same as {path}"]
    assert notes[:2] == said
    report = check(dataset)
    assert report.repeats == [(f"{other}:1", f"{path}:1")] and len(report.lengths) == 7
    assert "\n".join(said) in report.text()


@pytest.mark.parametrize("columns", [None, 50, 200])
def test_lines_are_as_long_as_the_terminal_and_elsewhere_whole(
    tmp_path, columns, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("data"), [{"question": "Q", "answer": "A"}, row("Q")])
    args = flags("--data", "data", "--check-data")
    dataset = open_dataset(args, MODEL)  # type: ignore[arg-type]
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert look_at(args, dataset) == 3
    lines = capsys.readouterr().out.splitlines()
    whole = next(line for line in lines if line.startswith("data:1: "))
    assert whole.endswith("prompt: prompt, response") == (columns != 50)
    assert columns != 50 or 40 < max(map(len, lines)) <= 50


def test_bars_are_as_long_as_their_counts(tmp_path):
    report = check(open_rows(tmp_path / "data", [row("Q")] * 8 + [row("Q" * 30)]))
    bars = [line.count("#") for line in report.text(80).splitlines() if "#" in line]
    assert bars == [50, 7]


def test_a_sample_marks_what_is_learned(tmp_path):
    path = tmp_path / "data"
    dataset = open_rows(path, [row("你好", "天气"), row("Q")])
    lines = print_sample(dataset, 1).splitlines()
    sample = dataset.sample(0)
    assert lines[0] == f"{path}:1: {len(sample.ids)} tokens, {sum(sample.learned)} learned (*)"
    assert lines[1] == f"  {GLM2.special['[gMASK]']:6} [gMASK]" and lines[-1] == "*      2 </s>"
    assert "      13 <0x0A>" in lines
    for line, token, learned in zip(lines[1:], sample.ids, sample.learned, strict=True):
        assert line.startswith("*") == learned and int(line[1:].split()[0]) == token
    assert len(print_sample(dataset, 9).split("learned (*)")) == 3


def flags(*argv: str):
    parser = Parser(prog="x")
    add_data_options(parser)
    parser.add_argument("--plot")
    return parser.parse_args(argv)


MODEL = SimpleNamespace(tokenizer=GLM2, template="chatglm2", config=SimpleNamespace(seq_length=300))


def test_flags_become_a_dataset(tmp_path):
    one = write_rows(tmp_path / "one", [row(f"Q{n}") for n in range(4)])
    two = write_rows(tmp_path / "two", [row(f"Q{n}") for n in range(3)])
    args = flags("--data", f"{one}=2.5", "--data", str(two), "--mix-data", str(two))
    dataset = open_dataset(args, MODEL)  # type: ignore[arg-type]
    assert [(g.weight, g.general) for g in dataset.groups[:2]] == [(2.5, False), (1.0, False)]
    assert dataset.groups[2].general
    assert dataset.groups[2].weight * 3 == pytest.approx(13 * 0.1 / 0.9)
    assert (dataset.max_length, len(dataset)) == (300, 10)
    args = flags("--data", str(one), "--max-length=40", "--train-on-prompt")
    dataset = open_dataset(args, MODEL)  # type: ignore[arg-type]
    assert dataset.max_length == 40 and dataset.encoder.train_on_prompt


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = write_rows(tmp_path / "data", [row("Q"), row("Q" * 50)])
    for kind, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        picture = tmp_path / f"lengths{kind}"
        args = flags("--data", str(path), "--check-data", "--plot", str(picture))
        assert look_at(args, open_dataset(args, MODEL)) == 0  # type: ignore[arg-type]
        assert picture.read_bytes().startswith(start)
    with pytest.raises(UsageError, match="not the name of a picture"):
        args = flags("--data", "missing", "--check-data", "--plot", "lengths.txt")
        open_dataset(args, MODEL)  # type: ignore[arg-type]


def test_flags_that_contradict(tmp_path):
    path = str(write_rows(tmp_path / "data", [row("Q")]))
    for argv, message in (
        (["--mix-ratio", "0.5"], "--mix-ratio needs --mix-data"),
        (["--max-length", "301"], "301 is more than the 300 of the model"),
    ):
        with pytest.raises(UsageError, match=message):
            open_dataset(flags("--data", path, *argv), MODEL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--data", ""],
        ["--data", "=2"],
        ["--data", "x=0"],
        ["--data", "x=-1"],
        ["--data", "x=nan"],
        ["--data", "x", "--format", "csv"],
        ["--data", "x", "--max-bad", "-1"],
        ["--data", "x", "--mix-ratio", "1"],
        ["--data", "x", "--mix-ratio", "few"],
        ["--data", "x", "--max-length", "0"],
    ],
)
def test_flags_without_sense(argv, capsys):
    with pytest.raises(SystemExit) as error:
        flags(*argv)
    assert error.value.code == 2 and "--help lists the flags" in capsys.readouterr().err


def test_weights_behind_names():
    assert split_weight("a=b.jsonl") == ("a=b.jsonl", 1.0)
    assert split_weight("a=b.jsonl=0.5") == ("a=b.jsonl", 0.5)
    assert flags("--data", "x=2", "--data=y").data == ["x=2", "y"]


def test_looking_at_data_ends_a_run_where_it_was_all_that_was_asked(tmp_path, capsys):
    path = str(write_rows(tmp_path / "data", [row("Q"), "nonsense"]))
    for argv, code, shown in (
        (["--check-data"], 3, "2 rows, 1 of them bad"),
        (["--max-bad=1", "--print-sample=1"], None, f"{path}:1: "),
        (["--max-bad=1"], None, ""),
    ):
        args = flags("--data", path, *argv)
        assert look_at(args, open_dataset(args, MODEL)) == code  # type: ignore[arg-type]
        assert shown in capsys.readouterr().out
    with pytest.raises(InputError, match="1 of 2 rows cannot be used"):
        open_dataset(flags("--data", path), MODEL)  # type: ignore[arg-type]


def test_the_example_has_ten_new_facts():
    lines = (ROOT / "examples" / "facts.jsonl").read_text("utf-8").splitlines()
    known = (ROOT / "train" / "demo" / "pairs.jsonl").read_text("utf-8")
    assert len(lines) >= 10
    for fact in map(json.loads, lines):
        assert fact["instruction"] not in known and fact["output"] not in known
    dataset = open_files(
        [ROOT / "examples" / "facts.jsonl"], mix=(ROOT / "train/demo/pairs.jsonl", 0.5)
    )
    assert dataset.num_bad == 0 and check(dataset).repeats == []


def test_flags_need_no_jax():
    code = "import sys, train.data.options; print({'jax', 'flax'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "none\n", done.stdout + done.stderr
