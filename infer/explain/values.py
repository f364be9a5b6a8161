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
from glm2_jax.blanks import find_blanks
from glm2_jax.cli.messages import Progress
from glm2_jax.context import TokenContext, token_context
from glm2_jax.limits import SCORES
from glm2_jax.runtime.dtypes import dtype_name
from glm2_jax.text.tokenizer import SPACE_MARK
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.explain import stages
from infer.explain.facts import Candidate, Head, Layer, Step, Token, Values

DIGITS = 6  # after the point, of norms and of attention probabilities
NO_PIECE = "<no piece>"  # of ids that fill up the vocabulary


def longest(config: GLMConfig) -> int:
    """Return the tokens, prompt and answer together, whose scores are computed at once."""
    return min(config.seq_length, int((SCORES / config.num_heads) ** 0.5))


def make_values(
    engine: Engine,
    ids: Sequence[int],
    *,
    heads: Sequence[tuple[int, int]],
    top_k: int,
    max_new_tokens: int,
) -> Values:
    """Answer a prompt, always with the most probable token, and walk through prompt and answer.

    `ids` are fewer than `longest`; `heads` are (layer, head) whose attention is wanted; of each
    token `top_k` candidates are listed. CheckpointError: NaN or Inf in the logits.
    """
    config, tokenizer, params = engine.config, engine.tokenizer, engine.checkpoint.params
    room = min(max_new_tokens, longest(config) - len(ids))
    sampling = SamplingParams(temperature=0.0, max_new_tokens=room)
    *_, event = engine.run([list(ids)], sampling, clean=engine.written.chat)
    answer = event.completion
    assert answer is not None
    ended = answer.stop_reason is not None  # by an end token, since there are no stop strings
    steps = len(answer.output_ids) + ended
    last, x, context, norms, attention = _walk(engine, [*ids, *answer.output_ids], len(ids), heads)
    # The prompt's end in all layers; then the tokens that the answer's tokens follow.
    x = jnp.concatenate([last, x[len(ids) - 1 :][:steps]])

    def likeliest(params: Any, x: jax.Array) -> Any:
        probabilities = jax.nn.softmax(stages.walk_head(config, params, x), axis=-1)
        return probabilities, *jax.lax.top_k(probabilities, min(top_k, config.vocab_size))

    every, *best = jax.device_get(_jit(engine)(likeliest)(params, x))
    likely = [
        tuple(Candidate(named(tokenizer, i), p) for p, i in zip(*pair, strict=True))
        for pair in zip(*(found.tolist() for found in best), strict=True)
    ]
    chosen = list(answer.output_ids)
    if ended:  # the engine does not report which id ended the answer: the most probable one did
        chosen.append(likely[-1][0].token.id)
    rows, places = range(len(norms), len(likely)), context.visible.places[0, : len(ids)]
    return Values(
        text=prompt_text(tokenizer, ids),
        tokens=tuple(named(tokenizer, i) for i in ids),
        positions=_positions(config, ids),
        sees=places.tolist(),
        layers=tuple(Layer(n - 1, *parts, lens=likely[n]) for n, parts in enumerate(norms)),
        heads=tuple(Head(*at, _rounded(attention[at])) for at in heads),
        steps=tuple(
            Step(Candidate(named(tokenizer, i), float(every[row, i])), likely[row])
            for i, row in zip(chosen, rows, strict=True)
        ),
        answer=answer.text,
        end="stop" if ended else answer.finish_reason,
        dtype=dtype_name(params["final_norm"].dtype),
    )


def _walk(
    engine: Engine, tokens: Sequence[int], prompt: int, heads: Sequence[tuple[int, int]]
) -> tuple[Any, ...]:
    """Walk through all layers.

    Returns the stream of the prompt's last token at the embedding and after every layer,
    [1 + L, D]; the stream after the last layer, [T, D]; the context of all tokens; the norms of the
    stream, of attention and of the mlp by layer, the embedding first, for the prompt's tokens; and
    {(layer, head): probabilities [P, P]}.
    """
    config, params = engine.config, engine.checkpoint.params

    def begin(params: Any, tokens: jax.Array) -> tuple[jax.Array, TokenContext]:
        context, _ = token_context(config, tokens, None, None, None, params["final_norm"].dtype)
        return stages.embed(config, params, tokens, context), context

    def layer(weights: Any, x: jax.Array, context: TokenContext) -> Any:
        """Return the output, the norms of that and of both parts [T], and attention [N, T, T]."""
        seen: dict[str, jax.Array] = {}

        def take(name: str, function: Callable[..., Any], *arrays: Any) -> Any:
            seen[name] = function(*arrays)
            return seen[name]

        x = stages.walk_layer(config, weights, x, context, None, take)
        norms = tuple(map(_norm, (x, seen["attention.o"], seen["mlp.down"])))
        return x, norms, seen["attention.softmax"][0]

    attention = {}
    with jax.default_device(engine.device), Progress("layers", config.num_layers) as bar:
        x, context = _jit(engine)(begin)(params, jnp.asarray([tokens]))
        run, nothing, rows = _jit(engine)(layer), [0.0] * prompt, [x[0, prompt - 1]]
        norms: list[tuple[Any, ...]] = [(_rounded(_norm(x)[:prompt]), nothing, nothing)]
        for index in range(config.num_layers):
            x, parts, probs = run(_weights(params["layers"], index), x, context)
            rows.append(x[0, prompt - 1])
            norms.append(tuple(_rounded(part[:prompt]) for part in parts))
            attention |= {
                at: np.asarray(probs[at[1], :prompt, :prompt]) for at in heads if at[0] == index
            }
            bar(index + 1)
        return jnp.stack(rows), x[0], context, norms, attention


def _jit(engine: Engine) -> Callable[..., Any]:
    return partial(jax.jit, compiler_options=compiler_options(engine.device.platform))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x[0].astype(jnp.float32), axis=-1)


def _weights(layers: Any, layer: int) -> Any:
    listed = isinstance(layers, list | tuple)
    return layers[layer] if listed else jax.tree.map(lambda x: x[layer], layers)


def _positions(config: GLMConfig, ids: Sequence[int]) -> list[list[int]]:
    """Return of each token its position, and its block position where it has one."""
    tokens = jnp.asarray([ids], jnp.int32)
    if not config.block.bidirectional:
        return [[index] for index in range(len(ids))]
    index = jnp.arange(len(ids), dtype=jnp.int32)[None]
    blanks, start = find_blanks(config, tokens, index, jnp.ones_like(index))
    return blanks.positions(index, start)[0].T.tolist()


def _rounded(x: Any) -> list[Any]:
    return np.round(np.asarray(x, np.float64), DIGITS).tolist()


def named(tokenizer: Tokenizer, token_id: int) -> Token:
    """Return an id with its piece and its text."""
    special = {number: name for name, number in tokenizer.special.items()}
    piece = special.get(token_id) or _piece(tokenizer, token_id) or NO_PIECE
    return Token(token_id, piece, tokenizer.token_bytes(token_id).decode("utf-8", "replace"))


def prompt_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return a prompt as it was built: without the ids that begin it, roles by their names."""
    special = {number: name for name, number in tokenizer.special.items()}
    rest = ids[len(tokenizer.prefix_ids) :]
    parts = (special.get(i, "").encode() or tokenizer.token_bytes(i) for i in rest)
    text = b"".join(parts).decode("utf-8", "replace")
    return text.removeprefix(" ") if tokenizer.adds_dummy_prefix else text


def _piece(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as SentencePiece writes it, also where the vocabulary is of bytes: "▁" is a
    space, "<0x0A>" a byte that is a control character or a part of a character."""
    if "glm4" not in tokenizer.families:
        return tokenizer.piece(token_id)
    data = tokenizer.token_bytes(token_id)
    try:
        letters = list(data.decode().replace(" ", SPACE_MARK))
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in data)
    return "".join(x if x >= " " else f"<0x{ord(x):02X}>" for x in letters)
