"""All sequences of some files: located and measured once, encoded again whenever one is needed."""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from glm2_jax.cli.json_input import parse_object
from glm2_jax.errors import InputError
from glm2_jax.text.tokenizer import Tokenizer
from infer.datasets.encode import Encoder
from infer.datasets.formats import Message, read_messages
from infer.datasets.index import DataFile
from train.data.scan import COLUMNS, MAX_LISTED, Reading, Scan, scan
from train.data.summary import counted, summed

MAX_SHOWN = 20  # bad rows that are shown without --check-data


@dataclass(frozen=True)
class Sample:
    """A token sequence to learn from."""

    ids: list[int]  # the tokens
    learned: list[bool]  # for each of them, whether its prediction counts in the loss
    source: str  # where its row is, see `Dataset.source`


class Group(NamedTuple):
    """The sequences of one file."""

    start: int  # the first sequence
    stop: int  # after the last one
    weight: float  # how often an epoch has each of them, on average
    general: bool = False  # whether they are mixed in between the others


class Dataset:
    """The sequences of all rows that can be learned from; made by `open`.

    Attributes:
        lengths: int32 [N], tokens of every sequence.
        learned: int32 [N], how many of them are learned.
        groups: the sequences of each file, in the order of the files.
        files: (path, sha256, format) of every file, in their order.
        rows: number of rows, good and bad.
        bad: (where, reason) of those that cannot be used, the first MAX_LISTED.
        bad_reasons: how many there are for each reason, without what is particular to a row.
        unused: keys that have no effect, with the number of rows that have them.
        marked: answers that their rows mark as not to be learned.
        tokenizer, template, max_length: as given to `open`.
    """

    lengths: np.ndarray
    learned: np.ndarray

    def __init__(self, encoder: Encoder, max_length: int):
        self._encoder, self.max_length = encoder, max_length
        self.tokenizer, self.template = encoder.tokenizer, encoder.template
        self.groups: list[Group] = []
        self.files: list[tuple[str, str, str]] = []
        self.rows = 0
        self.bad: list[tuple[str, str]] = []
        self.bad_reasons: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.marked = 0
        self._files: list[DataFile] = []
        self._stops: list[int] = []  # after the last sequence of each file
        self._same: list[int] = []  # for each file the first one with the same contents
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def open(
        cls,
        paths: Sequence[str | os.PathLike[str]],
        *,
        tokenizer: Tokenizer,
        template: str,
        max_length: int,
        fmt: str = "auto",
        train_on_prompt: bool = False,
        max_bad: int | None = 0,
        preferred: str | None = None,
        weights: Sequence[float] | None = None,
        mix: tuple[str | os.PathLike[str], float] | None = None,
        scan: Callable[[DataFile, Reading, Callable[[int], None]], Scan] = scan,
        on_note: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Dataset:
        """Read all rows of the files once, and keep where they are and how long.

        Args:
            paths: of JSON lines, JSON arrays, or tables.
            tokenizer, template, train_on_prompt: see `Encoder`.
            max_length, fmt, preferred: see `Reading`; `fmt` is also the default of `preferred`. The
                format of `mix` is always found from its rows.
            max_bad: how many bad rows may be left out; None = any number, even all.
            weights: how often an epoch has each row of each file; default once.
            mix: a file of general rows, and their share of an epoch.
            scan: reads a file, see `train.data.scan.scan`.
            on_note: called with lines for the user.
            progress: called with the bytes read and to read.

        Raises:
            InputError: too many bad rows, or a file that cannot be read, has no rows, or mixes
                formats.
        """
        dataset = cls(Encoder(tokenizer, template, train_on_prompt), max_length)
        dataset._files = [DataFile(path) for path in (*paths, *([mix[0]] if mix else []))]
        preferred = preferred or (None if fmt == "auto" else fmt)
        total = sum(file.size for file in dataset._files)
        before, scans = 0, []
        for number, file in enumerate(dataset._files):
            own_format = fmt if number < len(paths) else "auto"
            reading = Reading(dataset._encoder, max_length, own_format, preferred)
            scans.append(scan(file, reading, lambda done, at=before: progress(at + done, total)))
            before += file.size
        dataset._join(scans)
        dataset._weigh(weights or [1.0] * len(paths), mix[1] if mix else None)
        if max_bad is not None:
            dataset._report(max_bad, on_note)
        return dataset

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> Sample:
        """Return a sequence, encoded again from its row; InputError if that has changed."""
        number = int(self._columns["number"][index])
        ids, learned = self._encoder.encode(self.messages(index), number)
        return Sample(ids, learned, self.source(index))

    def messages(self, index: int) -> list[Message]:
        """Return the complete conversation of a sequence; InputError if its row has changed."""
        file = bisect_right(self._stops, index)
        offset, size, crc = (int(self._columns[name][index]) for name in ("offset", "size", "sum"))
        data = self._files[file].read(offset, size)
        if zlib.crc32(data) != crc:
            raise InputError(
                f"{self.source(index)} has changed since it was first read",
                "Training reads rows from their files again and again.",
                "Do not change the files during a run; start it again.",
            )
        return read_messages(parse_object(data), self.files[file][2])

    def first_of_rows(self) -> np.ndarray:
        """Return int64: the first sequence of every row; those of repeated files once."""
        first = self._columns["number"] == 0
        for number, same in enumerate(self._same):
            if same < number:
                first[self._stops[number - 1] : self._stops[number]] = False
        return np.flatnonzero(first)

    def source(self, index: int) -> str:
        """Return where the row of a sequence is: "file:line", or "file, row N" in a file that has
        several rows in a line."""
        line, row = (int(self._columns[name][index]) for name in ("line", "row"))
        return self._files[bisect_right(self._stops, index)].place(line, row)

    def row_ids(self) -> np.ndarray:
        """Return int64 [N]: a number for the row of each sequence; a file that is given again has
        the same numbers."""
        files = np.searchsorted(self._stops, np.arange(len(self)), side="right")
        return np.array(self._same, np.int64)[files] << 40 | self._columns["row"]

    def notes(self) -> list[str]:
        """Return lines about repeated files, and about keys and answers that are not used."""
        names = [name for name, _, _ in self.files]
        lines = [
            f"{name} is given again" if name == names[i] else f"{name} is a copy of {names[i]}"
            for number, (name, i) in enumerate(zip(names, self._same, strict=True))
            if i < number
        ]
        if self.unused:
            keys = (f"{key} ({counted(n, 'row')})" for key, n in self.unused.most_common())
            lines.append(f"keys that are not used: {', '.join(keys)}")
        if self.marked:
            lines.append(f"{counted(self.marked, 'answer')} marked as not to be learned")
        return lines

    @property
    def num_bad(self) -> int:
        """Number of rows that cannot be used."""
        return self.bad_reasons.total()

    def _join(self, scans: Sequence[Scan]) -> None:
        for file, found in zip(self._files, scans, strict=True):
            self.rows += found.rows
            self.bad += [(file.place(line, row), reason) for line, row, reason in found.bad]
            self.bad_reasons += found.bad_reasons
            self.unused += found.unused
            self.marked += found.marked
            self.files.append((file.name, file.sha256, found.format))
            self._stops.append((self._stops or [0])[-1] + len(found.columns["length"]))
        del self.bad[MAX_LISTED:]
        self._columns = {
            name: np.concatenate([found.columns[name] for found in scans]) for name in COLUMNS
        }
        self.lengths, self.learned = self._columns["length"], self._columns["learned"]
        sums = [sha256 for _, sha256, _ in self.files]
        self._same = [sums.index(sha256) for sha256 in sums]

    def _weigh(self, weights: Sequence[float], share: float | None) -> None:
        ranges = list(pairwise([0, *self._stops]))
        own = [Group(*place, weight) for place, weight in zip(ranges, weights, strict=False)]
        self.groups = own
        if share is not None:
            start, stop = ranges[-1]
            wanted = sum((g.stop - g.start) * g.weight for g in own) * share / (1 - share)
            self.groups = [*own, Group(start, stop, wanted / max(stop - start, 1), general=True)]

    def _report(self, max_bad: int, on_note: Callable[[str], None]) -> None:
        """Report the rows that are not learned; raise InputError where there are too many."""
        lines, more = summed(self.bad, MAX_SHOWN)
        for line in (*self.notes(), *lines):
            on_note(line)
        if more := more + self.num_bad - len(self.bad):
            on_note(f"... and {counted(more, 'more bad row')}")
        found = f"{self.num_bad} of {counted(self.rows, 'row')} cannot be used"
        first = f"the first is {': '.join(self.bad[0])}" if self.bad else ""
        for (name, _, _), group in zip(self.files, self.groups, strict=True):
            if group.start == group.stop:
                raise InputError(f"{name} has no row that can be learned from", first)
        if self.num_bad > max_bad:
            fix = "List all of them: --check-data. Or leave up to N of them out: --max-bad N."
            raise InputError(found, first, fix)
        if self.num_bad:
            on_note(f"{found} and are left out")
        for group in self.groups:
            if group.general:
                n = group.stop - group.start
                count = max(round(n * group.weight), 1)
                on_note(f"general sequences in an epoch: {count}, drawn from {n}")
