"""The ways in which weights are quantized, as sizes only: the memory plan needs no jax."""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm2_jax.errors import UsageError

# The weights of a layer that are quantized, and how many of their last axes are columns.
COLUMN_AXES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate_up": 1, "down": 1}

EMBEDDINGS = ("embed", "head")  # quantized on request; a row for each id
_EMBEDDINGS = "+embeddings"  # suffix of the schemes that include them
_WIDE = "+int8-embeddings"  # of those that have them in int8

GROUP = 128  # columns that share a scale in our int4

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scheme:
    """A way to quantize."""

    name: str  # one of `SCHEMES`
    bits: int  # 8 or 4
    grouped: bool  # whether a row has a scale for every group of columns, not one for the row
    embeddings: bool = False  # whether embedding and head are quantized, too
    most: int = GROUP  # columns that share a scale in a grouped one, at most
    wide: bool = False  # whether embedding and head are int8 with a scale per row instead

    def covers(self, name: str) -> bool:
        """Return whether a parameter of that name is quantized."""
        return name in COLUMN_AXES or (self.embeddings and name in EMBEDDINGS)

    def of(self, name: str) -> Scheme:
        """Return the scheme of one parameter among those that this one covers."""
        return SCHEMES["int8"] if self.wide and name in EMBEDDINGS else self

    def group(self, columns: int) -> int | None:
        """Return how many columns share a scale, at most `most`; None = all of a row."""
        return math.gcd(columns, self.most) if self.grouped else None

    def shapes(self, shape: Shape, column_axes: int) -> tuple[Shape, Shape]:
        """Return the shapes of values and scales of a weight whose last axes are columns."""
        rows, columns = shape[:-column_axes], math.prod(shape[-column_axes:])
        group = self.group(columns)
        groups = () if group is None else (columns // group,)
        return (*shape[:-1], shape[-1] * self.bits // 8), (*rows, *groups)


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, grouped=False),  # of the published int8 folders, and our own
        Scheme("int4-row", 4, grouped=False),  # of the published int4 folders
        Scheme("int4", 4, grouped=True),  # our own
        # Of chatglm-6b-int4-qe.
        Scheme("int4-row" + _EMBEDDINGS, 4, grouped=False, embeddings=True),
        Scheme("int8" + _EMBEDDINGS, 8, grouped=False, embeddings=True),
        Scheme("int4" + _EMBEDDINGS, 4, grouped=True, embeddings=True),
        # Of convert.quantize.
        Scheme("int4-g64", 4, grouped=True, most=64),
        Scheme("int4-g32", 4, grouped=True, most=32),
        Scheme("int4" + _WIDE, 4, grouped=True, embeddings=True, wide=True),
        Scheme("int4-g64" + _WIDE, 4, grouped=True, embeddings=True, most=64, wide=True),
        Scheme("int4-g32" + _WIDE, 4, grouped=True, embeddings=True, most=32, wide=True),
        # Of folders whose integers of 4 bits have zero points, or that have integers of 8 bits.
        Scheme("int8-g128", 8, grouped=True),
        Scheme("int8-g64", 8, grouped=True, most=64),
        Scheme("int8-g32", 8, grouped=True, most=32),
    )
}
GROUPS = (GROUP, 64, 32)


def grouped_scheme(group: int, embeddings: bool) -> Scheme:
    """Return the scheme of 4 bits with such groups, one of `GROUPS`; `embeddings` in int8."""
    name = "int4" if group == GROUP else f"int4-g{group}"
    return SCHEMES[name + _WIDE * embeddings]


def asked_scheme(
    quantize: str | None, embeddings: bool, *, stored: str | None = None, model: str = "The model"
) -> str | None:
    """Return the scheme's name that --quantize and --quantize-embeddings stand for.

    UsageError if the folder, which messages call `model`, is `stored` quantized already, or if
    embeddings are to be quantized without layers.
    """
    if stored is not None and (embeddings or quantize not in (None, "none")):
        raise UsageError(
            f"{model} is quantized already ({stored}).",
            "Quantizing it again would only lose precision.",
            "Omit --quantize and --quantize-embeddings, or start from the original weights.",
        )
    if embeddings and quantize in (None, "none"):
        raise UsageError(
            "Embedding and head cannot be quantized alone.",
            "They are quantized like the layers.",
            "Add --quantize int8 or int4.",
        )
    return f"{quantize}{_EMBEDDINGS}" if embeddings else quantize


def stored_as(dtype: str, scheme: Scheme | None) -> str:
    """Describe how weights are stored: "float16", or "int8, the rest float16"."""
    return dtype if scheme is None else f"{scheme.name}, the rest {dtype}"


def scheme_flags(name: str) -> str:
    """Return the flags that ask for a scheme."""
    flag = " --quantize-embeddings" if name.endswith(_EMBEDDINGS) else ""
    return f"--quantize {name.removesuffix(_EMBEDDINGS)}{flag}"
