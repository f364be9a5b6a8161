"""The forms of a model that `--compare` names. Needs no jax."""

import argparse
from dataclasses import dataclass

from glm2_jax.errors import UsageError
from infer.options import DTYPES, QUANTIZE


@dataclass(frozen=True)
class Variant:
    """A form of the model; None = as the other flags say.

    Attributes:
      name: as the user wrote it.
    """

    name: str
    dtype: str | None
    quantize: str | None


def variants(text: str) -> tuple[Variant, ...]:
    """An argparse type: "none,int8,float32:int4", two forms or more."""
    found = []
    for name in dict.fromkeys(part.strip() for part in text.split(",")):
        dtype, colon, quantize = name.partition(":")
        if not colon and dtype in QUANTIZE:
            dtype, quantize = "", dtype
        known = (not dtype or dtype in DTYPES) and (not quantize or quantize in QUANTIZE)
        if not known or not (dtype or quantize):
            raise argparse.ArgumentTypeError(
                f"{name!r} is none of {', '.join((*QUANTIZE, *DTYPES))}, nor two of them as in "
                "float32:int8"
            )
        found.append(Variant(name, dtype or None, quantize or None))
    if len(found) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is one form; to compare takes two or more")
    return tuple(found)


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for a flag that all forms of `--compare` contradict."""
    if args.quantize is not None and all(variant.quantize for variant in args.compare):
        raise UsageError(
            f"--quantize {args.quantize} has no effect",
            "--compare says the quantisation of all forms.",
            "Leave it out.",
        )
    if args.dtype != "auto" and all(variant.dtype for variant in args.compare):
        raise UsageError(
            f"--dtype {args.dtype} has no effect",
            "--compare says the dtype of all forms.",
            "Leave it out.",
        )
