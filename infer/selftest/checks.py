"""The checks of `infer.selftest`, and the figures that it measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.files.manifest import MANIFEST, verify_checkpoint
from convert.random import NAME as RANDOM
from glm2_jax import KVCache, last_logits
from glm2_jax.cli.messages import Progress, human_size
from glm2_jax.errors import GLMError
from glm2_jax.quant import QTensor
from glm2_jax.runtime.buckets import bucket
from glm2_jax.text.prompt import build_prompt
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params
from infer.selftest.known import (
    HELLO,
    PARAMETERS_6B,
    Answer,
    Prompt,
    claims_6b,
    is_6b,
    known_answers,
    known_tokens,
    same_text,
)

PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"
ANSWER_TOKENS = 64
DECODE_TOKENS, DECODE_SECONDS, DECODE_RUNS = 128, 5.0, 10  # measure until one of them is reached
STEPS = 2  # decode steps that are compared with one prefill

# Largest difference of two logits as a share of the largest logit. An accelerator multiplies
# float32 in narrower types by default.
_TOLERANCES = {"float32": 1e-4, "float32 accelerated": 2e-2}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    status: str  # "pass", "FAIL" or "skipped"
    expected: str = ""  # for people; "" where there is nothing to compare with
    got: str = ""
    note: str = ""  # why it failed or was skipped
    exit_code: int = 4  # of the command, if the check failed


@dataclass(frozen=True)
class Figures:
    """Speed at batch 1 once everything is compiled; seconds, tokens per second."""

    load_s: float
    compile_s: float
    prefill_tokens: int
    prefill_rate: float
    decode_tokens: int
    decode_rate: float


def compare(name: str, expected: Any, got: Any, note: str = "") -> Check:
    """Return the check that two values are equal."""
    same = expected == got
    return Check(name, PASS if same else FAIL, str(expected), str(got), "" if same else note)


def check_files(folder: Path) -> Check:
    """Check whether every file of a folder in our own format is as it was written."""
    if not (folder / MANIFEST).exists():
        return Check("files", SKIPPED, note=f"{MANIFEST} not found, which holds their checksums")
    try:
        with Progress("checking the files", show=human_size) as bar:
            manifest = verify_checkpoint(folder, bar.update)
    except GLMError as error:
        return failure("files", error)
    return Check(
        "files", PASS, got=f"{len(manifest.files)} files have the checksums of the manifest"
    )


def run_checks(engine: Engine, *, name: object = None) -> Iterator[Check]:
    """Run all checks of a loaded model, one after the other.

    Args:
        name: what the folder calls itself, `_name_or_path` of its config.json.
    """
    yield from guarded("parameters", lambda: [_parameters(engine, claims_6b(name))])
    yield from guarded("shapes", lambda: [_shapes(engine)])
    yield from guarded("finite", lambda: [_finite(engine)])
    yield from guarded("prompt ids", lambda: _prompt_ids(engine))
    yield from guarded("cache", lambda: [_cache(engine)])
    stored = engine.checkpoint.summary.stored_dtype
    answers = known_answers(engine.config, engine.tokenizer, stored)
    if engine.template != "chatglm2" or name == RANDOM:
        answers = ()
    for answer in answers:
        yield from guarded("first token", partial(_answer, engine, answer))
    for skipped in ("first token", "answer") if not answers else ():
        yield Check(skipped, SKIPPED, note="not known for this checkpoint")


def guarded(name: str, checks: Callable[[], list[Check]]) -> list[Check]:
    """Return the checks, or their failure."""
    try:
        return checks()
    except GLMError as error:
        return [failure(name, error)]


def failure(name: str, error: GLMError) -> Check:
    """Return the check that an error ended."""
    note = " ".join(f"{error.why} {error.fix}".split())
    return Check(name, FAIL, got=error.what, note=note, exit_code=error.exit_code)


def _leaves(params: Any) -> dict[str, Any]:
    """{"layers.q": array, ...}; {"layers.3.q.values": array, ...} of a list, quantized."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def _parameters(engine: Engine, named_6b: bool) -> Check:
    expected = engine.config.num_params
    if named_6b or is_6b(engine.config):
        expected = PARAMETERS_6B
    params = engine.checkpoint.params
    leaves = jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, QTensor))
    note = "the folder's name is that of a 6B checkpoint" if named_6b else ""
    return compare("parameters", f"{expected:,}", f"{sum(leaf.size for leaf in leaves):,}", note)


def _shapes(engine: Engine) -> Check:
    params, summary = engine.checkpoint.params, engine.checkpoint.summary
    precision = Precision(summary.dtype, summary.quantization)
    stacked = not isinstance(params["layers"], list)
    trees = abstract_params(engine.config, precision, stacked=stacked), params
    expected, found = ({name: x.shape for name, x in _leaves(tree).items()} for tree in trees)
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if not wrong:
        return Check("shapes", PASS, got=f"{len(found)} tensors match the configuration")
    texts = (f"{wrong[0]} {shapes.get(wrong[0], 'absent')}" for shapes in (expected, found))
    return Check("shapes", FAIL, *texts, note=f"{len(wrong)} tensors differ")


@jax.jit
def _finite_rows(array: jax.Array) -> jax.Array:
    """[L, ...] -> bool [L]: the largest magnitude keeps NaN and infinity.

    This needs no memory, where isfinite and then all first writes a byte for every number (jax
    0.10.2 and 0.12.0, on the CPU; float16, which is not used there, is copied in both).
    """
    return jnp.isfinite(jnp.abs(array).max(axis=tuple(range(1, array.ndim))))


def _finite(engine: Engine) -> Check:
    wrong, leaves = [], _leaves(engine.checkpoint.params)
    for name, leaf in leaves.items():
        if leaf.dtype == np.int8:
            continue
        rows = np.flatnonzero(~np.asarray(_finite_rows(leaf)))
        stacked = name.startswith("layers.") and not name.split(".")[1].isdecimal()
        unit = "layer" if stacked else "row"
        wrong += [f"{name} {unit} {row}" for row in rows[:3]]
    if wrong:
        return Check("finite", FAIL, "no NaN or infinity", f"in {', '.join(wrong[:5])}")
    return Check("finite", PASS, got=f"no NaN or infinity in {len(leaves)} tensors")


def _prompt_ids(engine: Engine) -> list[Check]:
    known = known_tokens(engine.config, engine.tokenizer)
    if known is None:
        note = f"not known for this tokenizer of {engine.tokenizer.num_pieces:,} pieces"
        return [Check("prompt ids", SKIPPED, note=note)]
    roles = "<|user|>" in engine.tokenizer.special
    able = [prompt for prompt in known.prompts if roles or prompt.template != "chatglm3"]
    return [_one_prompt(engine, known.name, prompt) for prompt in able]


def _one_prompt(engine: Engine, name: str, prompt: Prompt) -> Check:
    got = build_prompt(engine.tokenizer, prompt.template, prompt.question)
    if tuple(got) != prompt.ids:
        note = f"tokenizer.model is not the {name} one, or it is damaged"
        return Check("prompt ids", FAIL, str(list(prompt.ids)), str(got), note)
    short = prompt.question.split("\n")[0]
    text = f"{len(got)} ids for {short} ({prompt.template}), as the {name} tokenizer gives"
    return Check("prompt ids", PASS, got=text)


def _cache(engine: Engine) -> Check:
    """Compare the logits of one prefill with those of decode steps on a cache."""
    ids = engine.build_prompt(HELLO)
    tokens = np.array([ids], np.int32)
    size = bucket(len(ids), max(engine.max_length, len(ids)))
    config, params, call = engine.config, engine.checkpoint.params, engine.programs.call
    last = np.array([len(ids) - 1], np.int32)
    want, _ = call("check", tokens.shape, partial(last_logits, config), params, tokens, last)
    head = tokens[:, :-STEPS]
    cache = call("check fill", (head.shape, size), partial(_fill, config, size), params, head)
    got = want
    for token in tokens[0, -STEPS:]:
        step = partial(_step, config)
        got, cache = call("check step", size, step, params, token.reshape(1, 1), cache)
    want, got = np.asarray(want), np.asarray(got)
    difference = float(np.abs(want - got).max() / max(np.abs(want).max(), 1e-30))
    tolerance = _tolerance(engine)
    status = PASS if difference <= tolerance else FAIL  # NaN fails, too
    return Check("cache", status, f"at most {tolerance:g}", f"cached - uncached {difference:.1e}")


def _fill(config, size: int, params, tokens) -> KVCache:
    cache = KVCache.zeros(config, 1, size, params["final_norm"].dtype)
    _, cache = last_logits(config, params, tokens, jnp.zeros(1, jnp.int32), cache=cache)
    assert cache is not None
    return cache


def _step(config, params, token, cache):
    return last_logits(config, params, token, jnp.zeros(1, jnp.int32), cache=cache)


def _tolerance(engine: Engine) -> float:
    name = engine.checkpoint.summary.dtype
    if name == "float32" and engine.device.platform != "cpu":
        name = "float32 accelerated"
    return _TOLERANCES.get(name, _HALF_TOLERANCE)


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=tokens)


def _answer(engine: Engine, known: Answer) -> list[Check]:
    ids = engine.build_prompt(known.question)
    (completion,) = engine.complete([ids], _greedy(ANSWER_TOKENS), clean=True)
    first = completion.output_ids[0] if completion.output_ids else None
    right = any(same_text(completion.text, text) for text in known.texts)
    text = completion.text if right else f"{completion.text[:80]!r}"
    note = "" if right else "different, damaged or fine-tuned weights"
    expected, got = (f"{token} for {known.question}" for token in (known.first, first))
    return [
        compare("first token", expected, got),
        Check("answer", PASS if right else FAIL, known.texts[0], text, note),
    ]


def measure(engine: Engine) -> Figures:
    """Measure prefill and decode speed, each after a run that compiles and warms up.

    Raises:
        GLMError: the model computes NaN, or memory runs out.
    """
    compiled_before = engine.programs.seconds
    ids = engine.build_prompt(HELLO)
    length = 128 if engine.device.platform == "cpu" else 512
    length = max(min(length, engine.max_length // 2), 1)
    for _ in range(2):
        (read,) = engine.complete([list(islice(cycle(ids), length))], _greedy(1))
    engine.complete([ids], _greedy(ANSWER_TOKENS))
    tokens = runs = 0
    seconds, start = 0.0, time.perf_counter()
    while tokens < DECODE_TOKENS and runs < DECODE_RUNS:
        (answer,) = engine.complete([ids], _greedy(ANSWER_TOKENS))
        tokens += answer.stats.decode_tokens
        seconds += answer.stats.decode_s
        runs += 1
        if time.perf_counter() - start > DECODE_SECONDS:
            break
    compile_s = engine.programs.seconds - compiled_before
    rate = tokens / seconds if seconds else 0.0
    stats = read.stats
    return Figures(engine.load_s, compile_s, stats.prefill_tokens, stats.prefill_rate, tokens, rate)
