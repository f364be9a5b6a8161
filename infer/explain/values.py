"""The walk on real values: what a prompt does in every layer, and the answer token by token.

Axis letters as in `glm2_jax.model`; here T is the prompt and the answer together, and B is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    walked = _Walked(engine, tokens, len(ids), steps, dict.fromkeys(heads), progress)
    name = partial(named, engine.tokenizer)
    lens = walked.lens(top_k)
    layers = [
        Layer(index - 1, stream, attention, mlp, _candidates(name, *likely))
        for index, ((stream, attention, mlp), likely) in enumerate(
            zip(walked.lengths, lens, strict=True)
        )
    ]
    return Values(
        text=prompt_text(engine.tokenizer, ids),
        tokens=tuple(name(i) for i in ids),
        layers=tuple(layers),
        heads=tuple(Head(*at, _rounded(found)) for at, found in walked.heads.items()),
        steps=tuple(_steps(name, walked, answer.output_ids, top_k)),
        answer=answer.text,
        end="stop" if ended else answer.finish_reason,
        dtype=dtype_name(engine.checkpoint.params["final_norm"].dtype),
    )


class _Walked:
    """A walk through all layers, and what was seen of it.

    Attributes:
        lengths: for the embedding and each layer, those of the stream, of attention's and of the
            mlp's part, of the prompt's tokens: a list of P each.
        heads: (layer, head) -> probabilities [P, P].
    """

    def __init__(
        self,
        engine: Engine,
        tokens: Sequence[int],
        prompt: int,
        steps: int,
        heads: dict[tuple[int, int], Any],
        progress: Callable[[int], None],
    ):
        config, params = engine.config, engine.checkpoint.params
        self._jit = partial(jax.jit, compiler_options=compiler_options(engine.device.platform))
        self._config = config
        self._ends = {name: params[name] for name in ("embed", "final_norm", "head")}
        with jax.default_device(engine.device):
            x, context = self._jit(partial(_begin, config))(self._ends, jnp.asarray([tokens]))
            layer = self._jit(partial(_layer, config))
            rows = [x[0, prompt - 1]]
            nothing = [0.0] * prompt
            self.lengths = [[_rounded(_length(x)[:prompt]), nothing, nothing]]
            self.heads = heads
            for index in range(config.num_layers):
                x, lengths, probs = layer(_weights(params, index), x, context)
                rows.append(x[0, prompt - 1])
                self.lengths.append([_rounded(part[:prompt]) for part in lengths])
                for at in heads:
                    if at[0] == index:
                        heads[at] = np.asarray(probs[at[1], :prompt, :prompt])
                progress(index + 1)
            self._rows = jnp.stack(rows)
            self._answering = x[0, prompt - 1 : prompt - 1 + steps]

    def lens(self, top_k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The most probable tokens after the prompt, at the embedding and every layer."""
        return list(zip(*self._likeliest(self._rows, top_k)[1:], strict=True))

    def answering(self, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every token of the answer, and its end: all probabilities, the highest, their ids."""
        return self._likeliest(self._answering, top_k)

    def _likeliest(self, x: jax.Array, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = min(top_k, self._config.vocab_size)

        def likeliest(ends: Any, x: jax.Array) -> Any:
            probabilities = jax.nn.softmax(stages.walk_head(self._config, ends, x), axis=-1)
            return probabilities, *jax.lax.top_k(probabilities, count)

        return jax.device_get(self._jit(likeliest)(self._ends, x))


def _begin(config: GLMConfig, ends: Any, tokens: jax.Array) -> tuple[jax.Array, TokenContext]:
    context, _ = token_context(config, tokens, None, None, None, ends["final_norm"].dtype)
    return stages.embed(config, ends, tokens), context


def _layer(config: GLMConfig, weights: Any, x: jax.Array, context: TokenContext) -> Any:
    """One layer: its output, the lengths of that and of both parts [T], attention [N, T, T]."""
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


def _steps(
    name: Callable[[int], Token], walked: _Walked, output_ids: Sequence[int], top_k: int
) -> Iterator[Step]:
    every, probabilities, ids = walked.answering(top_k)
    for row, (likely, best) in enumerate(zip(probabilities, ids, strict=True)):
        # The engine does not report which id ended the answer: the most probable one did.
        chosen = output_ids[row] if row < len(output_ids) else int(best[0])
        candidate = Candidate(name(chosen), float(every[row, chosen]))
        yield Step(candidate, _candidates(name, likely, best))


def _candidates(
    name: Callable[[int], Token], probabilities: np.ndarray, ids: np.ndarray
) -> tuple[Candidate, ...]:
    pairs = zip(probabilities.tolist(), ids.tolist(), strict=True)
    return tuple(Candidate(name(i), probability) for probability, i in pairs)


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
