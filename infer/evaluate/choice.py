"""`--task choice`: the most likely of the letters A to D after a question.

One pass reads the question and compares the letters. Two passes follow the official C-Eval script
of ChatGLM2: the model first answers in words, greedily; then question, words and a sentence that
asks for the conclusion are one prompt, after which the letters are compared. (The script cuts a
prompt to 2048 tokens; here one that is too long is a bad row.)
"""

from __future__ import annotations

import dataclasses
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from statistics import fmean
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.cli.files import real_path
from glm2_jax.cli.messages import note
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.runtime.gather import gathered
from infer.engine.params import SamplingParams
from infer.evaluate.exams import (
    LETTERS,
    SUBJECTS,
    Exam,
    Question,
    examples_for,
    find_files,
    read_exam,
)
from infer.evaluate.generation import answers, checked
from infer.evaluate.predictions import check_output, predictions_file
from infer.evaluate.reader import read_all
from infer.evaluate.rows import BadRows, unplaced
from infer.startup import note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.evaluate.run import Settings


@dataclass(frozen=True)
class Asked:
    """A question that fits.

    Attributes:
        text: the question as asked, without earlier rounds with examples.
        ids: the complete prompt.
        shots: examples before it.
        words: what the model wrote in the first of two passes.
    """

    exam: Exam
    question: Question
    text: str
    ids: list[int]
    shots: int = 0
    words: str = ""


def run(settings: Settings) -> dict[str, Any]:
    """Ask all questions; returns the figures."""
    shots, two_pass, batch = settings.shots, settings.two_pass, settings.batch_size
    if two_pass and shots:
        raise UsageError("--two-pass excludes --shots", "The official script has no examples.")
    sampling = SamplingParams(temperature=0.0, max_new_tokens=settings.max_new_tokens)
    check_output(settings.predictions, settings.data, settings.overwrite)
    bad = BadRows(settings.max_bad)
    exams = _read_exams(settings, bad)
    examples = [examples_for(exam, bad)[:shots] if shots else () for exam in exams]
    note_demo_model(settings.choice)
    contents = {"questions": unplaced(each for exam in exams for each in exam.questions)}
    engine = open_engine(settings.choice, settings.options, rows=batch, contents=contents)
    asker = Asker(engine, bad)
    asked = [
        one
        for exam, few in zip(exams, examples, strict=True)
        for one in asker.ask(exam, None if two_pass else few)
    ]
    bad.check(len(asked))
    note(f"the first question: {asked[0].text!r}")
    result: dict[str, Any] = {"data": settings.data, "passes": 1 + two_pass, "shots": shots}
    if shots:
        result["mean_shots_used"] = fmean(one.shots for one in asked)
    if two_pass:
        found = answers(engine, [one.ids for one in asked], sampling, batch, clean=False)
        asked = asker.conclude(asked, [text for _, text in sorted(found)])
        bad.check(len(asked))
        note(f"the first question, second pass: {asked[0].text!r}")
    logits = letter_logits(engine, [one.ids for one in asked], asker.letters, batch)
    chosen = logits.argmax(axis=1)
    with predictions_file(settings.predictions) as write:
        for at, one in enumerate(asked):
            row: dict[str, Any] = {"where": one.question.where, "prompt": one.text}
            row |= {"words": one.words} if two_pass else {}
            row |= {"labels": LETTERS[one.question.answer], "predict": LETTERS[chosen[at]]}
            write(at, row | {"logits": [round(float(value), 4) for value in logits[at]]})
    return result | {"bad_rows": bad.count} | figures(asked, chosen)


def _read_exams(settings: Settings, bad: BadRows) -> list[Exam]:
    assert settings.data is not None
    files = find_files(settings.data)
    if settings.shots and any(real_path(file).parent.name == "dev" for file in files):
        raise UsageError(
            f"--shots takes its examples from the folder dev, and {settings.data} is in it",
            "Each question would appear among its examples, with the answer.",
            "Name the folder val or test next to it, or leave --shots out.",
        )
    exams = [read_exam(path, bad) for path in files]
    bad.check(sum(len(exam.questions) for exam in exams))
    return exams


class Asker:
    """Makes prompts of questions.

    Attributes:
        before: ids at the end of every prompt, with which all letters begin.
        letters: the ids that tell the letters apart.
    """

    def __init__(self, engine: Engine, bad: BadRows):
        self.engine, self.bad = engine, bad
        self.before, self.letters = letter_ids(engine)

    def ask(self, exam: Exam, examples: Sequence[Question] | None) -> list[Asked]:
        """Return the questions of an exam that fit, each after as many examples as fit; with
        None, an answer in words is asked for."""

        def put(where: str, question: Question) -> Asked:
            if examples is None:
                text = exam.head + exam.put(question, ask=False)
                ids = checked(self.engine, self.engine.build_prompt(text))
                return Asked(exam, question, text, ids)
            for count in range(len(examples), 0, -1):
                try:
                    return self._after(exam, question, examples[:count])
                except InputError:  # too long
                    continue
            return self._after(exam, question, ())

        return self.bad.keep(((question.where, question) for question in exam.questions), put)

    def _after(self, exam: Exam, question: Question, examples: Sequence[Question]) -> Asked:
        """Examples are earlier rounds, or with the template raw earlier text."""
        texts = [exam.put(one) for one in (*examples, question)]
        texts[0] = exam.head + texts[0]
        solved = [LETTERS[one.answer] for one in examples]
        if self.engine.template == "raw":
            rounds = [f"{text}{x}" for text, x in zip_longest(texts, solved, fillvalue="")]
            texts, solved = ["\n\n".join(rounds)], []
        *before, text = texts
        ids = self.engine.build_prompt(text, list(zip(before, solved, strict=True)))
        return Asked(exam, question, text, self._ended(ids), len(examples))

    def conclude(self, asked: Sequence[Asked], words: Sequence[str]) -> list[Asked]:
        """Return the questions of the second pass that fit, given the words of the first."""

        def put(where: str, row: tuple[Asked, str]) -> Asked:
            one, said = row
            end = "\n" if one.question.choices else ""  # the official texts end with one
            text = f"{one.text}{end}{said}\n{one.exam.style.conclude}"
            ids = self._ended(self.engine.build_prompt(text))
            return dataclasses.replace(one, text=text, ids=ids, words=said)

        rows = zip(asked, words, strict=True)
        return self.bad.keep(((row[0].question.where, row) for row in rows), put)

    def _ended(self, ids: list[int]) -> list[int]:
        return [*checked(self.engine, ids), *self.before]


def letter_ids(engine: Engine) -> tuple[list[int], list[int]]:
    """Return the ids that all answers "A" to "D" begin with (none in the published tokenizers), and
    the ids that follow, one per letter; CheckpointError where they are not different."""
    ids = [engine.tokenizer.encode(letter) for letter in LETTERS]
    common = os.path.commonprefix(ids)  # of any sequences
    different = [one[len(common)] for one in ids if len(one) > len(common)]
    if len(set(different)) < len(LETTERS):
        raise CheckpointError("the tokenizer has no separate ids for A, B, C and D")
    return list(common), different


def letter_logits(
    engine: Engine, prompts: Sequence[Sequence[int]], letters: Sequence[int], batch: int
) -> np.ndarray:
    """Return float32 [prompts, 4]: the logits of the letters after each prompt."""
    result = np.zeros((len(prompts), len(letters)), np.float32)
    ids = np.array(letters, np.int32)
    for numbers, (chunk,) in read_all([engine], prompts, batch):
        rows, width = chunk.real.shape
        at = np.array([len(prompts[number]) - 1 for number in numbers]) - chunk.start
        ending = np.flatnonzero((at >= 0) & (at < width))
        if ending.size:
            columns = np.zeros(rows, np.int32)
            columns[ending] = at[ending]
            values = engine.programs.call(
                "letters", chunk.logits.shape, pick, chunk.logits, columns, ids
            )
            result[np.take(numbers, ending)] = gathered(values)[ending]
    if not np.isfinite(result).all():
        raise CheckpointError("the model produced NaN or Inf", fix="Use another --dtype.")
    return result


def pick(logits: jax.Array, columns: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the logits of some ids at a column of each row: float32 [B, T, V] -> [B, ids]."""
    return jnp.take_along_axis(logits, columns[:, None, None], axis=1)[:, 0][:, ids]


def figures(asked: Sequence[Asked], chosen: np.ndarray) -> dict[str, Any]:
    """Return the accuracy of all questions (as the official script), by file and by C-Eval group;
    `chosen` are the letters taken, int [questions]."""
    pairs = zip(asked, chosen.tolist(), strict=True)
    files = [
        (exam, [letter == one.question.answer for one, letter in rows])
        for exam, rows in groupby(pairs, key=lambda pair: pair[0].exam)
    ]
    groups: dict[str | None, list[float]] = {}
    for exam, right in files:
        groups.setdefault(SUBJECTS.get(exam.subject, {}).get("group"), []).append(fmean(right))
    everything = [each for _, right in files for each in right]
    result: dict[str, Any] = {
        "questions": len(everything),
        "right": sum(everything),
        "accuracy": fmean(everything),
        "mean_of_files": fmean(fmean(right) for _, right in files),
    }
    if None not in groups:
        result["groups"] = [
            {"group": group, "files": len(shares), "accuracy": fmean(shares)}
            for group, shares in groups.items()
        ]
    result["files"] = [
        {"file": str(exam.path), "questions": len(right), "accuracy": fmean(right)}
        for exam, right in files
    ]
    return result
