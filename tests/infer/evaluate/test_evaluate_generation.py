"""`python -m infer.evaluate --task generation`: the figures, and files of answers."""

import json
import os
import random
import resource
import sys
import tracemalloc

import pytest

import infer.evaluate
from glm2_jax.errors import InputError, UsageError
from glm2_jax.processes import join
from infer.evaluate.__main__ import main
from infer.evaluate.generation import check_output, predictions_file
from tests.support.training_data import write_rows

metrics = pytest.importorskip("infer.evaluate.metrics")  # needs the extra `evaluate`

PREDICTION = "这是一款简约的牛仔外套,破洞设计,展现出时尚气息。"
LABEL = "简约而不简单的牛仔外套,白色的衣身十分百搭。"
LABELS = ["你好，世界。", "天气很好。", "Paris."]


@pytest.fixture
def rows(tmp_path):
    """A file of three questions, whose labels are LABELS."""
    values = [
        {"instruction": "你好", "output": "你好，世界。"},
        {"content": "今天", "summary": "天气很好。", "history": [["你好", "你好！"]]},
        {"instruction": "What is the capital", "input": "of France?", "output": "Paris."},
    ]
    return write_rows(tmp_path / "rows.jsonl", values)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generate(*args) -> int:
    return main(["--task", "generation", *map(str, args)])


def test_the_official_figures_of_a_pair():
    """Source: a run of the official script's functions (chatglm2-6b, ptuning/main.py)."""
    official = {"rouge-1": 46.1538, "rouge-2": 23.0769, "rouge-l": 42.8571, "bleu-4": 21.4941}
    assert metrics.pair_scores(PREDICTION, LABEL) == official
    found = metrics.score([PREDICTION, LABEL, " "], [LABEL, LABEL, LABEL])
    assert found["rouge-1"] == pytest.approx((46.1538 + 100) / 3, abs=1e-4)
    assert found["bleu-4"] == pytest.approx((21.4941 + 100) / 3, abs=1e-4)
    assert found["rows"] == 3 and found["empty_predictions"] == 1
    # Characters by hand: 2 of 4, 1 of 3 pairs; of triples and quadruples none, smoothed by
    # method 3: 1 / (2 x 2) and 1 / (4 x 1).
    expected = 100 * (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    found = metrics.pair_scores("甲乙丙丁", "甲乙戊己")
    assert found["bleu-4"] == pytest.approx(expected, abs=1e-4)
    for prediction in ("", "。", "甲" * 3000):  # any prediction has figures
        found = metrics.score([prediction], [LABEL])
        names = (*metrics.PER_PAIR, "meteor", "sacrebleu", "chrf")
        assert all(0 <= found[name] <= 100 for name in names)


def test_rouge_is_that_of_the_package_with_linear_memory():
    rng = random.Random(0)
    for size in (1, 7, 40, 150):
        for _ in range(8):
            texts = ["".join(rng.choices("甲乙 丙丁。！？”a\n…", k=size)) + "戊" for _ in "12"]
            cut = [" ".join(metrics.jieba.cut(text)) for text in texts]
            expected = metrics.Rouge().get_scores(*cut)[0]
            found = metrics.pair_scores(*texts)
            for name in metrics.PER_PAIR[:3]:
                assert found[name] == round(100 * expected[name]["f"], 4), texts
    for first, second, length in (("", "abc", 0), ("abcbdab", "bdcaba", 4), ("aaa", "aa", 2)):
        assert metrics.common_length(first, second) == length
    words = [chr(0x4E00 + n) for n in range(60)]
    first, second = (rng.choices(words, k=20_000) for _ in range(2))
    tracemalloc.start()
    try:
        assert 0 < metrics.common_length(first, second) < 20_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_meteor_by_hand_and_sacrebleu_by_language(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    found = metrics.score(["The cats sat"], ["The cat sat quietly"])
    # Three words match, "cats" by its stem, in one chunk: P 1, R 3/4.
    mean = 1 * 0.75 / (0.9 * 1 + 0.1 * 0.75)
    assert found["meteor"] == pytest.approx(100 * mean * (1 - 0.5 * (1 / 3) ** 3), abs=1e-6)
    assert "no WordNet" in found["meteor_stages"]
    chinese = metrics.score(["今天天气好"], ["今天天气很好"])
    english = metrics.score(["It is a fine day today"], ["It is a fine day today"])
    assert "tok:zh" in chinese["sacrebleu_signature"] and chinese["sacrebleu"] > 30
    assert "tok:13a" in english["sacrebleu_signature"]
    assert english["sacrebleu"] == pytest.approx(100) and english["chrf"] == pytest.approx(100)


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.delitem(sys.modules, "infer.evaluate.metrics")
    monkeypatch.delattr(infer.evaluate, "metrics")
    with pytest.raises(UsageError, match=r"(?s)sacrebleu.*pip install jieba jsonschema") as error:
        generate()
    assert error.value.exit_code == 2


def test_answers_are_written_and_scored(toy, rows, tmp_path, figures):
    path = tmp_path / "answers.jsonl"
    task, flags = ("--task", "generation"), ("--max-new-tokens", "5", "--batch-size", "1")
    with pytest.raises(UsageError, match="temperature"):
        generate("--data", rows, "--temperature", "-1")
    found = figures(*task, "--data", rows, "--predictions", path, *flags)
    written = read_lines(path)
    assert [row["labels"] for row in written] == LABELS
    assert written[2]["prompt"] == "What is the capital\nof France?"
    asked = [("你好", []), ("今天", [("你好", "你好！")]), ("What is the capital\nof France?", [])]
    for row, (question, history) in zip(written, asked, strict=True):
        answer, _ = toy.chat(question, history, temperature=0, max_new_tokens=5)
        assert row["predict"] == answer
    again = figures(*task, "--predictions", path)
    assert all(again[key] == found[key] for key in (*metrics.PER_PAIR, "rows"))


def test_places_for_predictions(tmp_path, monkeypatch):
    path, data = tmp_path / "answers.jsonl", tmp_path / "rows.jsonl"
    for name in (path, data, tmp_path / "other.partial"):
        name.write_text("mine")
    with pytest.raises(UsageError, match="answers.jsonl exists already"):
        check_output(str(path), str(data), False)
    with pytest.raises(UsageError, match="other.partial exists already"):
        check_output(str(tmp_path / "other"), str(data), False)
    with pytest.raises(UsageError, match="are both"):
        check_output(str(data), str(data), True)
    check_output(str(path), str(data), True)
    monkeypatch.setattr(join, "is_first", lambda: False)  # another of several processes
    check_output(str(path), str(data), False)
    with predictions_file(str(path)) as write:
        write(0, {"predict": "x"})
    assert path.read_text() == "mine" and len(os.listdir(tmp_path)) == 3


def test_what_is_answered_before_an_interrupt_is_kept(toy, rows, tmp_path, capsys, monkeypatch):
    path, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    complete, calls = toy.complete, []

    def until_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            assert not path.exists() and partial.read_text(encoding="utf-8").count("\n") == 2
            raise KeyboardInterrupt
        return complete(*args, **kwargs)

    flags = ["--data", rows, "--predictions", path, "--batch-size", "1", "--max-new-tokens", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(toy, "complete", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            generate(*flags)
    assert f"incomplete: 2 answers are in {partial}" in capsys.readouterr().err
    assert not path.exists()
    assert generate("--predictions", partial) == 0
    path.write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt), predictions_file(str(path)):
        raise KeyboardInterrupt  # before the first answer
    assert path.read_text() == "of an earlier run" and not partial.exists()
    assert generate(*flags, "--overwrite") == 0
    assert [row["labels"] for row in read_lines(path)] == LABELS
    assert sorted(tmp_path.iterdir()) == [path, rows]


def test_a_full_disk_keeps_the_answers_that_are_complete(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    limits, rows = resource.getrlimit(resource.RLIMIT_FSIZE), [{"predict": "x" * 50}] * 2
    try:
        with pytest.raises(InputError, match=r"answers.jsonl.partial\nFile too large"):
            with predictions_file(str(path)) as write:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # one, and a part
                for number, row in enumerate(rows):
                    write(number, row)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "incomplete: 1 answers are in" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl.partial").read_text() == json.dumps(rows[0]) + "\n"


def test_rows_of_every_format_marked_answers_and_bad_rows(toy, tmp_path, capsys):
    answers, path = tmp_path / "answers.jsonl", tmp_path / "rows.jsonl"
    turns = [("human", "你好"), ("gpt", "你好！"), ("human", "今天"), ("gpt", "天气很好。")]
    question = {"prompt": "今天", "history": [["你好", "你好！"]], "system": None}
    values = [
        {"text": "你好"},
        {"instruction": "世" * 400, "output": "a"},
        {"conversations": [{"from": role, "value": text} for role, text in turns]},
        question | {"response": "天气很好。"},
        {"prompt": "今天", "response": "不好", "weight": 0},
    ]
    write_rows(path, values)
    flags = ("--data", path, "--predictions", answers, "--max-new-tokens", "2", "--batch-size", "1")
    with pytest.raises(InputError, match="bad rows: 2 of 4"):
        generate(*flags, "--max-bad", "1")
    err = capsys.readouterr().err
    assert f"{path}:1: no known format, its keys are 'text': known: alpaca: instruction" in err
    assert f"{path}:2: The prompt is too long: " in err
    assert "marked as not to be learned: 1" in err
    assert generate(*flags, "--max-bad", "2") == 0
    assert "bad rows              2\nrows                  2\n" in capsys.readouterr().out
    written = read_lines(answers)
    assert written[0] == written[1] and written[0]["labels"] == "天气很好。" and len(written) == 2


def test_bad_predictions(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(InputError, match="nothing to score"):
        generate("--predictions", path)
    lines = ['{"labels": "a"}', '{"labels": "a", "predict": 1}', "[]"]
    lines += ['{"labels": " ", "predict": "a"}', '{"labels": "a", "predict": ""}']
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match="4 of 5"):
        generate("--predictions", path)
    err = capsys.readouterr().err
    assert all(f"{path}:{line}: no prediction" in err for line in (1, 2, 3, 4))
