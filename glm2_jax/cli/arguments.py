"""Types of command line arguments, and the checks that several commands share."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Collection

from glm2_jax.choices import DEVICES, unknown_device
from glm2_jax.cli.files import refuse_url
from glm2_jax.errors import UsageError
from glm2_jax.extras import pip_install

MAX_SEED = 2**63 - 1


def whole(text: str, least: int = 0) -> int:
    """Parse a whole number of 0 or more, for argparse."""
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least {least}, got {text!r}"
        )
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number of 1 or more, for argparse."""
    return min(whole(text, 1), 2**31 - 1)  # larger than any real value, and still easy to print


def random_seed(text: str) -> int:
    """Parse a random seed of 0 or more for argparse: at most what jax takes."""
    if (value := whole(text)) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_SEED}, got {text!r}")
    return value


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


def size_argument(text: str, unit: str = " ") -> int:
    """Parse a size such as "4GB", "500 MB", "1GiB" or "123456"; return bytes, at least 1."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 4GB or 500MB")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2] or unit))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a size must be at least one byte")
    return size


def memory_size(text: str) -> int:
    """Parse gigabytes, or a size with its unit, for argparse; return bytes."""
    return size_argument(text, "G" if text.strip()[-1:].isdigit() else " ")


def path_argument(text: str) -> str:
    """Parse a path for argparse; refuse an empty one (an unset shell variable) and a URL."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    refuse_url(text)
    return text


def device_argument(text: str, more: Collection[str] = (), pattern: str = "") -> str:
    """Parse the name of a device, or of one of `more`, or what a pattern matches, for argparse."""
    known = (*DEVICES, *more)
    name = text.lower()
    if name in known or (pattern and re.fullmatch(pattern, name)):
        return name
    raise argparse.ArgumentTypeError(unknown_device(text, known))


def choose_platform(device: str) -> None:
    """Keep jax from initializing an accelerator that is not wanted; call it before jax is there."""
    if device == "cpu" and "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"


def check_plot(path: str) -> None:
    """Raise UsageError, before anything is measured, if no picture of this kind can be drawn."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which cannot be imported.",
            str(error),
            f"Install it: {pip_install('plot')}",
        ) from error
    if os.path.splitext(path)[1].lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot must end in .png, .svg or .pdf, got {path}.")
