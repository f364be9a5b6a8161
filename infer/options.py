"""Flags that the answering tools share, and what they mean. Nothing here imports jax at once."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from convert.cli import Parser, note
from glm2_jax.errors import DeviceError, UsageError
from infer.params import PRESETS, SamplingParams

if TYPE_CHECKING:
    from infer.engine import Engine

DTYPES = ("auto", "bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32")
DEVICES = ("auto", "cpu", "gpu", "tpu")
_SAMPLING_FLAGS = (
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
    "stop",
    "seed",
    "logprobs",
    "loop_stop",
    "num_beams",
)


def add_model_options(parser: Parser) -> None:
    """Which model, and how its checkpoint is to be understood."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "-m",
        metavar="DIR",
        help="checkpoint folder, as published or converted (default: the bundled demo model)",
    )
    group.add_argument(
        "--rope-scaling",
        choices=("linear", "base"),
        help="what the checkpoint's rope_ratio means, where it does not say: positions divided "
        "(chatglm2-6b-32k) or the base multiplied (chatglm3-6b-32k, -128k)",
    )
    group.add_argument(
        "--template",
        choices=("chatglm2", "chatglm3", "raw"),
        help="how a prompt is written for the model (default: by the checkpoint's family)",
    )


def add_sampling_options(parser: Parser) -> None:
    """How an answer is drawn. A flag that is not given has the preset's value."""
    official = PRESETS["official"]
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="official",
        help="values for the flags below: official = the reference's chat(), "
        "api = the reference's HTTP server (temperature 0.95, top-p 0.7, max-length 2048)",
    )
    group.add_argument(
        "--greedy", action="store_true", help="always the likeliest token (= --temperature 0)"
    )

    def add(*flags: str, help: str, **kwargs: Any) -> None:
        group.add_argument(*flags, help=help, **kwargs)

    number: dict[str, Any] = {"type": float, "metavar": "X"}
    integer: dict[str, Any] = {"type": int, "metavar": "N"}
    add(
        "--temperature",
        "--temp",
        **number,
        help=f"0 = greedy (default: {official.temperature})",
    )
    add("--top-k", **integer, help=f"keep the N likeliest, 0 = all (default: {official.top_k})")
    add("--top-p", **number, help=f"keep this much probability, (0, 1] (default: {official.top_p})")
    add("--repetition-penalty", **number, help="above 1 avoids repeating (default: 1.0 = off)")
    add(
        "--max-new-tokens",
        "--max-tokens",
        **integer,
        help="longest answer (default: as far as --max-length goes)",
    )
    add(
        "--max-length",
        **integer,
        help=f"prompt and answer together, in tokens (default: {official.max_length}, "
        "at most what the model has)",
    )
    add(
        "--stop",
        action="append",
        metavar="S",
        help="end the answer before this string; may be given again",
    )
    add("--seed", **integer, help="the same seed gives the same answer (default: 0)")
    add("--logprobs", **integer, help="log-probabilities and N alternatives, with --json")
    add(
        "--loop-stop",
        **integer,
        help="end an answer whose end repeats itself N times, 0 = never (default: 0)",
    )
    add("--num-beams", **integer, help="beam search is not implemented, only 1 is accepted")


def add_performance_options(parser: Parser) -> argparse._ArgumentGroup:
    """Where and how to compute; returns the group, for what a single tool adds."""
    group = parser.add_argument_group("performance")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        metavar="TYPE",
        help="type to compute in, one of %(choices)s; auto = bfloat16 on TPU and GPUs that have "
        "it, float16 on older GPUs, float32 on CPU where it fits",
    )
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    group.add_argument(
        "--compile-cache",
        metavar="DIR|off",
        help="where compiled programs are kept (default: the user's cache folder)",
    )
    return group


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling flags as `SamplingParams`; UsageError for a bad value."""
    given = {
        name: getattr(args, name) for name in _SAMPLING_FLAGS if getattr(args, name) is not None
    }
    if args.greedy:
        if given.get("temperature"):
            raise UsageError(
                f"--greedy contradicts --temperature {given['temperature']:g}",
                fix="leave one of them out",
            )
        given["do_sample"] = False
    return SamplingParams.from_kwargs(args.preset, **given)


def open_engine(args: argparse.Namespace) -> Engine:
    """Loads the model that the flags name and says on stderr what there is to know about it."""
    if args.model is None:
        note("no --model given: using the bundled demo model, a few million parameters")
    if args.device == "cpu" and "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator is not even initialised
    import infer
    from infer import compile_cache

    compile_cache.use(args.compile_cache)
    engine = infer.load(
        args.model,
        dtype=args.dtype,
        device=select_device(args.device),
        rope_kind=args.rope_scaling,
        template=args.template,
    )
    for line in engine.checkpoint.notes:
        note(line)
    return engine


def select_device(name: str) -> Any:
    """The first device of a kind, None for "auto"; DeviceError if there is none."""
    if name == "auto":
        return None
    import jax

    try:
        return jax.devices(name)[0]
    except RuntimeError:
        raise DeviceError(
            f"--device {name}: there is no such device here",
            f"jax sees {', '.join(sorted({d.platform for d in jax.devices()}))}",
            f"install the {'cuda' if name == 'gpu' else name} extra, or leave the flag out",
        ) from None
