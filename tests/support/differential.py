"""Random tiny models, each answered in every way there is: do the greedy tokens agree?

`python -m tests.support.differential [ARCHITECTURES [MODELS [FIRST]]]` prints the counts, and every
answer that differs; so many models of each architecture share its programs, which take the time.
The reference reads the text again for each token: one device, stacked float32 weights, no cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, UsageError, check_mesh, forward, make_mesh, params_sharding
from glm2_jax.choices import FAMILIES, ROPE_KINDS
from glm2_jax.mesh import mesh_text
from glm2_jax.model import unstack_layers
from glm2_jax.schemes import SCHEMES
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from tests.support.engine_toy import streamed, toy_engine
from tests.support.toy import abstract_params, quantized

NEW_TOKENS, LONGEST = 16, 48  # of an answer; of a text
END = -1
TIE = 1e-5  # two likeliest logits this close may change places with the order of a sum
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
BLANKS = ("sop", "gmask", "mask", "smask")  # the last ids, where there are any
Texts = list[list[int]]


class Way(NamedTuple):
    """One way to answer: the weights it uses, how its engine is made, what is changed meanwhile."""

    name: str
    form: str  # of the layers
    params: Any
    options: dict[str, Any] = {}
    changed: dict[str, int] = {}
    rows: Sequence[int] = ()  # together, in this order; () = all
    complete: bool = False  # all at once, not token by token
    scheme: str | None = None  # of the weights


class Answer(NamedTuple):
    """What the reference says: tokens, and by how much each was the likeliest."""

    tokens: list[int]  # END in place of a token that ends the answer
    margins: list[float]


def random_config(random: np.random.Generator) -> GLMConfig:
    """A model of sizes that no published one has; half of them fit a mesh along `tensor`."""
    pick: Callable[..., Any] = lambda *choices: choices[random.integers(len(choices))]  # noqa: E731
    kv_heads, multiple = pick(1, 2, 3, 4), pick(2, 8)
    config = GLMConfig(
        num_layers=pick(1, 2, 3, 4, 5),
        vocab_size=multiple * int(random.integers(-(-104 // multiple), 300 // multiple)),
        hidden_size=multiple * int(random.integers(2, 7)),
        ffn_hidden_size=2 * multiple * int(random.integers(1, 6)),
        num_heads=kv_heads * pick(1, 2, 3, 4),
        num_kv_heads=kv_heads,
        head_dim=pick(4, 8, 12, 16),
        seq_length=pick(64, 96, 512),
        norm_eps=pick(1e-5, 1e-6),
        rope_ratio=pick(1.0, 2.5, 16.0, 50.0),
        rope_kind=pick(*ROPE_KINDS),
        rope_table_dtype=pick("float32", "reference"),
        logn_scaling=pick(False, True),
        family=pick(*FAMILIES),
    )
    if not config.block.bidirectional:
        return config
    ids = {f"{name}_token_id": config.vocab_size - i for i, name in enumerate(BLANKS, 1)}
    return dataclasses.replace(config, **ids)


def random_params(config: GLMConfig, seed: int) -> Any:
    """Float32 weights, norms and biases included, whose greedy answers vary."""
    random, size = np.random.default_rng(seed), 0.3 * config.block.residual_scale**0.5

    def draw(path: Any, x: Any) -> jax.Array:
        norm = path[-1].key.endswith("norm")
        center, scale = (norm, 0.1) if x.ndim < 3 else (0, size)
        return jnp.asarray(random.normal(center, scale, x.shape), jnp.float32)

    params = jax.tree.map_with_path(draw, abstract_params(config))
    if config.block.tied_head:  # or every token would be followed by itself
        params["final_norm"] = jnp.asarray(random.normal(0, 1, config.hidden_size), jnp.float32)
    if config.block.bidirectional:  # no answer has them: a text that is read again would change
        params["embed"] = params["embed"].at[-len(BLANKS) :].set(0)
    return params


def random_prompts(config: GLMConfig, random: np.random.Generator) -> Texts:
    """Four prompts; the first repeats itself, so that drafts are found."""
    drawn = [random.integers(3, config.vocab_size, n) for n in random.integers(1, 32, 4)]
    texts = [[*drawn[0].tolist()[:8] * 3], *(ids.tolist() for ids in drawn[1:])]
    if config.block.bidirectional:
        end = config.gmask_token_id, config.sop_token_id
        texts = [[*(x for x in ids[:29] if x < config.mask_token_id), *end] for ids in texts]
    return texts


def reference(
    program: Any,
    params: Any,
    prompts: Texts,
    ends: Sequence[int] = (),
    count: int = NEW_TOKENS,
    width: int = LONGEST,
) -> list[Answer]:
    """The greedy answers, read again for every token; `program` gives logits [4, width, V]."""
    texts, answers = [list(ids) for ids in prompts], [Answer([], []) for _ in prompts]
    for _ in range(count):
        tokens = np.zeros((4, width), np.int32)
        for row, ids in enumerate(texts):
            tokens[row, : len(ids)] = ids
        logits = np.asarray(program(params, tokens))
        for ids, found, row in zip(texts, answers, logits, strict=False):
            if END in found.tokens:
                continue
            second, first = np.sort(row[len(ids) - 1])[-2:]
            token = int(row[len(ids) - 1].argmax())
            found.margins.append(float(first - second))
            found.tokens.append(END if token in ends else token)
            ids.append(token)
    return answers


def answer(
    config: GLMConfig, way: Way, prompts: Texts, shared: dict[Any, Engine]
) -> Iterator[tuple[int, list[int]]]:
    """Each row and the tokens that an engine answers, as in `Answer`."""
    rows = list(way.rows) or list(range(len(prompts)))
    # Programs depend on shapes and places alone, but for what is changed in the code.
    key = str(jax.tree.map(lambda x: (x.dtype, x.sharding), way.params)), str(way.changed)
    form = {"config": config, "family": config.family, "template": "raw"}
    engine = toy_engine(way.params, **form, share=shared.get(key), **way.options)
    shared[key] = engine
    with contextlib.ExitStack() as stack:
        for name, value in way.changed.items():
            stack.enter_context(mock.patch(name, value))
        run = Engine.complete if way.complete else streamed
        completions = run(engine, [prompts[row] for row in rows], GREEDY)
    for row, one in zip(rows, completions, strict=True):
        yield row, [*map(int, one.output_ids), *[END] * (one.finish_reason == "stop")]


def ways(
    config: GLMConfig, weights: dict[str | None, Any], random: np.random.Generator
) -> Iterator[Way]:
    """Ways to answer with the weights of each scheme, None = float32; `random` decides which
    programs there are."""
    params, listed = weights[None], unstack_layers(weights[None])

    def either() -> tuple[str, Any]:
        return ("stacked", params) if random.random() < 0.5 else ("list", listed)

    lonely, order = either(), random.permutation(4).tolist()
    small = {
        "infer.engine.call.ROOM": 2,
        "glm2_jax.runtime.buckets.SMALLEST_BUCKET": 4,
        "glm2_jax.runtime.buckets.GROWTH": 2,
    }
    blocks = {
        "glm2_jax.attention.SCORES": 64,
        "glm2_jax.attention.KEYS": 16,
        "glm2_jax.model.MLP_ELEMENTS": 8 * config.ffn_hidden_size,
    }
    chunk, drafts = int(random.integers(1, 40)), int(random.integers(1, 9))
    both = {"prefill_chunk": chunk, "speculate": drafts}
    yield Way("stacked", "stacked", params)
    yield Way("list", "list", listed)
    for row in range(4):
        yield Way("alone", *lonely, rows=[row])
    yield Way("other rows", *either(), rows=order[:3])
    yield Way("complete", *either(), complete=True)
    yield Way("chunks", *either(), {"prefill_chunk": chunk})
    yield Way("speculate", *either(), {"speculate": drafts})
    yield Way("growth", *either(), both if random.random() < 0.5 else {}, small)
    yield Way("blocks", *either(), changed=blocks)
    for scheme, each in weights.items():
        name = "" if scheme is None else f"{scheme} "
        if scheme is not None:
            yield Way(f"{name}stacked", "stacked", each, scheme=scheme)
            options = {"prefill_chunk": 20} if random.random() < 0.7 else both
            yield Way(f"{name}list", "list", unstack_layers(each), options, scheme=scheme)
        form = "list" if random.random() < 0.5 else "stacked"
        each = unstack_layers(each) if form == "list" else each
        placed, mesh = spread(config, each, random, scheme)
        options = {"speculate": 2} if random.random() < 0.3 else {}
        yield Way(f"{name}mesh", f"{form} {mesh}", placed, options, scheme=scheme)


def spread(
    config: GLMConfig, params: Any, random: np.random.Generator, scheme: str | None = None
) -> tuple[Any, str]:
    """The params on a mesh of all devices that they fit, and the mesh's name."""
    count, how = len(jax.devices()), None if scheme is None else SCHEMES[scheme]
    sizes = [2**power for power in range(count.bit_length())]
    fitting = []
    for tensor, fsdp in ((a, b) for a in sizes for b in sizes if a * b <= count):
        mesh = {"data": count // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
        with contextlib.suppress(UsageError):
            check_mesh(config, mesh, how)
            fitting.append(mesh)
    # A tensor axis where one fits: it is the one that cuts sums.
    fitting = [mesh for mesh in fitting if mesh["tensor"] > 1] or fitting
    mesh = fitting[int(random.integers(len(fitting)))]
    where = params_sharding(
        config, make_mesh(mesh), scheme=how, as_list=isinstance(params["layers"], list)
    )
    return jax.device_put(params, where), mesh_text(mesh)


def check(architecture: int, models: int) -> Iterator[tuple[str, str, str]]:
    """Models of one architecture, which share their programs: (way, outcome, what differs) of every
    answer."""
    config = random_config(np.random.default_rng(architecture))
    program = jax.jit(lambda params, tokens: forward(config, params, tokens)[0])
    schemes = "int8", ("int4", "int4-row")[architecture % 2]
    shared: dict[Any, Engine] = {}
    for model in range(models):
        params = random_params(config, model)
        prompts = random_prompts(config, np.random.default_rng(model))
        ends = toy_engine(params, config=config, family=config.family).stop_ids
        weights: dict[str | None, Any] = {None: params}
        right: dict[str | None, Any] = {None: reference(program, params, prompts, ends)}
        said = {token for one in right[None] for token in one.tokens}
        assert len(said) > 6, f"the answers of {config} do not vary: {said}"
        for scheme in schemes:
            weights[scheme], plain = quantized(params, SCHEMES[scheme])
            right[scheme] = reference(program, plain, prompts, ends)
        for way in ways(config, weights, np.random.default_rng(architecture)):
            for row, tokens in answer(config, way, prompts, shared):
                outcome, detail = _compared(tokens, right[way.scheme][row])
                where = f"architecture {architecture}, model {model}, {way.form}, row {row}"
                yield way.name, outcome, f"{where}: {detail}; {config}"


def main(architectures: int = 40, models: int = 5, first: int = 0) -> dict[str, Any]:
    """Checks so many models of each architecture; how many answers of each way are right."""
    counts: dict[str, Counter[str]] = {}
    differing = []
    for number in range(first, first + architectures):
        # In place of the sampler, which takes half the time to compile, what it does when greedy.
        instead = {"sample": _likeliest, "token_logprobs": lambda *_: None}
        alone = mock.patch.multiple("infer.engine.steps", **instead)
        with alone if number % 8 else contextlib.nullcontext():
            for way, outcome, detail in check(number, models):
                counts.setdefault(way, Counter())[outcome] += 1
                if outcome != "same":
                    differing.append(f"{way}: {outcome}: {detail}")
                    print(differing[-1], file=sys.stderr, flush=True)
        jax.clear_caches()
        print(f"{number + 1 - first}/{architectures}", file=sys.stderr, flush=True)
    return {"models": architectures * models, "ways": counts, "differing": differing}


def _likeliest(logits: jax.Array, *_: Any) -> jax.Array:
    return jnp.argmax(logits, -1).astype(jnp.int32)


def _compared(tokens: list[int], right: Answer) -> tuple[str, str]:
    """ "same"; "tie" where a true tie decided the first token that differs; or "differs"."""
    if tokens == right.tokens:
        return "same", ""
    pairs = zip(tokens, right.tokens, strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if at is None:
        return "differs", f"{len(tokens)} tokens, not {len(right.tokens)}"
    margin = right.margins[at]
    return "tie" if margin <= TIE else "differs", f"token {at}, margin {margin:.2g}"


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
