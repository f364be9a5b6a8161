"""`python -m infer.evaluate --task choice`: layouts, prompts, and which letter is taken."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from glm2_jax import forward
from glm2_jax.errors import CheckpointError, InputError, UsageError
from infer.evaluate import choice, exams
from infer.evaluate.__main__ import main
from infer.evaluate.rows import BadRows
from infer.evaluate.subjects import CEVAL, NAMES
from tests.support.engine_toy import toy_engine, toy_params, warm_engine

CEVAL_HEAD = "id,question,A,B,C,D,answer,explanation\n"
CEVAL_ROWS = '0,一加一等于几,1,2,3,4,B,\n1,"两行的\n问题",甲,乙,丙,丁,d,因为\n'
CMMLU = ",Question,A,B,C,D,Answer\n0,一加一等于几,1,2,3,4,B\n"
MMLU = '"What is 1 + 1, at least?",1,2,3,4,B\nWhich?,a,b,c,d,C\n'


@pytest.fixture(scope="module")
def engine():
    return toy_engine(share=warm_engine(), max_length=256)


@pytest.fixture
def toy(engine, monkeypatch):
    """The toy engine in place of what the flags name."""
    monkeypatch.setattr(choice, "open_engine", lambda args, **contents: engine)
    return engine


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


def figures(capsys, path, *args: str) -> dict:
    assert main(["--task", "choice", "--data", str(path), *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def asked(capsys, tmp_path, path, *args: str) -> tuple[dict, list[dict]]:
    """The figures, and what was asked and answered."""
    file = tmp_path / "answers.out"
    found = figures(capsys, path, "--predictions", str(file), "--overwrite", *args)
    return found, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def always(letter: str, engine):
    """An engine whose logits depend on the last token alone, and whose letter is `letter` behind
    the end of any question; it shares the programs of another."""
    common, ids = choice.letter_ids(engine)
    last = [*engine.build_prompt("x"), *common][-1]
    params = toy_params()
    layers = {k: v * 0 if v.ndim > 2 else v for k, v in params["layers"].items()}
    row = params["embed"][last]
    head = params["head"] * 0
    for at, one in enumerate(ids):
        head = head.at[one].set(row if at == "ABCD".index(letter) else -row)
    return toy_engine({**params, "layers": layers, "head": head}, share=engine, max_length=256)


def test_c_eval(tmp_path):
    exam = read(write(tmp_path, "val/computer_network_val.csv", "\ufeff" + CEVAL_HEAD + CEVAL_ROWS))
    assert (exam.layout, exam.subject) == ("C-Eval", "computer_network")
    assert exam.head == "以下是中国关于计算机网络考试的单项选择题，请选出其中的正确答案。\n\n"
    first, second = exam.questions
    assert exam.put(first) == "一加一等于几\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    assert exam.put(first, ask=False).endswith("\nD. 4")
    assert (first.answer, second.answer) == (1, 3)
    assert [q.where.rpartition(":")[2] for q in exam.questions] == ["2", "3"]


def test_cmmlu(tmp_path):
    exam = read(write(tmp_path, "test/high_school_biology.csv", CMMLU))
    assert (exam.layout, exam.subject) == ("CMMLU", "high_school_biology")
    assert exam.put(exam.questions[0]) == "题目：一加一等于几\nA. 1\nB. 2\nC. 3\nD. 4\n答案是："


def test_mmlu(tmp_path):
    exam = read(write(tmp_path, "test/abstract_algebra_test.csv", MMLU))
    assert (exam.layout, exam.subject, len(exam.questions)) == ("MMLU", "abstract_algebra", 2)
    assert exam.head == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    )
    asks = "What is 1 + 1, at least?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert exam.put(exam.questions[0]) == asks


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("question,A,B,C,D,answer", "{}"),
        ("Question,a,b,c,d,Answer", "{}"),
        (",Question,A,B,C,D,Answer", "0,{}"),
        ("id,question,A,B,C,D,answer,explanation", "0,{},because"),
        ("question,A,B,C,D,E,answer,E", "What is 1 + 1?,1,2,3,4,,B,"),  # a fifth that is empty
        ("题目,A,B,C,D,答案", "{}"),
        (None, "{}"),
    ],
)
def test_an_english_file_is_asked_in_english_with_any_header(tmp_path, header, row):
    text = row.format("What is 1 + 1?,1,2,3,4,B") + "\n"
    exam = read(write(tmp_path, "test/anatomy_test.csv", f"{header}\n{text}" if header else text))
    assert exam.head == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
    )
    assert exam.put(exam.questions[0]) == "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert exam.questions[0].answer == 1


@pytest.mark.parametrize(
    ("header", "layout"),
    [
        ("id,question,A,B,C,D,answer", "C-Eval"),
        ("题目,A,B,C,D,答案", "CMMLU"),
        ("question,A,B,C,D,answer", "CMMLU"),
        (None, "CMMLU"),
    ],
)
def test_a_chinese_file_is_asked_in_chinese(tmp_path, header, layout):
    start = "0," if layout == "C-Eval" else ""
    text = f"{start}一加一等于几,1,2,3,4,B\n{start}IPv4 是什么,a,b,c,d,A\n"
    exam = read(write(tmp_path, "x_test.csv", f"{header}\n{text}" if header else text))
    assert exam.layout == layout and len(exam.questions) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0,Which is a bone?,Liver,Heart,Skin,Lung,Femur,A", "it has the choices A, B, C, D, E"),
        ("0,Which is a bone?,Liver,Heart,Skin,Lung,Femur,E", "it has the choices A, B, C, D, E"),
        ("0,Which, say, is a bone?,Liver,Heart,Skin,Lung,,A", "10 columns, but the header has 8"),
    ],
)
def test_choices_and_columns_are_never_dropped(tmp_path, capsys, row, reason):
    rows = f"id,question,A,B,C,D,E,answer\n0,Q?,1,2,3,4,,A\n{row}\n"
    path = write(tmp_path, "x_test.csv", rows)
    assert len(read(path, limit=1).questions) == 1
    assert f"{path}:3: {reason}" in capsys.readouterr().err


def test_the_official_jsonl_is_put_as_it_is(tmp_path):
    row = {"inputs_pretokenized": "问题\nA. 1\n", "label": 2, "choices_pretokenized": []}
    exam = read(write(tmp_path, "val/x.jsonl", json.dumps(row)))
    assert exam.head + exam.put(exam.questions[0]) == "问题\nA. 1\n"
    assert exam.questions[0].answer == 2


def test_the_subjects_of_c_eval():
    assert {group: len(names) for group, names in CEVAL.items()} == {
        "STEM": 20, "Social": 10, "Humanities": 11, "Others": 11,
    }  # fmt: skip
    assert len(set(NAMES.values())) == 52


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0,问题,1,2,3,4,E,", "the answer is 'E'"),
        ("0,问题,1,2,3,4,,", "the answer is ''"),
        ("0,问题,1,,3,4,A,", "b is empty"),
        ("0, ,1,2,3,4,A,", "question is empty"),
        ("0,问题,1,2", "4 columns"),
    ],
)
def test_bad_rows(tmp_path, capsys, row, reason):
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS + row + "\n")
    with pytest.raises(InputError, match="1 of 3 rows") as error:
        main(["--task", "choice", "--data", str(path)])
    assert error.value.exit_code == 3
    assert f"{path}:5: {reason}" in capsys.readouterr().err
    assert len(read(path, limit=1).questions) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"label": 1}', "no inputs_pretokenized"),
        ('{"inputs_pretokenized": "a"}', "the label is None"),
        ('{"inputs_pretokenized": "a", "label": true}', "the label is True"),
        ('{"inputs_pretokenized": "a", "label": 4}', "the label is 4"),
        ('{"inputs_pretokenized": "a", "label": 1.0}', "the label is 1.0"),
        ("[]", "no inputs_pretokenized"),
        (
            '{"inputs_pretokenized": "a", "label": 1, "choices_pretokenized": [1, 2, 3, 4, 5]}',
            "it has 5 choices",
        ),
        ("{", "not JSON"),
    ],
)
def test_bad_rows_of_the_official_jsonl(tmp_path, capsys, row, reason):
    path = write(tmp_path, "x.jsonl", '{"inputs_pretokenized": "a", "label": 0}\n' + row)
    with pytest.raises(InputError, match="1 of 2 rows"):
        read(path)
    assert f"{path}:2: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"id,question,A,B,C,D\n0,q,1,2,3,4\n", "no column answer"),
        (b"id,question,A,B,C,answer\n0,q,1,2,3,A\n", "no column d"),
        (b"a,b\n1,2\n", "no layout"),
        (b"", "empty"),
        ("id,question,A,B,C,D,answer\n0,问题,1,2,3,4,A\n".encode("gb18030"), "not UTF-8"),
        (b'"' + b"x" * 200_000 + b'",1,2,3,4,A\n', "field larger"),
    ],
)
def test_files_of_no_layout(tmp_path, content, reason):
    path = tmp_path / "law_val.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path)
    assert reason in str(error.value) and "law_val.csv" in str(error.value)


def test_no_files(tmp_path):
    with pytest.raises(InputError, match="no csv"):
        main(["--task", "choice", "--data", str(tmp_path)])
    with pytest.raises(InputError, match="file not found"):
        main(["--task", "choice", "--data", str(tmp_path / "none.csv")])


@pytest.mark.parametrize(("letter", "right"), [("A", 0), ("B", 1), ("D", 1)])
def test_a_model_that_always_says_the_same(engine, tmp_path, capsys, monkeypatch, letter, right):
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS)
    monkeypatch.setattr(choice, "open_engine", lambda args, **contents: always(letter, engine))
    found, rows = asked(capsys, tmp_path, path)
    assert [row["predict"] for row in rows] == [letter, letter]
    assert (found["questions"], found["right"], found["accuracy"]) == (2, right, right / 2)


def test_the_likeliest_letter_is_taken(toy, tmp_path, capsys):
    path = write(tmp_path, "test/biology.csv", CMMLU + "1,生物是什么,甲,乙,丙,丁,A\n")
    exam = read(path)
    _, rows = asked(capsys, tmp_path, path)
    common, ids = choice.letter_ids(toy)
    whole = jax.jit(forward, static_argnums=0)
    for row, question in zip(rows, exam.questions, strict=True):
        assert row["prompt"] == exam.head + exam.put(question)
        tokens = [*toy.build_prompt(row["prompt"]), *common]
        array = np.array([tokens], np.int32)
        logits = np.asarray(whole(toy.config, toy.checkpoint.params, array)[0])[0, -1, ids]
        np.testing.assert_allclose(row["logits"], logits, atol=2e-3)
        assert row["predict"] == "ABCD"[int(logits.argmax())]
        assert row["labels"] == "ABCD"[question.answer]


def test_examples_are_rounds_before_the_question(toy, tmp_path, capsys):
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS.split("\n")[0])
    write(tmp_path, "dev/law_dev.csv", CEVAL_HEAD + "0,几,1,2,3,4,C,\n1,何,5,6,7,8,A,\n")
    exam = read(path)
    few = exams.examples_for(path, BadRows()).questions
    asker = choice._Asker(toy, BadRows(), 2)
    one = asker.shown(exam, exam.questions[0], few[:2])
    head = exam.head + exam.put(few[0])
    question = exam.put(exam.questions[0])
    history = [(head, "C"), (exam.put(few[1]), "A")]
    assert one.ids == [*toy.build_prompt(question, history), *asker._before]
    assert one.shots == 2
    raw = choice._Asker(toy_engine(template="raw", max_length=256), BadRows(), 2)
    text = raw.shown(exam, exam.questions[0], few[:2]).text
    assert text == f"{head}C\n\n{exam.put(few[1])}A\n\n{question}"
    main(["--task", "choice", "--data", str(path), "--shots", "5", "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["shots"], found["mean_shots_used"]) == (5, 2)
    assert "1 of 1 questions have fewer than 5 examples" in err
    main(["--task", "choice", "--data", str(path), "--shots", "2"])
    assert "have fewer than" not in capsys.readouterr().err


def test_examples_that_do_not_fit_are_left_out_and_told(tmp_path, capsys):
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS)
    write(tmp_path, "dev/law.csv", CEVAL_HEAD + f"0,{'几' * 150},1,2,3,4,C,\n" * 2)
    exam = read(path)
    few = exams.examples_for(path, BadRows()).questions
    asker = choice._Asker(toy_engine(max_length=256), BadRows(), 2)
    one = asker.shown(exam, exam.questions[0], few)
    assert one.text == exam.head + exam.put(exam.questions[0]) and one.shots == 0


def test_solved_examples_are_no_questions(toy, tmp_path, capsys):
    for name in ("val/law_val.csv", "dev/law_dev.csv"):
        write(tmp_path, name, CEVAL_HEAD + CEVAL_ROWS)
    found = figures(capsys, tmp_path)
    assert [row["file"] for row in found["files"]] == [str(tmp_path / "val/law_val.csv")]
    assert exams.find_files(str(tmp_path)) == [tmp_path / "val/law_val.csv"]
    assert f"{tmp_path / 'dev'} is left out" in capsys.readouterr().err
    assert exams.find_files(str(tmp_path / "dev")) == [tmp_path / "dev/law_dev.csv"]
    for data in ("dev", "dev/law_dev.csv"):
        with pytest.raises(UsageError, match="among its own|takes its examples"):
            main(["--task", "choice", "--data", str(tmp_path / data), "--shots", "1"])


def test_a_folder_dev_alone_is_read(tmp_path):
    path = write(tmp_path, "dev/law_dev.csv", CEVAL_HEAD + CEVAL_ROWS)
    assert exams.find_files(str(tmp_path)) == [path]


def test_there_are_no_examples(toy, tmp_path):
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS)
    with pytest.raises(InputError, match="no examples"):
        main(["--task", "choice", "--data", str(path), "--shots", "1"])
    with pytest.raises(UsageError, match="exclude"):
        main(["--task", "choice", "--data", str(path), "--shots", "1", "--two-pass"])
    path = write(tmp_path, "x.jsonl", '{"inputs_pretokenized": "a", "label": 0}')
    with pytest.raises(UsageError, match="csv files"):
        main(["--task", "choice", "--data", str(path), "--shots", "1"])


def test_two_passes(toy, tmp_path, capsys):
    write(tmp_path, "val/law_val.csv", CEVAL_HEAD + CEVAL_ROWS.split("\n")[0])
    official = {"inputs_pretokenized": "一加一等于几\nA. 1\nB. 2\n", "label": 0}
    write(tmp_path, "val/x.jsonl", json.dumps(official))
    flags = ("--two-pass", "--max-new-tokens", "4", "--batch-size", "2")
    found, rows = asked(capsys, tmp_path, tmp_path / "val", *flags)
    assert found["passes"] == 2 and found["questions"] == 2 and len(found["files"]) == 2
    exam = read(tmp_path / "val/law_val.csv")
    plain = exam.head + exam.put(exam.questions[0], ask=False)
    for row, text in zip(rows, (plain + "\n", official["inputs_pretokenized"]), strict=True):
        assert row["words"]
        assert row["prompt"] == f"{text}{row['words']}\n综上所述，ABCD中正确的选项是："


def test_a_question_that_is_too_long_is_a_bad_row(toy, tmp_path, capsys):
    rows = f"0,{'几' * 300},1,2,3,4,C,\n1,几,1,2,3,4,C,\n"
    path = write(tmp_path, "val/law_val.csv", CEVAL_HEAD + rows)
    with pytest.raises(InputError, match="1 of 2"):
        main(["--task", "choice", "--data", str(path)])
    assert f"{path}:2: the prompt is too long" in capsys.readouterr().err
    assert figures(capsys, path, "--max-bad", "1")["questions"] == 1


def test_accuracy_of_all_of_files_and_of_groups(tmp_path):
    def one(subject: str, answer: int) -> choice.Asked:
        question = exams.Question("here", "q", ("1", "2", "3", "4"), answer)
        path = tmp_path / f"{subject}_val.csv"
        return choice.Asked(exams.Exam(path, subject, "C-Eval", (question,)), question, "q", [1])

    rows = [one("law", 0), one("law", 1), one("law", 2), one("logic", 3), one("physician", 1)]
    found = choice._figures(rows, np.array([0, 1, 3, 3, 0]))
    assert (found["questions"], found["right"], found["accuracy"]) == (5, 3, 0.6)
    assert found["mean_of_files"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    groups = {row["group"]: row["accuracy"] for row in found["groups"]}
    assert groups == pytest.approx({"Humanities": (2 / 3 + 1) / 2, "Others": 0})
    other = dataclasses.replace(rows[0], exam=dataclasses.replace(rows[0].exam, subject="a",
                                                                  path=tmp_path / "a"))  # fmt: skip
    assert "groups" not in choice._figures([*rows, other], np.zeros(6))


def test_letters_that_cannot_be_told_apart(engine, monkeypatch):
    monkeypatch.setattr(type(engine.tokenizer), "encode", lambda self, text: [5, 6])
    with pytest.raises(CheckpointError, match="A, B, C and D"):
        choice.letter_ids(engine)
    ids = {"A": [5, 7], "B": [5, 8], "C": [5, 9], "D": [5, 10]}
    monkeypatch.setattr(type(engine.tokenizer), "encode", lambda self, text: ids[text])
    assert choice.letter_ids(engine) == ([5], [7, 8, 9, 10])
