"""All sequences of some files: located and measured once, encoded again whenever one is needed."""

from __future__ import annotations

import copy
import os
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from convert.loading.folder import Folder
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.text_input import parse_object
from glm2_jax.config import GLMConfig
from glm2_jax.datasets import PREFERENCE, TEXT
from glm2_jax.datasets.encode import Encoder
from glm2_jax.datasets.formats import Message, read_messages
from glm2_jax.datasets.index import DataFile
from glm2_jax.datasets.pairs import read_pair
from glm2_jax.datasets.texts import Texts
from glm2_jax.errors import InputError, UsageError
from train.data.options import MAX_LENGTH, MIX_RATIO, DataOptions, split_weight
from train.data.scan import COLUMNS, MAX_LISTED, Reading, cached_scan, hash_origin

MAX_SHOWN = 20  # bad rows that are shown without --check-data
_RANGES = 20  # ranges of rows that a line lists


class Sample(NamedTuple):
    """A token sequence to learn from."""

    ids: list[int]  # the tokens
    learned: list[bool]  # for each of them, whether its prediction counts in the loss


class Source(NamedTuple):
    """A file to read."""

    path: str | os.PathLike[str]
    fmt: str = "auto"  # see `Reading`
    weight: float = 1.0  # how often an epoch has each of its rows
    share: float | None = None  # the share of an epoch that general rows have, instead of a weight


class Group(NamedTuple):
    """The sequences of one file."""

    start: int  # the first sequence
    stop: int  # after the last one
    weight: float  # how often an epoch has each of them, on average
    general: bool = False  # whether they are mixed in between the others


class Dataset:
    """The sequences of all rows that can be learned from, of files with the general rows last.

    `max_length` and `preferred` are those of `Reading`, `cache` is that of `cached_scan`; `max_bad`
    bad rows may be left out, None = any number, even all. InputError for more bad rows, or a file
    that cannot be read, has no rows, or mixes formats.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        max_length: int,
        *,
        preferred: str | None = None,
        max_bad: int | None = 0,
        cache: str | None = None,
    ):
        self.encoder, self.max_length = encoder, max_length
        self._files = files = [
            DataFile(source.path, texts=TEXT in (source.fmt, preferred)) for source in sources
        ]
        before, scans = 0, []
        with Progress("reading data", sum(file.size for file in files), show=human_size) as bar:
            for file, source in zip(files, sources, strict=True):
                reading = Reading(encoder, max_length, source.fmt, preferred)
                scans.append(cached_scan(file, reading, lambda n, at=before: bar(at + n), cache))
                before += file.size
        both = list(zip(files, scans, strict=True))
        self.files = [(file.name, file.sha256, one.format) for file, one in both]
        sums = [file.sha256 for file in files]
        self._same = [sums.index(sha256) for sha256 in sums]  # the first with the same contents
        self._columns = {x: np.concatenate([one.columns[x] for one in scans]) for x in COLUMNS}
        self._stops = np.cumsum([len(one.columns["row"]) for one in scans]).tolist()
        self.groups: list[Group] = []  # the sequences of each file
        for (start, stop), source in zip(pairwise([0, *self._stops]), sources, strict=True):
            weight, share = source.weight, source.share
            if share is not None:
                own = sum((group.stop - group.start) * group.weight for group in self.groups)
                weight = own * share / (1 - share) / max(stop - start, 1)
            self.groups.append(Group(start, stop, weight, share is not None))
        # Of all files, see `Scan`; `bad` is (where, reason) of the first MAX_LISTED.
        self.rows, self.marked = sum(x.rows for x in scans), sum(x.marked for x in scans)
        self.bad_reasons: Counter[str] = sum((x.bad_reasons for x in scans), Counter())
        self.unused: Counter[str] = sum((x.unused for x in scans), Counter())
        bad = ((file.place(line, row), why) for file, one in both for line, row, why in one.bad)
        self.bad = list(islice(bad, MAX_LISTED))
        if max_bad is not None:
            self._report(max_bad)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """int32 [N], tokens of every sequence."""
        return self._columns["length"]

    @property
    def width(self) -> int:
        """The most tokens that a row may have: those of a pair are both in it."""
        return self.max_length * (2 if any(fmt == PREFERENCE for _, _, fmt in self.files) else 1)

    @property
    def learned(self) -> np.ndarray:
        """int32 [N], how many of them are learned."""
        return self._columns["learned"]

    def subset(self, indices: np.ndarray) -> Dataset:
        """Return some of the sequences, whose indices ascend, as a dataset."""
        found = copy.copy(self)
        found._columns = {name: values[indices] for name, values in self._columns.items()}
        found._stops = np.searchsorted(indices, self._stops).tolist()
        edges = zip(self.groups, pairwise([0, *found._stops]), strict=True)
        found.groups = [group._replace(start=at[0], stop=at[1]) for group, at in edges]
        return found

    def sample(self, index: int) -> Sample:
        """Return a sequence, encoded again from its row; InputError if that has changed."""
        number = int(self._columns["number"][index])
        return Sample(*self.encoder.encode(self.messages(index), number))

    def samples(self, index: int) -> list[Sample]:
        """Return the sequences that one index stands for: one, or the two of a pair."""
        fields, fmt = self._row(index)
        if fmt != PREFERENCE:
            return [self.sample(index)]
        return [Sample(*self.encoder.encode(side, 0)) for side in read_pair(fields)]

    def messages(self, index: int) -> list[Message]:
        """Return the complete conversation of a sequence, of a pair the chosen one; InputError if
        its row has changed."""
        fields, fmt = self._row(index)
        return read_pair(fields)[0] if fmt == PREFERENCE else read_messages(fields, fmt)

    def _row(self, index: int) -> tuple[dict[str, Any], str]:
        """Return the row of a sequence and its format; InputError if it has changed."""
        file = bisect_right(self._stops, index)
        offset, size, crc = (int(self._columns[name][index]) for name in ("offset", "size", "sum"))
        data = self._files[file].read(offset, size)
        if zlib.crc32(data) != crc:
            raise InputError(
                f"{self.source(index)} has changed since it was first read",
                "Training reads rows from their files again and again.",
                "Do not change the files during a run; start it again.",
            )
        return parse_object(data), self.files[file][2]

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

    def origins(self) -> np.ndarray:
        """Return uint64 [N]: which row the row of each sequence was made of, a hash; itself where
        it is not augmented."""
        _, first, row = np.unique(self.row_ids(), return_index=True, return_inverse=True)
        own = np.array([hash_origin(self.source(n)) for n in first.tolist()], np.uint64)
        given = self._columns["origin"]
        return np.where(given == 0, own[row], given)

    def origin_ids(self) -> np.ndarray:
        """Return int64 [N]: `row_ids`, but rows of one origin, and the row that it names, have the
        number of the first."""
        ids = self.row_ids()
        if self._columns["origin"].any():
            _, first, which = np.unique(self.origins(), return_index=True, return_inverse=True)
            ids = ids[first][which]
        return ids

    def first_of_rows(self) -> np.ndarray:
        """Return int64, ascending: the first sequence of every row; repeated files count once."""
        return np.sort(np.unique(self.row_ids(), return_index=True)[1])

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

    def _report(self, max_bad: int) -> None:
        """Report the rows that are not learned; raise InputError where there are too many."""
        lines, more = summed(self.bad, MAX_SHOWN)
        for line in (*self.notes(), *lines):
            note(line)
        if more := more + self.num_bad - len(self.bad):
            note(f"... and {counted(more, 'more bad row')}")
        found = f"{self.num_bad} of {counted(self.rows, 'row')} cannot be used"
        first = f"the first is {': '.join(self.bad[0])}" if self.bad else ""
        for (name, _, _), group in zip(self.files, self.groups, strict=True):
            if group.start == group.stop:
                raise InputError(f"{name} has no row that can be learned from", first)
        if self.num_bad > max_bad:
            fix = "List all of them: --check-data. Or leave up to N of them out: --max-bad N."
            raise InputError(found, first, fix)
        if self.num_bad:
            note(f"{found} and are left out")
        for start, stop, weight, general in self.groups:
            if general:
                count = max(round((stop - start) * weight), 1)
                note(f"general sequences in an epoch: {count}, drawn from {stop - start}")


def widest_row(options: DataOptions, config: GLMConfig) -> int:
    """Return the most tokens that a row may have; UsageError as of `longest_sequence`."""
    return longest_sequence(options, config) * (2 if options.format == PREFERENCE else 1)


def longest_sequence(options: DataOptions, config: GLMConfig) -> int:
    """Return the most tokens that a sequence may have; UsageError for more than the model can
    have."""
    longest = config.context_limit
    max_length = options.max_length or min(MAX_LENGTH, config.seq_length)
    if max_length > longest:
        raise UsageError(f"--max-length {max_length} is more than the {longest} of the model.")
    return max_length


def open_dataset(options: DataOptions, folder: Folder, other: str | None = None) -> Dataset:
    """Open the dataset that the flags name, or `other`, such as `--val-data`, for a model.

    Raises UsageError where flags contradict each other or the model, else as `Dataset`.
    """
    trained, max_length = folder.config.seq_length, longest_sequence(options, folder.config)
    if max_length > trained and other is None:
        note(f"warning: --max-length {max_length} is beyond {trained}, the length of its training")
    if options.mix_ratio is not None and options.mix_data is None:
        raise UsageError("--mix-ratio needs --mix-data.", fix="Name the file of general rows.")
    if options.mix_ratio is not None and options.mix_ratio >= 1:
        raise UsageError(f"--mix-ratio must be below 1, got {options.mix_ratio:g}.")
    if options.stride is not None and options.format != TEXT:
        raise UsageError("--stride needs --format text.", fix="Leave it out.")
    texts = None
    if options.format == TEXT:
        texts = Texts(folder.tokenizer, max_length, options.stride)
    fmt = PREFERENCE if options.format == PREFERENCE else "auto"
    sources = [Source(other, fmt)] if other is not None else []
    if other is None:
        for text in options.data:
            path, weight = split_weight(text)
            sources.append(Source(path, options.format, weight))
        if options.mix_data is not None:
            sources.append(Source(options.mix_data, share=options.mix_ratio or MIX_RATIO))
    return Dataset(
        sources,
        Encoder(folder.tokenizer, folder.template, options.train_on_prompt, texts),
        max_length,
        preferred=None if options.format == "auto" else options.format,
        max_bad=None if options.check_data else options.max_bad,
        cache=options.data_cache,
    )


def counted(number: int, noun: str) -> str:
    """Return "1 row", "2 rows"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def summed(bad: Sequence[tuple[str, str]], limit: int | None = None) -> tuple[list[str], int]:
    """Return lines such as "file:2-9, 12: reason (9 rows)" for bad rows ("file:line" or "file, row
    N", reason), at most `limit` of them, and how many rows are in none of them."""
    rows: dict[tuple[str, str], list[int]] = {}
    for where, reason in bad:
        name = where.rstrip("0123456789")
        rows.setdefault((name, reason), []).append(int(where[len(name) :]))
    lines = []
    for (name, reason), numbers in list(rows.items())[:limit]:
        ranges = []
        for _, group in groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0]):
            found = [number for _, number in group]
            ranges.append(f"{found[0]}" if len(found) == 1 else f"{found[0]}-{found[-1]}")
        text = ", ".join(ranges[:_RANGES]) + (", ..." if len(ranges) > _RANGES else "")
        total = f" ({len(numbers)} rows)" if len(numbers) > 1 else ""
        lines.append(f"{name}{text}: {reason}{total}")
    return lines, len(bad) - sum(map(len, list(rows.values())[:limit]))
