"""The forms of a model that `--compare` names. Needs no jax."""

import argparse
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm2_jax.choices import DTYPES, QUANTIZE
from glm2_jax.errors import UsageError

if TYPE_CHECKING:
    from convert.loading.folder import Folder


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
            "--compare says the quantization of all forms.",
            "Leave it out.",
        )
    if args.dtype != "auto" and all(variant.dtype for variant in args.compare):
        raise UsageError(
            f"--dtype {args.dtype} has no effect",
            "--compare says the dtype of all forms.",
            "Leave it out.",
        )


def asking_for(args: argparse.Namespace, variant: Variant) -> argparse.Namespace:
    """The flags by which one form would be opened alone."""
    args = copy.copy(args)
    args.dtype = variant.dtype or args.dtype
    args.quantize = variant.quantize or args.quantize
    if args.quantize == "none":  # --quantize-embeddings is for the other forms
        args.quantize_embeddings = False
    return args


def check_folder(args: argparse.Namespace, folder: "Folder") -> None:
    """Raises UsageError for a form that the folder cannot have, or that is there twice."""
    from convert.loading.folder import target_scheme
    from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype

    seen: dict[object, str] = {}
    for variant in args.compare:
        form = asking_for(args, variant)
        if folder.scheme is not None and form.quantize not in (None, "none"):
            raise UsageError(
                f"--compare: no {form.quantize} of {folder.path}",
                f"It is quantized already ({folder.scheme.name}); once more, its weights would "
                "only get worse.",
                "As it is stored beside unpacked: --compare bfloat16,bfloat16:none. Or start from "
                "the original weights.",
            )
        scheme = target_scheme(folder, form.quantize, form.quantize_embeddings)
        dtype = form.dtype
        if dtype != "auto":
            dtype = dtype_name(resolve_dtype(dtype, num_params=folder.config.num_params))
        other = seen.setdefault((dtype, scheme), variant.name)
        if other != variant.name:
            raise UsageError(
                f"--compare: {other} and {variant.name} are the same form of this model",
                fix="Leave one of them out.",
            )
