"""What `python -m infer.lab` does once its flags are parsed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from glm2_jax.cli.arguments import check_plot
from glm2_jax.cli.files import require_file_place
from glm2_jax.cli.messages import note
from glm2_jax.datasets.rows import parse_row, read_rows
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.ideas import Idea, check_reads
from glm2_jax.runtime.machine import describe_device
from infer.bench.host import describe_host, load_text
from infer.bench.programs import Run, Shape, Workload
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from infer.engine.reader import Item
from infer.evaluate.perplexity import Material, measure, prepare
from infer.evaluate.rows import BUNDLED, BadRows, data_file
from infer.lab.cost import kept_bytes, step_bytes, usual_reads
from infer.lab.files import IdeaFile, blamed, read_ideas
from infer.lab.report import Report, Result, draw, show
from infer.lab.sample import Sample
from infer.memory.precision import vector_bytes
from infer.startup import find_choice, note_demo_model, open_engine

if TYPE_CHECKING:
    from infer.lab.options import Settings


def run(settings: Settings) -> int:
    """Measure the model and every idea, and print it; returns the exit code."""
    if settings.plot:
        check_plot(settings.plot)
        require_file_place(settings.plot)
    with contextlib.redirect_stdout(sys.stderr):  # an idea may print: only results go to stdout
        files = read_ideas(settings.ideas, settings.given or ())
        lab = open_lab(settings)
        report = lab.report()
        report.results, failure = try_all(lab, files)
        jax.effects_barrier()  # what programs still print
    if failure is not None and len(report.results) == 1:
        raise failure
    report.about["load average"] += f", {load_text()} at the end"
    if settings.plot:
        draw(report, settings.plot)
    show(report, settings.json)
    if failure is not None:
        raise failure
    return 0


def try_all(lab: Lab, files: Sequence[IdeaFile]) -> tuple[list[Result], Exception | None]:
    """Measure the model and the ideas up to the first one that fails; returns the results of those
    that did not, the model's first, and the failure."""
    tried, failure = [lab.without_idea()], None
    for file in files:
        try:
            tried.append(lab.with_idea(file))
        except Exception as error:
            failure = error
            break
    if len(tried) == 1:
        return [tried[0][0]], failure
    for _ in range(lab.settings.repeat):  # in turns, so that noise affects all
        for one in tuple(tried):
            try:
                one[0].seconds.append(one[1]())
            except Exception as error:
                if one is tried[0]:
                    raise
                failure = failure or error
                tried = [other for other in tried if other is not one]
    return [result for result, _ in tried], failure


def open_lab(settings: Settings) -> Lab:
    """Open the model and the prompts."""
    bad = BadRows(settings.max_bad)
    rows = bad.keep(read_rows(data_file(settings.prompts, "--prompts")), parse_row)
    bad.check(len(rows))
    note_demo_model(settings.choice)
    choice = dataclasses.replace(find_choice(settings.choice), layers="list")
    engine = open_engine(choice, settings.options, rows=settings.batch_size)
    return Lab(settings, engine, prepare(engine, rows, bad, None, None))


class Lab:
    """A model in memory, and the prompts that ideas are measured on; UsageError: the context that
    is asked for is longer than the model's."""

    def __init__(self, settings: Settings, engine: Engine, material: Material):
        self.settings, self.engine, self.material = settings, engine, material
        self.shape = Shape(batch=1, context=settings.context, steps=settings.steps)
        if self.shape.length > engine.config.seq_length:
            raise UsageError(
                f"--context {settings.context} and --steps {settings.steps} are too many tokens.",
                f"The model's context is {engine.config.seq_length}.",
                "Choose smaller numbers.",
            )
        self.sample = Sample.of(engine, material)

    def report(self) -> Report:
        """Return a report without results."""
        counted = sum(sum(item.counted[1:]) for item in self.material.items)
        about = {
            "model": self.settings.choice.path or "demo (bundled)",
            "device": describe_device(self.engine.device),
            "host": describe_host(),
            "prompts": f"{self.settings.prompts or BUNDLED}, {counted} tokens count",
            "load average": f"{load_text()} at the start",
        }
        return Report(about, self.settings.context)

    def without_idea(self) -> tuple[Result, Run]:
        """Measure the model; all but the seconds are in the result, and the run takes steps."""
        return self._measure("full model", Idea())

    def with_idea(self, file: IdeaFile) -> tuple[Result, Run]:
        """Do the same with an idea; InputError, also of the run, with the line that fails."""
        idea = file.idea(self.sample)
        try:
            with blamed(file.path):
                result, decode = self._measure(file.name, idea)
            figures = result.perplexity, result.kl_divergence, result.top1_agreement
            if not all(map(math.isfinite, figures)):
                raise _not_finite(file)
        except CheckpointError as error:  # the model itself was measured before, and is fine
            raise _not_finite(file) from error
        result.options = file.options

        def run() -> float:
            with blamed(file.path):
                return decode()

        return result, run

    def _measure(self, name: str, idea: Idea) -> tuple[Result, Run]:
        note(f"measuring {name}")
        engine, config = self._engine(idea), self.engine.config
        pair = measure([self.engine, engine], self.material, self.settings.batch_size)
        likelihood, distance = pair[1].likelihood(self.material), pair[1].distance()
        told, reads = self.sample.measure(idea), usual_reads(config, self.shape)
        if idea.reads is not None:
            reads = check_reads(idea.reads, idea.reads(reads, told))
        same = None
        if idea.drafts:
            tokens, same = self._drafted(engine)
            reads = reads._replace(tokens=tokens)
        load = Workload(engine.config, engine.checkpoint.params, executor=engine.executor)
        decode = load.decode(self.shape)
        cache = engine.executor.new_cache(1, self.settings.context)
        vector = vector_bytes(config.head_dim, jnp.dtype(engine.executor.cache_dtype).itemsize)
        result = Result(
            name=name,
            perplexity=likelihood["perplexity"],
            kl_divergence=distance["kl_divergence"],
            top1_agreement=distance["top1_agreement"],
            told=told,
            reads=reads,
            read_bytes=step_bytes(config, engine.checkpoint.params, vector, reads),
            moved_bytes=load.moved(self.shape),
            cache_bytes=kept_bytes(engine.config, vector, reads),
            allocated_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves((cache.k, cache.v))),
            same_answers=same,
        )
        return result, decode

    def _engine(self, idea: Idea) -> Engine:
        """Return an engine with the same parameters and an idea."""
        base = self.engine
        if idea == Idea():
            return base
        config = dataclasses.replace(base.config, idea=idea)
        checkpoint = dataclasses.replace(base.checkpoint, config=config)
        kv = idea.kv or base.executor.kv
        return Engine(checkpoint, max_length=base.max_length, kv=kv)

    def _drafted(self, engine: Engine) -> tuple[float, bool]:
        """Return how many tokens a step yields on average, in greedy answers to the prompts, and
        whether these answers are those of the model."""
        sampling = SamplingParams(temperature=0, max_new_tokens=self.settings.max_new_tokens)
        prefix = len(self.engine.tokenizer.start_ids)
        prompts = [prompt_of(item, prefix) for item in self.material.items]
        tokens = passes = 0
        same = True
        for first in range(0, len(prompts), self.settings.batch_size):
            some = prompts[first : first + self.settings.batch_size]
            ours, models = (one.complete(some, sampling) for one in (engine, self.engine))
            same &= [one.output_ids for one in ours] == [one.output_ids for one in models]
            tokens += sum(one.stats.decode_tokens for one in ours)
            passes += sum(one.stats.passes for one in ours)
        return tokens / max(passes, 1), same


def _not_finite(file: IdeaFile) -> InputError:
    return InputError(
        f"idea {file.path} produced NaN or Inf.",
        "The model without it does not, on the same prompts.",
        "Look for a division by 0, a mask that hides all keys, or numbers too large for the dtype.",
    )


def prompt_of(item: Item, prefix: int) -> list[int]:
    """Return the ids to answer after: those before the first that counts, or the first half of a
    plain text, where all after the `prefix` ids count."""
    first = list(item.counted).index(True)
    return list(item.ids[: first if first > prefix else len(item.ids) // 2])
