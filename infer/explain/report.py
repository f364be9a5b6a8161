"""An explanation for a terminal of any width."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from glm2_jax.cli.messages import cut_to_width, human_size
from glm2_jax.cli.tables import fold, table
from glm2_jax.escape import escape_controls
from infer.explain.facts import Bound, Candidate, Head, Pass, Stage, Step, Token, Values, Walk

BOUND = (
    "The least time for these operations and bytes by the makers' figures, which no program "
    "reaches; nothing here was measured. The head reads one position of each prompt, and scores "
    "of tokens that may not be seen are left out. What flows between stages, and starting "
    "programs, is not counted."
)
UNKNOWN = "?: no figure is known; the times there are those of the bytes alone."
BYTES = "<0x..>: one byte of a character that has no piece of its own; <0x0A> is a newline."
COUNTED = (
    "FLOP: 2 for each product and sum of a matrix product, all scores included, also those of "
    "tokens that may not be seen. Bytes: weights read, keys and values written and read. Of "
    "stages in layers, both are of one layer."
)
LENGTHS = (
    "Lengths are of the last token: of the stream that leaves the layer, and of what attention and "
    "mlp added. Next: what final norm and head make of it there; after the last layer this is the "
    "model's own answer."
)
SHADES = " .:-=+*#%@"  # of a probability's square root, in tenths
LENGTH_FROM = {
    "tokenizer": "",
    "published": ", counted with the published tokenizer",
    "asked": ", as asked for",
    "example": ", an example",
}
LIMITS = {"unknown": "?"}
_PROMPT = 20  # columns of a prompt in a line, at most
_PIECE = 12  # columns of a piece, at most
_LABEL = 13  # columns before a row of a map


def render(walk: Walk, values: Values | None, columns: int) -> Iterator[str]:
    """The lines, at most so many columns wide where no single word is wider."""
    prompt = escape_controls(walk.prompt or "", "\n")
    walk = replace(walk, model=escape_controls(walk.model), prompt=prompt)
    for line in _head(walk):
        yield from fold(line, columns)
    yield ""
    yield from _stages(walk, columns)
    yield ""
    yield from _notes(walk, columns)
    yield ""
    for line in _totals(walk):
        yield from fold(line, columns)
    if walk.bounds:
        yield ""
        yield from _bounds(walk.bounds, columns)
    if values is not None:
        yield from _values(values, columns)


def _head(walk: Walk) -> Iterator[str]:
    s = walk.sizes
    yield (
        f"{walk.model}: {walk.params:,} parameters, {human_size(walk.weight_bytes)} in "
        f"{walk.weights_in}, which bytes are counted in; {s['L']} layers of {s['D']}, "
        f"{s['N']} query heads on {s['K']} key/value heads of {s['H']}, "
        f"feed-forward {s['F']}, vocabulary {s['V']}"
    )
    shown = cut_to_width(" ".join((walk.prompt or "").split()), _PROMPT)
    what = f"prompt {shown}" if shown else "a prompt"
    rows = "" if s["B"] == 1 else f", {s['B']} rows"
    yield f"{what}: {walk.length} ids{LENGTH_FROM[walk.length_from]}{rows}"


def _stages(walk: Walk, columns: int) -> list[str]:
    pairs = list(zip(walk.prefill.stages, walk.decode.stages, strict=True))
    rows: list[tuple[str, ...]] = [
        ("stage", "shape", "parameters", "FLOP", "bytes", "step FLOP", "step bytes")
    ]
    inside = False
    for read, step in pairs:
        if read.in_layer != inside:
            inside = read.in_layer
            rows.append((f"{_between(walk, inside)}:", *[""] * 6))
        rows.append((f"  {read.title_en}", _shape(read), *_figures(read, step)))
        rows += [("", f"= {joined}", *[""] * 5) for joined in _joined(read)]
    lines = table(rows, texts=2)
    return lines if _fits(lines, columns) else list(_records(walk, pairs, columns))


def _between(walk: Walk, inside: bool) -> str:
    return f"each of {walk.sizes['L']} layers" if inside else "after the layers"


def _figures(read: Stage, step: Stage) -> tuple[str, ...]:
    figures = (read.flops, read.bytes, step.flops, step.bytes)
    kinds = (_count, human_size, _count, human_size)
    moved = (kind(n) if n else "-" for kind, n in zip(kinds, figures, strict=True))
    return f"{read.params:,}" if read.params else "-", *moved


def _records(walk: Walk, pairs: Sequence[tuple[Stage, Stage]], columns: int) -> Iterator[str]:
    """The table's rows as a few lines each."""
    inside = False
    for read, step in pairs:
        if read.in_layer != inside:
            inside = read.in_layer
            yield f"{_between(walk, inside)}:"
        yield from fold(" = ".join((f"{read.title_en} {_shape(read)}", *_joined(read))), columns)
        facts = [f"{read.params:,} parameters"] if read.params else []
        facts += [part for part in (_cost(read), _cost(step, "step ")) if part]
        if facts:
            yield from textwrap.wrap(
                "; ".join(facts), columns, initial_indent="  ", subsequent_indent="  "
            )


def _cost(stage: Stage, name: str = "") -> str:
    """ "step 33.6 MFLOP, 33.6 MB"; what is nothing is left out."""
    flops = f"{_count(stage.flops)}FLOP" if stage.flops else ""
    moved = human_size(stage.bytes) if stage.bytes else ""
    return name + ", ".join(filter(None, (flops, moved))) if flops or moved else ""


def _notes(walk: Walk, columns: int) -> Iterator[str]:
    for stage in walk.prefill.stages:
        if stage.note_en:
            yield from fold(f"{stage.title_en}: {stage.note_en}", columns)
    yield from fold(COUNTED, columns)


def _totals(walk: Walk) -> Iterator[str]:
    yield f"reading the prompt: {_work(walk.prefill)}"
    yield f"one step after it, {walk.decode.keys} keys a row: {_work(walk.decode)}"
    cache, s = walk.cache, walk.sizes
    yield (
        f"cache: {_binary(cache.per_token)} a token; {_binary(cache.with_full_heads)} if all "
        f"{s['N']} heads had keys and values of their own; {_binary(cache.now)} after the prompt, "
        f"{_binary(cache.at_most)} at {walk.context:,} tokens"
    )


def _work(work: Pass) -> str:
    flops, moved = _count(work.flops), human_size(work.bytes)
    return f"{flops}FLOP on {moved}, {_digits(work.intensity)} FLOP a byte"


def _bounds(bounds: Sequence[Bound], columns: int) -> Iterator[str]:
    rest = list(bounds)
    while rest:
        lines, count = _bound_table(rest[:1]), 1
        while count < len(rest) and _fits(wider := _bound_table(rest[: count + 1]), columns):
            lines, count = wider, count + 1
        yield from (*lines, "")
        rest = rest[count:]
    yield from fold(BOUND, columns)
    if any(bound.flops is None for bound in bounds):
        yield from fold(UNKNOWN, columns)


def _bound_table(bounds: Sequence[Bound]) -> list[str]:
    def row(name: str, cell: Callable[[Bound], str]) -> tuple[str, ...]:
        return name, *map(cell, bounds)

    rows = [
        row("device", lambda b: b.device),
        row("memory", lambda b: human_size(b.memory)),
        row("fits, as planned", lambda b: "yes" if b.fits else "no"),
        row("bandwidth, GB/s", lambda b: f"{b.bandwidth / 1e9:,.0f}"),
        row("16-bit TFLOP/s", lambda b: "?" if b.flops is None else f"{b.flops / 1e12:.4g}"),
        row("balance, FLOP/byte", lambda b: "?" if b.ridge is None else f"{b.ridge:.0f}"),
        row("prompt, ms >=", lambda b: _digits(b.prefill * 1e3)),
        row("  limited by", lambda b: LIMITS.get(b.prefill_limit, b.prefill_limit)),
        row("step, ms >=", lambda b: _digits(b.decode * 1e3)),
        row("  limited by", lambda b: LIMITS.get(b.decode_limit, b.decode_limit)),
        row("tokens/s <=", lambda b: f"{b.tokens_per_s:,.0f}"),
    ]
    return table(rows, texts=1)


def _values(values: Values, columns: int) -> Iterator[str]:
    yield from ("", "the prompt as it is built:")
    text = escape_controls(values.text, "\n")
    yield from (f"  | {line}".rstrip() for line in _broken(text, columns - 4))
    yield from ("", f"its ids, computed in {values.dtype}:")
    rows = [("piece", "", "id"), *((_piece(t), str(n), str(t.id)) for n, t in _numbered(values))]
    yield from table(rows, texts=1)
    if any(token.piece.startswith("<0x") for token in values.tokens):
        yield from fold(BYTES, columns)
    yield from ("", "layer by layer:")
    yield from _layers(values, columns)
    yield from fold(LENGTHS, columns)
    for head in values.heads:
        yield ""
        yield from _map(head, values, columns)
    yield from ("", *fold("the answer, always the likeliest token:", columns))
    yield from _answer(values, columns)
    yield from _broken(escape_controls(f"answer: {values.answer}", "\n"), columns)


def _numbered(values: Values) -> Iterator[tuple[int, Token]]:
    return enumerate(values.tokens)


def _layers(values: Values, columns: int) -> list[str]:
    names = ["layer", *("embed" if x.layer < 0 else str(x.layer) for x in values.layers)]
    parts = [(layer.stream, layer.attention, layer.mlp) for layer in values.layers]
    lengths = [("stream", "attention", "mlp")]
    lengths += [tuple(f"{part[-1]:.3g}" for part in layer) for layer in parts]

    def lens(count: int) -> list[tuple[str, ...]]:
        likely = [tuple(map(_likely, layer.lens[:count])) for layer in values.layers]
        return [("next", *[""] * (count - 1)), *likely]

    def joined(*cells: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        rows = zip(names, *cells, strict=True)
        return [(name, *(cell for part in parts for cell in part)) for name, *parts in rows]

    def both(count: int) -> list[str]:
        return table(joined(lens(count), lengths), texts=1 + count)

    most = len(values.layers[0].lens)
    lines = _widest(both, most, columns)
    if _fits(lines, columns):
        return lines
    lines = _widest(lambda count: table(joined(lens(count)), texts=1 + count), most, columns)
    return [*table(joined(lengths), texts=1), *lines]


def _answer(values: Values, columns: int) -> list[str]:
    def rows(count: int) -> list[tuple[str, ...]]:
        head = ("", "token", *["or"] * min(count - 1, 1), *[""] * (count - 2))
        return [head, *(row(n, step, count) for n, step in enumerate(values.steps, 1))]

    def row(number: int, step: Step, count: int) -> tuple[str, ...]:
        others = [c for c in step.alternatives if c.token != step.chosen.token][: count - 1]
        cells = [_likely(candidate) for candidate in (step.chosen, *others)]
        return str(number), *cells, *[""] * (count - len(cells))

    most = len(values.steps[0].alternatives) if values.steps else 1
    lines = _widest(lambda count: table(rows(count), texts=1 + count), most, columns)
    ends = {"stop": "ended by its end token", "length": "as long as it may be"}
    return [*lines, ends.get(values.end, values.end)]


def _likely(candidate: Candidate) -> str:
    return f"{cut_to_width(_piece(candidate.token), _PIECE)} {_per_cent(candidate.probability)}"


def _per_cent(part: float) -> str:
    """Neither certainty nor impossibility is claimed where there is none."""
    if 0.9995 < part < 1:
        return ">99.9%"
    return "<0.1%" if 0 < part < 0.0005 else f"{100 * part:.1f}%"


def _map(head: Head, values: Values, columns: int) -> Iterator[str]:
    yield f"attention of layer {head.layer}, head {head.head}:"
    tokens = len(values.tokens)
    if _LABEL + tokens > columns:
        yield from fold("too wide for here; --html, --json or a greater --width shows it", columns)
        return
    wide = 2 if _LABEL + 2 * tokens <= columns else 1
    rows = []
    for (number, token), weights in zip(_numbered(values), head.weights, strict=True):
        cells = (SHADES[min(int(10 * weight**0.5), 9)] * wide for weight in weights[: number + 1])
        rows.append((str(number), cut_to_width(_piece(token), _LABEL - 5), "".join(cells)))
    yield from table(rows, texts=3)
    if head is values.heads[-1]:
        shown = (
            "A row looks at the columns up to its own. Signs are tenths of the square root: a "
            f"blank, then {SHADES.strip()}"
        )
        yield from fold(shown, columns)


def _widest(build: Callable[[int], list[str]], most: int, columns: int) -> list[str]:
    """The table with as many candidates as the columns hold, one at least; says if not all."""
    counts = range(most, 1, -1)
    count = next((count for count in counts if _fits(build(count), columns)), 1)
    left_out = f"({count} of {most} candidates fit here; --width N takes more columns)"
    return [*build(count), *(fold(left_out, columns) if count < most else [])]


def _fits(lines: Sequence[str], columns: int) -> bool:
    return all(cut_to_width(line, columns) == line for line in lines)


def _shape(stage: Stage) -> str:
    return f"[{', '.join(map(str, stage.shape))}]"


def _joined(stage: Stage) -> list[str]:
    """The shape with gate and up side by side, of the stage that has them."""
    if "C" not in stage.axes:
        return []
    *rest, two, width = stage.shape
    return [f"[{', '.join(map(str, (*rest, two * width)))}]"]


def _piece(token: Token) -> str:
    return escape_controls(token.piece)


def _digits(number: float) -> str:
    """2048.3 -> "2,050"."""
    return f"{float(f'{number:.3g}'):,g}"


def _count(number: float) -> str:
    """203346608128 -> "203 G"."""
    units = ["", "k", "M", "G", "T", "P"]
    while number >= 999.5 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.3g} {units[0]}"


def _binary(size: float) -> str:
    """28672 -> "28 KiB"."""
    units = ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"


def _broken(text: str, columns: int) -> Iterator[str]:
    """Lines of a text of any language, at most so many columns wide."""
    for line in text.split("\n"):
        while (part := cut_to_width(line, columns)) != line:
            at = part.rfind(" ") + 1
            part = part[:at] if at > len(part) // 2 else part
            yield part.rstrip()
            line = line[len(part) :]
        yield line
