"""Perplexity: how likely a model finds texts, and answers to questions, token by token.

A text is read behind the template's prefix ids. One that is longer than the window is read in
windows that overlap: each token is counted once, in the first window it is in, and but for the
first window with at least `window - stride` tokens before it. Of a conversation every answer and
what ends it are counted, as training learns them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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

WINDOW = 2048  # tokens read at once, where neither model nor user says less


@dataclass(frozen=True)
class Item:
    """A row of tokens.

    Attributes:
      ids: the tokens.
      counted: for each of them, whether it counts; the first one does not.
    """

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass
class Total:
    """What was measured: nats are minus natural logarithms of probabilities.

    Attributes:
      characters, bytes: of the texts, or of the answers; UTF-8.
    """

    rows: int
    characters: int
    bytes: int
    tokens: int = 0
    nats: float = 0.0

    def figures(self) -> dict[str, Any]:
        """The averages, for people and programs."""
        per_token = self.nats / self.tokens
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "nats_per_token": per_token,
            "perplexity": math.exp(min(per_token, 700.0)),  # beyond that no number is left
            "nats_per_character": self.nats / self.characters,
            "bits_per_byte": self.nats / self.bytes / math.log(2),
        }


@dataclass(frozen=True)
class Material:
    """What is to be read, and what it was made of."""

    items: tuple[Item, ...]
    rows: int
    characters: int
    bytes: int

    @property
    def tokens(self) -> int:
        """How many are read in all, those that only lead up to others included."""
        return sum(len(item.ids) - 1 for item in self.items)

    def total(self) -> Total:
        """An empty total."""
        return Total(self.rows, self.characters, self.bytes)


def prepare(
    engine: Engine,
    rows: Sequence[Text | Conversation],
    bad: BadRows,
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Material:
    """Makes tokens of the rows; conversations that are too long are told as bad rows.

    Args:
      window: tokens read at once, None = 2048 or what the engine has.
      stride: tokens by which windows follow each other, None = half a window.

    Raises:
      UsageError: a window that the engine does not have, or a stride that is not smaller.
      InputError: no row is left, or too many are bad.
    """
    longest = engine.max_length
    prefix = tuple(engine.tokenizer.prefix_ids)
    room, stride = fit_windows(window, stride, longest, len(prefix))
    encoder = Encoder(engine.tokenizer, engine.template)

    def items(where: str, row: Text | Conversation) -> list[Item]:
        if isinstance(row, Text):
            return list(windows(prefix, engine.tokenizer.encode(row.text), room, stride))
        found = []
        for number in reversed(range(encoder.count(row.messages))):  # the longest one first
            ids, learned = encoder.encode(row.messages, number)
            if len(ids) - 1 > longest:
                raise InputError("too long", f"{len(ids)} tokens, of {longest} that there may be")
            found.insert(0, Item(tuple(ids), tuple(learned)))
        return found

    made: list[Item] = []
    texts: list[str] = []
    good = marked = 0
    for row in rows:
        for found in bad.keep([(row.where, row)], items):
            made += found
            texts += _counted_texts(row)
            good, marked = good + bool(found), marked + (not found)
    if marked:
        note(f"rows left out, because nothing in them is to be learned: {marked}")
    bad.check(good)
    sizes = [len(text.encode()) for text in texts]
    return Material(tuple(made), good, sum(map(len, texts)), sum(sizes))


def _counted_texts(row: Text | Conversation) -> list[str]:
    """What of a row counts."""
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
    """(room of a window for a text's tokens, stride) for what was asked; None = the default.

    Args:
      longest: tokens that may be read at once.
      prefix: tokens before each window.

    Raises:
      UsageError: as `prepare`.
    """
    window = min(WINDOW, longest) if window is None else window
    if not prefix + 2 <= window <= longest:
        raise UsageError(
            f"--window {window} is not possible",
            f"A window has {prefix + 2} to {longest} tokens here (--max-length).",
        )
    room = window + 1 - prefix  # the last token of a text is not read, only predicted
    stride = max(window // 2, 1) if stride is None else stride
    if stride >= room:
        raise UsageError(
            f"--stride {stride} is not possible",
            f"Windows of {window} tokens would leave out what is before them.",
            f"Use {room - 1} or less.",
        )
    return room, stride


def windows(prefix: tuple[int, ...], ids: Sequence[int], room: int, stride: int) -> Iterator[Item]:
    """Cuts a text into items of at most `room` of its ids, in which every id counts once."""
    done = 0
    while done < len(ids):
        new = room if not done else stride
        end = min(done + new, len(ids))
        start = max(end - room, 0)
        before = len(prefix) + done - start
        yield Item((*prefix, *ids[start:end]), (False,) * before + (True,) * (end - done))
        done = end


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items to read together, the longest first: what does not fit into memory shows early."""
    ordered = sorted(items, key=lambda item: -len(item.ids))
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


class Targets:
    """What follows each column of a batch, and whether it counts; cut to a chunk's columns."""

    def __init__(self, batch: Sequence[Item], rows: int):
        width = max(len(item.ids) - 1 for item in batch)
        self._next = np.zeros((rows, width), np.int32)
        self._counts = np.zeros((rows, width), bool)
        for row, item in enumerate(batch):
            self._next[row, : len(item.ids) - 1] = item.ids[1:]
            self._counts[row, : len(item.ids) - 1] = item.counted[1:]

    def of(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """int32 [B, T] tokens that follow, and bool [B, T] whether they count."""
        missing = chunk.start + chunk.real.shape[1] - self._next.shape[1]
        columns = slice(chunk.start, chunk.start + chunk.real.shape[1])
        pad = ((0, 0), (0, max(missing, 0)))
        return np.pad(self._next[:, columns], pad), np.pad(self._counts[:, columns], pad)


def measure(engine: Engine, material: Material, batch: int) -> Total:
    """Reads everything and adds up what counts."""
    total = material.total()
    reader = Reader(engine, batch, engine.max_length)
    compiled = engine.programs.seconds
    with Progress("tokens read", material.tokens) as bar:
        done = 0
        for items in batches(material.items, batch):
            targets = Targets(items, reader.batch)
            for chunk in reader.read([item.ids[:-1] for item in items]):
                add(engine, total, chunk, targets)
                done += int(chunk.real.sum())
                bar.start += engine.programs.seconds - compiled  # says nothing of the time left
                compiled = engine.programs.seconds
                bar(done)
    return total


def add(engine: Engine, total: Total, chunk: Chunk, targets: Targets) -> np.ndarray:
    """Adds a chunk to a total; returns bool [B, T], which positions counted.

    Raises:
      CheckpointError: NaN or Inf in the logits.
    """
    tokens, counts = targets.of(chunk)
    nats = gathered(
        engine.programs.call("nats", chunk.logits.shape, token_nats, chunk.logits, tokens)
    )[counts]
    if not np.isfinite(nats).all():
        raise CheckpointError(
            "the model produced NaN or Inf",
            "The weights are damaged, or their numbers do not fit the dtype.",
            "Check the checkpoint's files, or use --dtype float32 or bfloat16.",
        )
    total.tokens += nats.size
    total.nats += float(nats.astype(np.float64).sum())
    return counts


def token_nats(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log softmax(logits)[token]: float32 [B, T, V], int32 [B, T] -> float32 [B, T]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
