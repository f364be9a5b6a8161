"""An explanation for a terminal of any width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from glm2_jax.cli.messages import cut_to_width, human_size, text_width
from glm2_jax.cli.tables import fitted, fold, table
from glm2_jax.escape import escape_controls
from infer.explain.facts import Bound, Candidate, Head, Pass, Stage, Token, Values, Walk

BOUND = (
    "The minimum time for these operations and bytes by the makers' figures, which no program "
    "reaches; nothing here was measured. The head is computed at one position of each prompt, and "
    "masked scores are left out. Activations that pass between stages, and the time to start "
    "programs, are not counted."
)
UNKNOWN = "?: no figure is published; the times there are those of the bytes alone."
BYTES = "<0x..>: one byte of a character that has no piece in the vocabulary; <0x0A> is a newline."
COUNTED = (
    "FLOP: 2 for each multiply-add of a matrix product, masked scores included. Bytes: weights "
    "read, keys and values written and read. For stages in layers, both are of one layer."
)
NORMS = (
    "Norms are of the last token: of the layer's output, and of what attention and mlp added. "
    "Next: what final norm and head would predict there; after the last layer this is the model's "
    "own answer."
)
ROW = (
    "Each row is a token and shows its attention to the tokens that it sees, as the square root of "
    "the probability in tenths: a blank, then "
)
LOOKS_AHEAD = (
    "The tokens before <sop> see each other (#), so a prompt is prefilled in one piece. A row is a "
    "token, a column a token that it sees; more tokens continue the pattern:"
)
SHADES = " .:-=+*#%@"  # of a probability's square root, in tenths
LENGTH_FROM = {
    "published": ", counted with the published tokenizer", "asked": ", as given",
    "example": ", an example",
}  # fmt: skip
_IDS = 100  # of a prompt without its values, at most
_PROMPT = 20  # columns of a prompt in a line, at most
_PIECE = 12  # columns of a piece, at most
_LABEL = 13  # columns before a row of a map


def render(walk: Walk, values: Values | None, columns: int) -> list[str]:
    """Return the lines, at most so many columns wide where no single word is wider."""
    prompt = escape_controls(" ".join((walk.prompt or "").split()))
    walk = replace(walk, model=escape_controls(walk.model), prompt=prompt)
    lines = [*_head(walk)]
    if walk.tokens and values is None:  # which have a table of them
        more = ["..."] * (len(walk.tokens) > _IDS)
        lines.append(f"its ids: {', '.join([*map(_named, walk.tokens[:_IDS]), *more])}")
    lines += ["", *_stages(walk, columns), ""]
    lines += [f"{s.title_en}: {s.note_en}" for s in walk.prefill.stages if s.note_en]
    lines += [COUNTED, "", *_totals(walk)]
    lines += ["", *_bounds(walk.bounds, columns)] if walk.bounds else []
    lines += [] if values is None else _values(values, columns)
    return [part for line in lines for part in fold(line, columns)]


def _head(walk: Walk) -> Iterator[str]:
    s = walk.sizes
    yield (
        f"{walk.model}: {walk.params:,} parameters, {human_size(walk.weight_bytes)} in "
        f"{walk.weights_in}; {s['L']} layers of {s['D']}, "
        f"{s['N']} query heads on {s['K']} key/value heads of {s['H']}, "
        f"feed-forward {s['F']}, vocabulary {s['V']}"
    )
    what = f"prompt {cut_to_width(walk.prompt, _PROMPT)}" if walk.prompt else "a prompt"
    rows = "" if s["B"] == 1 else f", {s['B']} rows"
    yield f"{what}: {walk.length} ids{LENGTH_FROM.get(walk.length_from, '')}{rows}"


def _stages(walk: Walk, columns: int) -> Iterator[str]:
    rows: list[list[str]] = [
        ["stage", "shape", "published code", "parameters", "FLOP", "bytes", "step FLOP",
         "step bytes"]
    ]  # fmt: skip
    inside = False
    for read, step in zip(walk.prefill.stages, walk.decode.stages, strict=True):
        if read.in_layer != inside:
            inside = read.in_layer
            title = f"each of {walk.sizes['L']} layers:" if inside else "after the layers:"
            rows.append([title, *[""] * 7])
        figures = f"{read.params:,}", _flop(read), human_size(read.bytes)
        cells = [*figures, _flop(step), human_size(step.bytes)]
        cells = ["-" if cell.strip() in ("0", "0 B") else cell for cell in cells]
        rows.append([f"  {read.title_en}", _shape(read.shape), _shape(read.reference), *cells])
    if max(map(text_width, table(rows, 3))) <= columns:
        yield from table(rows, 3)
        return
    yield from fitted([row[:6] for row in rows], 3, columns)  # the prompt, then a step after it
    yield ""
    yield from fitted([[row[0], *row[6:]] for row in rows], 1, columns)


def _totals(walk: Walk) -> Iterator[str]:
    yield f"prefill of the prompt: {_work(walk.prefill)}"
    yield f"one decode step after it, {walk.decode.keys} keys a row: {_work(walk.decode)}"
    cache, s = walk.cache, walk.sizes
    full = f"{_binary(cache.with_full_heads)} if all {s['N']} heads had their own keys and values; "
    longest = f"{_binary(cache.at_most)} at {walk.context:,} tokens"
    yield (
        f"cache: {_binary(cache.per_token)} a token; {full if s['G'] > 1 else ''}"
        f"{_binary(cache.now)} after the prompt, {longest}"
    )
    if walk.looks_ahead:
        yield from ("", LOOKS_AHEAD, *_mask(walk.length))


def _mask(length: int) -> Iterator[str]:
    """Draw what the tokens of a prompt, cut short, and the first ones of its answer see."""
    context = min(length - 1, 6)
    for row in range(context + 3):
        name = f"{'prompt' if row < context else '<sop>' if row == context else 'answer':8}"
        yield name + " ".join(
            "#" if col <= max(row, context - 1) else "." for col in range(context + 3)
        )


def _work(work: Pass) -> str:
    moved, intensity = human_size(work.bytes), _digits(work.intensity)
    return f"{_flop(work)}FLOP, {moved}, {intensity} FLOP per byte"


def _bounds(bounds: Sequence[Bound], columns: int) -> Iterator[str]:
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
    yield from fitted([[name, *map(cell, bounds)] for name, cell in rows], 1, columns)
    yield from ("", BOUND)
    if any(bound.flops is None for bound in bounds):
        yield UNKNOWN


def _values(values: Values, columns: int) -> Iterator[str]:
    yield from ("", "the prompt as it is built:")
    yield from (f"  | {line}" for line in escape_controls(values.text, "\n").split("\n"))
    yield from ("", f"its ids, computed in {values.dtype}:")
    heads = ("position", "block", "sees up to")[: len(values.positions[0])]
    heads = (*heads, "sees up to") if len(heads) > 1 else ()  # else all is as its number
    rows = [
        (_piece(token), str(at), str(token.id), *map(str, (*where, sees)[: len(heads)]))
        for at, (token, where, sees) in enumerate(
            zip(values.tokens, values.positions, values.sees, strict=True)
        )
    ]
    yield from table([("piece", "", "id", *heads), *rows], texts=1)
    if any(token.piece.startswith("<0x") for token in values.tokens):
        yield BYTES
    count = len(values.layers[0].lens)
    layers = [["layer", "next", *[""] * (count - 1), "stream", "attention", "mlp"]]
    for one in values.layers:
        norms = (f"{part[-1]:.3g}" for part in (one.stream, one.attention, one.mlp))
        name = "embed" if one.layer < 0 else str(one.layer)
        layers.append([name, *map(_likely, one.lens), *norms])
    yield from ("", "layer by layer:", *fitted(layers, 1 + count, columns), NORMS)
    for head in values.heads:
        yield from ("", *_map(head, values, columns))
    if values.heads:
        yield ROW + SHADES.strip()
    yield from ("", "the answer, always the most probable token:")
    answer = [["", "token", *["or"] * (count - 1)]]
    for number, step in enumerate(values.steps, 1):
        others = [c for c in step.alternatives if c.token != step.chosen.token]
        answer.append([str(number), *map(_likely, (step.chosen, *others[: count - 1]))])
    yield from fitted(answer, 1 + count, columns)
    ends = {"stop": "ended by its end token", "length": "ended by the length limit"}
    yield ends.get(values.end, values.end)
    yield from f"answer: {escape_controls(values.answer, chr(10))}".split("\n")


def _likely(candidate: Candidate) -> str:
    return f"{cut_to_width(_piece(candidate.token), _PIECE)} {candidate.probability:.1%}"


def _map(head: Head, values: Values, columns: int) -> Iterator[str]:
    yield f"attention of layer {head.layer}, head {head.head}:"
    tokens = len(values.tokens)
    if _LABEL + tokens > columns:
        yield "too wide for this terminal; --html, --json or a greater --width shows it"
        return
    wide = 2 if _LABEL + 2 * tokens <= columns else 1
    rows = []
    for at, (token, weights) in enumerate(zip(values.tokens, head.weights, strict=True)):
        cells = (
            SHADES[min(int(10 * weight**0.5), 9)] * wide
            for weight in weights[: values.sees[at] + 1]
        )
        rows.append((str(at), cut_to_width(_piece(token), _LABEL - 5), "".join(cells)))
    yield from table(rows, texts=3)


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _named(token: Token) -> str:
    return f"{_piece(token)}={token.id}".removeprefix("=")


def _piece(token: Token) -> str:
    return escape_controls(token.piece)


def _digits(number: float) -> str:
    """Return a rounded number: 2048.3 -> "2,050"."""
    return f"{float(f'{number:.3g}'):,g}"


def _flop(work: Pass | Stage) -> str:
    """Return a short count of operations: "203.3 G"."""
    return human_size(work.flops)[:-1]


def _binary(size: float) -> str:
    """Return bytes in binary units: 28672 -> "28 KiB"."""
    units = ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"
