"""What `--check-data` and `--print-sample` report of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from glm2_jax.escape import join_lines
from train.data.dataset import Dataset, counted, summed
from train.data.duplicates import ALIKE, PIECE, repeats
from train.data.figures import SAMPLE, SHARED, Figures, gather, shared
from train.data.language import LANGUAGES
from train.data.options import DataOptions

_BINS = 12
_BAR = 50  # characters of the longest bar
_LISTED = 5  # examples of rows that are only counted
Split = Callable[[], tuple[Dataset, Dataset | None]]


def print_checks(
    options: DataOptions, dataset: Dataset, plot: str | None = None, split: Split | None = None
) -> int | None:
    """Print on standard output what `--check-data` and `--print-sample` ask for.

    Returns the exit code of a run that ends with `--check-data`, 3 where there are bad rows; None
    without that flag. `plot` is a picture of the lengths to draw with `--check-data`. `split` gives
    the rows to learn from, and those for validation or None, which are compared.
    """
    if options.print_sample is not None:
        print(print_sample(dataset, options.print_sample))
    if not options.check_data:
        return None
    figures = gather(dataset)
    print(report(dataset, figures))
    if plot is not None and len(dataset):
        draw(dataset.lengths, dataset.width, plot)
    bad = dataset.num_bad
    if split is not None and len(dataset):
        learned, validation = split()
        if validation is not None:
            print(leakage(dataset, figures, learned, validation))
            bad += validation.num_bad
    return 3 if bad else 0


def report(dataset: Dataset, figures: Figures | None = None) -> str:
    """Return a report of every row of a dataset that was opened with `max_bad=None`."""
    rows, sequences = counted(dataset.rows, "row"), counted(len(dataset), "sequence")
    lines = [f"{name}: {fmt}" for name, _, fmt in dataset.files]
    lines += [f"{rows}, {dataset.num_bad} of them bad; {sequences} to learn from", *_bad(dataset)]
    figures = gather(dataset) if figures is None else figures
    lines += [*dataset.notes(), *_repeats(dataset, figures), *_contents(figures)]
    return join_lines([*lines, *_lengths(dataset)])


def _bad(dataset: Dataset) -> list[str]:
    lines = summed(dataset.bad)[0]
    lines += _rest(dataset.num_bad, len(dataset.bad))
    return lines + [f"bad: {n} x {reason}" for reason, n in dataset.bad_reasons.most_common()]


def _rest(total: int, listed: int) -> list[str]:
    """Return the line after a list that was cut, if it was."""
    return [f"... and {total - listed} more"] if total > listed else []


def _repeats(dataset: Dataset, figures: Figures) -> list[str]:
    """Return lines about rows that repeat others, or parts of them."""
    growing, rows = figures.growing, figures.firsts
    found = repeats(figures.signatures).tolist()
    near = [(n, first) for n, first in enumerate(found) if n != first]

    def listed(pairs: list[tuple[int, int]], verb: str) -> list[str]:
        places = ((dataset.source(rows[x]), dataset.source(rows[y])) for x, y in pairs[:_LISTED])
        return [f"{where} {verb} {other}" for where, other in places] + _rest(len(pairs), _LISTED)

    lines = []
    if growing:
        lines.append(
            f"dialogues that continue in another row: {counted(len(growing), 'row')}; every row "
            "learns all answers in it, so they are learned again and again: keep only the last row "
            "of each dialogue"
        )
    lines += listed(growing, "continues in")
    lines.append(
        f"near-duplicates (by MinHash, {ALIKE:.0%} of their {PIECE}-character pieces in common): "
        f"{counted(len(near), 'row')}"
    )
    return lines + listed(near, "nearly repeats")


def _contents(figures: Figures) -> list[str]:
    """Return lines about origins, diversity and languages."""
    origins = len(np.unique(figures.origins))
    lines = []
    if origins < len(figures.origins):
        lines.append(f"{counted(len(figures.origins), 'row')} of {counted(origins, 'origin')}")
    if not figures.languages:
        return lines
    sample = f", of {SAMPLE} rows" if len(figures.firsts) > SAMPLE else ""
    lines.append(f"different 1-grams and 2-grams (Chinese characters and words){sample}:")
    for side, distinct in figures.distinct.items():
        one, two = (f"{share:.1%}" if share else "none" for share in distinct.shares())
        lines.append(f"  {side}: {one} and {two} of all")
    lines.append("languages:")
    for side, counts in figures.languages.items():
        named = (f"{name} {counts[name]}" for name in LANGUAGES if counts[name])
        lines.append(f"  {side}: {', '.join(named)}")
    return lines


def leakage(dataset: Dataset, figures: Figures, learned: Dataset, validation: Dataset) -> str:
    """Return a report of the validation rows that are in training, too.

    `figures` are those of `dataset`, of which the other two may be parts.
    """
    alone = validation.files != dataset.files
    ours = figures.only(learned.row_ids())
    theirs = gather(validation) if alone else figures.only(validation.row_ids())
    found = shared(ours, theirs)
    lines, counts = [], Counter(one.how for one in found)
    if alone:
        lines += [f"{name}: {fmt}" for name, _, fmt in validation.files]
        bad = f"{counted(validation.rows, 'row')}, {validation.num_bad} of them bad"
        lines += [bad, *_bad(validation)]
    total = counted(len(theirs.firsts), "row")
    each = ", ".join(f"{counts[how]} {words}" for how, words in SHARED.items() if counts[how])
    lines.append(
        f"leakage: {len(found)} of {total} for validation {'is' if len(found) == 1 else 'are'} in "
        f"training too{': ' * bool(each)}{each}"
    )
    for how, row, other in found[:_LISTED]:
        where = (validation if alone else dataset).source(theirs.firsts[row])
        lines.append(f"{where} {how} {dataset.source(ours.firsts[other])}")
    return join_lines(lines + _rest(len(found), _LISTED))


def _lengths(dataset: Dataset) -> list[str]:
    if not len(dataset):
        return []
    tokens, learned = (int(x.sum(dtype=np.int64)) for x in (dataset.lengths, dataset.learned))
    low, *middle, high = np.percentile(dataset.lengths, (0, 50, 90, 99, 100)).astype(int)
    lines = [
        f"{counted(tokens, 'token')}, {learned} learned",
        f"lengths {low} to {high}, median {middle[0]}, 90 % up to {middle[1]}, 99 % up to "
        f"{middle[2]}, allowed {dataset.width}:",
    ]
    edges, counts = histogram(dataset.lengths)
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


def print_sample(dataset: Dataset, count: int) -> str:
    """Return the tokens of the first sequences, one per line, those that are learned with a star.

    Special ids have their names, bytes and spaces are as the tokenizer writes them.
    """
    tokenizer = dataset.encoder.tokenizer
    names = {number: name for name, number in tokenizer.special.items()}
    lines = []
    for index in range(min(count, len(dataset))):
        where = dataset.source(index)
        for sample in dataset.samples(index):
            learned = sum(sample.learned)
            lines.append(f"{where}: {len(sample.ids)} tokens, {learned} learned (*)")
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
