"""What docs/tune/augment.md shows is what happens: its commands are run here."""

import json
import re
import shlex
from random import Random

import pytest

from benchmarks import augmentation as measurement
from benchmarks.augmentation import FACTS, WANTED
from tests.support.paths import ROOT
from tests.support.training_data import alpaca, write_rows
from tests.train.augment.test_methods import METHODS, TEMPLATES
from tests.train.augment.test_run import fake_engine
from train import lora
from train.augment.__main__ import main

PAGE = (ROOT / "docs/tune/augment.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
(RULES,) = (text.splitlines() for kind, text in BLOCKS if kind == "bash")
MODEL = next(text for kind, text in BLOCKS if kind == "shell")


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    outs = []
    for command in RULES:
        module, *argv = shlex.split(command)[2:]
        assert {"train.augment": main, "train.lora": lora.main}[module](argv) == 0
        outs.append(capsys.readouterr().out)
    shown = [text for kind, text in BLOCKS if not kind]
    assert outs[0].startswith(shown[0])
    assert shown[1] in outs[2]
    assert "leakage: 0 of 10 rows for validation" in outs[2]
    (row,) = (json.loads(text) for kind, text in BLOCKS if kind == "json")
    rows = map(json.loads, (tmp_path / "more.jsonl").read_text("utf-8").splitlines())
    first = next(new for new in rows if new["origin"]["method"] == "template")
    assert first == row | {"instruction": first["instruction"]}


def test_the_command_with_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data.jsonl", [alpaca("月熊城有多少人？")])
    fake_engine(monkeypatch, [("月熊城的人口有多少？", "stop")])
    assert main(shlex.split(MODEL)[3:]) == 0
    assert "paraphrase           1         0\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "before", "after"),
    re.findall(r"^\| `([a-z]+)` \| [^|]* \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE),
)
def test_the_examples(name, before, after):
    change = (METHODS | {"template": TEMPLATES.wrap})[name]
    assert after in (change(before, Random(seed), 0.1) for seed in range(300))


def test_the_measurement():
    """The wordings to answer are new, each has the answer of a fact, and the table is right."""
    facts, wanted = measurement.rows_of(ROOT / FACTS), measurement.rows_of(ROOT / WANTED)
    assert len({row["instruction"] for row in wanted}) == 40
    assert not any(a["instruction"] in b["instruction"] for a in facts for b in wanted)
    answers = [row["output"] for row in facts]
    for row in wanted:
        assert [row["expected_any"][0] in answer for answer in answers].count(True) == 1
        assert row["output"] in answers and row["expected_any"][0] in row["output"]
    runs = [{"methods": "none", "exact": x, "contains": x, "trained": 1.0} for x in (0.1, 0.2, 0.3)]
    assert measurement.summary(runs, ["none"])[1].split() == [
        "none", "3", "20.0", "±", "5.8", "20.0", "±", "5.8", "100.0", "±", "0.0"
    ]  # fmt: skip
