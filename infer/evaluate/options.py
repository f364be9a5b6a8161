"""The flags of `python -m infer.evaluate`, and the variants that `--compare` names. No jax here."""

import argparse
import dataclasses
from dataclasses import dataclass
from functools import partial

from glm2_jax.choices import DTYPES, QUANTIZE
from glm2_jax.cli.arguments import path_argument, positive, whole
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.cli.parser import flag
from glm2_jax.datasets import FORMATS

_count = partial(flag, type=positive, metavar="N")


@dataclass(frozen=True)
class Variant:
    """A variant of the model, `name` as the user wrote it; None = as the other flags say."""

    name: str
    dtype: str | None
    quantize: str | None
    kv: str | None = None  # likewise

    def with_cache(self, options: EngineOptions) -> EngineOptions:
        """Return the options of this variant."""
        return dataclasses.replace(options, kv=self.kv or options.kv)

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
        form, _, last = name.rpartition(":")
        kv, form = ("int8", form) if last == "kv" else (None, name)
        dtype, _, quantize = form.rpartition(":") if form not in DTYPES else (form, "", "")
        if not name.strip(":") or dtype not in (*DTYPES, "") or quantize not in (*QUANTIZE, ""):
            raise argparse.ArgumentTypeError(
                f"{name!r} must be one of {', '.join((*QUANTIZE, *DTYPES))}, or DTYPE:QUANTIZATION "
                "such as float32:int8, or one of them with kv, such as int8:kv"
            )
        found.append(Variant(name, dtype or None, quantize or None, kv))
    if len(found) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must name at least two variants")
    return tuple(found)


@dataclass(frozen=True)
class DataOptions:
    """What is measured."""

    task: str = flag(
        "perplexity = of texts, or of the answers to questions; generation = BLEU, ROUGE and "
        "METEOR of generated answers; choice = the most likely of A, B, C and D; cases = prompts "
        "with checks of their answers; rate = a sheet on which people judge answers",
        choices=("perplexity", "generation", "choice", "cases", "rate"), default="perplexity",
    )  # fmt: skip
    data: str | None = flag(
        'plain text, or rows as train.lora reads them, also {"text"} alone; for choice a csv '
        "file of C-Eval, MMLU or CMMLU, a jsonl file of the official C-Eval script, or a folder of "
        "them (default: 45 bundled questions that are new to the demo model; none for choice)",
        type=path_argument, metavar="F",
    )  # fmt: skip
    format: str = flag(
        "format of --data, as in train.lora; auto = by the keys of each row",
        choices=("auto", *FORMATS), default="auto",
    )  # fmt: skip
    max_bad: int = flag(
        "bad rows that may be left out; each is reported as file:line with the reason, more "
        "are an error (exit code 3)",
        type=whole, default=0, metavar="N",
    )  # fmt: skip
    batch_size: int = _count("rows per batch", default=8)


@dataclass(frozen=True)
class PerplexityOptions:
    """The variants that are compared, and the windows of a long text."""

    compare: tuple[Variant, ...] | None = flag(
        "compare variants of the model, each a quantization (none, int8, int4), a dtype, or "
        "both (bfloat16:int8), and with kv (kv, int8:kv) as --kv int8: size, perplexity, distance "
        "of the logits from the first variant's; two variants are in memory at once",
        type=variants, metavar="A,B",
    )  # fmt: skip
    against: str | None = flag(
        "compare with another model of the same tokens, for example the one that --model was "
        "quantized from; both are in memory",
        type=path_argument, metavar="DIR|NAME",
    )  # fmt: skip
    window: int | None = _count("tokens per window of a text (default: 2048, at most --max-length)")
    stride: int | None = _count(
        "tokens between the starts of two windows (default: half of --window)"
    )


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are drawn."""

    max_new_tokens: int = _count("longest answer", default=512)
    temperature: float = flag(
        "sampling temperature, 0 = greedy; the official ADGEN script uses 0.95, top-p 0.7",
        type=float, default=0.0, metavar="X",
    )  # fmt: skip
    top_p: float = flag("as in infer.generate", type=float, default=1.0, metavar="X")
    seed: int = flag("random seed", type=int, default=0, metavar="N")


@dataclass(frozen=True)
class ChoiceOptions:
    """How questions with choices are asked."""

    shots: int = flag(
        "solved examples before each question, from the folder dev next to the data's folder",
        type=whole, default=0, metavar="N",
    )  # fmt: skip
    two_pass: bool = flag(
        "follow the official C-Eval script: the model first answers in words, greedily; then "
        "its words are part of the prompt, and the most likely letter is its answer",
        action="store_true",
    )


@dataclass(frozen=True)
class CasesOptions:
    """Use cases as tests."""

    cases: str | None = flag(
        "YAML file of prompts with checks of their answers (docs/tune/evaluate.md); exit code 4 if "
        "one of them fails",
        type=path_argument, metavar="FILE.yml",
    )  # fmt: skip
    repeat: int = _count(
        "answers to each case, of which all must pass; above 1 needs --temperature", default=1
    )
    junit: str | None = flag(
        "also write the result as JUnit XML, for a CI system", type=path_argument, metavar="FILE"
    )


@dataclass(frozen=True)
class RateOptions:
    """A sheet on which answers are judged."""

    sheet: str | None = flag(
        "the sheet, a page for any browser; its key, FILE.key.json, says which model gave which "
        "answer: keep it to yourself, next to the sheet",
        type=path_argument, metavar="FILE.html",
    )  # fmt: skip
    answers: list[str] | None = flag(
        "write a sheet with these answers: JSON lines of infer.generate --batch-file, or of "
        "--predictions, a file for each model; NAME= names the model (default: by the file)",
        nargs="+", type=path_argument, metavar="[NAME=]F",
    )  # fmt: skip
    scale: str = flag(
        "ab = which of two answers is better, blind; 1-5 = a score for each answer",
        choices=("ab", "1-5"), default="ab",
    )  # fmt: skip
    limit: int | None = _count("items on the sheet, drawn by --seed (default: all)")
    rates: list[str] | None = flag(
        "read the rating files of a sheet: win rates, Bradley-Terry, agreement, disagreements",
        nargs="+", type=path_argument, metavar="FILE",
    )  # fmt: skip
    drop_inattentive: bool = flag(
        "leave out raters who fail the attention checks", action="store_true"
    )
    judge: str | None = flag(
        "let a model (a folder, OWNER/NAME, or demo) rate a sheet; writes FILE.NAME.json, a rating "
        "file labelled as a model's",
        type=path_argument, metavar="DIR|NAME",
    )  # fmt: skip


@dataclass(frozen=True)
class OutputOptions:
    """Where the figures and the answers go."""

    json: bool = flag("print one JSON object instead of a table", action="store_true")
    predictions: str | None = flag(
        'JSON lines of the answers, for generation {"prompt", "labels", "predict"}; without '
        "--data such a file is read and scored, and no model is needed",
        type=path_argument, metavar="F",
    )  # fmt: skip
    overwrite: bool = flag(
        "replace an existing sheet, rating file or --predictions file, also the partial one of an "
        "interrupted run",
        action="store_true",
    )


@dataclass(frozen=True, kw_only=True)
class Settings(
    DataOptions, PerplexityOptions, AnswerOptions, ChoiceOptions, CasesOptions, RateOptions,
    OutputOptions,
):  # fmt: skip
    """The flags of the command, but those of several processes."""

    choice: ModelChoice
    options: EngineOptions
