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
from glm2_jax import GLMConfig, KVCache, last_logits
from glm2_jax.cli.messages import Progress, human_size
from glm2_jax.config import PRESETS
from glm2_jax.errors import GLMError
from glm2_jax.quant import QTensor
from glm2_jax.runtime.buckets import bucket
from glm2_jax.text.prompt import build_prompt
from glm2_jax.text.template import find_template
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.known_ids import HELLO, known_tokens
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params
from infer.selftest.known import Answer, claimed_preset, known_answers, same_text

PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"
ANSWER_TOKENS = 64
DECODE_TOKENS, DECODE_SECONDS = 128, 5.0  # measure until one of them is reached
STEPS = 2  # decode steps that are compared with one prefill

# Largest difference of two logits as a share of the largest logit. An accelerator multiplies
# float32 in narrower types by default.
_CPU_TOLERANCE, _ACCELERATED_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2, 5e-2


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    status: str  # "pass", "FAIL" or "skipped"
    expected: str = ""  # for people; "" where there is nothing to compare with
    got: str = ""
    note: str = ""  # why it failed or was skipped
    exit_code: int = 4  # of the command, if the check failed


def failure(name: str, error: GLMError) -> Check:
    """Return the check that an error ended."""
    note = " ".join(f"{error.why} {error.fix}".split())
    return Check(name, FAIL, got=error.what, note=note, exit_code=error.exit_code)


def check_files(folder: Path) -> Check:
    """Check whether every file of a folder in our own format is as it was written."""
    if not (folder / MANIFEST).exists():
        return Check("files", SKIPPED, note=f"{MANIFEST} not found, which holds their checksums")
    try:
        with Progress("checking the files", show=human_size) as bar:
            files = len(verify_checkpoint(folder, bar.update).files)
    except GLMError as error:
        return failure("files", error)
    return Check("files", PASS, got=f"{files} files have the checksums of the manifest")


def run_checks(engine: Engine, *, name: object = None) -> Iterator[Check]:
    """Run all checks of a loaded model, one after the other; `name` is what the folder calls
    itself, `_name_or_path` of its config.json."""
    found = known_answers(engine.config, engine.tokenizer, engine.checkpoint.summary.stored_dtype)
    answers = [one for one in found if one.template == engine.template and name != RANDOM]
    checks: list[tuple[str, Callable[[Engine], Iterator[Check]]]] = [
        ("parameters", partial(_parameters, claimed=claimed_preset(name))),
        ("shapes", _shapes),
        ("finite", _finite),
        ("prompt ids", _prompt_ids),
        ("cache", _cache),
        *(("first token", partial(_answer, known=answer)) for answer in answers),
    ]
    for title, check in checks:
        try:
            yield from check(engine)
        except GLMError as error:
            yield failure(title, error)
    for skipped in ("first token", "answer") if not answers else ():
        yield Check(skipped, SKIPPED, note="not known for this checkpoint")


def _leaves(params: Any) -> dict[str, Any]:
    """{"layers.q": array, ...}; {"layers.3.q.values": array, ...} of a list, quantized."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def _parameters(engine: Engine, claimed: str | None) -> Iterator[Check]:
    config = engine.config if claimed is None else PRESETS[claimed]
    expected = config.num_params
    params = engine.checkpoint.params
    leaves = jax.tree.leaves(params, is_leaf=lambda value: isinstance(value, QTensor))
    count = sum(leaf.size for leaf in leaves)
    if count == expected:
        yield Check("parameters", PASS, got=f"{count:,}")
    else:
        note = "" if claimed is None else f"the folder's name is that of {claimed}"
        yield Check("parameters", FAIL, f"{expected:,}", f"{count:,}", note)


def _shapes(engine: Engine) -> Iterator[Check]:
    params, summary = engine.checkpoint.params, engine.checkpoint.summary
    precision = Precision(summary.dtype, summary.quantization)
    stacked = not isinstance(params["layers"], list)
    trees = abstract_params(engine.config, precision, stacked=stacked), params
    expected, found = ({name: x.shape for name, x in _leaves(tree).items()} for tree in trees)
    wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
    if not wrong:
        yield Check("shapes", PASS, got=f"{len(found)} tensors match the configuration")
        return
    texts = (f"{wrong[0]} {shapes.get(wrong[0], 'absent')}" for shapes in (expected, found))
    yield Check("shapes", FAIL, *texts, note=f"{len(wrong)} tensors differ")


@jax.jit
def _finite_rows(array: jax.Array) -> jax.Array:
    """[L, ...] -> bool [L]: the largest magnitude keeps NaN and infinity.

    This needs no memory, where isfinite and then all first writes a byte for every number (jax
    0.10.2 and 0.12.0, on the CPU; float16, which is not used there, is copied in both).
    """
    return jnp.isfinite(jnp.abs(array).max(axis=tuple(range(1, array.ndim))))


def _finite(engine: Engine) -> Iterator[Check]:
    wrong, leaves = [], _leaves(engine.checkpoint.params)
    for name, leaf in leaves.items():
        if leaf.dtype == np.int8:
            continue
        rows = np.flatnonzero(~np.asarray(_finite_rows(leaf)))
        stacked = name.startswith("layers.") and not name.split(".")[1].isdecimal()
        unit = "layer" if stacked else "row"
        wrong += [f"{name} {unit} {row}" for row in rows[:3]]
    if wrong:
        yield Check("finite", FAIL, "no NaN or infinity", f"in {', '.join(wrong[:5])}")
    else:
        yield Check("finite", PASS, got=f"no NaN or infinity in {len(leaves)} tensors")


def _prompt_ids(engine: Engine) -> Iterator[Check]:
    tokenizer = engine.tokenizer
    known = known_tokens(engine.config, tokenizer)
    if known is None:
        note = f"not known for this tokenizer of {tokenizer.num_pieces:,} pieces"
        yield Check("prompt ids", SKIPPED, note=note)
        return
    for (template, question), ids in known.prompts.items():
        if find_template(template).roles and "<|user|>" not in tokenizer.special:
            continue
        got = build_prompt(tokenizer, template, question)
        if got != ids:
            note = f"tokenizer.model is not the {known.name} one, or it is damaged"
            yield Check("prompt ids", FAIL, str(ids), str(got), note)
        else:
            short = question.split("\n")[0]
            text = f"{len(ids)} ids for {short} ({template}), as the {known.name} tokenizer gives"
            yield Check("prompt ids", PASS, got=text)


def _cache(engine: Engine) -> Iterator[Check]:
    """Compare the logits of one prefill with those of decode steps on a cache."""
    prompt = engine.build_prompt(HELLO)  # in one piece: its tokens may see each other
    tokens = np.array([[*prompt, *prompt[:STEPS]]], np.int32)
    size = bucket(tokens.size, max(engine.max_length, tokens.size))
    compute = partial(_both_ways, engine.config, size)
    params = engine.checkpoint.params
    found = engine.programs.call("check", (tokens.shape, size), compute, params, tokens)
    want, got = map(np.asarray, found)
    difference = float(np.abs(want - got).max() / max(np.abs(want).max(), 1e-30))
    tolerance = _HALF_TOLERANCE
    if engine.checkpoint.summary.dtype == "float32":
        cpu = engine.device.platform == "cpu"
        tolerance = _CPU_TOLERANCE if cpu else _ACCELERATED_TOLERANCE
    status = PASS if difference <= tolerance else FAIL  # NaN fails, too
    yield Check("cache", status, f"at most {tolerance:g}", f"cached - uncached {difference:.1e}")


def _both_ways(config: GLMConfig, size: int, params: Any, tokens: jax.Array) -> Any:
    """Return the last logits of one prefill, and of decode steps after a shorter one."""
    first = jnp.zeros(1, jnp.int32)
    want, _ = last_logits(config, params, tokens, first + tokens.shape[1] - 1)
    cache = KVCache.zeros(config, 1, size, params["final_norm"].dtype)
    got, cache = last_logits(config, params, tokens[:, :-STEPS], first, cache=cache)
    for at in range(-STEPS, 0):
        got, cache = last_logits(config, params, tokens[:, at, None], first, cache=cache)
    return want, got


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=tokens)


def _answer(engine: Engine, known: Answer) -> Iterator[Check]:
    ids = engine.build_prompt(known.question)
    (completion,) = engine.complete([ids], _greedy(ANSWER_TOKENS), clean=True)
    first = completion.output_ids[0] if completion.output_ids else None
    expected, got = (f"{token} for {known.question}" for token in (known.first, first))
    yield Check("first token", PASS if first == known.first else FAIL, expected, got)
    if any(same_text(completion.text, text) for text in known.texts):
        yield Check("answer", PASS, got=completion.text)
    else:
        note = "different, damaged or fine-tuned weights"
        yield Check("answer", FAIL, known.texts[0], f"{completion.text[:80]!r}", note)


def measure(engine: Engine) -> dict[str, float]:
    """Measure speed at batch 1 in tokens per second, each after a run that compiles and warms up.
    GLMError: the model computes NaN, or memory runs out."""
    compiled_before = engine.programs.seconds
    ids = engine.build_prompt(HELLO)
    length = 128 if engine.device.platform == "cpu" else 512
    length = max(min(length, engine.max_length // 2), 1)
    for _ in range(2):
        (read,) = engine.complete([list(islice(cycle(ids), length))], _greedy(1))
    engine.complete([ids], _greedy(ANSWER_TOKENS))
    tokens, seconds, end = 0, 0.0, time.perf_counter() + DECODE_SECONDS
    while tokens < DECODE_TOKENS:
        (answer,) = engine.complete([ids], _greedy(ANSWER_TOKENS))
        tokens += answer.stats.decode_tokens
        seconds += answer.stats.decode_s
        if time.perf_counter() > end:
            break
    return {
        "load_s": engine.load_s,
        "compile_s": engine.programs.seconds - compiled_before,
        "prefill_tokens": read.stats.prefill_tokens,
        "prefill_rate": read.stats.prefill_rate,
        "decode_tokens": tokens,
        "decode_rate": tokens / seconds if seconds else 0.0,
    }
