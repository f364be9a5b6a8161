"""Flags that the tools of inference share. Nothing here imports jax: `--help` must not wait."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from glm2_jax.choices import DEVICES, DTYPES, LAYER_LAYOUTS, QUANTIZE
from glm2_jax.cli.arguments import memory_size, path_argument, positive
from glm2_jax.cli.parser import Parser, flag
from glm2_jax.errors import UsageError
from glm2_jax.limits import DRAFT
from infer.engine.params import PRESETS, SamplingParams

_number = partial(flag, type=float, metavar="X")
_integer = partial(flag, type=int, metavar="N")


@dataclass(frozen=True)
class SamplingFlags:
    """The flags of sampling; None = the value of the preset."""

    preset: str = flag(
        "defaults of the flags below: official = the reference's chat(), "
        "api = the reference's HTTP server (temperature 0.95, top-p 0.7, max-length 2048)",
        choices=tuple(PRESETS), default="official",
    )  # fmt: skip
    greedy: bool = flag("most likely token at each step (= --temperature 0)", action="store_true")
    temperature: float | None = _number(
        "sampling temperature, 0 = greedy (default: 0.8)", short=("--temp",)
    )
    top_k: int | None = _integer("sample from the N most likely tokens, 0 = all (default: 50)")
    top_p: float | None = _number("nucleus sampling: cumulative probability (default: 0.8)")
    repetition_penalty: float | None = _number("above 1 reduces repetition (default: 1.0 = off)")
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

    def params(self) -> SamplingParams:
        """Return the sampling parameters; UsageError for a bad value."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        preset, greedy = given.pop("preset"), given.pop("greedy")
        if greedy:
            if given.get("temperature"):
                raise UsageError(
                    f"--greedy contradicts --temperature {self.temperature:g}",
                    fix="leave one of them out",
                )
            given["do_sample"] = False
        return SamplingParams.from_kwargs(preset, **given)


def add_adapter_options(parser: Parser) -> None:
    """Add the flags of an adapter or prefix."""
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--adapter", "--adapter-path", type=path_argument, metavar="DIR",
        help="LoRA adapter, as train.lora and the PEFT library write it",
    )  # fmt: skip
    group.add_argument(
        "--force-adapter", action="store_true",
        help="accept an adapter that was trained on another base model or prompt template",
    )  # fmt: skip
    group.add_argument(
        "--prefix", type=path_argument, metavar="DIR",
        help="P-Tuning v2 prefix, as the official repository's training saves it "
        "(checkpoint-3000 with pytorch_model.bin)",
    )  # fmt: skip


def add_performance_options(
    parser: Parser, *, cards: Iterable[str] = ()
) -> argparse._ArgumentGroup:
    """Add the flags of where and how to compute, with `cards` that can only be planned for; return
    their group."""
    group = parser.add_argument_group("performance")
    add = group.add_argument
    add(
        "--dtype", choices=DTYPES, default="auto", metavar="TYPE",
        help="dtype of activations and unquantized weights, one of %(choices)s; auto = bfloat16 on "
        "TPUs and GPUs that support it, float16 on older GPUs, float32 on a CPU where it fits",
    )  # fmt: skip
    add(
        "--quantize", choices=QUANTIZE,
        help="quantize the matrices of the layers while loading; none = dequantize (default: as "
        "stored). Less memory; on a CPU, one row is faster in int8 than in bfloat16, and int4 is "
        "no faster than int8; not measured on other devices",
    )  # fmt: skip
    add(
        "--quantize-embeddings", action="store_true",
        help="with --quantize int8 or int4: also the embedding and the head; infer.evaluate "
        "measures the cost in quality",
    )  # fmt: skip
    add(
        "--layers", choices=LAYER_LAYOUTS,
        help="layout of the layers in memory: list is faster on a CPU, stacked compiles faster "
        "(default: by device)",
    )  # fmt: skip
    add(
        "--prefill-chunk", type=positive, metavar="N",
        help="prefill N tokens of all rows at once: a smaller N needs less memory and more time "
        "(default: 2048)",
    )  # fmt: skip
    more = f"; with --dry-run also one of {', '.join(cards)}" if cards else ""
    add(
        "--device", choices=(*DEVICES, *cards), default="auto", metavar="DEVICE",
        help=f"device: {', '.join(DEVICES)}{more}",
    )  # fmt: skip
    add(
        "--memory-limit", type=memory_size, metavar="GB",
        help="refuse a model that needs more memory, before it is loaded (default: what the device "
        "has free)",
    )  # fmt: skip
    add(
        "--compile-cache", type=path_argument, metavar="DIR|off",
        help="folder of compiled programs (default: the user's cache folder)",
    )  # fmt: skip
    return group


def add_speculate(group: argparse._ArgumentGroup) -> None:
    """Add the flag of speculative decoding, for the tools that answer."""
    group.add_argument(
        "--speculate", type=_draft_tokens, default=0, metavar="N",
        help=f"prompt-lookup speculative decoding: draft N tokens per step, up to {DRAFT} (0 = "
        "off). Faster where answers repeat the prompt or themselves (quotations, edits, code), "
        "often slower elsewhere and with many rows. The answers stay the same in float32; in "
        "narrower dtypes ties may be decided differently. Measured on a CPU only",
    )  # fmt: skip


def _draft_tokens(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) < 10 else -1
    if not 0 <= number <= DRAFT:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to {DRAFT}, got {text[:20]!r}"
        )
    return number
