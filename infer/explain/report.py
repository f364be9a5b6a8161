"""An explanation for a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from glm2_jax.cli.messages import cut_to_width, human_size
from glm2_jax.cli.tables import fold, table
from glm2_jax.escape import escape_controls
from infer.explain.facts import Bound, Candidate, Head, Pass, Step, Token, Values, Walk

BOUND = (
    "The minimum time for these operations and bytes by the makers' figures, which no program "
    "reaches; nothing here was measured. The head computes one position of each prompt, and masked "
    "scores are left out. Arrays that are passed between stages, and starting programs, are not "
    "counted."
)
UNKNOWN = "?: no figure is known; the times there are those of the bytes alone."
BYTES = "<0x..>: one byte of a character that has no piece in the vocabulary; <0x0A> is a newline."
COUNTED = (
    "FLOP: 2 for a product and sum of a matrix product, all scores included, also masked ones. "
    "Bytes: weights read, keys and values written and read. Both are of one layer for stages in "
    "layers."
)
LENGTHS = (
    "Lengths are norms of the last token: of the layer's output, and of what attention and mlp "
    "added. Next: the result of final norm and head there; after the last layer this is the "
    "model's own answer."
)
ROW = (
    "A row attends to the columns up to its own. Signs are tenths of the square root of the "
    "probability: a blank, then "
)
SHADES = " .:-=+*#%@"  # of a probability's square root, in tenths
LENGTH_FROM = {
    "tokenizer": "",
    "published": ", counted with the published tokenizer",
    "asked": ", as asked for",
    "example": ", an example",
}
STAGES = ("stage", "shape", "parameters", "FLOP", "bytes", "step FLOP", "step bytes")
_PROMPT = 20  # columns of a prompt in a line, at most
_PIECE = 12  # columns of a piece, at most
_LABEL = 13  # columns before a row of a map


def render(walk: Walk, values: Values | None, columns: int) -> list[str]:
    """Return the lines, at most so many columns wide where no single word is wider."""
    prompt = escape_controls(walk.prompt or "", "\n")
    walk = replace(walk, model=escape_controls(walk.model), prompt=prompt)
    lines = [*_head(walk), "", *_stages(walk, columns), ""]
    lines += [f"{s.title_en}: {s.note_en}" for s in walk.prefill.stages if s.note_en]
    lines += [COUNTED, "", *_totals(walk)]
    lines += ["", *_bounds(walk.bounds, columns)] if walk.bounds else []
    lines += [] if values is None else _values(values, columns)
    return [part for line in lines for part in fold(line, columns)]


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
    """Return the stages in a table, or where that is too wide, in a few lines each."""
    rows: list[tuple[str, ...]] = [STAGES]
    records, inside = [], False
    for read, step in zip(walk.prefill.stages, walk.decode.stages, strict=True):
        if read.in_layer != inside:
            inside = read.in_layer
            title = f"each of {walk.sizes['L']} layers:" if inside else "after the layers:"
            rows.append((title, *[""] * 6))
            records.append(title)
        shapes = [_shape(read.shape)]
        if "C" in read.axes:  # gate and up side by side
            *rest, two, width = read.shape
            shapes.append(f"= {_shape((*rest, two * width))}")
        params = f"{read.params:,}" if read.params else ""
        figures = [
            show(n) if n else ""
            for stage in (read, step)
            for show, n in ((_count, stage.flops), (human_size, stage.bytes))
        ]
        dashes = [cell or "-" for cell in (params, *figures)]
        rows.append((f"  {read.title_en}", shapes[0], *dashes))
        rows += [("", more, *[""] * 5) for more in shapes[1:]]
        records.append(f"{read.title_en} {' '.join(shapes)}")
        facts = [f"{params} parameters"] if params else []
        for name, (flops, moved) in (("", figures[:2]), ("step ", figures[2:])):
            cost = ", ".join(filter(None, (flops and f"{flops}FLOP", moved)))
            facts += [name + cost] if cost else []
        records += [f"  {'; '.join(facts)}"] if facts else []
    lines = table(rows, texts=2)
    return lines if _fits(lines, columns) else records


def _totals(walk: Walk) -> Iterator[str]:
    yield f"prefill of the prompt: {_work(walk.prefill)}"
    yield f"one decode step after it, {walk.decode.keys} keys a row: {_work(walk.decode)}"
    cache, s = walk.cache, walk.sizes
    yield (
        f"cache: {_binary(cache.per_token)} a token; {_binary(cache.with_full_heads)} if all "
        f"{s['N']} heads had their own keys and values; {_binary(cache.now)} after the prompt, "
        f"{_binary(cache.at_most)} at {walk.context:,} tokens"
    )


def _work(work: Pass) -> str:
    flops, moved = _count(work.flops), human_size(work.bytes)
    return f"{flops}FLOP on {moved}, {_digits(work.intensity)} FLOP a byte"


def _bounds(bounds: Sequence[Bound], columns: int) -> Iterator[str]:
    rest = list(bounds)
    while rest:
        counts = range(len(rest), 1, -1)
        tables = ((count, _bound_table(rest[:count])) for count in counts)
        fitting = (found for found in tables if _fits(found[1], columns))
        count, lines = next(fitting, (1, _bound_table(rest[:1])))
        yield from (*lines, "")
        rest = rest[count:]
    yield BOUND
    if any(bound.flops is None for bound in bounds):
        yield UNKNOWN


def _bound_table(bounds: Sequence[Bound]) -> list[str]:
    rows: tuple[tuple[str, Callable[[Bound], str]], ...] = (
        ("device", lambda b: b.device),
        ("memory", lambda b: human_size(b.memory)),
        ("fits, as planned", lambda b: "yes" if b.fits else "no"),
        ("bandwidth, GB/s", lambda b: f"{b.bandwidth / 1e9:,.0f}"),
        ("16-bit TFLOP/s", lambda b: "?" if b.flops is None else f"{b.flops / 1e12:.4g}"),
        ("balance, FLOP/byte", lambda b: "?" if b.ridge is None else f"{b.ridge:.0f}"),
        ("prompt, ms >=", lambda b: _digits(b.prefill * 1e3)),
        ("  limited by", lambda b: b.prefill_limit.replace("unknown", "?")),
        ("step, ms >=", lambda b: _digits(b.decode * 1e3)),
        ("  limited by", lambda b: b.decode_limit.replace("unknown", "?")),
        ("tokens/s <=", lambda b: f"{b.tokens_per_s:,.0f}"),
    )
    return table([(name, *map(cell, bounds)) for name, cell in rows], texts=1)


def _values(values: Values, columns: int) -> Iterator[str]:
    yield from ("", "the prompt as it is built:")
    text = escape_controls(values.text, "\n")
    yield from (f"  | {line}".rstrip() for line in _broken(text, columns - 4))
    yield from ("", f"its ids, computed in {values.dtype}:")
    rows = [(_piece(token), str(at), str(token.id)) for at, token in enumerate(values.tokens)]
    yield from table([("piece", "", "id"), *rows], texts=1)
    if any(token.piece.startswith("<0x") for token in values.tokens):
        yield BYTES
    yield from ("", "layer by layer:", *_layers(values, columns), LENGTHS)
    for head in values.heads:
        yield from ("", *_map(head, values, columns))
    yield from ("", "the answer, always the most probable token:", *_answer(values, columns))
    yield from _broken(escape_controls(f"answer: {values.answer}", "\n"), columns)


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
    ends = {"stop": "ended by its end token", "length": "ended by the length limit"}
    return [*lines, ends.get(values.end, values.end)]


def _likely(candidate: Candidate) -> str:
    return f"{cut_to_width(_piece(candidate.token), _PIECE)} {_per_cent(candidate.probability)}"


def _per_cent(part: float) -> str:
    """Return a share in per cent that is 0 or 100 only if it is exactly that."""
    if 0.9995 < part < 1:
        return ">99.9%"
    return "<0.1%" if 0 < part < 0.0005 else f"{100 * part:.1f}%"


def _map(head: Head, values: Values, columns: int) -> Iterator[str]:
    yield f"attention of layer {head.layer}, head {head.head}:"
    tokens = len(values.tokens)
    if _LABEL + tokens > columns:
        yield "too wide for this terminal; --html, --json or a greater --width shows it"
        return
    wide = 2 if _LABEL + 2 * tokens <= columns else 1
    rows = []
    for at, (token, weights) in enumerate(zip(values.tokens, head.weights, strict=True)):
        cells = (SHADES[min(int(10 * weight**0.5), 9)] * wide for weight in weights[: at + 1])
        rows.append((str(at), cut_to_width(_piece(token), _LABEL - 5), "".join(cells)))
    yield from table(rows, texts=3)
    if head is values.heads[-1]:
        yield ROW + SHADES.strip()


def _widest(build: Callable[[int], list[str]], most: int, columns: int) -> list[str]:
    """Return the table with as many candidates as fit the columns, at least one; note the rest."""
    counts = range(most, 1, -1)
    count = next((count for count in counts if _fits(build(count), columns)), 1)
    left_out = f"({count} of {most} candidates fit here; --width N gives more columns)"
    return [*build(count), *([left_out] if count < most else [])]


def _fits(lines: Sequence[str], columns: int) -> bool:
    return all(cut_to_width(line, columns) == line for line in lines)


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _piece(token: Token) -> str:
    return escape_controls(token.piece)


def _digits(number: float) -> str:
    """Return a rounded number: 2048.3 -> "2,050"."""
    return f"{float(f'{number:.3g}'):,g}"


def _count(number: float) -> str:
    """Return a short count: 203346608128 -> "203 G"."""
    units = ["", "k", "M", "G", "T", "P"]
    while number >= 999.5 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.3g} {units[0]}"


def _binary(size: float) -> str:
    """Return bytes in binary units: 28672 -> "28 KiB"."""
    units = ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"


def _broken(text: str, columns: int) -> Iterator[str]:
    """Return lines of a text of any language, at most so many columns wide."""
    for line in text.split("\n"):
        while (part := cut_to_width(line, columns)) != line:
            at = part.rfind(" ") + 1
            part = part[:at] if at > len(part) // 2 else part
            yield part.rstrip()
            line = line[len(part) :]
        yield line
