"""`python -m infer.evaluate --task choice`: layouts, prompts, and which letter is taken."""

import json

import jax
import numpy as np
import pytest

from glm2_jax import forward
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.text.prompt import build_prompt
from infer.evaluate import choice, exams, generation
from infer.evaluate.__main__ import main
from infer.evaluate.rows import BadRows
from tests.support.engine_toy import family_engine, toy_engine
from tests.support.toy import jit_forward

CEVAL_HEAD = "id,question,A,B,C,D,answer,explanation\n"
CEVAL_ROWS = '0,一加一等于几,1,2,3,4,B,\n1,"两行的\n问题",甲,乙,丙,丁,d,因为\n'


def write(folder, name: str, text: str):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def read(path, limit: int = 0) -> exams.Exam:
    bad = BadRows(limit)
    exam = exams.read_exam(path, bad)
    bad.check(len(exam.questions))
    return exam


@pytest.fixture
def asked(figures, tmp_path):
    """Returns the figures, and what was asked and answered."""

    def run(path, *args: str) -> tuple[dict, list[dict]]:
        file = tmp_path / "answers.out"
        flags = ("--predictions", file, "--overwrite")
        found = figures("--task", "choice", "--data", path, *flags, *args)
        return found, [json.loads(line) for line in file.read_text("utf-8").splitlines()]

    return run


def test_c_eval_and_the_official_jsonl(tmp_path):
    exam = read(write(tmp_path, "val/computer_network_val.csv", "\ufeff" + CEVAL_HEAD + CEVAL_ROWS))
    assert (exam.style, exam.subject) == (exams.C_EVAL, "computer_network")
    assert exam.head == "以下是中国关于计算机网络考试的单项选择题，请选出其中的正确答案。\n\n"
    (_, first), (_, second) = exam.questions
    assert exam.put(first) == "一加一等于几\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    assert exam.put(first, ask=False).endswith("\nD. 4")
    assert (first.answer, second.answer) == (1, 3)
    assert [where.rpartition(":")[2] for where, _ in exam.questions] == ["2", "3"]
    assert len(set(exams.SUBJECTS.values())) == 52

    row = {"inputs_pretokenized": "问题\nA. 1\n", "label": 2, "choices_pretokenized": []}
    exam = read(write(tmp_path, "val/x.jsonl", json.dumps(row)))
    assert exam.head + exam.put(exam.questions[0][1]) == "问题\nA. 1\n"
    assert exam.questions[0][1].answer == 2


@pytest.mark.parametrize(
    ("header", "row", "style"),
    [
        ("id,question,A,B,C,D,answer,explanation", '0,"1, 2?",1,2,3,4,B,why', exams.MMLU),
        ("question,A,B,C,D,E,answer", '"1, 2?",1,2,3,4,,B', exams.MMLU),  # a fifth that is empty
        (None, '"1, 2?",1,2,3,4,B', exams.MMLU),
        ("id,question,A,B,C,D,answer", "0,一加一等于几,1,2,3,4,B", exams.C_EVAL),
        ("题目,A,B,C,D,答案", "一加一等于几,1,2,3,4,B", exams.CMMLU),
        (None, "一加一等于几,1,2,3,4,B", exams.CMMLU),
    ],
)
def test_a_csv_file_is_asked_in_its_language_with_any_header(tmp_path, header, row, style):
    text = f"{header}\n{row}\n" if header else f"{row}\n"
    exam = read(write(tmp_path, "test/anatomy_test.csv", text))
    assert (exam.style, exam.subject) == (style, "anatomy")
    [(_, question)] = exam.questions
    assert question.answer == 1
    if style == exams.MMLU:
        assert exam.head == (
            "The following are multiple choice questions (with answers) about anatomy.\n\n"
        )
        assert exam.put(question) == "1, 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    if style == exams.CMMLU:
        assert exam.put(question) == "题目：一加一等于几\nA. 1\nB. 2\nC. 3\nD. 4\n答案是："


BAD_CSV = [
    ("0,问题,1,2,3,4,,E", "the answer is 'E'"),
    ("0,问题,1,,3,4,,A", "b is empty"),
    ("0,问题,1,2", "c, d, answer is empty"),
    ("0,Which is a bone?,Liver,Heart,Skin,Lung,Femur,A", "it has the choices A, B, C, D, E"),
    ("0,Which, say, is a bone?,Liver,Heart,Skin,Lung,,A", "10 columns, but the header has 8"),
]
FIVE = '{"inputs_pretokenized": "a", "label": 1, "choices_pretokenized": [1, 2, 3, 4, 5]}'
BAD_JSONL = [
    ('{"label": 1}', "no inputs_pretokenized"),
    ('{"inputs_pretokenized": "a", "label": true}', "the label is True"),
    ('{"inputs_pretokenized": "a", "label": 4}', "the label is 4"),
    (FIVE, "it has 5 choices"),
    ("[]", "no inputs_pretokenized"),
]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("law_val.csv", "id,question,A,B,C,D,E,answer\n0,Q?,1,2,3,4,,A\n", BAD_CSV),
        ("x.jsonl", '\n{"inputs_pretokenized": "a", "label": 0}\n', BAD_JSONL),
    ],
)
def test_bad_rows(tmp_path, capsys, name, good, bad):
    path = write(tmp_path, name, good + "\n".join(row for row, _ in bad) + "\n")
    with pytest.raises(InputError, match=f"bad rows: {len(bad)} of {len(bad) + 1}") as error:
        main(["--task", "choice", "--data", str(path)])
    assert error.value.exit_code == 3
    err = capsys.readouterr().err
    for line, (_, reason) in enumerate(bad, 3):
        assert f"{path}:{line}: {reason}" in err
    assert len(read(path, limit=len(bad)).questions) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"id,question,A,B,C,D\n0,q,1,2,3,4\n", "no column answer"),
        (b"", "empty, or has an unknown layout"),
        ("id,question,A,B,C,D,answer\n0,问题,1,2,3,4,A\n".encode("gb18030"), "not UTF-8"),
        (b'"' + b"x" * 200_000 + b'",1,2,3,4,A\n', "field larger"),
        (None, "no csv"),
    ],
)
def test_files_of_no_layout(tmp_path, content, reason):
    path = tmp_path / "law_val.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        main(["--task", "choice", "--data", str(tmp_path if content is None else path)])
    assert reason in str(error.value) and str(tmp_path) in str(error.value)


def test_the_likeliest_letter_is_taken(toy, tmp_path, asked):
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS)
    exam = read(path)
    found, rows = asked(path)
    right = sum(row["predict"] == row["labels"] for row in rows)
    assert (found["questions"], found["right"], found["accuracy"]) == (2, right, right / 2)
    common, ids = choice.letter_ids(toy)
    full = jax.jit(forward, static_argnums=0)
    for row, (_, question) in zip(rows, exam.questions, strict=True):
        assert row["prompt"] == exam.head + exam.put(question)
        tokens = np.array([[*toy.build_prompt(row["prompt"]), *common]], np.int32)
        logits = np.asarray(full(toy.config, toy.checkpoint.params, tokens)[0])[0, -1, ids]
        np.testing.assert_allclose(row["logits"], logits, atol=2e-3)
        assert row["predict"] == "ABCD"[int(logits.argmax())]
        assert row["labels"] == "ABCD"[question.answer]


def test_examples_are_rounds_before_the_question(toy, tmp_path, figures):
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS.split("\n")[0])
    write(tmp_path, "dev/law_dev.csv", CEVAL_HEAD + "0,几,1,2,3,4,C,\n1,何,5,6,7,8,A,\n")
    exam = read(path)
    few = exams.examples_for(exam, BadRows())
    [(_, one)] = choice.ask(toy, exam, few, BadRows())
    head, question = exam.head + exam.put(few[0]), exam.put(exam.questions[0][1])
    history = [(head, "C"), (exam.put(few[1]), "A")]
    assert one.ids == toy.build_prompt(question, history)
    assert one.shots == 2
    [(_, raw)] = choice.ask(toy_engine(template="raw", max_length=256), exam, few, BadRows())
    assert raw.text == f"{head}C\n\n{exam.put(few[1])}A\n\n{question}"
    long = exams.Question("几" * 150, ("1", "2", "3", "4"), 0)
    [(_, one)] = choice.ask(
        toy, exam, [long, long], BadRows()
    )  # examples that do not fit are left out
    assert one.text == exam.head + question and one.shots == 0
    found = figures("--task", "choice", "--data", path, "--shots", "5")
    assert (found["shots"], found["mean_shots_used"]) == (5, 2)


def test_solved_examples_are_no_questions(tmp_path, capsys):
    for name in ("val/law_val.csv", "dev/law_dev.csv"):
        write(tmp_path, name, CEVAL_HEAD + CEVAL_ROWS)
    assert exams.find_files(str(tmp_path)) == [tmp_path / "val/law_val.csv"]
    assert f"{tmp_path / 'dev'} is left out" in capsys.readouterr().err
    assert exams.find_files(str(tmp_path / "dev")) == [tmp_path / "dev/law_dev.csv"]
    flags = ["--task", "choice", "--shots", "1", "--data"]
    with pytest.raises(UsageError, match="takes its examples"):
        main([*flags, str(tmp_path / "dev")])
    with pytest.raises(UsageError, match="excludes"):
        main([*flags, str(tmp_path / "val"), "--two-pass"])
    (tmp_path / "dev/law_dev.csv").unlink()
    with pytest.raises(InputError, match="no examples"):
        main([*flags, str(tmp_path / "val")])


def test_two_passes(toy, tmp_path, asked):
    write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS.split("\n")[0])
    official = {"inputs_pretokenized": "一加一等于几\nA. 1\nB. 2\n", "label": 0}
    write(tmp_path, "val/x.jsonl", json.dumps(official))
    flags = ("--two-pass", "--max-new-tokens", "4", "--batch-size", "2")
    found, rows = asked(tmp_path / "val", *flags)
    assert found["passes"] == 2 and found["questions"] == 2 and len(found["files"]) == 2
    exam = read(tmp_path / "val/law_val.csv")
    plain = exam.head + exam.put(exam.questions[0][1], ask=False)
    for row, text in zip(rows, (plain + "\n", official["inputs_pretokenized"]), strict=True):
        assert row["words"]
        assert row["prompt"] == f"{text}{row['words']}\n综上所述，ABCD中正确的选项是："


def test_a_question_that_is_too_long_is_a_bad_row(toy, tmp_path, figures, capsys):
    rows = f"0,{'几' * 300},1,2,3,4,C,\n1,几,1,2,3,4,C,\n"
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + rows)
    with pytest.raises(InputError, match="1 of 2"):
        main(["--task", "choice", "--data", str(path)])
    assert f"{path}:2: The prompt is too long" in capsys.readouterr().err
    assert figures("--task", "choice", "--data", path, "--max-bad", "1")["questions"] == 1


def test_accuracy_of_all_and_of_files(tmp_path):
    def ask(subject: str, *answers: int) -> list[choice.Asked]:
        choices = ("1", "2", "3", "4")
        questions = [("here", exams.Question("q", choices, answer)) for answer in answers]
        exam = exams.Exam(tmp_path / f"{subject}_val.csv", subject, exams.C_EVAL, questions)
        return [choice.Asked(exam, question, "q", [1]) for _, question in questions]

    rows = [*ask("law", 0, 1, 2), *ask("logic", 3), *ask("physician", 1)]
    found = choice.figures(rows, np.array([0, 1, 3, 3, 0]))
    assert (found["questions"], found["right"], found["accuracy"]) == (5, 3, 0.6)
    assert found["mean_of_files"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert [row["questions"] for row in found["files"]] == [3, 1, 1]


def test_the_ids_of_the_letters(engine, monkeypatch):
    for ids in (["AB", "A", "AC", "AD"], ["AB", "AC", "AD", "AB"], ["A", "A", "A", "A"]):
        table = dict(zip("ABCD", ids, strict=True))
        monkeypatch.setattr(
            type(engine.tokenizer), "encode", lambda self, text, t=table: list(map(ord, t[text]))
        )
        with pytest.raises(CheckpointError, match="A, B, C and D"):
            choice.letter_ids(engine)
    ids = {"A": [5, 7], "B": [5, 8], "C": [5, 9], "D": [5, 10]}
    monkeypatch.setattr(type(engine.tokenizer), "encode", lambda self, text: ids[text])
    assert choice.letter_ids(engine) == ([5], [7, 8, 9, 10])


def test_a_glm_base_model_fills_a_blank_after_the_question(tmp_path, monkeypatch, asked):
    engine = family_engine("glm", 2048)
    for module in (choice, generation):
        monkeypatch.setattr(module, "open_engine", lambda *args, **kwargs: engine)
    ids = [10, 11, 12, 13]  # its vocabulary has no letters
    monkeypatch.setattr(choice, "letter_ids", lambda engine: ([], ids))
    rows = '0,一加一等于几,1,2,3,4,B,\n1,"[MASK]是什么",1,2,3,4,B,\n'
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + rows)
    write(tmp_path, "dev/law_dev.csv", CEVAL_HEAD + "0,几,1,2,3,4,C,\n")
    found, [row] = asked(path, "--max-bad", "1", "--shots", "1")
    assert (found["bad_rows"], found["mean_shots_used"]) == (1, 1)  # it has a blank of its own
    exam = read(path)
    [example] = exams.examples_for(exam, BadRows())
    question = exam.put(exam.questions[0][1])
    text = f"{exam.head}{exam.put(example)}C\n\n{question}[MASK]"
    assert row["prompt"] == text
    tokens = np.array([build_prompt(engine.tokenizer, "fill", text)], np.int32)
    logits, _ = jit_forward(engine.config, engine.executor.params, tokens)
    np.testing.assert_allclose(row["logits"], np.asarray(logits)[0, -1, ids], atol=2e-3)
    _, [row] = asked(path, "--max-bad", "1", "--two-pass", "--max-new-tokens", "4")
    assert row["prompt"].endswith("正确的选项是：[MASK]") and row["words"]
