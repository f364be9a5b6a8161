"""How many questions the demo answers correctly, greedily."""

from glm2_jax import Tokenizer
from infer import Engine
from train.demo.data import Pair

BATCH = 64


def answers(engine: Engine, questions: list[str]) -> list[str]:
    """Return the greedy answer to every question."""
    texts = []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        texts += [x.text for x in engine.generate(part, temperature=0, max_new_tokens=96)]
    return texts


def wrong_answers(engine: Engine, pairs: list[Pair]) -> list[tuple[str, str, str]]:
    """Return (question, expected, got) of every plain question with another answer than learned."""
    got = answers(engine, [pair.questions[0] for pair in pairs])
    return [
        (pair.questions[0], pair.answer, text)
        for pair, text in zip(pairs, got, strict=True)
        if text != _as_decoded(engine.tokenizer, pair.answer)
    ]


def missed_wordings(engine: Engine, heldout: list[dict]) -> list[tuple[str, str]]:
    """Return (question, got) of unseen wordings whose answer has none of the expected texts."""
    got = answers(engine, [row["instruction"] for row in heldout])
    return [
        (row["instruction"], text)
        for row, text in zip(heldout, got, strict=True)
        if not any(expected in text for expected in row["expected_any"])
    ]


def _as_decoded(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text))
