"""Multiple-choice questions in their published layouts, and how they are asked.

* C-Eval: csv with the header id,question,A,B,C,D,answer,explanation.
* CMMLU: csv with the header ,Question,A,B,C,D,Answer.
* MMLU: csv without a header: question, A, B, C, D, answer; exports of it have one.
* The data of ChatGLM2's evaluation script: JSON lines {"inputs_pretokenized", "label"}, whose text
  is the complete prompt and whose label counts from 0.

A csv file is asked in its own language: questions without Chinese characters as in MMLU, all others
as in C-Eval (a header with an id) or CMMLU. A question with more than four choices is a bad row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from glm2_jax.cli.files import real_path
from glm2_jax.cli.messages import note
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.datasets.rows import read_rows
from glm2_jax.errors import InputError
from glm2_jax.text.chinese import CHINESE
from infer.evaluate.rows import BadRows

LETTERS = ("A", "B", "C", "D")
_COLUMNS = ("question", "a", "b", "c", "d", "answer")
_CHINESE_HEADER = {"题目": "question", "问题": "question", "答案": "answer"}
_FOUR = "only A, B, C and D are supported"

_SUBJECTS = (Path(__file__).parent / "subjects.jsonl").read_text(encoding="utf-8")
SUBJECTS = {row["name"]: row["chinese"] for row in map(json.loads, _SUBJECTS.splitlines())}
"""The 52 subjects of C-Eval, with their names in its prompts."""


@dataclass(frozen=True)
class Style:
    """How the questions of a layout are asked, in the words of its authors."""

    head: str = ""  # before the first question
    question: str = ""  # before each question
    ask: str = ""  # after its choices
    conclude: str = "综上所述，ABCD中正确的选项是："  # after the model's words, in the second pass


OFFICIAL = Style()
C_EVAL = Style("以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n", ask="答案：")
CMMLU = Style(
    "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n", "题目：", "答案是："
)
MMLU = Style(
    "The following are multiple choice questions (with answers) about {subject}.\n\n",
    ask="Answer:",
    conclude="In conclusion, the correct option among A, B, C and D is:",
)


@dataclass(frozen=True)
class Question:
    """A question with one right answer."""

    text: str  # of the official JSON lines the complete prompt
    choices: tuple[str, ...]  # four; none where `text` has them
    answer: int  # 0 to 3


@dataclass(frozen=True)
class Exam:
    """The questions of one file."""

    path: Path
    subject: str  # from the file's name, e.g. "computer_network"
    style: Style
    questions: list[tuple[str, Question]]  # each with its file and line

    @property
    def head(self) -> str:
        """What comes before the first question."""
        name = SUBJECTS.get(self.subject, self.subject.replace("_", " "))
        return self.style.head.format(subject=name)

    def put(self, question: Question, *, ask: bool = True) -> str:
        """Return a question with its choices; `ask` for the answer at the end."""
        lines = [self.style.question + question.text]
        lines += [f"{x}. {text}" for x, text in zip(LETTERS, question.choices, strict=False)]
        return "\n".join([*lines, self.style.ask] if ask and self.style.ask else lines)


def find_files(named: str) -> list[Path]:
    """Return the csv and jsonl files of a folder, or the one file.

    A folder `dev` next to `val` or `test` holds the examples of `--shots`, not questions: it is
    left out, with a note. InputError where there is no file.
    """
    path = Path(named)
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix in (".csv", ".jsonl") and p.is_file())
    if not found:
        raise InputError(f"{named} has no csv and no jsonl files")
    examples = {
        folder
        for file in found
        for folder in file.parents
        if folder.name == "dev"
        and path in folder.parents
        and any((folder.parent / name).is_dir() for name in ("val", "test"))
    }
    for folder in sorted(examples):
        note(f"{folder} is left out: it holds the solved examples of --shots")
    return [file for file in found if examples.isdisjoint(file.parents)]


def read_exam(path: Path, bad: BadRows) -> Exam:
    """Read a file; rows that cannot be used are reported. InputError: the file is not UTF-8, or has
    the columns of no known layout."""
    subject = re.sub(r"_(val|dev|test)$", "", path.stem)
    if path.suffix == ".jsonl":
        return Exam(path, subject, OFFICIAL, bad.keep(read_rows(str(path)), _official))
    header, style, rows = _csv(path)
    questions = bad.keep(rows, lambda row: _question(row, header))
    chinese = sum(bool(CHINESE.search(question.text)) for _, question in questions)
    style = style if 2 * chinese > len(questions) else MMLU
    return Exam(path, subject, style, questions)


def examples_for(exam: Exam, bad: BadRows) -> list[Question]:
    """Return the solved questions of a file, from the folder `dev` next to the file's folder."""
    folder, subject = real_path(exam.path).parent.parent / "dev", exam.subject
    for name in (f"{subject}_dev.csv", f"{subject}.csv"):
        if exam.style is not OFFICIAL and (folder / name).exists():  # those are complete prompts
            return [question for _, question in read_exam(folder / name, bad).questions]
    raise InputError(
        f"no examples for {exam.path}",
        f"Neither {subject}_dev.csv nor {subject}.csv is in {folder}.",
        "Put them there, or leave --shots out.",
    )


def _csv(path: Path) -> tuple[list[str], Style, Iterator[tuple[str, list[str]]]]:
    """Return the column names of a csv file, how its Chinese questions are asked, and its rows."""
    rows = _csv_rows(path)
    where, header = next(rows, ("", []))
    names = [name.strip().lower() for name in header]
    names = [_CHINESE_HEADER.get(name, name) for name in names]
    if "question" in names:
        if missing := [name for name in _COLUMNS if name not in names]:
            raise InputError(
                f"{path} has no column {', '.join(missing)}",
                f"Its columns are {', '.join(header)}. (C-Eval's test files have no answers.)",
                "Use the files of val.",
            )
        return names, C_EVAL if "id" in names else CMMLU, rows
    if len(header) != len(_COLUMNS):
        raise InputError(
            f"{path} is empty, or has an unknown layout",
            f"It begins with {len(header)} columns, without a header that names a question.",
            "Known: C-Eval (id,question,A,B,C,D,answer), CMMLU (,Question,A,B,C,D,Answer), "
            "MMLU (six columns, no header).",
        )
    return list(_COLUMNS), CMMLU, chain([(where, header)], rows)


def _csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield "file:line" and the cells of each row; the line is the one it begins on."""
    csv.field_size_limit(2**17)  # of the whole process, where a data set may have set another
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""))
    where = f"{path}:1"
    try:
        for row in reader:
            if row:
                yield where, row
            where = f"{path}:{reader.line_num + 1}"
    except csv.Error as error:
        raise InputError(f"{where}: not csv", str(error)) from None


def _question(row: Sequence[str], header: Sequence[str]) -> Question:
    if any(cell.strip() for cell in row[len(header) :]):
        raise InputError(
            f"{len(row)} columns, but the header has {len(header)}",
            "a text with a comma must be in quotes",
        )
    cells: dict[str, str] = dict.fromkeys(_COLUMNS, "")
    for name, cell in zip(header, row, strict=False):
        cells[name] = cells.get(name) or cell.strip()
    if more := [name.upper() for name in cells if re.fullmatch("[e-z]", name) and cells[name]]:
        raise InputError(f"it has the choices {', '.join((*LETTERS, *more))}", _FOUR)
    if empty := [name for name in _COLUMNS if not cells[name]]:
        raise InputError(f"{', '.join(empty)} is empty")
    letter = cells["answer"].upper()
    if letter not in LETTERS:
        raise InputError(
            f"the answer is {cells['answer']!r}", f"expected one of {', '.join(LETTERS)}"
        )
    choices = tuple(cells[name] for name in _COLUMNS[1:5])
    return Question(cells["question"], choices, LETTERS.index(letter))


def _official(row: Any) -> Question:
    text = row.get("inputs_pretokenized") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError("no inputs_pretokenized", 'write {"inputs_pretokenized", "label"}')
    choices, label = row.get("choices_pretokenized"), row.get("label")
    if isinstance(choices, list) and len(choices) > len(LETTERS):
        raise InputError(f"it has {len(choices)} choices", _FOUR)
    if type(label) is not int or label not in range(len(LETTERS)):
        raise InputError(f"the label is {label!r}", "expected 0, 1, 2 or 3")
    return Question(text, (), label)
