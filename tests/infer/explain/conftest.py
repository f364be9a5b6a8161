"""The walk of the 6B model, on devices of every kind."""

import pytest

from glm2_jax import PRESETS
from infer.explain.options import PROMPT
from infer.explain.walk import make_walk
from infer.memory.cards import CARDS
from infer.memory.precision import Precision


@pytest.fixture(scope="session")
def walk():
    return make_walk(
        PRESETS["chatglm2-6b"], Precision("bfloat16"), 17, model="chatglm2-6b", prompt=PROMPT,
        length_from="published", cards=[CARDS[name] for name in ("3060", "a100", "h200", "v5e-1")],
    )  # fmt: skip
