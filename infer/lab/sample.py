"""Some of the prompts, for an idea that measures before it decides."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from glm2_jax import GLMConfig, forward
from glm2_jax.ideas import Idea, listening
from infer.engine.engine import Engine
from infer.evaluate.perplexity import Material

ROWS, TOKENS = 8, 256  # at most


@dataclass(frozen=True)
class Sample:
    """A model and some tokens."""

    config: GLMConfig
    params: Any  # with the layers as a list
    tokens: Any  # int32 [B, T], without padding

    @classmethod
    def of(cls, engine: Engine, material: Material) -> Sample:
        """Take rows of one length: of the longer half of them, and cut."""
        rows = sorted((item.ids[:-1] for item in material.items), key=len)
        rows = rows[len(rows) // 2 :][:ROWS]
        length = min(len(rows[0]), TOKENS)
        tokens = np.array([row[:length] for row in rows], np.int32)
        return cls(engine.config, engine.checkpoint.params, tokens)

    def measure(self, idea: Idea) -> dict[str, float]:
        """Read the tokens with an idea; return the means of what it told."""
        config = dataclasses.replace(self.config, idea=idea)
        with listening() as told:
            run = jax.jit(lambda params, tokens: forward(config, params, tokens)[0])
            traced = run.trace(self.params, self.tokens)
            if told:
                jax.block_until_ready(traced.lower().compile()(self.params, self.tokens))
        return {name: sum(values) / len(values) for name, values in told.items()}
