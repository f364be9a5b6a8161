"""Flags that the tools of inference share. Nothing here imports jax: `--help` must not wait."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from glm2_jax.choices import DEVICES
from glm2_jax.cli.arguments import device_argument, path_argument
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice, add_mesh_options
from glm2_jax.cli.parser import Parser, add_flags, flag
from glm2_jax.errors import UsageError
from infer.engine.params import SamplingParams
from infer.requests.request import read_prompt

_number = partial(flag, type=float, metavar="X")
_integer = partial(flag, type=int, metavar="N")


class Once(argparse.Action):
    """Stores a value; a second one is an error, so that no prompt or file is lost silently."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "given twice")
        setattr(namespace, self.dest, values)


@dataclass(frozen=True)
class PromptFlags:
    """Where a prompt comes from."""

    prompt: str | None = flag(
        "the prompt; - reads it from standard input",
        short=("-p",), action=Once, metavar="TEXT", exclusive=True,
    )  # fmt: skip
    prompt_file: str | None = flag(
        "a UTF-8 file with the prompt",
        type=path_argument, action=Once, metavar="F", exclusive=True,
    )  # fmt: skip

    def read(self) -> str:
        """Return the prompt that the flags name, or standard input.

        InputError: it cannot be read. UsageError: no flag is given, and standard input is a
        terminal or closed.
        """
        if self.prompt_file is not None:
            return read_prompt(self.prompt_file)
        if self.prompt not in (None, "-"):
            return self.prompt
        if self.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
            raise UsageError(
                "No prompt was given.",
                "No flag names one, and standard input is a terminal or closed.",
                "Add --prompt TEXT.",
            )
        return read_prompt("-")


@dataclass(frozen=True)
class SamplingFlags:
    """The flags of sampling; None = the value of the preset. UsageError when made: a bad value."""

    preset: str = flag(
        "defaults of the flags below: official = the published code of the model (as below; "
        "ChatGLM-6B as api, GLM greedy), api = the published HTTP server (temperature 0.95, top-p "
        "0.7, max-length 2048)",
        choices=("official", "api"), default="official",
    )  # fmt: skip
    greedy: bool = flag("most likely token at each step (= --temperature 0)", action="store_true")
    temperature: float | None = _number(
        "sampling temperature, 0 = greedy (default: 0.8)", short=("--temp",)
    )
    top_k: int | None = _integer("sample from the N most likely tokens, 0 = all (default: 50)")
    top_p: float | None = _number("nucleus sampling: cumulative probability (default: 0.8)")
    repetition_penalty: float | None = _number("above 1 reduces repetition (default: 1.0 = off)")
    presence_penalty: float | None = _number(
        "above 0 reduces tokens that the answer has already, -2 to 2 (default: 0 = off)"
    )
    frequency_penalty: float | None = _number(
        "the same, times how often the answer has them, -2 to 2 (default: 0 = off)"
    )
    logit_bias: list[str] | None = flag(
        "add X, -100 to 100, to the logit of a token id, for example 5=-100,9=2.5; may be repeated",
        action="append", metavar="ID=X,...",
    )  # fmt: skip
    max_new_tokens: int | None = _integer(
        "longest answer in tokens (default: up to --max-length)", short=("--max-tokens",)
    )
    max_length: int | None = _integer(
        "context: prompt and answer, in tokens (default: 8192, or what the model has)"
    )
    stop: list[str] | None = flag(
        "stop string: the answer ends before it; may be repeated", action="append", metavar="S"
    )
    seed: int | None = _integer("random seed; the same seed gives the same answer (default: 0)")
    logprobs: int | None = _integer("with --json: log-probabilities and N alternatives")
    loop_stop: int = _integer(
        "stop an answer that ends in N repetitions over more than 64 x N tokens, 0 = never",
        default=0,
    )
    num_beams: int | None = _integer("beam search is not supported: only 1 is accepted")

    def __post_init__(self) -> None:
        self.params()

    def params(self, preset_of: Callable[[str], str] = str) -> SamplingParams:
        """Return the sampling parameters; `preset_of` is that of the model's template."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        preset, greedy = given.pop("preset"), given.pop("greedy")
        if greedy:
            if given.get("temperature"):
                raise UsageError(
                    f"--greedy contradicts --temperature {self.temperature:g}.",
                    fix="Leave one of them out.",
                )
            given["do_sample"] = False
        if self.logit_bias is not None:
            given["logit_bias"] = _biases(self.logit_bias)
        try:
            return SamplingParams.from_kwargs(preset_of(preset), **given)
        except UsageError as error:  # it begins with the name of the parameter, not of its flag
            name = next((name for name in given if re.match(rf"{name}\b", error.what)), "")
            what = f"--{name.replace('_', '-')}" * bool(name) + error.what[len(name) :]
            raise UsageError(what, error.why, error.fix) from None


def _biases(texts: Iterable[str]) -> list[tuple[int, float]]:
    """Return the pairs of token id and bias in texts like "5=-100,9=2.5"."""
    pairs = []
    for pair in ",".join(texts).split(","):
        token, _, bias = pair.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            raise UsageError(
                f"--logit-bias must be ID=X,..., got {pair!r}.",
                fix="Example: --logit-bias 5=-100,9=2.5",
            ) from None
    return pairs


def add_adapter_options(parser: Parser) -> None:
    """Add the flags of an adapter or prefix."""
    add_flags(parser, "adapter", ModelChoice, ("adapter", "force_adapter", "prefix"))


def add_performance_options(
    parser: Parser,
    *,
    cards: Iterable[str] = (),
    mesh: bool = False,
    speculate: bool = False,
    chunk: bool = True,
    kv: bool = True,
    layout: bool = True,
) -> argparse._ArgumentGroup:
    """Add the flags of where and how to compute, with `cards` that can only be planned for; return
    their group. Without `chunk`, the command has its own flag for the tokens of a prefill;
    without `kv`, it has no cache, or none of this kind; without `layout`, it needs a layout of the
    layers."""
    group = parser.add_argument_group("performance")
    more = f"; with --dry-run also one of {', '.join(cards)}" if cards else ""
    kind = partial(device_argument, more=tuple(cards))
    device: Any = {"type": kind, "help": f"device: {', '.join(DEVICES)}{more}"}
    where = "dtype", "quantize", "quantize_embeddings", *("layers",) * layout, "device"
    add_flags(group, None, ModelChoice, where, device=device)
    limits = ("prefill_chunk",) * chunk + ("memory_limit", "tuned", "compile_cache")
    add_flags(group, None, EngineOptions, limits)
    if mesh:
        add_mesh_options(group)
    more = ("speculate",) * speculate + ("kv",) * kv
    if more:
        add_flags(group, None, EngineOptions, more)
    return group
