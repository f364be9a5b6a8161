"""`--task choice`: the most likely of the letters A to D after a question.

One pass reads the question and compares the letters; a GLM base model fills a [MASK] after the
question with one of them. Two passes follow the official C-Eval script
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
from glm2_jax.text.prompt import MASKS, with_blank
from infer.engine.params import SamplingParams
from infer.engine.reader import finite, read_all
from infer.evaluate.exams import (
    LETTERS,
    OFFICIAL,
    Exam,
    Question,
    examples_for,
    find_files,
    read_exam,
)
from infer.evaluate.generation import answers, check_output, checked, predictions_file
from infer.evaluate.rows import BadRows
from infer.startup import note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.evaluate.options import Settings


@dataclass(frozen=True)
class Asked:
    """A question that fits."""

    exam: Exam
    question: Question
    text: str  # the question as asked, without earlier rounds with examples
    ids: list[int]  # the complete prompt
    shots: int = 0  # examples before it
    words: str = ""  # what the model wrote in the first of two passes


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
    contents = {"questions": [each for exam in exams for _, each in exam.questions]}
    engine = open_engine(settings.choice, settings.options, rows=batch, contents=contents)
    common, letters = letter_ids(engine)
    asked = [
        one
        for exam, few in zip(exams, examples, strict=True)
        for one in ask(engine, exam, None if two_pass else few, bad)
    ]
    bad.check(len(asked))
    note(f"the first question: {asked[0][1].text!r}")
    result: dict[str, Any] = {"data": settings.data, "passes": 1 + two_pass, "shots": shots}
    if shots:
        result["mean_shots_used"] = fmean(one.shots for _, one in asked)
    if two_pass:
        found = answers(engine, [one.ids for _, one in asked], sampling, batch, clean=False)
        asked = conclude(engine, asked, [text for _, text in sorted(found)], bad)
        bad.check(len(asked))
        note(f"the first question, second pass: {asked[0][1].text!r}")
    logits = letter_logits(engine, [[*one.ids, *common] for _, one in asked], letters, batch)
    chosen = logits.argmax(axis=1)
    with predictions_file(settings.predictions) as write:
        for at, (where, one) in enumerate(asked):
            row: dict[str, Any] = {"where": where, "prompt": one.text}
            row |= {"words": one.words} if two_pass else {}
            row |= {"labels": LETTERS[one.question.answer], "predict": LETTERS[chosen[at]]}
            write(at, row | {"logits": [round(float(value), 4) for value in logits[at]]})
    return result | {"bad_rows": bad.count} | figures([one for _, one in asked], chosen)


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


def ask(
    engine: Engine, exam: Exam, examples: Sequence[Question] | None, bad: BadRows
) -> list[tuple[str, Asked]]:
    """Return the questions of an exam that fit, each after as many examples as fit: earlier rounds,
    or with the template raw earlier text. With None, an answer in words is asked for."""

    def put(question: Question) -> Asked:
        if examples is None:
            text = exam.head + exam.put(question, ask=False)
            ids = engine.build_prompt(_with_blank(engine, exam, text, engine.tokenizer.blank))
            return Asked(exam, question, text, checked(engine, ids))
        for count in range(len(examples), 0, -1):
            try:
                return after(question, examples[:count])
            except InputError:  # too long
                continue
        return after(question, ())

    def after(question: Question, few: Sequence[Question]) -> Asked:
        texts = [exam.put(one) for one in (*few, question)]
        texts[0] = exam.head + texts[0]
        solved = [LETTERS[one.answer] for one in few]
        if not engine.written.chat:
            rounds = [f"{text}{x}" for text, x in zip_longest(texts, solved, fillvalue="")]
            texts, solved = ["\n\n".join(rounds)], []
        *before, text = texts
        text = _with_blank(engine, exam, text)
        ids = engine.build_prompt(text, list(zip(before, solved, strict=True)))
        return Asked(exam, question, text, checked(engine, ids), len(few))

    return bad.keep(exam.questions, put)


def conclude(
    engine: Engine, asked: Sequence[tuple[str, Asked]], words: Sequence[str], bad: BadRows
) -> list[tuple[str, Asked]]:
    """Return the questions of the second pass that fit, given the words of the first."""

    def put(row: tuple[Asked, str]) -> Asked:
        one, said = row
        end = "\n" if one.question.choices else ""  # the official texts end with one
        text = f"{one.text}{end}{said}\n{one.exam.style.conclude}"
        text = _with_blank(engine, one.exam, text)
        ids = checked(engine, engine.build_prompt(text))
        return dataclasses.replace(one, text=text, ids=ids, words=said)

    rows = zip(asked, words, strict=True)
    return bad.keep(((where, (one, said)) for (where, one), said in rows), put)


def _with_blank(engine: Engine, exam: Exam, text: str, mask: str = "[MASK]") -> str:
    """Return a text as a model that fills blanks is asked, by default for a letter; InputError for
    a question that has a mask of its own, but not for a complete prompt."""
    if engine.written.fills and exam.style is not OFFICIAL and (found := MASKS.search(text)):
        why = f"{found[0]} is a blank to this model, and the answer belongs at the end"
        raise InputError("the question has a blank of its own", why)
    return with_blank(engine.tokenizer, engine.template, text, mask)


def letter_ids(engine: Engine, letters: Sequence[str] = LETTERS) -> tuple[list[int], list[int]]:
    """Return the ids that all answers "A" to "D" begin with (none in the published tokenizers), and
    the ids that follow, one per letter; CheckpointError where they are not different."""
    ids = [engine.tokenizer.encode(letter) for letter in letters]
    common = os.path.commonprefix(ids)  # of any sequences
    different = [one[len(common)] for one in ids if len(one) > len(common)]
    if len(set(different)) < len(letters):
        *first, last = letters
        names = f"{', '.join(first)} and {last}"
        raise CheckpointError(f"the tokenizer has no separate ids for {names}")
    return list(common), different


def letter_logits(
    engine: Engine, prompts: Sequence[Sequence[int]], letters: Sequence[int], batch: int
) -> np.ndarray:
    """Return float32 [prompts, letters]: the logits of the letters after each prompt."""
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
                "letters", (*chunk.logits.shape, ids.size), pick, chunk.logits, columns, ids
            )
            result[np.take(numbers, ending)] = gathered(values)[ending]
    return finite(result)


def pick(logits: jax.Array, columns: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the logits of some ids at a column of each row: float32 [B, T, V] -> [B, ids]."""
    return jnp.take_along_axis(logits, columns[:, None, None], axis=1)[:, 0][:, ids]


def figures(asked: Sequence[Asked], chosen: np.ndarray) -> dict[str, Any]:
    """Return the accuracy of all questions (as the official script), and by file; `chosen` are the
    letters taken, int [questions]."""
    pairs = zip(asked, chosen.tolist(), strict=True)
    files = [
        (str(exam.path), [letter == one.question.answer for one, letter in rows])
        for exam, rows in groupby(pairs, key=lambda pair: pair[0].exam)
    ]
    everything = [each for _, right in files for each in right]
    return {
        "questions": len(everything),
        "right": sum(everything),
        "accuracy": fmean(everything),
        "mean_of_files": fmean(fmean(right) for _, right in files),
        "files": [
            {"file": path, "questions": len(right), "accuracy": fmean(right)}
            for path, right in files
        ],
    }
