"""The demo's questions and answers, how they become packed training rows, and how many of them a
model answers correctly."""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from glm2_jax import Tokenizer
from glm2_jax.text.prompt import build_prompt, chatglm2_text
from infer import Engine
from train.data.batch import Batch, make_batch

FOLDER = Path(__file__).parent
HISTORY_SHARE = 0.25  # of the examples, so that the model also answers later rounds
MAX_HISTORY = 2


@dataclasses.dataclass(frozen=True)
class Pair:
    """An answer and every wording of its question, the plain one first."""

    questions: tuple[str, ...]
    answer: str


def load_pairs() -> list[Pair]:
    """Return the pairs of `pairs.jsonl`."""
    rows = read_lines("pairs.jsonl")
    return [Pair((row["instruction"], *row.get("paraphrases", ())), row["output"]) for row in rows]


def load_heldout() -> list[dict]:
    """Return wordings the model never sees: {"instruction", "expected_any": substrings}."""
    return read_lines("heldout.jsonl")


def read_lines(name: str) -> list[dict]:
    """Return the rows of a file of this folder."""
    with open(FOLDER / name, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(pairs: list[Pair], vocab_size: int) -> bytes:
    """Train a SentencePiece model with the options of the published one on the pairs' text.

    Lines hold no newline, so that it stays a byte piece, as in the published model.
    """
    prompts = [chatglm2_text(question) for pair in pairs for question in pair.questions]
    answers = [pair.answer for pair in pairs for _ in pair.questions]
    text = [line for entry in prompts + answers for line in entry.splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        character_coverage=1.0, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
        allow_whitespace_only_pieces=True, max_sentencepiece_length=16, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def epoch(
    pairs: list[Pair], tokenizer: Tokenizer, rng: np.random.Generator, rows: int, width: int
) -> Iterator[Batch]:
    """Yield every pair once, in one of its wordings, in packed batches of `rows` x `width` tokens.

    The last, incomplete batch is left out: the next epoch draws another order.
    """
    batch, row, used = [], [], 0
    for index in rng.permutation(len(pairs)):
        ids, learned = _example(pairs, index, tokenizer, rng)
        if used + len(ids) > width:
            batch.append(row)
            row, used = [], 0
            if len(batch) == rows:
                yield make_batch(batch, width)
                batch = []
        row.append((ids, learned))
        used += len(ids)


def _example(pairs, index, tokenizer, rng) -> tuple[list[int], list[bool]]:
    """Return a prompt, sometimes with earlier rounds, and its answer, which is learned."""
    history = []
    if rng.random() < HISTORY_SHARE:
        for other in rng.integers(len(pairs), size=rng.integers(1, MAX_HISTORY + 1)):
            history.append((_wording(pairs[other], rng), pairs[other].answer))
    prompt = build_prompt(tokenizer, "chatglm2", _wording(pairs[index], rng), history)
    answer = [*tokenizer.encode(pairs[index].answer), tokenizer.eos_id]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _wording(pair: Pair, rng: np.random.Generator) -> str:
    """Return a wording of the question, sometimes typed carelessly."""
    plain = rng.random() < 0.3
    text = pair.questions[0 if plain else rng.integers(len(pair.questions))]
    if rng.random() < 0.15:
        text = text.rstrip("？?。.！!") or text
    return text.lower() if rng.random() < 0.1 else text


def wrong_answers(engine: Engine, pairs: list[Pair]) -> list[tuple[str, str, str]]:
    """Return (question, expected, got) of every plain question with another answer than learned."""
    tokenizer, questions = engine.tokenizer, [pair.questions[0] for pair in pairs]
    return [
        (question, pair.answer, text)
        for question, pair, text in zip(questions, pairs, _answers(engine, questions), strict=True)
        if text != tokenizer.decode(tokenizer.encode(pair.answer))
    ]


def missed_wordings(engine: Engine, heldout: list[dict]) -> list[tuple[str, str]]:
    """Return (question, got) of unseen wordings whose answer has none of the expected texts."""
    questions = [row["instruction"] for row in heldout]
    return [
        (question, text)
        for question, row, text in zip(questions, heldout, _answers(engine, questions), strict=True)
        if not any(expected in text for expected in row["expected_any"])
    ]


def _answers(engine: Engine, questions: list[str], at_once: int = 64) -> list[str]:
    """Return the greedy answer to every question."""
    parts = [questions[at : at + at_once] for at in range(0, len(questions), at_once)]
    found = [engine.generate(part, temperature=0, max_new_tokens=96) for part in parts]
    return [completion.text for part in found for completion in part]
