"""The walk on real values: what a prompt does in every layer, and the answer token by token.

Axis letters as in `glm2_jax.model`; here T is the prompt and the answer together, and B is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax import GLMConfig, Tokenizer, compiler_options
from glm2_jax.context import TokenContext, token_context
from glm2_jax.limits import SCORES
from glm2_jax.runtime.dtypes import dtype_name
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.explain import stages
from infer.explain.facts import Candidate, Head, Layer, Step, Token, Values

DIGITS = 6  # after the point, of lengths and of attention probabilities
NO_PIECE = "<no piece>"  # of ids that fill up the vocabulary


def longest(config: GLMConfig) -> int:
    """Return the tokens, prompt and answer together, whose scores are computed at once."""
    return min(config.seq_length, int((SCORES / config.num_heads) ** 0.5))


def make_values(
    engine: Engine,
    ids: Sequence[int],
    *,
    heads: Sequence[tuple[int, int]],
    top_k: int = 5,
    max_new_tokens: int = 64,
    progress: Callable[[int], None] = lambda layers: None,
) -> Values:
    """Answer a prompt, always with the most probable token, and walk through prompt and answer.

    Args:
        ids: of the prompt, fewer than `longest`.
        heads: (layer, head) whose attention is wanted.
        top_k: candidates that are listed, at most `infer.engine.params.MAX_LOGPROBS`.
        max_new_tokens: longest answer.
        progress: called with the layers that are done.

    Raises:
        CheckpointError: NaN or Inf in the logits. DeviceError: out of memory.
    """
    room = min(max_new_tokens, longest(engine.config) - len(ids))
    sampling = SamplingParams(temperature=0.0, max_new_tokens=room)
    clean = engine.template != "raw"
    *_, last = engine.run([list(ids)], sampling, clean=clean)
    answer = last.completion
    assert answer is not None
    tokens = [*ids, *answer.output_ids]
    ended = answer.stop_reason is not None  # by an end token, since there are no stop strings
    steps = len(answer.output_ids) + ended
    streams, lengths, attention = _walk(engine, tokens, len(ids), steps, heads, progress)
    name = partial(named, engine.tokenizer)
    every, *best = _likeliest(engine, streams, top_k)
    likely = [
        tuple(Candidate(name(i), p) for p, i in zip(*pair, strict=True))
        for pair in zip(*(found.tolist() for found in best), strict=True)
    ]
    chosen = list(answer.output_ids)
    if ended:  # the engine does not report which id ended the answer: the most probable one did
        chosen.append(likely[-1][0].token.id)
    rows = range(len(lengths), len(likely))
    return Values(
        text=prompt_text(engine.tokenizer, ids),
        tokens=tuple(map(name, ids)),
        layers=tuple(
            Layer(index - 1, *parts, lens=likely[index]) for index, parts in enumerate(lengths)
        ),
        heads=tuple(Head(*at, _rounded(attention[at])) for at in attention),
        steps=tuple(
            Step(Candidate(name(i), float(every[row, i])), likely[row])
            for i, row in zip(chosen, rows, strict=True)
        ),
        answer=answer.text,
        end="stop" if ended else answer.finish_reason,
        dtype=dtype_name(engine.checkpoint.params["final_norm"].dtype),
    )


def _walk(
    engine: Engine,
    tokens: Sequence[int],
    prompt: int,
    steps: int,
    heads: Sequence[tuple[int, int]],
    progress: Callable[[int], None],
) -> tuple[jax.Array, list[tuple[Any, ...]], dict[tuple[int, int], np.ndarray]]:
    """Walk through all layers.

    Returns:
        The stream [1 + L + steps, D]: of the prompt's last token at the embedding and after every
        layer, then after the last layer of the tokens that the answer's tokens follow. The lengths
        of the stream, of attention and of the mlp by layer, the embedding first, for the prompt's
        tokens. {(layer, head): probabilities [P, P]}.
    """
    config, params = engine.config, engine.checkpoint.params
    compiled = _jit(engine)
    found = dict.fromkeys(heads, np.zeros(0))
    with jax.default_device(engine.device):
        x, context = compiled(partial(_begin, config))(_ends(params), jnp.asarray([tokens]))
        layer = compiled(partial(_layer, config))
        rows, nothing = [x[0, prompt - 1]], [0.0] * prompt
        lengths: list[tuple[Any, ...]] = [(_rounded(_length(x)[:prompt]), nothing, nothing)]
        for index in range(config.num_layers):
            x, parts, probs = layer(_weights(params, index), x, context)
            rows.append(x[0, prompt - 1])
            lengths.append(tuple(_rounded(part[:prompt]) for part in parts))
            for at in found:
                if at[0] == index:
                    found[at] = np.asarray(probs[at[1], :prompt, :prompt])
            progress(index + 1)
        answering = x[0, prompt - 1 : prompt - 1 + steps]
        return jnp.concatenate([jnp.stack(rows), answering]), lengths, found


def _likeliest(engine: Engine, x: jax.Array, top_k: int) -> tuple[np.ndarray, ...]:
    """Return the next token at every row of a stream: all probabilities, the highest, their ids."""
    config = engine.config

    def likeliest(params: Any, x: jax.Array) -> Any:
        probabilities = jax.nn.softmax(stages.walk_head(config, params, x), axis=-1)
        return probabilities, *jax.lax.top_k(probabilities, min(top_k, config.vocab_size))

    return jax.device_get(_jit(engine)(likeliest)(_ends(engine.checkpoint.params), x))


def _jit(engine: Engine) -> Callable[..., Any]:
    return partial(jax.jit, compiler_options=compiler_options(engine.device.platform))


def _ends(params: Any) -> dict[str, Any]:
    """Return the parameters outside the layers."""
    return {name: params[name] for name in ("embed", "final_norm", "head")}


def _begin(config: GLMConfig, ends: Any, tokens: jax.Array) -> tuple[jax.Array, TokenContext]:
    context, _ = token_context(config, tokens, None, None, None, ends["final_norm"].dtype)
    return stages.embed(config, ends, tokens), context


def _layer(config: GLMConfig, weights: Any, x: jax.Array, context: TokenContext) -> Any:
    """Run one layer: its output, the lengths of that and of both parts [T], attention [N, T, T]."""
    seen: dict[str, jax.Array] = {}

    def take(name: str, function: Callable[..., Any], *arrays: Any) -> Any:
        seen[name] = function(*arrays)
        return seen[name]

    x = stages.walk_layer(config, weights, x, context, None, take)
    lengths = tuple(_length(part) for part in (x, seen["attention.o"], seen["mlp.down"]))
    return x, lengths, seen["attention.softmax"][0]


def _length(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x[0].astype(jnp.float32), axis=-1)


def _weights(params: Any, layer: int) -> Any:
    layers = params["layers"]
    stacked = not isinstance(layers, list | tuple)
    return jax.tree.map(lambda x: x[layer], layers) if stacked else layers[layer]


def _rounded(x: Any) -> list[Any]:
    return np.round(np.asarray(x, np.float64), DIGITS).tolist()


def named(tokenizer: Tokenizer, token_id: int) -> Token:
    """Return an id with its piece and its text."""
    special = {number: name for name, number in tokenizer.special.items()}
    piece = special.get(token_id) or tokenizer.piece(token_id) or NO_PIECE
    return Token(token_id, piece, tokenizer.token_bytes(token_id).decode("utf-8", "replace"))


def prompt_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return a prompt as it was built: without the ids that begin it, roles by their names."""
    special = {number: name for name, number in tokenizer.special.items()}
    rest = ids[len(tokenizer.prefix_ids) :]
    parts = (special.get(i, "").encode() or tokenizer.token_bytes(i) for i in rest)
    text = b"".join(parts).decode("utf-8", "replace")
    return text.removeprefix(" ") if tokenizer.adds_dummy_prefix else text
