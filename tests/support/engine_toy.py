"""A toy engine: random float32 weights and the tiny SentencePiece model of the tests."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import jax
import numpy as np

from glm2_jax import GLMConfig, Tokenizer, forward, init_params
from infer.engine.answer import Completion
from infer.engine.engine import Engine
from tests.support.rank_file import rank_file
from tests.support.sp_model import chatglm_model, sp_model

TOY = GLMConfig(
    num_layers=2,
    vocab_size=640,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    seq_length=256,
)


FILES: dict[str, Any] = {
    "glm4": rank_file,
    "glm4-0414": rank_file,
    "chatglm": chatglm_model,
    "glm": functools.partial(sp_model, byte_fallback=False),
}
"""A vocabulary of the kind of a family."""


@functools.cache
def toy_params(config: GLMConfig = TOY):
    """Random weights, large enough that greedy answers vary and never meet the end token."""
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x * 12 if x.ndim > 2 else x, params)
    return {**params, "head": params["head"].at[Tokenizer.eos_id].set(0)}


def toy_engine(
    params=None,
    *,
    config: GLMConfig = TOY,
    family: str = "chatglm2",
    template: str | None = None,
    share: Engine | None = None,
    **kwargs: Any,
) -> Engine:
    """A new engine; nothing is compiled yet, but for what it may `share` with another."""
    config = dataclasses.replace(config, family=family)
    checkpoint = SimpleNamespace(
        config=config,
        params=toy_params() if params is None else params,
        tokenizer=Tokenizer.from_bytes(FILES.get(family, sp_model)(), family),
        template=template or config.default_template,
        fingerprint="toy",
    )
    # Programs depend on shapes alone, the weights are an argument.
    programs = None if share is None else share.programs
    return Engine(cast(Any, checkpoint), programs=programs, **kwargs)


def family_config(family: str, **changes: Any) -> GLMConfig:
    """`TOY` of a family, with the ids of its vocabulary and its relations between sizes."""
    tokenizer = Tokenizer.from_bytes(FILES[family](), family)
    config = dataclasses.replace(
        TOY, family=family, vocab_size=tokenizer.size // 8 * 8 + 8, eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id, **changes,
    )  # fmt: skip
    if config.block.bidirectional:
        ids: Any = {"sop_token_id": tokenizer.suffix_ids[-1]}
        for name in ("mask", "gmask", "smask") if family == "glm" else ("mask", "gmask"):
            ids[f"{name}_token_id"] = tokenizer.special[f"[{name.replace('mask', 'MASK')}]"]
        config = dataclasses.replace(config, num_kv_heads=TOY.num_heads, **ids)
    if family == "glm":
        config = dataclasses.replace(config, ffn_hidden_size=4 * TOY.hidden_size)
    return config


@functools.cache
def family_engine(family: str, seq_length: int = 256) -> Engine:
    """An engine of a family with a vocabulary of its kind."""
    config = family_config(family, seq_length=seq_length)
    params = init_params(config, jax.random.key(0))
    size = 12 * math.sqrt(config.block.residual_scale)
    params = jax.tree.map(lambda x: x * size if x.ndim > 2 else x, params)
    if config.block.tied_head:  # or every token would be followed by itself
        final = jax.random.normal(jax.random.key(1), params["final_norm"].shape)
        params = {**params, "final_norm": final}
    checkpoint = SimpleNamespace(
        config=config,
        params=params,
        tokenizer=Tokenizer.from_bytes(FILES[family](), family),
        template=config.default_template,
        fingerprint="toy",
    )
    return Engine(cast(Any, checkpoint), prefill_chunk=64)


@functools.cache
def warm_engine() -> Engine:
    """One engine of the process: others share what it compiled."""
    return toy_engine()


def for_commands(engine: Engine, notes: tuple[str, ...] = ()) -> Engine:
    """Give its checkpoint what the commands print about it, and return the engine."""
    checkpoint = cast(Any, engine.checkpoint)
    checkpoint.summary = SimpleNamespace(dtype="float32", quantization=None)
    checkpoint.notes, checkpoint.fingerprint = notes, "a" * 64
    return engine


def open_toy(opened: list[tuple[Any, Any]], notes: tuple[str, ...] = ()):
    """Return what replaces `infer.engine.load.open_choice`: it opens toy engines that share their
    programs, and appends (choice, options) to `opened`."""

    def open_choice(choice, options, **kwargs) -> Engine:
        opened.append((choice, options))
        family = "chatglm3" if choice.template == "chatglm3" else "chatglm2"
        engine = toy_engine(
            share=warm_engine(), family=family, template=choice.template,
            max_length=options.max_length,
        )  # fmt: skip
        return for_commands(engine, notes)

    return open_choice


def streamed(engine: Engine, prompts, sampling, **kwargs: Any) -> list[Completion]:
    """Return what `run` gives, in the form of `complete`."""
    events = engine.run(prompts, sampling, **kwargs)
    done = {event.row: event.completion for event in events if event.completion}
    return [done[row] for row in range(len(prompts))]


def finished(events) -> Completion:
    """Return the answer at the end of a call of one row."""
    return next(event.completion for event in events if event.completion)


def prompt_scores(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    """The log-probabilities after each id, float32 [T, V], from the plain forward pass."""
    tokens = np.zeros((1, 64), np.int32)  # what follows does not matter, and compiles once
    tokens[0, : len(ids)] = ids
    logits, _ = _forward(engine.config, engine.executor.params, tokens)
    return np.asarray(jax.nn.log_softmax(logits[0]))[: len(ids)]


_forward = jax.jit(forward, static_argnums=0)


@contextlib.contextmanager
def failing(engine: Engine, number: int, error: BaseException) -> Iterator[None]:
    """Have the program that is run as the `number`th raise an error."""
    call, count = engine.programs.call, itertools.count(1)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            raise error
        return call(*args, **kwargs)

    with mock.patch.object(engine.programs, "call", fails):
        yield


def cache_bytes(slots: int) -> int:
    """Return the size of a float32 cache of one row."""
    return 2 * TOY.num_layers * slots * TOY.num_kv_heads * TOY.head_dim * 4


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Give a list of what JAX compiles meanwhile."""
    found = []

    def count(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
