"""How good the answers of a trained model to its validation rows are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from glm2_jax.errors import InputError, UsageError
from glm2_jax.lora import with_lora
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.evaluate.generation import answers, ask, open_metrics
from train.data.dataset import Dataset
from train.methods import Method
from train.programs import Programs, shapes, with_scale
from train.sweep.options import ACCURACY

_GREEDY = SamplingParams(temperature=0.0, max_new_tokens=512)
_ROWS = 8  # in a batch


def require_metric(metric: str, dataset: Dataset) -> None:
    """Raise UsageError where the rows have no answers to compare with, or an extra is missing."""
    if metric != ACCURACY:
        open_metrics(f"--metric {metric}")
    if next(_questions(dataset), None) is None:
        name = dataset.files[0][0]
        raise UsageError(
            f"--metric {metric} needs questions with answers, and {name} has none.",
            "A row counts if it ends in an answer that is learned.",
            "Use --metric val_loss.",
        )


def score_answers(
    metric: str, method: Method, trained: Any, dataset: Dataset, programs: Programs
) -> float:
    """Return the mean score of greedy answers: BLEU-4 or ROUGE-L from 0 to 100, or the share of
    answers that are right word for word. InputError where a question cannot be asked."""
    params, lora = method.model(trained)
    lora = with_scale(lora)
    whole = params if lora is None else with_lora(params, lora)
    checkpoint = dataclasses.replace(method.checkpoint, params=whole)
    # The programs are kept, not an engine, which would keep its model in the memory.
    shared = programs.shared(("answers", shapes(whole)), lambda: Engine(checkpoint).programs)
    engine = Engine(checkpoint, programs=shared)
    rows = list(_questions(dataset))
    if not rows:
        raise InputError(f"no validation row has an answer that --metric {metric} could compare")
    prompts, _, labels = zip(*(ask(engine, row) for row in rows), strict=True)
    found = answers(engine, prompts, _GREEDY, _ROWS, clean=engine.written.chat)
    pairs = [(text, labels[number]) for number, text in found]
    if metric == ACCURACY:
        return fmean(text.strip() == label.strip() for text, label in pairs)
    pair_scores = open_metrics(f"--metric {metric}").pair_scores
    return fmean(pair_scores(*pair)[metric] for pair in pairs)


def _questions(dataset: Dataset) -> Iterator[list[Any]]:
    """Yield the conversations that end in an answer that is learned."""
    for index in dataset.first_of_rows().tolist():
        row = dataset.messages(index)
        if len(row) > 1 and row[-1]["role"] == "assistant" and row[-1].get("loss", True):
            yield row
