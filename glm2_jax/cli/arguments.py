"""Types of command line arguments, and the checks that several commands share."""

import argparse
import importlib
import os
import re
import sys

from glm2_jax.cli.files import refuse_url
from glm2_jax.errors import UsageError

INSTALL = "pip install 'glm2-jax[plot]'"


def positive(text: str) -> int:
    """Parse a whole number of 1 or more, for argparse."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return min(int(text), 2**31 - 1)  # larger than any real value, and still easy to print


def memory_size(text: str) -> int:
    """Parse gigabytes, or a size with its unit, for argparse; return bytes."""
    try:
        number = float(text)
    except ValueError:
        return size_argument(text)
    try:
        return size_argument(f"{number}GB")
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write for example 8 (GB), 4GB or 500MB"
        ) from None


def use_utf8() -> None:
    """Make standard output and error UTF-8, whatever the locale says (LANG=C, old Windows)."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")


def choose_platform(device: str) -> None:
    """Keeps jax from initializing an accelerator that is not wanted; call it before jax is there.

    `infer.startup.open_engine` decides which device is used.
    """
    if device == "cpu" and "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"


def path_argument(text: str) -> str:
    """Parse a path for argparse; refuse an empty one (an unset shell variable) and a URL."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    refuse_url(text)
    return text


def size_argument(text: str) -> int:
    """Parse a size such as "4GB", "500 MB", "1GiB" or "123456"; return bytes, at least 1."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 4GB or 500MB")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2] or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a size must be at least one byte")
    return size


def check_plot(path: str) -> None:
    """Check, before anything is measured, that a picture of this kind can be drawn.

    Raises:
        UsageError: matplotlib is not installed or cannot be imported, or `path` does not
            end in .png, .svg or .pdf.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which cannot be imported.",
            str(error),
            f"Install it: {INSTALL}",
        ) from error
    if os.path.splitext(path)[1].lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot must end in .png, .svg or .pdf, got {path}.")


def number(text: str) -> float:
    """Parse a finite number of 0 or more, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def above_zero(text: str) -> float:
    """Parse a finite number above 0, for argparse."""
    value = number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return value


def whole(text: str) -> int:
    """Parse a whole number of 0 or more, for argparse."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)
