"""`python -m train.augment`: files in, files out, reports, and what it refuses."""

import importlib.util
import io
import json
import os
from types import SimpleNamespace

import pytest

from glm2_jax import InputError, UsageError
from tests.support.training_data import alpaca, open_files, role_messages, write_rows
from train.augment import model
from train.augment import run as running
from train.augment.__main__ import main

ROWS = [alpaca(f"山上有什么动物和植物{n}？", f"有{n}。") for n in "甲乙丙"]
RULES = "typo,homophone,width,script,template,synonym,swap,delete"


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(write_rows(tmp_path / "data.jsonl", ROWS))


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_new_rows_follow_the_old_ones(data, capsys):
    flags = ["--data", data, "--methods", RULES, "--per-row", "4"]
    assert main([*flags, "--output", "a.jsonl"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("rows: 3, new: 12\n")
    rows = lines("a.jsonl")
    assert len(rows) == 15 and rows[0] == ROWS[0] | {
        "origin": {"source": f"{data}:1", "method": ""}
    }
    assert [row["origin"]["source"] for row in rows[3:]] == [
        f"{data}:{n}" for n in (1, 2, 3) for _ in range(4)
    ]
    assert {row["origin"]["method"] for row in rows[3:]} <= set(RULES.split(","))
    answers = {row["origin"]["source"]: row["output"] for row in rows[:3]}
    assert all(row["output"] == answers[row["origin"]["source"]] for row in rows)
    assert len({row["instruction"] for row in rows}) == 15
    dataset = open_files(["a.jsonl"])  # training takes it, and does not wonder at the key
    assert len(dataset) == 15 and dataset.notes() == []
    assert main([*flags, "--output", "b.jsonl"]) == 0
    assert lines("b.jsonl") == rows
    assert main([*flags, "--seed", "1", "--output", "b.jsonl", "--overwrite"]) == 0
    assert lines("b.jsonl") != rows


def test_numbers_do_not_run_into_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", [alpaca("3个5")])
    flags = [
        "--data",
        "a.jsonl",
        "--methods",
        "typo,delete",
        "--per-row",
        "9",
        "--output",
        "o.jsonl",
    ]
    assert main(flags) == 0
    assert [row["instruction"] for row in lines("o.jsonl")] == ["3个5", "3个个5"]


def test_reports(data, capsys, monkeypatch):
    flags = ["--data", data, "--methods", "typo,script"]
    assert main([*flags, "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"{data}:1: {ROWS[0]['instruction']}\n  typo: 山")
    assert json.loads(out) == {
        "rows": 3, "new": 6,
        "methods": {"typo": {"kept": 3, "rejected": {}}, "script": {"kept": 3, "rejected": {}}},
    }  # fmt: skip
    text = "\n".join(json.dumps(row) for row in ROWS).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert main(["--data", "-", "--output", "-"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 9 and "\nrows: 3, new: 6\n" in err
    assert json.loads(out.splitlines()[0])["origin"]["source"] == "-:1"


def test_a_method_that_finds_nothing_leaves_the_row_to_the_next(tmp_path, capsys):
    path = str(write_rows(tmp_path / "en.jsonl", [alpaca("Where is it?")]))
    assert main(["--data", path, "--methods", "script,template", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "script       0         1  nothing new 1\ntemplate     2         0\n" in out
    with pytest.raises(InputError, match="no new row: 2 were rejected") as error:
        main(["--data", path, "--methods", "script", "--output", str(tmp_path / "o.jsonl")])
    assert "script     0         2  nothing new 2" in error.value.why
    assert not (tmp_path / "o.jsonl").exists()


def fake_engine(monkeypatch, answers):
    """An engine that gives these answers, one after another, and repeats the last."""
    asked = []

    def completions(engine, prompts, sampling, batch, clean):
        asked.extend(prompts)
        for number, _ in enumerate(prompts):
            text, reason = answers.pop(0) if len(answers) > 1 else answers[0]
            yield number, SimpleNamespace(text=text, finish_reason=reason)

    engine = SimpleNamespace(
        build_prompt=lambda text: [*text], max_length=300, tokenizer=None, template="chatglm2",
        written=SimpleNamespace(chat=True),
    )  # fmt: skip
    monkeypatch.setattr(model, "completions", completions)
    monkeypatch.setattr("infer.startup.open_engine", lambda *args, **options: engine)
    return asked


def test_paraphrases_are_kept_where_the_checker_accepts(data, capsys, monkeypatch):
    answers = [
        ("“甲：山里有哪些动物和植物？”", "stop"), ("乙：山里有些什么动物，什么植物", "length"),
        ("What lives there?", "stop"), ("", "stop"),
    ]  # fmt: skip
    asked = fake_engine(monkeypatch, answers)
    flags = ["--data", data, "--methods", "paraphrase,typo", "--output", "o.jsonl"]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    assert "paraphrase     1         2  cut off 1, other language 1" in out
    assert "using the bundled demo model" in err
    assert "".join(asked[0]).endswith(f"\n\n{ROWS[0]['instruction']}")
    rows = lines("o.jsonl")
    assert [row["origin"]["method"] for row in rows[3:]] == ["typo", "paraphrase", "typo", "typo"]
    assert rows[4] == ROWS[0] | {
        "instruction": "甲：山里有哪些动物和植物？",
        "origin": {"source": f"{data}:1", "method": "paraphrase"},
    }


def test_a_translation_goes_there_and_back(data, capsys, monkeypatch):
    there, back = ("What is on the hill?", "stop"), ("山有什么", "stop")
    asked = fake_engine(monkeypatch, [there] * 3 + [back])
    with pytest.raises(InputError) as error:
        main(["--data", data, "--methods", "back-translation", "--per-row", "1",
              "--similarity", "0.9", "1", "--output", "o.jsonl"])  # fmt: skip
    assert "back-translation     0         3  too different 3" in error.value.why
    assert len(asked) == 6 and "".join(asked[3]).startswith("Translate")
    fake_engine(monkeypatch, [("", "stop")])
    with pytest.raises(InputError, match="no new row: 6 were rejected") as error:
        main(["--data", data, "--methods", "back-translation", "--output", "o.jsonl"])
    assert "empty 6" in error.value.why and error.value.exit_code == 3


def test_what_is_refused(data, tmp_path, monkeypatch, capsys):
    flags = ["--data", data, "--output", "o.jsonl"]
    for argv, kind, message in (
        (["--data", data], UsageError, "No --output was given"),
        (["--data", data, "--output", "../" + tmp_path.name + "/data.jsonl", "--overwrite"],
         UsageError, "--output and --data are both"),
        ([*flags, "--similarity", "0.9", "0.1"], UsageError, "must be LOW HIGH, got 0.9 0.1"),
        (["--data", "missing.jsonl", "--dry-run"], InputError, "cannot read missing.jsonl"),
        (["--data", data, "--output", "no/where.jsonl"], InputError, "folder not found"),
        ([*flags, "--templates", "missing"], InputError, "cannot read missing"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            main(argv)
    for argv, message in (
        (["--methods", "typo,spelling"], "unknown method 'spelling'; known: typo, "),
        (["--methods", ""], "unknown method ''"),
        (["--rate", "0.9"], "must be at most 0.5"),
        (["--per-row", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*flags, *argv])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert main(flags) == 0
    with pytest.raises(UsageError, match="o.jsonl exists already"):
        main(flags)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="opencc is not installed") as error:
        main([*flags, "--methods", "script", "--overwrite"])
    assert error.value.fix == "pip install jieba opencc pypinyin"


def test_bad_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "bad.jsonl", [ROWS[0], alpaca(""), '{"instruction": "cut'])
    flags = ["--data", "bad.jsonl", "--output", "o.jsonl"]
    with pytest.raises(InputError, match="bad rows: 2 of 3"):
        main(flags)
    err = capsys.readouterr().err
    assert "bad.jsonl:2: instruction is empty" in err and "bad.jsonl:3: not JSON" in err
    assert main([*flags, "--max-bad", "2"]) == 0 and len(lines("o.jsonl")) == 3
    write_rows(tmp_path / "other.jsonl", [role_messages(("user", "Q"), ("assistant", "A"))])
    with pytest.raises(InputError, match="several formats") as error:
        main(["--data", "bad.jsonl", "--data", "other.jsonl", "--max-bad", "2", "--dry-run"])
    assert "bad.jsonl:1 is alpaca, other.jsonl:1 is messages" in error.value.why
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "plain.txt").write_text("只有一篇文章。")
    (tmp_path / "none.json").write_text("[]")
    for name, message in (("empty.jsonl", "has no rows"), ("plain.txt", "no row can be used"),
                          ("none.json", "no row can be used")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            main(["--data", name, "--dry-run"])


def test_an_output_belongs_to_one_run(data, monkeypatch):
    """Another run is refused when it starts, and a file that appears meanwhile is not replaced."""
    flags = ["--data", data, "--output", "o.jsonl"]
    read = running._read

    def during(settings):
        with pytest.raises(InputError, match="Another process is writing"):
            running.run(settings)
        with open("o.jsonl", "w") as file:
            file.write("mine")
        return read(settings)

    monkeypatch.setattr(running, "_read", during)
    with pytest.raises(UsageError, match="o.jsonl exists already"):
        main(flags)
    monkeypatch.setattr(running, "_read", lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*flags, "--overwrite"])
    assert sorted(os.listdir()) == ["data.jsonl", "o.jsonl"]
    with open("o.jsonl") as file:
        assert file.read() == "mine"
