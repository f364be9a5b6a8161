"""Perplexity: the likelihood of texts, and of answers to questions, token by token.

A text follows the template's prefix ids. One that is longer than the window is read in overlapping
windows: each token counts once, in the first window that has it, and except in the first window at
least `window - stride` tokens come before it. In a conversation every answer and its end count, as
in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm2_jax.cli.messages import Progress, note
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.runtime.gather import gathered
from infer.datasets.encode import Encoder
from infer.evaluate.reader import Chunk, Reader
from infer.evaluate.rows import BadRows, Conversation, Text

if TYPE_CHECKING:
    from infer.engine.engine import Engine

WINDOW = 2048  # tokens of a window by default


@dataclass(frozen=True)
class Item:
    """A sequence of token ids, and which of them count; the first one never does."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True)
class Material:
    """What is read, and the size of what counts in it: rows, characters, bytes of UTF-8."""

    items: tuple[Item, ...]
    rows: int
    characters: int
    bytes: int

    @property
    def tokens(self) -> int:
        """Number of tokens that are read, counted or not."""
        return sum(len(item.ids) - 1 for item in self.items)


@dataclass
class Total:
    """What was measured so far: counted tokens, and their negative log-likelihood in nats."""

    material: Material
    tokens: int = 0
    nats: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Return the averages."""
        per_token = self.nats / self.tokens
        return {
            "rows": self.material.rows,
            "tokens": self.tokens,
            "characters": self.material.characters,
            "bytes": self.material.bytes,
            "nats_per_token": per_token,
            "perplexity": math.exp(min(per_token, 700.0)),  # a larger one has no float
            "nats_per_character": self.nats / self.material.characters,
            "bits_per_byte": self.nats / self.material.bytes / math.log(2),
        }


def prepare(
    engine: Engine,
    rows: Sequence[Text | Conversation],
    bad: BadRows,
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Material:
    """Tokenize the rows for an engine; `window` and `stride` as in `fit_windows`.

    Raises:
        UsageError: as `fit_windows`.
        InputError: no row is left, or too many are bad, such as conversations that are too long.
    """
    longest = engine.max_length
    prefix = tuple(engine.tokenizer.prefix_ids)
    room, stride = fit_windows(window, stride, longest, len(prefix))
    encoder = Encoder(engine.tokenizer, engine.template)

    def items(where: str, row: Text | Conversation) -> tuple[Text | Conversation, list[Item]]:
        if isinstance(row, Text):
            return row, list(windows(prefix, engine.tokenizer.encode(row.text), room, stride))
        found = []
        for number in reversed(range(encoder.count(row.messages))):  # the longest one first
            ids, learned = encoder.encode(row.messages, number)
            if len(ids) - 1 > longest:
                raise InputError("too long", f"{len(ids)} tokens, at most {longest} are possible")
            found.insert(0, Item(tuple(ids), tuple(learned)))
        return row, found

    good = bad.keep(((row.where, row) for row in rows), items)
    counted = [(row, found) for row, found in good if found]
    if marked := len(good) - len(counted):
        note(f"rows left out, because nothing in them is to be learned: {marked}")
    bad.check(len(counted))
    texts = [text for row, _ in counted for text in _counted_texts(row)]
    return Material(
        tuple(item for _, found in counted for item in found),
        rows=len(counted),
        characters=sum(map(len, texts)),
        bytes=sum(len(text.encode()) for text in texts),
    )


def _counted_texts(row: Text | Conversation) -> list[str]:
    if isinstance(row, Text):
        return [row.text]
    return [
        message["content"] or message.get("metadata", "")
        for message in row.messages
        if message["role"] == "assistant" and message.get("loss", True)
    ]


def fit_windows(
    window: int | None, stride: int | None, longest: int, prefix: int
) -> tuple[int, int]:
    """Return the text tokens of a window, and the stride; None = the default of the flag.

    Args:
        longest: the maximal length of the engine.
        prefix: tokens before the text in each window.

    Raises:
        UsageError: the window does not fit, or the stride is not smaller than it.
    """
    window = min(WINDOW, longest) if window is None else window
    if not prefix + 2 <= window <= longest:
        raise UsageError(
            f"--window must be from {prefix + 2} to {longest}, got {window}",
            "The upper limit is --max-length.",
        )
    room = window + 1 - prefix  # the last token of a text is only predicted, not read
    stride = max(window // 2, 1) if stride is None else stride
    if stride >= room:
        raise UsageError(
            f"--stride must be below {room}, got {stride}",
            f"Otherwise windows of {window} tokens do not overlap and have no context.",
        )
    return room, stride


def windows(prefix: tuple[int, ...], ids: Sequence[int], room: int, stride: int) -> Iterator[Item]:
    """Cut a text into items of at most `room` of its ids, in which every id counts once."""
    done = 0
    while done < len(ids):
        end = min(done + (stride if done else room), len(ids))
        start = max(end - room, 0)
        before = len(prefix) + done - start
        yield Item((*prefix, *ids[start:end]), (False,) * before + (True,) * (end - done))
        done = end


def _targets(items: Sequence[Item], chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
    """Return the next tokens of a chunk's columns, int32 [B, T], and whether they count, bool."""
    tokens, counts = np.zeros(chunk.real.shape, np.int32), np.zeros(chunk.real.shape, bool)
    columns = slice(chunk.start + 1, chunk.start + 1 + chunk.real.shape[1])
    for row, item in enumerate(items):
        ids = item.ids[columns]
        tokens[row, : len(ids)], counts[row, : len(ids)] = ids, item.counted[columns]
    return tokens, counts


def measure(
    engines: Sequence[Engine],
    material: Material,
    batch: int,
    also: Callable[[Sequence[Chunk], np.ndarray], None] = lambda chunks, counts: None,
) -> list[Total]:
    """Read everything with each engine, `batch` rows at a time; returns one total per engine.

    `also` is called with the chunks of all engines for the same columns, and bool [B, T], which
    positions count. The maximal length of the first engine holds for all.
    """
    totals = [Total(material) for _ in engines]
    readers = [Reader(engine, batch, engines[0].max_length) for engine in engines]
    # The longest first: what does not fit into memory fails early.
    ordered = sorted(material.items, key=lambda item: -len(item.ids))
    compiled = _compile_seconds(engines)
    with Progress("tokens read", material.tokens) as bar:
        done = 0
        for first in range(0, len(ordered), batch):
            items = ordered[first : first + batch]
            ids = [item.ids[:-1] for item in items]
            for chunks in zip(*(reader.read(ids) for reader in readers), strict=True):
                tokens, counts = _targets(items, chunks[0])
                for engine, total, chunk in zip(engines, totals, chunks, strict=True):
                    _add(engine, total, chunk.logits, tokens, counts)
                also(chunks, counts)
                done += int(chunks[0].real.sum())
                now = _compile_seconds(engines)
                bar.start, compiled = bar.start + now - compiled, now  # not part of the rate
                bar(done)
    return totals


def _compile_seconds(engines: Sequence[Engine]) -> float:
    return sum(engine.programs.seconds for engine in engines)


def _add(
    engine: Engine, total: Total, logits: jax.Array, tokens: np.ndarray, counts: np.ndarray
) -> None:
    """Add a chunk to a total; CheckpointError for NaN or Inf in the logits."""
    nats = gathered(engine.programs.call("nats", logits.shape, token_nats, logits, tokens))[counts]
    if not np.isfinite(nats).all():
        raise CheckpointError(
            "the model produced NaN or Inf",
            "The weights are damaged, or their values do not fit the dtype.",
            "Check the checkpoint's files, or use --dtype float32 or bfloat16.",
        )
    total.tokens += nats.size
    total.nats += float(nats.astype(np.float64).sum())


def token_nats(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return -log softmax(logits)[token]: float32 [B, T, V], int32 [B, T] -> float32 [B, T]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
