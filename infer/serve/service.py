"""What the routes share: the model's facts, the worker, and how requests are answered."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm2_jax.errors import shorten
from glm2_jax.text.template import Template, find_template
from glm2_jax.text.tokenizer import Tokenizer
from infer.batching.grammar import Grammars
from infer.batching.worker import Worker
from infer.engine.engine import Engine
from infer.engine.params import PRESETS, SamplingParams
from infer.serve.errors import ApiError
from infer.serve.metrics import Metrics
from infer.serve.options import OPENAI, RequestOptions

OPENAI_DEFAULTS = SamplingParams(temperature=1.0, top_k=0, top_p=1.0)


@dataclass(frozen=True)
class Facts:
    """What the API says of the model."""

    tokenizer: Tokenizer
    template: str
    max_length: int
    vocab_size: int
    fingerprint: str  # of the weights and how they are computed
    longest_token: int  # in characters
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    @property
    def written(self) -> Template:
        """How prompts are written by the template."""
        return find_template(self.template)

    @classmethod
    def of(cls, engine: Engine, fingerprint: str) -> Facts:
        tokenizer = engine.tokenizer
        sizes = engine.max_length, engine.config.vocab_size
        longest = max(len(tokenizer.piece(token)) for token in range(tokenizer.size))
        return cls(tokenizer, engine.template, *sizes, f"fp_{fingerprint[:16]}", longest)


@dataclass(frozen=True)
class Service:
    """All that a route needs.

    `models` has the number of the LoRA adapter, 0 = none, of each name; the first is the default.
    """

    facts: Facts
    worker: Worker
    models: Mapping[str, int]
    options: RequestOptions = field(default_factory=RequestOptions)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", Metrics(next(iter(self.models)), self.worker))

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What compiles the schemas of answers; making it takes a second."""
        return Grammars(self.facts.tokenizer, self.facts.vocab_size)

    @property
    def defaults(self) -> SamplingParams:
        """The sampling parameters that a request leaves out."""
        preset = self.facts.written.preset_of(self.options.preset)
        return OPENAI_DEFAULTS if preset == OPENAI else PRESETS[preset]

    def model(self, name: str | None) -> str:
        """Return the name of the model that a request asks for; ApiError if it is not served."""
        if name is None:
            return next(iter(self.models))
        if name not in self.models:
            raise ApiError(
                404,
                f"The model {shorten(name)} does not exist. Served: {', '.join(self.models)}.",
                code="model_not_found",
                param="model",
            )
        return name


def model_name(path: str | None) -> str:
    """Return the name of a model in the API where none was given: that of its folder."""
    return "glm2-demo" if path is None else Path(path).resolve().name or "model"
