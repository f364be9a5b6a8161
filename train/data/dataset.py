"""All sequences of some files: counted and measured once, encoded again whenever one is wanted."""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from glm2_jax.errors import InputError, UsageError
from glm2_jax.tokenizer import Tokenizer
from infer.requests import parse_object
from train.data import FORMATS
from train.data.encode import Encoder
from train.data.formats import Message, detect, read_messages, unknown_format, unused_keys
from train.data.index import DataFile, Row, no_rows
from train.data.told import counted, joined, summed

MAX_LISTED = 10_000  # bad rows that are kept; all are counted
MAX_TOLD = 20  # bad rows that are told where nobody asked for all


@dataclass(frozen=True)
class Sample:
    """A token sequence to learn from.

    Attributes:
        ids: the tokens.
        learned: for each of them, whether its prediction counts in the loss.
        source: "file:line" of its row.
    """

    ids: list[int]
    learned: list[bool]
    source: str


class Group(NamedTuple):
    """Sequences of one file.

    Attributes:
        start, stop: which ones.
        weight: how often an epoch has each of them, on average.
        general: whether they are mixed in between the others.
    """

    start: int
    stop: int
    weight: float
    general: bool = False


class Dataset:
    """Sequences of all rows that can be learned from; made by `open`.

    Attributes:
        lengths: int32 [N], tokens of every sequence.
        learned: int32 [N], how many of them are learned.
        groups: the sequences of each file, in the order of the files.
        fingerprint: sha256 over the contents of the files.
        files: (path, sha256, format) of every file, in their order.
        rows: rows that were read, good and bad.
        bad: ("file:line", reason) of those that cannot be used, the first MAX_LISTED.
        bad_reasons: how many there are for each reason, without what is particular to a row.
        unused: keys that the formats do not know, with the number of rows that have them.
        tokenizer, template, max_length: as given to `open`.
    """

    lengths: np.ndarray
    learned: np.ndarray
    fingerprint: str

    def __init__(self, encoder: Encoder, max_length: int):
        self.encoder, self.max_length = encoder, max_length
        self.tokenizer, self.template = encoder.tokenizer, encoder.template
        self.groups: list[Group] = []
        self.files: list[tuple[str, str, str]] = []
        self.rows = 0
        self.bad: list[tuple[str, str]] = []
        self.bad_reasons: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self._files: list[DataFile] = []
        self._stops: list[int] = []  # behind the last sequence of each file
        # One entry a sequence: its row's place and sum, and which of the row's sequences it is.
        self._offset, self._line, self._size = array("q"), array("q"), array("i")
        self._sum, self._number = array("I"), array("i")
        self._length, self._learned = array("i"), array("i")

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
        weights: Sequence[float] | None = None,
        mix: tuple[str | os.PathLike[str], float] | None = None,
        on_note: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Dataset:
        """Reads all rows of the files once, and keeps where they are and how long.

        Args:
            paths: of JSON lines, or of JSON arrays.
            tokenizer, template: of the model.
            max_length: most tokens of a sequence; a longer one makes its row a bad one.
            fmt: one of FORMATS, or "auto": of every file, that of its first rows.
            train_on_prompt: learn questions as well as answers.
            max_bad: how many bad rows may be left out; None = any number, even all.
            weights: how often an epoch has each row of each file; default once.
            mix: a file of general rows, and the share of an epoch that they are to be.
            on_note: called with lines for the user.
            progress: called with the bytes read and to read.

        Raises:
            InputError: too many bad rows, or a file that cannot be read, has no rows, or mixes
                formats. UsageError: an argument makes no sense.
        """
        weights = [1.0] * len(paths) if weights is None else list(weights)
        _check(paths, fmt, max_length, weights, mix)
        dataset = cls(Encoder(tokenizer, template, train_on_prompt), max_length)
        dataset._files = [DataFile(path) for path in (*paths, *([mix[0]] if mix else []))]
        total = sum(file.size for file in dataset._files)
        before = 0
        for file in dataset._files:
            dataset._scan(file, fmt, lambda done, at=before: progress(at + done, total))
            before += file.size
        dataset._freeze(weights, mix[1] if mix else None)
        dataset._judge(max_bad, on_note)
        return dataset

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> Sample:
        """A sequence, encoded again from its row; InputError if that has changed."""
        ids, learned = self.encoder.encode(self.messages(index), self._number[index])
        return Sample(ids, learned, self.source(index))

    def messages(self, index: int) -> list[Message]:
        """The whole conversation that a sequence is of; InputError if its row has changed."""
        file = self._file_of(index)
        data = self._files[file].read(self._offset[index], self._size[index])
        if zlib.crc32(data) != self._sum[index]:
            raise InputError(
                f"{self.source(index)} has changed since it was first read",
                "rows are read again from their files while they are learned",
                "do not touch the files of a run; start it again",
            )
        return read_messages(parse_object(data), self.files[file][2])

    def first_of_rows(self) -> np.ndarray:
        """int64: the first sequence of every row; those of repeated files once."""
        first = np.array(self._number, np.int32) == 0
        for number, same in enumerate(self._same()):
            if same < number:
                first[self._stops[number - 1] : self._stops[number]] = False
        return np.flatnonzero(first)

    def source(self, index: int) -> str:
        """ "file:line" of the row of a sequence."""
        return f"{self.files[self._file_of(index)][0]}:{self._line[index]}"

    def close(self) -> None:
        """Closes the files; nothing can be encoded any more."""
        for file in self._files:
            file.close()

    @property
    def num_bad(self) -> int:
        """How many rows cannot be used."""
        return self.bad_reasons.total()

    @property
    def repeated_files(self) -> list[str]:
        """What is to be said of files with the contents of an earlier one, one line each."""
        names = [name for name, _, _ in self.files]
        pairs = [(names[i], names[first]) for i, first in enumerate(self._same()) if first < i]
        return [
            f"{name} is given again" if name == first else f"{name} holds the same as {first}"
            for name, first in pairs
        ]

    def _same(self) -> list[int]:
        """For each file the first one with the same contents."""
        sums = [sum for _, sum, _ in self.files]
        return [sums.index(sum) for sum in sums]

    def _file_of(self, index: int) -> int:
        return bisect_right(self._stops, index)

    def _scan(self, file: DataFile, fmt: str, progress: Callable[[int], None]) -> None:
        chosen, before = _Format(file, fmt), self.rows
        for row in file.rows():
            self.rows += 1
            try:
                self._add(row, chosen)
            except InputError as error:
                if error is chosen.mixture:
                    raise
                self._leave_out(f"{file.name}:{row.line}", error)
            progress(row.offset + row.size)
        if self.rows == before:  # an array without elements
            raise no_rows(file.name)
        self.files.append((file.name, file.sha256, chosen.name or "unknown"))
        self._stops.append(len(self._length))

    def _add(self, row: Row, chosen: _Format) -> None:
        """Takes the sequences of a row, all of them or none."""
        if row.data is None:
            raise InputError("the row is too long to be read", f"{row.size} bytes")
        fields = parse_object(row.data)
        fmt = chosen.of(fields, row.line)
        messages = read_messages(fields, fmt)
        lengths, learned = [], []
        # The last one is the longest: of an endless conversation no more is encoded.
        for number in reversed(range(self.encoder.count(messages))):
            ids, mask = self.encoder.encode(messages, number)
            if len(ids) > self.max_length:
                raise InputError("too long", f"{len(ids)} tokens, at most {self.max_length}")
            lengths.insert(0, len(ids))
            learned.insert(0, sum(mask))
        self.unused.update(unused_keys(fields, fmt))
        self._offset.extend([row.offset] * len(lengths))
        self._line.extend([row.line] * len(lengths))
        self._size.extend([row.size] * len(lengths))
        self._sum.extend([zlib.crc32(row.data)] * len(lengths))
        self._number.extend(range(len(lengths)))
        self._length.extend(lengths)
        self._learned.extend(learned)

    def _leave_out(self, where: str, error: InputError) -> None:
        self.bad_reasons[error.what] += 1
        if len(self.bad) < MAX_LISTED:
            self.bad.append((where, joined(error)))

    def _freeze(self, weights: Sequence[float], share: float | None) -> None:
        self.lengths = np.array(self._length, np.int32)
        self.learned = np.array(self._learned, np.int32)
        sums = "".join(sum for _, sum, _ in self.files)
        self.fingerprint = hashlib.sha256(sums.encode()).hexdigest()
        ranges = list(pairwise([0, *self._stops]))
        own = [Group(*place, weight) for place, weight in zip(ranges, weights, strict=False)]
        self.groups = own
        if share is not None:
            start, stop = ranges[-1]
            wanted = sum((g.stop - g.start) * g.weight for g in own) * share / (1 - share)
            self.groups = [*own, Group(start, stop, wanted / max(stop - start, 1), general=True)]

    def _judge(self, max_bad: int | None, on_note: Callable[[str], None]) -> None:
        """Tells what is not learned, and raises InputError where that is too much."""
        if max_bad is None:
            return
        if self.unused:
            keys = (f"{key} ({counted(n, 'row')})" for key, n in self.unused.most_common(8))
            on_note(f"keys that are not used: {', '.join(keys)}")
        lines, more = summed(self.bad, MAX_TOLD)
        for line in (*self.repeated_files, *lines):
            on_note(line)
        if more := more + self.num_bad - len(self.bad):
            on_note(f"... and {counted(more, 'more bad row')}")
        found = f"{self.num_bad} of {counted(self.rows, 'row')} cannot be used"
        first = f"the first is {': '.join(self.bad[0])}" if self.bad else ""
        for (name, _, _), group in zip(self.files, self.groups, strict=True):
            if group.start == group.stop:
                raise InputError(f"{name} has no row that can be learned from", first)
        if self.num_bad > max_bad:
            fix = "--check-data says what is wrong with which; --max-bad N leaves so many out"
            raise InputError(found, first, fix)
        if self.num_bad:
            on_note(f"{found} and are left out")
        for group in self.groups:
            if group.general:
                n = group.stop - group.start
                count = max(round(n * group.weight), 1)
                on_note(f"general sequences in an epoch: {count}, drawn from {n}")


class _Format:
    """The format of a file: as given, or that of the first row that has all the keys of one."""

    def __init__(self, file: DataFile, fmt: str):
        self._file = file.name
        self.name = None if fmt == "auto" else fmt
        self._detect, self._line = fmt == "auto", 0
        self.mixture: InputError | None = None

    def of(self, row: dict[str, Any], line: int) -> str:
        """The format to read a row in.

        Raises:
            InputError: the row has the keys of no format, or those of two; or, and then it is kept
                as `mixture`, its format is not that of the rows before.
        """
        found = detect(row) if self._detect else None
        if self.name is None:
            if found is None:
                raise unknown_format(row)
            self.name, self._line = found, line
        elif found is not None and found != self.name:
            self.mixture = InputError(
                f"{self._file} mixes formats",
                f"line {self._line} is {self.name}, line {line} is {found}",
                "split it into files of one format each",
            )
            raise self.mixture
        return self.name


def _check(paths, fmt, max_length, weights, mix) -> None:
    if not paths:
        raise UsageError("no data", fix="name a file: --data FILE")
    if fmt not in ("auto", *FORMATS):
        known = f"Known: auto, {', '.join(FORMATS)}."
        raise UsageError(f"unknown format {fmt!r} of data", fix=known)
    if max_length < 2:
        raise UsageError(f"a longest sequence of {max_length} tokens leaves nothing to learn")
    if len(weights) != len(paths) or not all(0 < weight < float("inf") for weight in weights):
        raise UsageError("each file of data needs a weight above 0")
    if mix is not None and not 0 < mix[1] < 1:
        raise UsageError(f"the share of general rows is {mix[1]}, not between 0 and 1")
