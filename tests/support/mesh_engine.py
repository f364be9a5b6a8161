"""The engine on meshes of eight devices, compared with one."""

from __future__ import annotations

import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import (
    GLMConfig,
    KVCache,
    cache_sharding,
    forward,
    init_lora,
    lora_sharding,
    make_mesh,
    params_sharding,
    parse_mesh,
)
from glm2_jax.errors import GLMError
from glm2_jax.lora import with_lora
from glm2_jax.mesh import mesh_text
from glm2_jax.model import unstack_layers
from glm2_jax.prefix import Prefix, with_prefix
from glm2_jax.runtime.gather import gathered
from glm2_jax.schemes import SCHEMES
from glm2_jax.sharding import replicated
from infer.batching.batcher import Batcher
from infer.batching.job import Job
from infer.batching.options import BatchOptions
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.engine.reader import read
from infer.engine.session import Session
from infer.generate import __main__ as generate
from tests.support.differential import reference
from tests.support.engine_toy import compilations, finished, streamed, toy_engine, toy_params
from tests.support.program_text import collectives, kinds
from tests.support.toy import quantized

CONFIG = GLMConfig(2, 104, 32, 64, 8, 2, 8, 256)
PROMPTS = [[5, 6, 7], [40, 12], [9, 8, 30, 77, 5]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)
SAMPLED = SamplingParams(seed=3, max_new_tokens=6, logprobs=2)
LONG = [[5 + i % 90 for i in range(100)], [7, 8, 9]]
ENGINES: dict[tuple[str, str | None], Engine] = {}

# Mesh, scheme of the weights, whether layers are a list: each answers as one device does.
CASES = [
    ("tensor=8", None, True),
    ("tensor=4,data=2", None, False),
    ("data=2,fsdp=2,tensor=2", None, False),
    ("data=8", "int8", False),
    ("data=2,tensor=4", "int4", False),  # a group of columns is on all four devices
]


@cache
def weights(scheme: str | None = None) -> tuple[Any, Any]:
    """Random weights, and what they stand for in float32."""
    params = toy_params(CONFIG)
    return (params, params) if scheme is None else quantized(params, SCHEMES[scheme])


@cache
def extras() -> tuple[Any, Any]:
    """An adapter and a prefix."""
    random = np.random.default_rng(4)
    lora = init_lora(CONFIG, jax.random.key(3), rank=4, targets="all-linear")
    lora = jax.tree.map(lambda x: jax.numpy.asarray(random.normal(0, 0.1, x.shape), x.dtype), lora)
    shape = (CONFIG.num_layers, 3, CONFIG.num_kv_heads, CONFIG.head_dim)
    return lora, Prefix(*(jax.numpy.asarray(random.normal(0, 1, shape), "float32"),) * 2)


def with_extras(params: Any, lora: Any, prefix: Prefix) -> Any:
    return with_prefix(with_lora(params, lora), prefix)


def engine(
    mesh: str | None,
    scheme: str | None = None,
    as_list: bool = False,
    *,
    more: bool = False,
    **kwargs: Any,
):
    """An engine on a mesh; `more` = with an adapter and a prefix."""
    params, (lora, prefix) = weights(scheme)[0], extras()
    params = unstack_layers(params) if as_list else params
    if mesh is not None:
        over, form = make_mesh(parse_mesh(mesh)), SCHEMES[scheme] if scheme else None
        places = params_sharding(CONFIG, over, scheme=form, as_list=as_list)
        params = jax.device_put(params, places)
        lora = jax.device_put(lora, lora_sharding(lora, over))
        prefix = jax.device_put(prefix, replicated(over))
    if more:
        params = with_extras(params, lora, prefix)
    return toy_engine(params, config=CONFIG, **kwargs)


def answered(engine: Engine, prompts: Any, sampling: SamplingParams) -> list[list[int]]:
    """Tokens of all answers, step by step."""
    return [list(map(int, one.output_ids)) for one in streamed(engine, prompts, sampling)]


plain = jax.jit(lambda params, tokens: forward(CONFIG, params, tokens)[0])


def greedy(prompts: Any, count: int, scheme: str | None = None, *, more: bool = False) -> list[Any]:
    """The greedy answers of one device, read again for every token."""
    params = weights(scheme)[1]
    params = with_extras(params, *extras()) if more else params
    return [one.tokens for one in reference(plain, params, prompts, count=count, width=128)]


def drawn(engine: Engine) -> tuple[list[Any], np.ndarray]:
    """The sampled answers, and the log-probabilities of their tokens."""
    answers = streamed(engine, PROMPTS, SAMPLED)
    logprobs = [token.logprob for one in answers for token in one.logprobs or ()]
    return [list(map(int, one.output_ids)) for one in answers], np.array(logprobs)


@cache
def sampled(scheme: str | None = None) -> tuple[list[Any], np.ndarray]:
    """Those of one device."""
    return drawn(engine(None, scheme))


def compare(mesh: str, scheme: str | None, as_list: bool) -> dict[str, Any]:
    """One case: whether the answers are those of one device, and the engine's decode program."""
    one = ENGINES[mesh, scheme] = engine(mesh, scheme, as_list)
    first = answered(one, PROMPTS, GREEDY)
    with compilations() as compiled:
        (tokens, logprobs), again = drawn(one), answered(one, PROMPTS, GREEDY)
    ((at, program),) = ((k, p) for k, p in one.programs._programs.items() if k[0] == "decode")
    memory, found = program.memory_analysis(), collectives(program.as_text())
    rows, slots = cast(Any, at[1])
    assert one.mesh is not None
    where: Any = cache_sharding(CONFIG, one.mesh).k
    part = where.shard_shape((CONFIG.num_layers, rows, CONFIG.num_kv_heads, slots, 8))
    return {
        "mesh": mesh_text(dict(one.mesh.shape)),
        "scheme": scheme,
        "greedy": first == again == greedy(PROMPTS, 6, scheme),
        "sampled": tokens == sampled(scheme)[0],
        "off": float(np.abs(logprobs - sampled(scheme)[1]).max()),
        "rows": rows,
        "programs": one.programs.compiled,
        "compiled_when_warm": len(compiled),
        "cache": 2 * int(np.prod(part)) * 4,
        "alias": memory.alias_size_in_bytes,
        "layers": kinds(found, True),
        "outside": kinds(found, False),
        "largest": max((one.elements for one in found), default=0),
    }


def conversation(engine: Engine) -> list[bool]:
    """Two turns that keep their cache, which grows on the way: whether each is right."""
    session, ids, right = Session(engine), [5, 6, 7], []
    for count in (4, 6):
        answer = finished(session.run(ids, SamplingParams(temperature=0, max_new_tokens=count)))
        said = list(map(int, answer.output_ids))
        right.append([said] == greedy([ids], count))
        ids = [*ids, *said, *range(10, 70)]
    return [*right, answer.stats.reused_tokens > 0]


def more_ways(mesh: str) -> dict[str, bool]:
    """What else there is, on a mesh and on one device."""
    one, long = ENGINES[mesh, None], engine(mesh, more=True, prefill_chunk=256)
    drafting = engine(mesh, speculate=3, share=one)
    logits = [gathered(next(read(each, PROMPTS, 3, 64)).logits) for each in (one, engine(None))]
    off = [
        np.abs(logits[0][i, : len(ids)] - logits[1][i, : len(ids)]).max()
        for i, ids in enumerate(PROMPTS)
    ]
    want = greedy(PROMPTS, 6)
    drafted = drafting.complete(PROMPTS, GREEDY)
    completed = [list(map(int, each.output_ids)) for each in one.complete(PROMPTS, GREEDY)]
    with ThreadPoolExecutor(4) as pool:
        ask = partial(answered, prompts=PROMPTS, sampling=GREEDY)
        threads = list(pool.map(ask, [one, drafting] * 4))  # drafts: not compiled yet
    return {
        "conversation": all(conversation(one)),
        "several threads": all(found == want for found in threads),
        "long prompts, adapter and prefix": answered(long, LONG, GREEDY)
        == greedy(LONG, 6, more=True),
        "speculation": [list(each.output_ids) for each in drafted] == want
        and drafted[0].stats.passes > 0,
        "logits for evaluation": bool(max(off) < 1e-4),
        "complete": completed == want,
        "some rows of a cache": some_rows(mesh),
        "requests that join and leave": joined(one) == want * 2,
    }


def joined(engine: Engine) -> list[list[int]]:
    """Answers of more requests than there are slots."""
    batcher = Batcher(engine, BatchOptions(slots=4, size=104, tokens_per_prefill=64))
    rows, found = engine.rows(PROMPTS * 2, GREEDY), {}
    for row in rows:
        batcher.submit(Job(row, lambda event: found.update({event.row: event.completion})))
    while batcher.step():
        pass
    return [list(map(int, found[row.index].output_ids)) for row in rows]


def some_rows(mesh: str) -> bool:
    """Whether parts of a cache are read and written on a mesh as on one device."""

    def run(params: Any) -> Any:
        tokens, rows = jnp.arange(20).reshape(4, 5), jnp.asarray([2, 9, 0])
        cache = KVCache.zeros(CONFIG, 4, 64, jnp.float32)
        _, cache = forward(CONFIG, params, tokens, cache=cache)
        logits, cache = forward(CONFIG, params, tokens[:3], cache=cache, rows=rows, view=16)
        return logits[:: len(rows) - 1], cache

    one, many = engine(None), ENGINES[mesh, None]
    assert many.mesh is not None
    with jax.set_mesh(many.mesh):
        found = jax.jit(run)(many.executor.params)
    pairs = zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.jit(run)(one.executor.params)), strict=True
    )
    return all(np.abs(gathered(ours) - gathered(other)).max() < 1e-4 for ours, other in pairs)


def command(*flags: str) -> list[str]:
    """What `python -m infer.generate` writes on standard output and error, or its error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            generate.main([*flags, "--compile-cache", "off", "--device", "cpu"])
        except GLMError as error:
            return [type(error).__name__, error.what, error.why, error.fix]
    return [out.getvalue(), err.getvalue()]


def main() -> None:
    ask = ("--prompt", "你好", "--seed", "7", "--layers", "stacked", "--max-new-tokens", "12")
    found: dict[str, Any] = {
        "devices": jax.device_count(),
        "cases": [compare(*case) for case in CASES],
        "varied": len(set(map(str, [*greedy(PROMPTS, 6), *sampled()[0]]))),
        "ways": more_ways("tensor=4,data=2"),
        "command": [command(*ask, "--tp", "8"), command(*ask)],
        "bad": command("--prompt", "x", "--tp", "4"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
