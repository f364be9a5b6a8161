"""`python -m infer.evaluate --task generation`: the figures, and files of answers."""

import json
import random
import resource
import sys
import tracemalloc

import pytest

from glm2_jax.errors import InputError, UsageError
from infer.evaluate import generation, metrics
from infer.evaluate.__main__ import main, parser
from tests.support.engine_toy import toy_engine, warm_engine

pytest.importorskip("jieba")
pytest.importorskip("nltk")
pytest.importorskip("rouge_chinese")
pytest.importorskip("sacrebleu")

PREDICTION = "这是一款简约的牛仔外套,破洞设计,展现出时尚气息。"
LABEL = "简约而不简单的牛仔外套,白色的衣身十分百搭。"


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine(), max_length=128)


@pytest.fixture
def toy(engine, monkeypatch):
    """The toy engine in place of what the flags name."""
    monkeypatch.setattr(generation, "open_engine", lambda args, **contents: engine)
    return engine


@pytest.fixture
def rows(tmp_path):
    """A file of three questions."""
    path = tmp_path / "rows.jsonl"
    values = [
        {"instruction": "你好", "output": "你好，世界。"},
        {"content": "今天", "summary": "天气很好。", "history": [["你好", "你好！"]]},
        {"instruction": "What is the capital", "input": "of France?", "output": "Paris."},
    ]
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    return path


def figures(capsys, *args: str) -> dict:
    assert main(["--task", "generation", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_official_figures_of_a_pair():
    """Source: a run of the official script's functions (chatglm2-6b, ptuning/main.py)."""
    assert metrics.pair_scores(PREDICTION, LABEL) == {
        "rouge-1": 46.1538,
        "rouge-2": 23.0769,
        "rouge-l": 42.8571,
        "bleu-4": 21.4941,
    }


def test_the_figures_are_means_over_pairs():
    found = metrics.score([PREDICTION, LABEL, " "], [LABEL, LABEL, LABEL])
    assert found["rouge-1"] == pytest.approx((46.1538 + 100) / 3, abs=1e-4)
    assert found["bleu-4"] == pytest.approx((21.4941 + 100) / 3, abs=1e-4)
    assert found["rows"] == 3 and found["empty_predictions"] == 1


def test_bleu_by_hand():
    # Characters: 4 of 5, 3 of 4, 2 of 3, 1 of 2; as long as the reference.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    found = metrics.pair_scores("甲乙丙丁戊", "甲乙丙丁己")
    assert found["bleu-4"] == pytest.approx(expected, abs=1e-4)


def test_bleu_is_smoothed_by_method_3():
    # 2 of 4 characters, 1 of 3 pairs; nothing of 2 and of 1: 1 / (2 x 2) and 1 / (4 x 1).
    expected = 100 * (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    found = metrics.pair_scores("甲乙丙丁", "甲乙戊己")
    assert found["bleu-4"] == pytest.approx(expected, abs=1e-4)


def test_rouge_by_hand():
    # 2 of 3 and 2 of 4 words are in both, 1 of 2 and 1 of 3 pairs of them.
    found = metrics.pair_scores("猫 狗 鸟", "猫 狗 鱼 马")
    assert found["rouge-1"] == pytest.approx(
        100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4), abs=0.01
    )
    assert found["rouge-2"] == pytest.approx(
        100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3), abs=0.01
    )


def test_rouge_l_is_that_of_the_package():
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


def test_the_longest_common_subsequence_by_hand():
    for first, second, length in (
        ("", "", 0),
        ("abc", "", 0),
        ("", "abc", 0),
        ("abcbdab", "bdcaba", 4),
        ("aaa", "aa", 2),
        ("abc", "xyz", 0),
        ("x" * 200 + "y", "y" + "x" * 130, 130),
    ):
        assert metrics.common_length(first, second) == length


def test_a_long_pair_takes_little_memory():
    rng = random.Random(1)
    words = [chr(0x4E00 + n) for n in range(60)]
    first, second = (rng.choices(words, k=20_000) for _ in range(2))
    tracemalloc.start()
    try:
        assert 0 < metrics.common_length(first, second) < 20_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("prediction", ["", "\n", "。", "a", "The same.", "甲" * 3000])
def test_any_prediction_has_figures(prediction):
    found = metrics.score([prediction], [LABEL])
    assert all(
        0 <= found[name] <= 100 for name in (*metrics.PER_PAIR, "meteor", "sacrebleu", "chrf")
    )


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


@pytest.mark.parametrize("name", ["jieba", "rouge_chinese", "nltk", "sacrebleu"])
def test_a_package_that_is_missing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"glm2-jax\[evaluate\]") as error:
        main(["--task", "generation"])
    assert error.value.exit_code == 2 and name in error.value.what


def test_answers_are_written_and_scored(toy, rows, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    flags = ("--predictions", str(path), "--max-new-tokens", "5", "--batch-size", "1")
    found = figures(capsys, "--data", str(rows), *flags)
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["labels"] for row in written] == ["你好，世界。", "天气很好。", "Paris."]
    assert written[2]["prompt"] == "What is the capital\nof France?"
    asked = [("你好", []), ("今天", [("你好", "你好！")]), ("What is the capital\nof France?", [])]
    for row, (question, history) in zip(written, asked, strict=True):
        answer, _ = toy.chat(question, history, temperature=0, max_new_tokens=5)
        assert row["predict"] == answer
    again = figures(capsys, "--predictions", str(path))
    assert {key: again[key] for key in metrics.PER_PAIR} == {
        key: found[key] for key in metrics.PER_PAIR
    }
    assert found["rows"] == again["rows"] == 3


def test_answers_are_not_overwritten(toy, rows, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_text("mine", encoding="utf-8")
    flags = ["--task", "generation", "--data", str(rows), "--predictions", str(path)]
    with pytest.raises(UsageError, match="there already"):
        main(flags)
    assert path.read_text(encoding="utf-8") == "mine"
    figures(capsys, *flags[2:], "--overwrite", "--max-new-tokens", "2", "--batch-size", "1")
    assert path.read_text(encoding="utf-8").count("\n") == 3
    with pytest.raises(UsageError, match="are both"):
        main([*flags[:4], "--predictions", str(rows), "--overwrite"])
    for place in (tmp_path, tmp_path / "none" / "answers.jsonl"):
        with pytest.raises(InputError, match="cannot write"):
            main([*flags[:4], "--predictions", str(place)])


def test_what_is_answered_before_an_interrupt_is_kept(toy, rows, tmp_path, capsys, monkeypatch):
    path, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    partial.write_text("of an earlier run", encoding="utf-8")
    complete, calls = toy.complete, []

    def until_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            assert not path.exists() and partial.read_text(encoding="utf-8").count("\n") == 2
            raise KeyboardInterrupt
        return complete(*args, **kwargs)

    monkeypatch.setattr(toy, "complete", until_the_third)
    flags = ["--data", str(rows), "--predictions", str(path), "--batch-size", "1"]
    flags += ["--max-new-tokens", "2"]
    with pytest.raises(UsageError, match="partial is there already"):
        main(["--task", "generation", *flags])
    assert partial.read_text(encoding="utf-8") == "of an earlier run"
    flags.append("--overwrite")
    with pytest.raises(KeyboardInterrupt):
        main(["--task", "generation", *flags])
    assert f"not complete: 2 answers are in {partial}" in capsys.readouterr().err
    assert not path.exists()
    assert figures(capsys, "--predictions", str(partial))["rows"] == 2
    monkeypatch.undo()
    monkeypatch.setattr(generation, "open_engine", lambda args, **contents: toy)
    figures(capsys, *flags)
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["labels"] for row in written] == ["你好，世界。", "天气很好。", "Paris."]
    assert sorted(tmp_path.iterdir()) == [path, rows]


def test_an_interrupt_before_the_first_answer_leaves_no_file(
    toy, rows, tmp_path, capsys, monkeypatch
):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "complete", interrupted)
    path = tmp_path / "answers.jsonl"
    path.write_text("mine", encoding="utf-8")
    flags = ["--data", str(rows), "--predictions", str(path), "--overwrite"]
    with pytest.raises(KeyboardInterrupt):
        main(["--task", "generation", *flags])
    assert sorted(tmp_path.iterdir()) == [path, rows] and path.read_text() == "mine"


def test_a_text_is_no_question_with_its_answer(toy, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "你好"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="no row can be used\n1 is bad"):
        main(["--task", "generation", "--data", str(path)])
    told = capsys.readouterr().err
    assert "no known format, its keys are 'text': there are alpaca: instruction, output" in told


def test_rows_of_every_format_and_marked_answers(toy, tmp_path, capsys):
    path, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    turns = [("human", "你好"), ("gpt", "你好！"), ("human", "今天"), ("gpt", "天气很好。")]
    values = [
        {"conversations": [{"from": role, "value": text} for role, text in turns]},
        {
            "prompt": "今天",
            "response": "天气很好。",
            "history": [["你好", "你好！"]],
            "system": None,
        },
        {"prompt": "今天", "response": "不好", "weight": 0},
    ]
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    flags = ("--data", str(path), "--predictions", str(answers), "--max-new-tokens", "2")
    assert main(["--task", "generation", *flags, "--batch-size", "1"]) == 0
    written = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert written[0] == written[1] and written[0]["labels"] == "天气很好。" and len(written) == 2
    assert "marked as not to be learned: 1" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_a_bad_row(toy, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    values = [{"instruction": "世" * 200, "output": "a"}, {"instruction": "你好", "output": "世界"}]
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    with pytest.raises(InputError, match="1 of 2 rows"):
        main(["--task", "generation", "--data", str(path)])
    assert f"{path}:1: the prompt is too long: " in capsys.readouterr().err
    flags = ("--max-new-tokens", "2", "--batch-size", "1", "--max-bad", "1")
    found = figures(capsys, "--data", str(path), *flags)
    assert found["rows"] == 1 and found["bad_rows"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{}", "no prediction"),
        ('{"labels": "a"}', "no prediction"),
        ('{"labels": "a", "predict": 1}', "no prediction"),
        ('{"labels": " ", "predict": "a"}', "labels is empty"),
        ("[]", "no prediction"),
    ],
)
def test_bad_predictions(tmp_path, capsys, line, reason):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"labels": "a", "predict": ""}\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match="1 of 2"):
        main(["--task", "generation", "--predictions", str(path)])
    assert f"{path}:2: {reason}" in capsys.readouterr().err


def test_predictions_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="to score"):
        main(["--task", "generation", "--predictions", str(tmp_path / "none.jsonl")])


def test_a_bad_temperature_is_told_before_anything_is_read(toy, rows):
    with pytest.raises(UsageError, match="temperature"):
        main(["--task", "generation", "--data", str(rows), "--temperature", "-1"])


def test_a_full_disk_keeps_the_answers_that_are_whole(tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    args = parser().parse_args(["--task", "generation", "--predictions", str(path)])
    limits, rows = resource.getrlimit(resource.RLIMIT_FSIZE), [{"predict": "x" * 50}] * 2
    try:
        with pytest.raises(InputError, match=r"answers.jsonl.partial\nFile too large"):
            with generation.predictions_file(args) as write:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # one, and a part
                for number, row in enumerate(rows):
                    write(number, row)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "not complete: 1 answers are in" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl.partial").read_text() == json.dumps(rows[0]) + "\n"
