"""`--check-data` and `--print-sample`: a report of all rows, and samples with what is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from glm2_jax.escape import join_lines
from train.data.dataset import Dataset
from train.data.duplicates import ALIKE, PIECE, Dialogues, repeats, signature
from train.data.summary import counted, summed

_BINS = 12
_BAR = 50  # characters of the longest bar
_LISTED = 5  # examples of rows that are only counted


@dataclass(frozen=True)
class Report:
    """The result of a check."""

    dataset: Dataset  # the dataset that was checked
    repeats: list[tuple[str, str]]  # (where, where the earlier row is that it nearly repeats)
    growing: list[tuple[str, str]]  # (where, where a row is that continues the same dialogue)

    @property
    def exit_code(self) -> int:
        """The exit code of a command that was asked to check: 3 where there are bad rows."""
        return 3 if self.dataset.num_bad else 0

    def text(self) -> str:
        """Return the report for people."""
        data = self.dataset
        rows, sequences = counted(data.rows, "row"), counted(len(data), "sequence")
        lines = [f"{name}: {fmt}" for name, _, fmt in data.files]
        lines += [f"{rows}, {data.num_bad} of them bad; {sequences} to learn from"]
        lines += summed(data.bad)[0]
        if data.num_bad > len(data.bad):
            lines.append(f"... and {data.num_bad - len(data.bad)} more")
        lines += [f"bad: {n} x {reason}" for reason, n in data.bad_reasons.most_common()]
        lines += data.notes()
        if self.growing:
            lines.append(
                f"dialogues that continue in another row: {counted(len(self.growing), 'row')}; "
                "every row learns all answers in it, so they are learned again and again: keep "
                "only the last row of each dialogue"
            )
            lines += [f"{where} continues in {later}" for where, later in self.growing[:_LISTED]]
        lines.append(
            f"near-duplicates (by MinHash, {ALIKE:.0%} of their {PIECE}-character pieces in "
            f"common): {counted(len(self.repeats), 'row')}"
        )
        lines += [f"{where} nearly repeats {first}" for where, first in self.repeats[:_LISTED]]
        return join_lines([*lines, *self._lengths()])

    def _lengths(self) -> list[str]:
        data = self.dataset
        if not len(data):
            return []
        tokens, learned = (int(x.sum(dtype=np.int64)) for x in (data.lengths, data.learned))
        low, middle, high = np.percentile(data.lengths, (0, 50, 100)).astype(int)
        lines = [
            f"{counted(tokens, 'token')}, {learned} learned",
            f"lengths {low} to {high}, median {middle}, allowed {data.max_length}:",
        ]
        edges, counts = histogram(data.lengths)
        for low, high, n in zip(edges, edges[1:], counts, strict=False):
            bar = "#" * -(-int(n) * _BAR // int(counts.max()))
            lines.append(f"{low + 1:6} - {high:6} {n:9} {bar}".rstrip())
        return lines


def histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return edges [n + 1] and counts [n] of at most 12 bins whose size is 1, 2 or 5 times a power
    of ten; a length that equals an edge is in the bin before it."""
    low, high = int(lengths.min()) - 1, int(lengths.max())
    sizes = (factor * 10**power for power in range(10) for factor in (1, 2, 5))
    size = next(size for size in sizes if size * _BINS >= high - low // size * size)
    edges = np.arange(low // size * size, high + size, size)
    return edges, np.histogram(lengths, edges + 0.5)[0]


def check(
    dataset: Dataset, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Look at every row of a dataset that was opened with `max_bad=None`.

    Args:
        progress: called with the rows compared and to compare.
    """
    rows = dataset.first_of_rows().tolist()
    signatures = np.empty((len(rows), 64), np.uint32)
    dialogues = Dialogues()
    for number, index in enumerate(rows):
        messages = dataset.messages(index)
        dialogues.add(messages)
        signatures[number] = signature("\n".join(message["content"] for message in messages))
        progress(number + 1, len(rows))
    near = [(i, first) for i, first in enumerate(repeats(signatures).tolist()) if i != first]

    def places(pairs: list[tuple[int, int]]) -> list[tuple[str, str]]:
        return [(dataset.source(rows[i]), dataset.source(rows[other])) for i, other in pairs]

    return Report(dataset, places(near), places(dialogues.growing()))


def print_sample(dataset: Dataset, count: int) -> str:
    """Return the tokens of the first sequences, one per line, those that are learned with a star.

    Special ids have their names, bytes and spaces are as the tokenizer writes them.
    """
    tokenizer = dataset.tokenizer
    names = {number: name for name, number in tokenizer.special.items()}
    lines = []
    for index in range(min(count, len(dataset))):
        sample = dataset.sample(index)
        learned = sum(sample.learned)
        lines.append(f"{sample.source}: {len(sample.ids)} tokens, {learned} learned (*)")
        for token, mark in zip(sample.ids, sample.learned, strict=True):
            piece = names.get(token) or tokenizer.piece(token)
            lines.append(f"{'*' if mark else ' '} {token:6} {piece}")
    return join_lines(lines)


def draw(lengths: np.ndarray, max_length: int, path: str) -> None:
    """Draw the histogram of the lengths (extra `plot`) as .png, .svg or .pdf."""
    from matplotlib.figure import Figure

    edges, counts = histogram(lengths)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", edgecolor="white")
    title = f"{counted(len(lengths), 'sequence')}, at most {max_length} tokens allowed"
    axes.set(xlabel="tokens", ylabel="sequences", title=title)
    axes.grid(True, axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)
