"""The flags of `infer.bench --serve`, without jax."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from glm2_jax.cli.arguments import above_zero, number, path_argument, random_seed
from glm2_jax.cli.parser import flag
from glm2_jax.errors import UsageError
from infer.bench.options import BenchSettings, count, lengths

LLAMA = "llama"


def _rates(text: str) -> tuple[float, ...]:
    """Parse numbers above 0, separated by commas, for argparse."""
    return tuple(sorted({above_zero(part) for part in text.split(",")}))


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"expected http://HOST:PORT, got {text!r}")
    return text.rstrip("/").removesuffix("/v1")


def _peer(text: str) -> str:
    return text if text == LLAMA else _url(text)


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """Which server is measured, with what traffic; each field is a flag."""

    serve: bool = flag(
        "measure a server as its clients see it: python -m infer.serve, which is started with the "
        "model of --model or --random, or that of --url",
        action="store_true",
    )
    url: str | None = flag(
        "a running server of OpenAI's API, instead of starting one", type=_url, metavar="URL"
    )
    api_key_file: str | None = flag(
        "file with the key of --url (default: the environment variable GLM2_API_KEY)",
        type=path_argument, metavar="F",
    )  # fmt: skip
    model_name: str | None = flag(
        "model to ask --url for (default: the first that it lists)", metavar="NAME"
    )
    peer_server: str | None = flag(
        "measure another server in turns: llama starts llama-server, which must be on PATH, with "
        "the same weights as GGUF (f16, or q8_0 with --quantize int8); or the URL of one",
        type=_peer, metavar=f"{LLAMA}|URL",
    )  # fmt: skip
    slots: int | None = count(
        "slots of servers that are started (default: the largest number of users, or 32 with "
        "--rate)"
    )
    server_args: tuple[str, ...] | None = flag(
        "further flags for infer.serve, in quotes", type=_words, metavar="FLAGS"
    )
    users: tuple[int, ...] = lengths(
        "closed loop: so many users at once, each of whom sends a request when the last one has "
        "been answered; several numbers are measured one after another",
        default="1,8,32",
    )
    rate: tuple[float, ...] | None = flag(
        "instead of --users: requests arrive at random, so many per second on average (Poisson)",
        type=_rates, metavar="X,X",
    )  # fmt: skip
    requests: int | None = count(
        "requests of each measurement (default: 8 for each user, or a minute of --rate)"
    )
    prompt_tokens: int = count("tokens of a prompt, which are random", default=128)
    new_tokens: int = count("tokens of an answer", default=64)
    spread: float = flag(
        "lengths of prompts and answers are log-normal around these medians, with this standard "
        "deviation of the logarithm, and at most 4 times the median (0 = all the same)",
        type=number, default=0.0, metavar="S",
    )  # fmt: skip
    temperature: float = flag(
        "temperature of the requests (0 = greedy)", type=number, default=0.0, metavar="T"
    )
    seed: int = flag("random seed of the traffic", type=random_seed, default=0, metavar="N")
    timeout: float = flag(
        "seconds until a request counts as failed", type=above_zero, default=600.0, metavar="S"
    )
    slo_ttft_ms: float = flag(
        "goodput counts requests whose time to first token is at most this",
        type=above_zero, default=2000.0, metavar="MS",
    )  # fmt: skip
    slo_itl_ms: float = flag(
        "and whose mean inter-token latency is at most this",
        type=above_zero, default=200.0, metavar="MS",
    )  # fmt: skip


# Flags of the bench that say what a server is started with, and those that mean nothing to one.
_OF_THE_MODEL = ("random", "dtypes", "quantize", "layout")
_OF_PROGRAMS = ("preset", "prompts", "batches", "contexts", "steps", "repeat", "peer", "ceilings")


def check(settings: BenchSettings, load: LoadSettings) -> None:
    """Raise UsageError for flags that have no effect together."""
    if not load.serve:
        _refuse(_changed(load), "needs --serve.")
        return
    _refuse(_changed(settings, _OF_PROGRAMS), "has no effect with --serve.")
    if load.url is not None:
        named = _changed(settings.choice) + _changed(settings, _OF_THE_MODEL)
        _refuse(named, "has no effect with --url, whose server has its model already.")
        if load.peer_server == LLAMA:
            raise UsageError(
                "--peer-server llama has no effect with --url.",
                "It is started with the weights of --model or --random.",
                "Start llama-server, and give its address to --peer-server.",
            )
    else:
        _refuse(_changed(load, ("api_key_file", "model_name")), "needs --url.")
    for name in ("dtypes", "quantize", "layout"):
        values = getattr(settings, name) or ()
        if len(values) > 1:
            raise UsageError(f"--{name} must name one with --serve, got {','.join(values)}.")
    if load.rate and "--users" in _changed(load):
        raise UsageError("--users and --rate exclude each other.", fix="Leave one out.")


def _changed(settings: Any, only: tuple[str, ...] = ()) -> list[str]:
    """Return the flags of a dataclass that are not at their defaults."""
    found = []
    for field in fields(settings):
        known: Mapping[str, Any] = field.metadata
        if "help" not in known or (only and field.name not in only):
            continue
        default, value = field.default, getattr(settings, field.name)
        if isinstance(default, str) and (parse := known.get("type")):  # as argparse does
            default = parse(default)
        if value != default:
            found.append(f"--{known.get('name', field.name).replace('_', '-')}")
    return found


def _refuse(flags: list[str], why: str) -> None:
    if flags:
        raise UsageError(f"{flags[0]} {why}", fix="Leave it out, or see --help.")
