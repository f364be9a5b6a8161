"""The flags of `python -m infer.explain`. Nothing here imports jax."""

import argparse
import re
from dataclasses import dataclass
from functools import partial

from glm2_jax.choices import unknown_device
from glm2_jax.cli.arguments import path_argument, positive
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import flag
from glm2_jax.cli.tables import columns
from glm2_jax.errors import UsageError
from infer.engine.params import MAX_LOGPROBS
from infer.memory.cards import CARDS, LINKS, MESHES

PROMPT = "你好"
DEVICES = ("3090", "a100", "h200", "v5e-1")

_count = partial(flag, type=positive, metavar="N")


def _device(text: str) -> str:
    """Parse a device, or several joined by links ("v5e" is one chip), for argparse."""
    name = text.lower()
    if name in CARDS or f"{name}-1" in CARDS or re.fullmatch(MESHES, name):
        return name
    raise argparse.ArgumentTypeError(unknown_device(text, CARDS))


def _heads(text: str) -> tuple[tuple[int, int], ...]:
    """Parse heads such as "0:0,27:31", for argparse."""
    if not re.fullmatch(r"\d{1,6}:\d{1,6}(,\d{1,6}:\d{1,6})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a list of heads; write LAYER:HEAD, for example 0:0,27:31"
        )
    pairs = (part.split(":") for part in text.split(","))
    return tuple(dict.fromkeys((int(layer), int(head)) for layer, head in pairs))


@dataclass(frozen=True)
class SubjectOptions:
    """What is explained."""

    config: str | None = flag(
        "instead of --model: a published name such as chatglm2-6b, or a config.json; only "
        "shapes and costs, in bfloat16 unless --dtype or --quantize say otherwise",
        type=path_argument, metavar="NAME|FILE",
    )  # fmt: skip
    prompt: str | None = flag(
        f"the question (default: {PROMPT})", short=("-p",), metavar="TEXT", exclusive=True
    )
    length: int | None = _count(
        "instead of a prompt: its number of ids; only shapes and costs", exclusive=True
    )
    batch: int = _count("batch size, in shapes and costs", default=1)


@dataclass(frozen=True)
class ValueOptions:
    """What is shown of a model with weights."""

    top_k: int | None = flag(
        f"most probable tokens to list, up to {MAX_LOGPROBS} (default: 5)",
        type=int, choices=range(1, MAX_LOGPROBS + 1), metavar="N",
    )  # fmt: skip
    heads: tuple[tuple[int, int], ...] | None = flag(
        "heads whose attention is shown, counted from 0 (default: two heads of three layers)",
        type=_heads, metavar="LAYER:HEAD,...",
    )  # fmt: skip
    max_new_tokens: int | None = _count("longest answer (default: 64)", short=("--max-tokens",))


@dataclass(frozen=True)
class DeviceOptions:
    """The devices that the costs are shown for."""

    device: list[str] | None = flag(
        f"devices to show the minimum time for, any of {', '.join(CARDS)} (v5e is v5e-1); "
        f"this machine need not have them "
        f"(default: {', '.join(DEVICES)}; with --mesh: {', '.join(LINKS)})",
        nargs="+", type=_device, metavar="NAME",
    )  # fmt: skip
    mesh: str | None = flag(
        "instead of the stages: what each of several devices holds, moves and sends, such as "
        "--mesh data=2,tensor=4 --device v5e-8 v5p-8 8xh200; --length is that of the rows",
        metavar="AXIS=N,...",
    )


@dataclass(frozen=True)
class OutputOptions:
    """How it is shown."""

    json: bool = flag("one JSON object instead of tables", action="store_true")
    html: str | None = flag(
        "also write a page that a browser shows without a network; overwrites the file",
        type=path_argument, metavar="FILE",
    )  # fmt: skip
    width: int | None = _count(
        "width of the output in columns, at least 30 (default: the terminal's)"
    )


@dataclass(frozen=True, kw_only=True)
class Settings(SubjectOptions, ValueOptions, DeviceOptions, OutputOptions):
    """The flags of the command."""

    choice: ModelChoice
    options: EngineOptions

    def refuse(self, *names: str, why: str) -> None:
        """Raise UsageError if one of these flags was given."""
        found = [name.replace("_", "-") for name in names if getattr(self, name) is not None]
        if found:
            raise UsageError(f"--{', --'.join(found)}: no effect", why, "Leave it out.")

    @property
    def columns(self) -> int:
        """Columns to write in."""
        return max(self.width or columns(100), 30)
