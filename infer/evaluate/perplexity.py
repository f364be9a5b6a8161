"""`--task perplexity`: how likely texts, and answers to questions, are to a model, or to each
variant that `--compare` names, also next to the model that `--against` names.

A text follows the template's prefix ids. One that is longer than the window is read in overlapping
windows: each token counts once, in the first window that has it, and except in the first window at
least `window - stride` tokens come before it. In a conversation every answer and its end count, as
in training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.loading.folder import open_folder, target_scheme
from glm2_jax.cli.messages import human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.datasets.encode import Encoder
from glm2_jax.datasets.rows import parse_row, read_rows
from glm2_jax.datasets.texts import spans
from glm2_jax.errors import InputError, UsageError
from glm2_jax.runtime.gather import gathered
from infer.engine.load import demo_folder
from infer.engine.reader import Item, nats_of, read_all
from infer.evaluate.options import Variant
from infer.evaluate.rows import BUNDLED, BadRows, data_file
from infer.memory.budget import DEFAULT_CONTEXT
from infer.startup import find_choice, note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.engine.engine import Engine
    from infer.evaluate.options import Settings

WINDOW = 2048  # tokens of a window by default


class Material(NamedTuple):
    """What is read, and the size of what counts in it: rows, characters, bytes of UTF-8."""

    items: list[Item]
    size: dict[str, int]


@dataclass
class Total:
    """Sums over the tokens that count: negative log-likelihood in nats, and distances of the logits
    from those of the first engine, as `distances` returns them (0 for the first one itself)."""

    tokens: int = 0
    nats: float = 0.0
    largest: float = 0.0  # the largest difference
    distances: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def likelihood(self, material: Material) -> dict[str, Any]:
        """Return the averages of the likelihood."""
        per_token = self.nats / self.tokens
        return {
            "rows": material.size["rows"],
            "tokens": self.tokens,
            **material.size,
            "nats_per_token": per_token,
            "perplexity": math.exp(min(per_token, 700.0)),  # a larger one has no float
            "nats_per_character": self.nats / material.size["characters"],
            "bits_per_byte": self.nats / material.size["bytes"] / math.log(2),
        }

    def distance(self) -> dict[str, float]:
        """Return the distances from the first engine; KL(first || this) in nats."""
        mean, divergence, different = (self.distances / self.tokens).tolist()
        return {
            "mean_abs_delta_logit": mean,
            "max_abs_delta_logit": self.largest,
            "kl_divergence": divergence,
            "top1_agreement": 1 - different,
        }


def run(settings: Settings) -> dict[str, Any]:
    """Read all rows; returns the figures."""
    bad = BadRows(settings.max_bad)
    parse = partial(parse_row, fmt=settings.format)
    rows = bad.keep(read_rows(data_file(settings.data)), parse)
    bad.check(len(rows))
    note_demo_model(settings.choice)
    choice, batch = find_choice(settings.choice), settings.batch_size
    settings = dataclasses.replace(settings, choice=choice)
    _check_folder(settings)
    (variant, choice), *others = _compared(settings)
    options = variant.with_cache(settings.options)
    contents = {"rows": [row for _, row in rows]}
    engine = open_engine(choice, options, rows=batch, contents=contents)
    material = prepare(engine, rows, bad, settings.window, settings.stride)
    if others:
        figures = {"variants": _compare(settings, variant, others, engine, material)}
    else:
        [total] = measure([engine], material, batch)
        figures = total.likelihood(material)
    return {"data": settings.data or BUNDLED, "bad_rows": bad.count, **figures}


def _check_folder(settings: Settings) -> None:
    """Raise UsageError for what the model cannot do, before its weights are loaded."""
    choice = settings.choice
    folder = open_folder(choice.path or demo_folder(), **choice.form)
    longest = min(settings.options.max_length or DEFAULT_CONTEXT, folder.config.seq_length)
    fit_windows(settings.window, settings.stride, longest, len(folder.tokenizer.prefix_ids))
    for variant in settings.compare or ():
        one = variant.of(choice)
        try:
            target_scheme(folder, one.quantize, one.quantize_embeddings)
        except UsageError as error:
            raise UsageError(
                f"--compare {variant.name}: {error.what}",
                error.why,
                f"Leave {variant.name} out, or start from the original weights.",
            ) from None


def _compared(settings: Settings) -> list[tuple[Variant, ModelChoice]]:
    """Return every model to read with, the one that the others are compared with first."""
    choice = settings.choice
    named = settings.compare or (Variant(choice.path or "demo", None, None),)
    found = [(variant, variant.of(choice)) for variant in named]
    if settings.against is None:
        return found
    plain = ModelChoice(
        path=settings.against, dtype=choice.dtype, layers=choice.layers, mesh=choice.mesh,
        device=choice.device,
    )  # fmt: skip
    plain = find_choice(plain)
    tokens = [_tokens(one) for one in (plain, choice)]
    if tokens[0] != tokens[1]:
        raise UsageError(
            f"--against {settings.against} has other tokens, or another prompt.",
            "Logits are compared token by token.",
            "Name the model that this one was made from.",
        )
    return [(Variant(settings.against, None, None), plain), *found]


def _tokens(choice: ModelChoice) -> tuple[Any, ...]:
    """Return what decides the ids of a text, and how many logits each has."""
    folder = open_folder(choice.path or demo_folder(), **choice.form)
    tokenizer = folder.tokenizer
    ids = tokenizer.special, tokenizer.added, tokenizer.start_ids
    return tokenizer.model_bytes, *ids, folder.template, folder.config.vocab_size


def _compare(
    settings: Settings,
    variant: Variant,
    others: Sequence[tuple[Variant, ModelChoice]],
    first: Engine,
    material: Material,
) -> list[dict[str, Any]]:
    """Return the figures of all models; the first, `variant`, stays in memory, the others take
    turns with its maximal length, in the memory that it leaves."""
    options, batch = settings.options, settings.batch_size
    options = dataclasses.replace(options, max_length=first.max_length)
    if options.memory_limit is not None:
        taken = weight_bytes(first)
        note(f"the first variant takes {human_size(taken)} of --memory-limit")
        options = dataclasses.replace(options, memory_limit=max(options.memory_limit - taken, 0))
    results = []
    for another, choice in others:
        note(f"comparing {variant.name} with {another.name}")
        engine = open_engine(choice, another.with_cache(options), rows=batch)
        total, other = measure([first, engine], material, batch)
        if not results:
            results.append(_figures(variant, first, material, total))
        results.append(_figures(another, engine, material, other))
        del engine  # before the next is loaded
    return results


def _figures(variant: Variant, engine: Engine, material: Material, total: Total) -> dict[str, Any]:
    summary = engine.checkpoint.summary
    return {
        "variant": variant.name,
        "dtype": summary.dtype,
        "quantization": summary.quantization or "none",
        "kv": engine.executor.kv,
        "weight_bytes": weight_bytes(engine),
        **total.likelihood(material),
        **total.distance(),
    }


def weight_bytes(engine: Engine) -> int:
    """Return the bytes of all parameters in memory."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(engine.checkpoint.params))


def fit_windows(
    window: int | None, stride: int | None, longest: int, prefix: int
) -> tuple[int, int]:
    """Return the text tokens of a window, and the stride; None = the default of the flag.

    `longest` is the maximal length of the engine, `prefix` the tokens before the text in each
    window. UsageError: the window does not fit, or the stride is not smaller than it.
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


def prepare(
    engine: Engine,
    rows: Sequence[tuple[str, str | list[dict[str, Any]]]],
    bad: BadRows,
    window: int | None,
    stride: int | None,
) -> Material:
    """Tokenize rows for an engine, each a place and a text or messages; `window` and `stride` as in
    `fit_windows`.

    InputError: no row is left, or too many are bad, such as conversations that are too long.
    """
    longest, prefix = engine.max_length, tuple(engine.tokenizer.start_ids)
    room, stride = fit_windows(window, stride, longest, len(prefix))
    encoder = Encoder(engine.tokenizer, engine.template)

    def items(row: str | list[dict[str, Any]]) -> tuple[str, list[Item]]:
        if isinstance(row, str):
            return row, list(windows(prefix, engine.tokenizer.encode(row), room, stride))
        found = [Item(*encoder.encode(row, number)) for number in range(encoder.count(row))]
        if (most := max((len(ids) for ids, _ in found), default=0)) - 1 > longest:
            raise InputError("too long", f"{most} tokens, at most {longest} are possible")
        answers = (m for m in row if m["role"] == "assistant" and m.get("loss", True))
        text = "".join(answer["content"] or answer.get("metadata", "") for answer in answers)
        return text, found

    good = bad.keep(rows, items)
    counted = [(text, found) for _, (text, found) in good if found]
    if marked := len(good) - len(counted):
        note(f"rows left out, because nothing in them is to be learned: {marked}")
    bad.check(len(counted))
    size = {
        "rows": len(counted),
        "characters": sum(len(text) for text, _ in counted),
        "bytes": sum(len(text.encode()) for text, _ in counted),
    }
    return Material([item for _, found in counted for item in found], size)


def windows(prefix: tuple[int, ...], ids: Sequence[int], room: int, stride: int) -> Iterator[Item]:
    """Cut a text into items of at most `room` of its ids, in which every id counts once."""
    for start, new, end in spans(len(ids), room, stride):
        before = len(prefix) + new - start
        yield Item((*prefix, *ids[start:end]), (False,) * before + (True,) * (end - new))


def measure(engines: Sequence[Engine], material: Material, batch: int) -> list[Total]:
    """Read everything with each engine, `batch` rows at a time; returns one total per engine.
    CheckpointError: NaN or Inf in the logits."""
    totals = [Total() for _ in engines]
    rows = [item.ids[:-1] for item in material.items]
    for numbers, chunks in read_all(engines, rows, batch):
        read, first = [material.items[number] for number in numbers], chunks[0].logits
        for engine, total, chunk in zip(engines, totals, chunks, strict=True):
            call, logits = engine.programs.call, chunk.logits
            nats, counts = nats_of(engine, read, chunk)
            total.tokens += int(counts.sum())
            total.nats += float(nats[counts].sum(dtype=np.float64))
            if logits is not first:
                parts = call("distances", logits.shape, distances, first, logits)
                largest, *others = (gathered(part)[counts] for part in parts)
                total.largest = max(total.largest, float(largest.max(initial=0.0)))
                total.distances += [part.sum(dtype=np.float64) for part in others]
    return totals


def distances(first: jax.Array, other: jax.Array) -> tuple[jax.Array, ...]:
    """Compare float32 [B, T, V] logits: largest and mean |difference|, KL(first || other) in nats,
    and whether the most likely token is another; each [B, T]."""
    difference = jnp.abs(first - other)
    p, q = jax.nn.log_softmax(first), jax.nn.log_softmax(other)
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    another = first.argmax(axis=-1) != other.argmax(axis=-1)
    return difference.max(axis=-1), difference.mean(axis=-1), divergence, another
