"""What a dataset is: a report of all its rows, and samples with what is learned of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from glm2_jax.cli.tables import fold
from glm2_jax.escape import join_lines
from train.data.dataset import Dataset
from train.data.duplicates import ALIKE, PIECE, Dialogues, repeats, signature
from train.data.summary import counted, summed

_BINS = 12
_LISTED = 5  # examples of what is only counted
_WIDTH = 80  # of the histogram where there is no terminal
_FIGURES = 30  # columns beside a bar


@dataclass(frozen=True)
class Report:
    """What is in a dataset.

    Attributes:
        files: (path, format) of each.
        rows: rows that were read.
        bad: (where, reason), the first ones.
        bad_reasons: how many there are for each reason.
        lengths: int32 [N], tokens of every sequence.
        learned: int, tokens that are learned in an epoch of all rows.
        max_length: most tokens of a sequence.
        repeats: (where, where the earlier row is that it nearly repeats).
        unused: keys that are not used, with their number of rows.
        repeated_files: what is to be said of files with the contents of an earlier one.
        marked: answers that are marked as not to be learned.
        growing: (where, where a row is that goes on with the same dialogue).
    """

    files: list[tuple[str, str]]
    rows: int
    bad: list[tuple[str, str]]
    bad_reasons: Counter[str]
    lengths: np.ndarray
    learned: int
    max_length: int
    repeats: list[tuple[str, str]]
    unused: Counter[str]
    repeated_files: list[str] = field(default_factory=list)
    marked: int = 0
    growing: list[tuple[str, str]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Of a tool that was asked to check: 3 where there are bad rows."""
        return 3 if self.bad_reasons else 0

    def bins(self) -> tuple[np.ndarray, np.ndarray]:
        """The histogram of the lengths: edges [n + 1], a sequence of exactly one is in the bin
        before it, and counts [n]."""
        longest = int(self.lengths.max(initial=1))
        before = int(self.lengths.min(initial=longest)) - 1
        size = next(s for s in _round_numbers() if s * _BINS >= longest - before // s * s)
        edges = np.arange(before // size * size, longest + size, size)
        return edges, np.histogram(self.lengths, edges + 0.5)[0]

    def text(self, columns: int | None = None) -> str:
        """The report for a terminal of so many columns; None = no line is wrapped."""
        lines = [f"{name}: {fmt}" for name, fmt in self.files]
        count, bad = len(self.lengths), self.bad_reasons.total()
        lines += self.repeated_files
        rows, sequences = counted(self.rows, "row"), counted(count, "sequence")
        lines.append(f"{rows}, {bad} of them bad; {sequences} to learn from")
        lines += summed(self.bad)[0]
        if bad > len(self.bad):
            lines.append(f"... and {bad - len(self.bad)} more")
        lines += [f"bad: {n} x {reason}" for reason, n in self.bad_reasons.most_common()]
        if self.unused:
            keys = (f"{key} ({counted(n, 'row')})" for key, n in self.unused.most_common())
            lines.append(f"keys that are not used: {', '.join(keys)}")
        if self.marked:
            lines.append(f"{counted(self.marked, 'answer')} marked as not to be learned")
        if self.growing:
            lines.append(
                f"dialogues that go on in another row: {counted(len(self.growing), 'row')}; every "
                "row learns all answers in it, so their answers are learned again and again: keep "
                "only the last row of each dialogue"
            )
            lines += [f"{where} goes on in {later}" for where, later in self.growing[:_LISTED]]
        lines.append(
            f"near-duplicates (by MinHash, {ALIKE:.0%} of their {PIECE}-character pieces in "
            f"common): {counted(len(self.repeats), 'row')}"
        )
        lines += [f"{where} nearly repeats {first}" for where, first in self.repeats[:_LISTED]]
        if columns is not None:
            lines = [part for line in lines for part in fold(line, columns)]
        return join_lines([*lines, *self._lengths(_WIDTH if columns is None else columns)])

    def _lengths(self, columns: int) -> list[str]:
        if not len(self.lengths):
            return []
        tokens = int(self.lengths.sum(dtype=np.int64))
        low, middle, high = np.percentile(self.lengths, (0, 50, 100)).astype(int)
        lines = [
            f"{counted(tokens, 'token')}, {self.learned} learned",
            f"lengths {low} to {high}, median {middle}, allowed {self.max_length}:",
        ]
        edges, counts = self.bins()
        room = max(columns - _FIGURES, 10)
        for low, high, n in zip(edges, edges[1:], counts, strict=False):
            bar = "#" * -(-int(n) * room // int(counts.max()))
            lines.append(f"{low + 1:6} - {high:6} {n:9} {bar}".rstrip())
        return lines


def check(
    dataset: Dataset, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Looks at every row; opens nothing that `Dataset.open(max_bad=None)` has not.

    Args:
        dataset: all of it is looked at.
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
    earlier = repeats(signatures)
    pairs = [(i, first) for i, first in enumerate(earlier.tolist()) if i != first]
    return Report(
        files=[(name, fmt) for name, _, fmt in dataset.files],
        rows=dataset.rows,
        bad=dataset.bad,
        bad_reasons=dataset.bad_reasons,
        lengths=dataset.lengths,
        learned=int(dataset.learned.sum(dtype=np.int64)),
        max_length=dataset.max_length,
        repeats=[(dataset.source(rows[i]), dataset.source(rows[first])) for i, first in pairs],
        unused=dataset.unused,
        repeated_files=dataset.repeated_files,
        marked=dataset.marked,
        growing=[
            (dataset.source(rows[i]), dataset.source(rows[later]))
            for i, later in dialogues.growing()
        ],
    )


def print_sample(dataset: Dataset, count: int) -> str:
    """The tokens of the first sequences, one a line; a star stands before those that are learned.

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


def draw(report: Report, path: str) -> None:
    """Writes the histogram of the lengths as a picture (extra `plot`).

    Args:
        report: of `check`.
        path: ends in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    edges, counts = report.bins()
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", edgecolor="white")
    title = (
        f"{counted(len(report.lengths), 'sequence')}, at most {report.max_length} tokens allowed"
    )
    axes.set(xlabel="tokens", ylabel="sequences", title=title)
    axes.grid(True, axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)


def _round_numbers():
    """1, 2, 5, 10, 20, 50, ..."""
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10
