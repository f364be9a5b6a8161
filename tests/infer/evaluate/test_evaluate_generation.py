"""`python -m infer.evaluate --task generation`: the figures, and files of answers."""

import json
import os
import random
import resource
import sys
import tracemalloc

import pytest

from glm2_jax.errors import InputError, UsageError
from glm2_jax.processes import join
from infer.evaluate import metrics
from infer.evaluate.__main__ import main
from infer.evaluate.predictions import check_output, predictions_file

pytest.importorskip("jieba")
pytest.importorskip("nltk")
pytest.importorskip("rouge_chinese")
pytest.importorskip("sacrebleu")

PREDICTION = "这是一款简约的牛仔外套,破洞设计,展现出时尚气息。"
LABEL = "简约而不简单的牛仔外套,白色的衣身十分百搭。"
LABELS = ["你好，世界。", "天气很好。", "Paris."]


@pytest.fixture
def rows(tmp_path):
    """A file of three questions, whose labels are LABELS."""
    path = tmp_path / "rows.jsonl"
    values = [
        {"instruction": "你好", "output": "你好，世界。"},
        {"content": "今天", "summary": "天气很好。", "history": [["你好", "你好！"]]},
        {"instruction": "What is the capital", "input": "of France?", "output": "Paris."},
    ]
    return write_rows(path, *values)


def write_rows(path, *values):
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    return path


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


def test_bleu_by_hand():
    # Characters: 4 of 5, 3 of 4, 2 of 3, 1 of 2; as long as the reference.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    found = metrics.pair_scores("甲乙丙丁戊", "甲乙丙丁己")
    assert found["bleu-4"] == pytest.approx(expected, abs=1e-4)
    # 2 of 4 characters, 1 of 3 pairs; of triples and quadruples none, smoothed by method 3:
    # 1 / (2 x 2) and 1 / (4 x 1).
    expected = 100 * (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    found = metrics.pair_scores("甲乙丙丁", "甲乙戊己")
    assert found["bleu-4"] == pytest.approx(expected, abs=1e-4)


def test_rouge_is_that_of_the_package():
    rng = random.Random(0)
    from rouge_chinese import Rouge

    for size in (1, 2, 7, 40, 150):
        for _ in range(8):
            texts = ["".join(rng.choices("甲乙 丙丁。！？”a\n…", k=size)) + "戊" for _ in "12"]
            cut = [" ".join(metrics._import("jieba").cut(text)) for text in texts]
            expected = Rouge().get_scores(*cut)[0]
            found = metrics.pair_scores(*texts)
            for name in metrics.PER_PAIR[:3]:
                assert found[name] == round(100 * expected[name]["f"], 4), texts


def test_the_longest_common_subsequence():
    for first, second, length in (
        ("", "abc", 0),
        ("abc", "", 0),
        ("abcbdab", "bdcaba", 4),
        ("aaa", "aa", 2),
        ("x" * 200 + "y", "y" + "x" * 130, 130),
    ):
        assert metrics.common_length(first, second) == length
    rng = random.Random(1)
    words = [chr(0x4E00 + n) for n in range(60)]
    first, second = (rng.choices(words, k=20_000) for _ in range(2))
    tracemalloc.start()
    try:
        assert 0 < metrics.common_length(first, second) < 20_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("prediction", ["", "\n", "。", "The same.", "甲" * 3000])
def test_any_prediction_has_figures(prediction):
    found = metrics.score([prediction], [LABEL])
    names = (*metrics.PER_PAIR, "meteor", "sacrebleu", "chrf")
    assert all(0 <= found[name] <= 100 for name in names)


def test_meteor_by_hand_and_without_wordnet(monkeypatch):
    monkeypatch.setattr("nltk.data.path", [])
    found = metrics.score(["The cats sat"], ["The cat sat quietly"])
    # Three words match, "cats" by its stem, in one chunk: P 1, R 3/4.
    mean = 1 * 0.75 / (0.9 * 1 + 0.1 * 0.75)
    assert found["meteor"] == pytest.approx(100 * mean * (1 - 0.5 * (1 / 3) ** 3), abs=1e-6)
    assert "no WordNet" in found["meteor_stages"]


def test_sacrebleu_cuts_chinese_into_characters():
    chinese = metrics.score(["今天天气好"], ["今天天气很好"])
    english = metrics.score(["It is a fine day today"], ["It is a fine day today"])
    assert "tok:zh" in chinese["sacrebleu_signature"] and chinese["sacrebleu"] > 30
    assert "tok:13a" in english["sacrebleu_signature"]
    assert english["sacrebleu"] == pytest.approx(100) and english["chrf"] == pytest.approx(100)


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UsageError, match=r"(?s)sacrebleu.*glm2-jax\[evaluate\]") as error:
        generate()
    assert error.value.exit_code == 2


def test_answers_are_written_and_scored(toy, rows, tmp_path, figures):
    path = tmp_path / "answers.jsonl"
    task, flags = ("--task", "generation"), ("--max-new-tokens", "5", "--batch-size", "1")
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
    for place in (tmp_path, tmp_path / "none" / "answers.jsonl"):
        with pytest.raises(InputError, match="cannot write"):
            check_output(str(place), None, True)
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
    assert generate(*flags, "--overwrite") == 0
    assert [row["labels"] for row in read_lines(path)] == LABELS
    assert sorted(tmp_path.iterdir()) == [path, rows]


def test_an_interrupt_before_the_first_answer_leaves_the_old_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), predictions_file(str(path)):
        raise KeyboardInterrupt
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["answers.jsonl"]


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


def test_rows_of_every_format_and_marked_answers(toy, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    turns = [("human", "你好"), ("gpt", "你好！"), ("human", "今天"), ("gpt", "天气很好。")]
    question = {"prompt": "今天", "history": [["你好", "你好！"]], "system": None}
    values = [
        {"conversations": [{"from": role, "value": text} for role, text in turns]},
        question | {"response": "天气很好。"},
        {"prompt": "今天", "response": "不好", "weight": 0},
    ]
    path = write_rows(tmp_path / "rows.jsonl", *values)
    flags = ("--data", path, "--predictions", answers, "--max-new-tokens", "2")
    assert generate(*flags, "--batch-size", "1") == 0
    written = read_lines(answers)
    assert written[0] == written[1] and written[0]["labels"] == "天气很好。" and len(written) == 2
    assert "marked as not to be learned: 1" in capsys.readouterr().err


def test_bad_rows(toy, tmp_path, capsys):
    values = [{"instruction": "世" * 400, "output": "a"}, {"instruction": "你", "output": "世"}]
    path = write_rows(tmp_path / "rows.jsonl", {"text": "你好"}, *values)
    with pytest.raises(InputError, match="2 of 3 rows"):
        generate("--data", path, "--max-bad", "1")
    err = capsys.readouterr().err
    assert f"{path}:1: no known format, its keys are 'text': known: alpaca: instruction" in err
    assert f"{path}:2: the prompt is too long: " in err
    assert generate("--data", path, "--max-bad", "2", "--max-new-tokens", "2") == 0
    assert "bad rows              2\nrows                  1\n" in capsys.readouterr().out


def test_bad_predictions(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(InputError, match="nothing to score"):
        generate("--predictions", path)
    lines = ["{}", '{"labels": "a"}', '{"labels": "a", "predict": 1}', "[]"]
    lines += ['{"labels": " ", "predict": "a"}', '{"labels": "a", "predict": ""}']
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match="5 of 6"):
        generate("--predictions", path)
    err = capsys.readouterr().err
    assert all(f"{path}:{line}: no prediction" in err for line in (1, 2, 3, 4))
    assert f"{path}:5: labels is empty" in err


def test_a_bad_temperature_is_reported_before_anything_is_read(toy, rows):
    with pytest.raises(UsageError, match="temperature"):
        generate("--data", rows, "--temperature", "-1")
