"""Conversations of many more turns than the model reads: what is left out."""

import dataclasses
import random

import pytest

from glm2_jax.runtime import buckets
from infer.engine.params import SamplingParams
from infer.requests.conversation import Conversation
from tests.support.engine_toy import toy_engine, warm_engine

SAMPLING = SamplingParams(temperature=0, max_new_tokens=4)


@pytest.fixture
def conversation(monkeypatch) -> Conversation:
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", 256)  # one shape, so little is compiled
    engine = toy_engine(share=warm_engine())
    return Conversation(engine, SAMPLING, say=lambda text: None)


def ask(conversation: Conversation, question: str) -> None:
    for _ in conversation.reply(question):
        pass


def fewest_left_out(conversation: Conversation, question: str) -> int:
    """How many of the oldest turns have to be left out, by trying every number."""
    limit, count = conversation.limit, len(conversation.turns)
    tries = (n for n in range(count) if len(conversation._build(question, n)) <= limit)
    return next(tries, count)


def test_as_few_turns_as_possible_are_left_out_whatever_was_done_before(conversation):
    draw, seen = random.Random(0), set()
    for _ in range(80):
        action = draw.random()
        if action < 0.1:
            conversation.undo()
        elif action < 0.2:
            conversation.set_system("好" * draw.choice([1, 60]))
        elif action < 0.3:
            longest = draw.choice([120, 180, 256])
            conversation.sampling = dataclasses.replace(SAMPLING, max_length=longest)
        question = "你好" * draw.choice([1, 1, 1, 5, 15])
        expected = fewest_left_out(conversation, question)
        ask(conversation, question)
        assert conversation.left_out == expected
        seen.add(expected - len(conversation.turns))
        assert sum(turn.ids is not None for turn in conversation.turns) <= 8
    assert len(seen) > 5
