"""Flags that the answering tools share, and what they mean.

Everything of the project but `glm2_jax.cli.main` is imported inside the functions that use it after
parsing: it may bring in jax, and `--help` must not wait for that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm2_jax.choices import DEVICES, DTYPES, QUANTIZE
from glm2_jax.cli.arguments import memory_size, path_argument, positive
from glm2_jax.cli.parser import Parser
from glm2_jax.limits import DRAFT

if TYPE_CHECKING:
    from infer.engine.params import SamplingParams


@dataclass(frozen=True)
class SamplingFlags:
    """The flags of `add_sampling_options`; None = the value of the preset."""

    preset: str = "official"
    greedy: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    stop: list[str] | None = None
    seed: int | None = None
    logprobs: int | None = None
    loop_stop: int | None = None
    num_beams: int | None = None

    def params(self) -> SamplingParams:
        """Return the sampling parameters; UsageError for a bad value."""
        from glm2_jax.errors import UsageError
        from infer.engine.params import SamplingParams

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
    """Which adapter or prefix answers with the model."""
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--adapter",
        "--adapter-path",
        type=path_argument,
        metavar="DIR",
        help="answer with a LoRA adapter, as python -m train.lora and the PEFT library write it",
    )
    group.add_argument(
        "--force-adapter",
        action="store_true",
        help="take the adapter though it was trained on another base model or prompt template",
    )
    group.add_argument(
        "--prefix",
        type=path_argument,
        metavar="DIR",
        help="answer with a P-Tuning v2 prefix, as the official repository's training saves it "
        "(checkpoint-3000 with pytorch_model.bin)",
    )


def add_sampling_options(parser: Parser, *, loop_stop: int = 0) -> None:
    """How an answer is drawn. A flag that is not given has the preset's value, but `--loop-stop`
    has its own."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--preset",
        choices=("official", "api"),
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
        help="0 = greedy (default: 0.8)",
    )
    add("--top-k", **integer, help="keep the N likeliest, 0 = all (default: 50)")
    add("--top-p", **number, help="keep this much probability, (0, 1] (default: 0.8)")
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
        help="prompt and answer together, in tokens (default: 8192, at most what the model has)",
    )
    add(
        "--stop",
        action="append",
        metavar="S",
        help="end the answer before this string in its text, as it is shown; may be given again",
    )
    add("--seed", **integer, help="the same seed gives the same answer (default: 0)")
    add("--logprobs", **integer, help="log-probabilities and N alternatives, with --json")
    add(
        "--loop-stop",
        **integer,
        default=loop_stop,
        help="end an answer whose end repeats itself N times and for 64 x N tokens, 0 = never",
    )
    add("--num-beams", **integer, help="beam search is not implemented, only 1 is accepted")


def add_performance_options(
    parser: Parser, *, cards: Iterable[str] = ()
) -> argparse._ArgumentGroup:
    """Where and how to compute; returns the group, for what a single tool adds.

    Args:
      cards: further devices that may be named, though there is no computing on them.
    """
    group = parser.add_argument_group("performance")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        metavar="TYPE",
        help="type to compute in, one of %(choices)s; auto = bfloat16 on TPU and GPUs that have "
        "it, float16 on older GPUs, float32 on CPU where it fits",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="keep the matrices of the layers as int8 or int4, quantized while they are loaded; "
        "none = unpack what is stored quantized (default: as it is stored). Saves memory; on a CPU "
        "one answer comes faster in int8 than in bfloat16, int4 is no faster than int8; on other "
        "devices not measured",
    )
    group.add_argument(
        "--quantize-embeddings",
        action="store_true",
        help="with --quantize int8 or int4: the embedding and the head, too (default: they stay as "
        "they are); what that costs in quality, python -m infer.evaluate tells",
    )
    group.add_argument(
        "--layers",
        choices=("stacked", "list"),
        help="how the layers lie in memory: a list computes faster on a CPU, stacked ones compile "
        "faster (default: by device)",
    )
    group.add_argument(
        "--prefill-chunk",
        type=positive,
        metavar="N",
        help="read prompts N tokens at once, all rows together: less needs less memory and more "
        "time (default: 2048)",
    )
    more = f"; with --dry-run also one of {', '.join(cards)}" if cards else ""
    group.add_argument(
        "--device",
        choices=(*DEVICES, *cards),
        default="auto",
        metavar="DEVICE",
        help=f"where to compute: {', '.join(DEVICES)}{more}",
    )
    group.add_argument(
        "--memory-limit",
        type=memory_size,
        metavar="GB",
        help="take no more memory than that: what does not fit is refused before it is loaded, "
        "with what does (default: what the device has free)",
    )
    group.add_argument(
        "--compile-cache",
        type=path_argument,
        metavar="DIR|off",
        help="where compiled programs are kept (default: the user's cache folder)",
    )
    return group


def add_speculate(group: argparse._ArgumentGroup) -> None:
    """The flag that has steps verify drafts, for the tools that answer."""
    group.add_argument(
        "--speculate",
        type=draft_tokens,
        default=0,
        metavar="N",
        help="have each step verify N tokens that followed when the text's last words were there "
        f"before, up to {DRAFT}; 0 = off (default). Pays where answers repeat the prompt or "
        "themselves (quotations, edits, code); often slower where answers repeat nothing, and with "
        "many prompts at once more so. In float32 the answers stay the same; in narrower types "
        "ties may fall otherwise. Measured on a CPU only",
    )


def draft_tokens(text: str) -> int:
    """An argparse type: a whole number up to what a step may verify."""
    number = int(text) if text.isdecimal() and len(text) < 10 else -1
    if not 0 <= number <= DRAFT:
        raise argparse.ArgumentTypeError(
            f"{text[:20]!r} is not a whole number from 0 to {DRAFT}: every step computes all N, "
            "and text seldom agrees for longer"
        )
    return number
