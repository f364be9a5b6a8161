"""Conversations of many more turns than the model reads: what is left out, and what that costs."""

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
    assert len(seen) > 5


def test_a_turn_of_a_long_conversation_costs_no_more_than_one_of_a_short_one(
    conversation, monkeypatch
):
    turns = 0

    def build(self, question, left_out, original=Conversation._build):
        nonlocal turns
        turns += len(self.turns) - left_out
        return original(self, question, left_out)

    monkeypatch.setattr(Conversation, "_build", build)
    built, kept = [], []
    for number in range(120):
        turns = 0
        ask(conversation, f"你好{number % 7}")
        built.append(turns)
        kept.append(sum(turn.ids is not None for turn in conversation.turns))
    assert conversation.left_out > 100
    assert max(built[100:]) < 1.5 * max(built[20:40]) < 100  # turns put together for a prompt
    assert max(kept) == 8
