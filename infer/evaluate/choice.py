"""Multiple choice: the likeliest of the letters A to D behind a question.

One pass reads the question and compares the letters. Two passes do as the official C-Eval script
of ChatGLM2: the model answers greedily in words; then the question, its words and a sentence that
asks for the conclusion are one question, and the letters are compared behind that. (The script cuts
what is longer than 2048 tokens; here nothing is cut, what is too long is a bad row.)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.cli.files import real_path
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.runtime.gather import gathered
from infer.evaluate.exams import LETTERS, Exam, Question, examples_for, find_files, read_exam
from infer.evaluate.generation import (
    answers,
    check_output,
    checked,
    predictions_file,
    sampling_params,
)
from infer.evaluate.reader import Reader
from infer.evaluate.rows import BadRows, unplaced
from infer.evaluate.subjects import GROUPS
from infer.startup import note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine


@dataclass(frozen=True)
class Asked:
    """A question that fits.

    Attributes:
      text: what is asked, without the rounds of examples before it.
      ids: the whole prompt.
      shots: examples before it.
    """

    exam: Exam
    question: Question
    text: str
    ids: list[int]
    shots: int = 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Asks all questions; returns the figures."""
    if args.two_pass and args.shots:
        raise UsageError("--two-pass and --shots exclude each other", "The script has no examples.")
    sampling = sampling_params(args, greedy=True)
    check_output(args)
    bad = BadRows(args.max_bad)
    files = find_files(args.data)
    if args.shots and any(real_path(file).parent.name == "dev" for file in files):
        raise UsageError(
            f"--shots takes its examples from the folder dev, and {args.data} is in it",
            "Each question would be among its own examples, with the answer.",
            "Name the folder val or test beside it, or leave --shots out.",
        )
    exams = [read_exam(path, bad) for path in files]
    bad.check(sum(len(exam.questions) for exam in exams))
    whole = [str(exam.path) for exam in exams if exam.layout == "official"]
    if args.shots and whole:
        raise UsageError(
            "--shots goes with csv files",
            f"The texts of {whole[0]} are whole prompts.",
            "Leave --shots out.",
        )
    shots = [examples_for(exam.path, bad).questions if args.shots else () for exam in exams]
    note_demo_model(from_flags(ModelChoice, args))
    engine = open_engine(
        from_flags(ModelChoice, args),
        from_flags(EngineOptions, args),
        contents={"questions": unplaced(q for exam in exams for q in exam.questions)},
    )
    asker = _Asker(engine, bad, args.batch_size)
    asked = []
    for exam, examples in zip(exams, shots, strict=True):
        if args.two_pass:
            asked += asker.fitting(exam, lambda exam, q: asker.plain(exam, q))
        else:
            few = examples[: args.shots]
            asked += asker.fitting(exam, lambda exam, q, few=few: asker.shown(exam, q, few))
    bad.check(len(asked))
    note(f"the first question: {asked[0].text!r}")
    words = []
    used = [one.shots for one in asked]
    if fewer := sum(count < args.shots for count in used):
        note(f"{fewer} of {len(asked)} questions have fewer than {args.shots} examples: there are "
             "no more, or they would be too long")  # fmt: skip
    if args.two_pass:
        prompts = [one.ids for one in asked]
        found = sorted(answers(engine, prompts, sampling, args.batch_size, clean=False))
        words = [text for _, text in found]
        asked, words = asker.concluded(asked, words)
        bad.check(len(asked))
        note(f"the first question, second pass: {asked[0].text!r}")
    scores = asker.letters([one.ids for one in asked])
    _write(args, asked, words, scores)
    shown = {"shots": args.shots, **({"mean_shots_used": fmean(used)} if args.shots else {})}
    return {"data": args.data, "passes": 1 + args.two_pass, **shown, "bad_rows": bad.count,
            **_figures(asked, scores.argmax(axis=1))}  # fmt: skip


class _Asker:
    """Puts questions to an engine."""

    def __init__(self, engine: Engine, bad: BadRows, batch: int):
        self.engine, self.bad, self.batch = engine, bad, batch
        common, self.ids = letter_ids(engine)
        self._before = common

    def fitting(self, exam: Exam, make: Any) -> list[Asked]:
        """The questions of an exam that fit; `make` (exam, question) puts one."""
        rows = ((question.where, question) for question in exam.questions)
        return self.bad.keep(rows, lambda where, question: make(exam, question))

    def plain(self, exam: Exam, question: Question) -> Asked:
        """A question that is to be answered in words."""
        text = exam.head + exam.put(question, ask=False)
        return Asked(exam, question, text, checked(self.engine, self.engine.build_prompt(text)))

    def shown(self, exam: Exam, question: Question, examples: Sequence[Question]) -> Asked:
        """A question to be answered with a letter, behind as many examples as there is room for."""
        for count in range(len(examples), -1, -1):
            try:
                text, ids = self._behind(exam, question, examples[:count])
                ids = checked(self.engine, ids)
                break
            except InputError:
                if not count:
                    raise
        return Asked(exam, question, text, [*ids, *self._before], count)

    def _behind(
        self, exam: Exam, question: Question, examples: Sequence[Question]
    ) -> tuple[str, list[int]]:
        """Examples are earlier rounds of the conversation, or with the raw template text."""
        texts = [exam.put(one) for one in (*examples, question)]
        solved = [LETTERS[one.answer] for one in examples]
        if self.engine.template == "raw":
            texts = [
                "".join(f"{text}{x}\n\n" for text, x in zip(texts, [*solved, ""], strict=True))
            ]
            texts, solved = [texts[0].removesuffix("\n\n")], []
        texts[0] = exam.head + texts[0]
        *before, text = texts
        return text, self.engine.build_prompt(text, list(zip(before, solved, strict=True)))

    def concluded(
        self, asked: Sequence[Asked], words: Sequence[str]
    ) -> tuple[list[Asked], list[str]]:
        """The questions of the second pass, and the words of those that fit."""

        def conclude(where: str, row: tuple[Asked, str]) -> tuple[Asked, str]:
            one, said = row
            end = "\n" if one.question.choices else ""  # the official texts have their own
            text = f"{one.text}{end}{said}\n{one.exam.style.conclude}"
            ids = checked(self.engine, self.engine.build_prompt(text))
            return Asked(one.exam, one.question, text, [*ids, *self._before]), said

        rows = ((row[0].question.where, row) for row in zip(asked, words, strict=True))
        kept = self.bad.keep(rows, conclude)
        return [one for one, _ in kept], [said for _, said in kept]

    def letters(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [prompts, 4]: the logits of the letters behind each prompt."""
        result = np.zeros((len(prompts), len(LETTERS)), np.float32)
        reader = Reader(self.engine, self.batch, self.engine.max_length)
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        with Progress("questions", len(prompts)) as bar:
            for first in range(0, len(order), self.batch):
                rows = order[first : first + self.batch]
                compiled = self.engine.programs.seconds
                for part, values in self._last([prompts[row] for row in rows], reader):
                    result[[rows[at] for at in part]] = values
                bar.start += self.engine.programs.seconds - compiled
                bar(first + len(rows))
        if not np.isfinite(result).all():
            raise CheckpointError("the model produced NaN or Inf", fix="Use another --dtype.")
        return result

    def _last(
        self, prompts: list[Sequence[int]], reader: Reader
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """(rows, their letters' logits [rows, 4]), as their ends are read."""
        last = np.array([len(ids) - 1 for ids in prompts])
        for chunk in reader.read(prompts):
            width = chunk.real.shape[1]
            ending = np.flatnonzero((chunk.start <= last) & (last < chunk.start + width))
            if not ending.size:
                continue
            columns = np.zeros(reader.batch, np.int32)
            columns[ending] = last[ending] - chunk.start
            key = chunk.logits.shape
            call = self.engine.programs.call
            values = call("letters", key, pick, chunk.logits, columns, np.array(self.ids, np.int32))
            yield ending.tolist(), gathered(values)[ending]


def pick(logits: jax.Array, columns: jax.Array, ids: jax.Array) -> jax.Array:
    """Some ids' logits at a column of each row: float32 [B, T, V] -> [B, ids]."""
    rows = jnp.take_along_axis(logits, columns[:, None, None], axis=1)[:, 0]
    return rows[:, ids]


def letter_ids(engine: Engine) -> tuple[list[int], list[int]]:
    """The ids that all answers "A" to "D" begin with (none in the published tokenizers), and the
    one by which each goes on.

    Raises:
      CheckpointError: the tokenizer does not tell the letters apart by one id.
    """
    ids = [engine.tokenizer.encode(letter) for letter in LETTERS]
    at = 0
    while len({tuple(one[: at + 1]) for one in ids}) == 1 and all(len(one) > at + 1 for one in ids):
        at += 1
    different = [one[at] for one in ids]
    if len(set(different)) < len(LETTERS):
        raise CheckpointError("the tokenizer has no ids of their own for A, B, C and D")
    return ids[0][:at], different


def _figures(asked: Sequence[Asked], chosen: np.ndarray) -> dict[str, Any]:
    """Accuracy of all questions (the official script's), by file, and by group of C-Eval."""
    right: dict[str, list[bool]] = {}
    groups: dict[str, list[str]] = {}
    for one, letter in zip(asked, chosen, strict=True):
        name = str(one.exam.path)
        right.setdefault(name, []).append(bool(letter == one.question.answer))
        group = GROUPS.get(one.exam.subject)
        if group and name not in groups.setdefault(group, []):
            groups[group].append(name)
    shares = {name: fmean(each) for name, each in right.items()}
    everything = [each for part in right.values() for each in part]
    result: dict[str, Any] = {
        "questions": len(everything),
        "right": sum(everything),
        "accuracy": fmean(everything),
        "mean_of_files": fmean(shares.values()),
    }
    if groups and sum(map(len, groups.values())) == len(right):
        result["groups"] = [
            {"group": group, "files": len(names), "accuracy": fmean(shares[name] for name in names)}
            for group, names in groups.items()
        ]
    result["files"] = [
        {"file": name, "questions": len(right[name]), "accuracy": share}
        for name, share in shares.items()
    ]
    return result


def _write(
    args: argparse.Namespace, asked: Sequence[Asked], words: Sequence[str], scores: np.ndarray
) -> None:
    with predictions_file(args) as write:
        for at, (one, values) in enumerate(zip(asked, scores, strict=True)):
            write(
                at,
                {
                    "where": one.question.where,
                    "prompt": one.text,
                    **({"words": words[at]} if words else {}),
                    "labels": LETTERS[one.question.answer],
                    "predict": LETTERS[int(values.argmax())],
                    "logits": [round(float(value), 4) for value in values],
                },
            )
