"""The variants of a model that `--compare` names. Does not import jax."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from glm2_jax.choices import DTYPES, QUANTIZE
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.errors import UsageError


@dataclass(frozen=True)
class Variant:
    """One variant, `name` as the user wrote it; None = as the other flags say."""

    name: str
    dtype: str | None
    quantize: str | None

    def of(self, choice: ModelChoice) -> ModelChoice:
        """Return the choice of this variant."""
        quantize = self.quantize or choice.quantize
        return dataclasses.replace(
            choice,
            dtype=self.dtype or choice.dtype,
            quantize=quantize,
            quantize_embeddings=choice.quantize_embeddings and quantize != "none",
        )


def variants(text: str) -> tuple[Variant, ...]:
    """Parse variants such as "none,int8,float32:int4", at least two, for argparse."""
    found = []
    for name in dict.fromkeys(part.strip() for part in text.split(",")):
        dtype, _, quantize = name.rpartition(":") if name not in DTYPES else (name, "", "")
        if not name.strip(":") or dtype not in (*DTYPES, "") or quantize not in (*QUANTIZE, ""):
            raise argparse.ArgumentTypeError(
                f"{name!r} must be one of {', '.join((*QUANTIZE, *DTYPES))}, or DTYPE:QUANTIZATION "
                "such as float32:int8"
            )
        found.append(Variant(name, dtype or None, quantize or None))
    if len(found) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must name at least two variants")
    return tuple(found)


def check_flags(compared: Sequence[Variant], choice: ModelChoice) -> None:
    """Raise UsageError for a flag that every variant overrides."""
    for flag, value in {"quantize": choice.quantize, "dtype": choice.dtype}.items():
        if value not in (None, "auto") and all(getattr(one, flag) for one in compared):
            raise UsageError(
                f"--{flag} {value} has no effect",
                f"--compare names the {flag} of every variant.",
                "Leave it out.",
            )
