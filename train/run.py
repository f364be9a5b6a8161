"""One run of a command that trains, from its recipe: data, model, loop, result."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from convert.loading.folder import Folder, fingerprint, open_folder
from glm2_jax.cli.arguments import check_plot
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import InputError, UsageError
from glm2_jax.lora import LoRA
from glm2_jax.processes import join
from glm2_jax.runtime.compile_cache import enable_compile_cache
from glm2_jax.runtime.devices import device_errors, find_device, find_mesh
from infer.engine.load import demo_folder
from infer.startup import find_choice, note_demo_model
from train.attention import choose_attention, with_attention
from train.data.batches import Batches
from train.data.check import print_checks
from train.data.dataset import Dataset, open_dataset
from train.data.plan import split
from train.defaults import choose, warn_of_few_steps
from train.devices import Devices
from train.loop import Loop, NotFinite, Position
from train.methods import Method
from train.optim import Numbers, make_schedule
from train.options import TrainingOptions
from train.preferences import preference
from train.programs import Programs, compiling_step
from train.recipe import Recipe
from train.remat import choose_remat, find_tuned
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.folder import RunFolder
from train.run_folder.log import Log, cut_log, draw, losses, read_log
from train.stopping import Stopping
from train.validation import GUARD, VALIDATION, Figures, make_evaluation

MakeMethod = Callable[[Folder, Recipe, Devices, Any], Method]
Sets = dict[str, Dataset]


class Watcher:
    """What a command that makes several runs may change of each, and learn from it; here nothing.

    An exception of `evaluated` or `finished` ends the run.
    """

    advises = True  # whether to name flags for another run, where this one is too short

    def __init__(self, programs: Programs | None = None):
        self.programs = Programs() if programs is None else programs

    def split(self, recipe: Recipe, folder: Folder, dataset: Dataset) -> tuple[Dataset, Sets]:
        """Return the rows to learn from, and the sets to evaluate by name."""
        return split_sets(recipe, folder, dataset)

    def planned(self, recipe: Recipe, total: int) -> Recipe:
        """Return the recipe to run, whose numbers are all chosen, in `total` steps."""
        return recipe

    def evaluated(self, step: int, figures: Figures) -> None:
        """Take the figures of an evaluation after `step` steps."""

    def finished(self, method: Method, trained: Any, sets: Sets, position: Position) -> None:
        """Take the result, before it is written."""


def run(recipe: Recipe, make_method: MakeMethod, watcher: Watcher | None = None) -> int:
    """Train as the recipe says, and return the exit code; raises GLMError for what the user can
    fix."""
    watcher = Watcher() if watcher is None else watcher
    _check(recipe)
    output = recipe.output
    enable_compile_cache(recipe.compile_cache, warn=note)
    note_demo_model(recipe.choice)
    folder = find_folder(recipe)
    for line in folder.notes if recipe.data.check_data else ():  # a run notes them when it loads
        note(line)
    dataset = open_dataset(recipe.data, folder)

    def split() -> tuple[Dataset, Dataset | None]:
        learned, sets = watcher.split(recipe, folder, dataset)
        return learned, sets.get(VALIDATION)

    if (code := print_checks(recipe.data, dataset, output.plot, split)) is not None:
        return code
    mesh = find_mesh(recipe.choice.mesh, recipe.choice.device)
    first = find_device(recipe.choice.device) if mesh is None else mesh.local_devices[0]
    devices = Devices(first, mesh)
    learned, sets = watcher.split(recipe, folder, dataset)
    width, advises = folder.config.hidden_size, watcher.advises
    recipe, batches, total = _plan(recipe, learned, devices, width, advises=advises)
    tuned = find_tuned(recipe, folder, devices)
    recipe = choose_remat(recipe, folder, batches, devices, tuned)
    recipe = choose_attention(recipe, folder, devices, tuned, batches)
    recipe = watcher.planned(recipe, total)
    identity = identity_of(recipe, folder, dataset, sets)
    join.compare(
        {
            "model": identity["base"],
            "data": _contents({"data": dataset, **sets}),
            "first adapter": identity.get("--init-adapter"),
        }
    )
    with RunFolder(
        output.output, resume=output.resume, identity=identity, checkpoints=output.checkpoints
    ) as out:
        with Progress("loading", show=human_size) as bar:
            method = make_method(folder, recipe, devices, bar.update)
        with jax.default_device(devices.first):
            return _train(recipe, out, method, batches, total, sets, devices, watcher)


def find_folder(recipe: Recipe) -> Folder:
    """Return the folder of the base model."""
    path = find_choice(recipe.choice).path
    return open_folder(path or demo_folder(), **recipe.choice.form)


def _check(recipe: Recipe) -> None:
    """Refuse at once what would fail at the end."""
    output, evaluation = recipe.output, recipe.evaluation
    if output.plot is not None:
        check_plot(output.plot)
    for flag, path in (("--plot", output.plot), ("--log-jsonl", output.log_jsonl)):
        parent = os.path.dirname(path or "") or "."
        if path == "-" or not os.access(parent, os.W_OK):
            why = "It must be a file in a folder that exists and can be written."
            raise InputError(f"{flag} {path} cannot be written", why)
    if evaluation.early_stop is not None:
        if evaluation.eval_every is None:
            raise UsageError("--early-stop needs --eval-every.")
        if not evaluation.val_split and evaluation.val_data is None:
            raise UsageError("--early-stop needs --val-data or --val-split.")


def split_sets(recipe: Recipe, folder: Folder, dataset: Dataset) -> tuple[Dataset, Sets]:
    """Return the rows to learn from, and the sets to evaluate by name."""
    evaluation, learned, sets = recipe.evaluation, dataset, Sets()
    if evaluation.val_split:
        learned, sets[VALIDATION] = split(dataset, evaluation.val_split, recipe.training.seed)
    for name, path in ((VALIDATION, evaluation.val_data), (GUARD, evaluation.guard_data)):
        if path is not None:
            sets[name] = open_dataset(recipe.data, folder, path)
    return learned, sets


def _plan(
    recipe: Recipe, learned: Dataset, devices: Devices, hidden_size: int, *, advises: bool
) -> tuple[Recipe, Batches, int]:
    """Return the recipe with the numbers that depend on data and model, the batches, and the number
    of steps."""
    rows = min(recipe.training.batch_size, len(learned))  # more would be empty, but computed
    make = partial(
        Batches,
        learned,
        batch_size=rows,
        pack=recipe.data.packs,
        shuffle=not recipe.data.no_shuffle,
        seed=recipe.training.seed,
        rows=devices.rows(rows),
    )
    parts = make().steps_per_epoch(0)
    recipe = choose(recipe, parts, hidden_size)
    assert recipe.training.grad_accum is not None
    batches = make(accumulate=min(recipe.training.grad_accum, -(-len(learned) // rows)))
    total = count_steps(recipe.training, batches)
    if advises:
        warn_of_few_steps(recipe, parts, total)
    return recipe, batches, total


def count_steps(training: TrainingOptions, batches: Batches) -> int:
    """Return the number of steps of the complete run."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    if not batches.pack:  # all epochs have as many
        return max(1, round(training.epochs * batches.steps_per_epoch(0)))
    epochs, part = divmod(training.epochs, 1)
    steps = sum(batches.steps_per_epoch(epoch) for epoch in range(int(epochs)))
    return max(1, steps + (round(part * batches.steps_per_epoch(int(epochs))) if part else 0))


def identity_of(recipe: Recipe, folder: Folder, dataset: Dataset, sets: Sets) -> dict[str, Any]:
    """Return everything that the result depends on, for the check of a resumed run."""
    found = recipe.identity() | {"base": fingerprint(folder), "template": folder.template}
    start = getattr(recipe.adapter, "init_adapter", None)
    if start is not None:
        digest = hashlib.sha256()
        for path in sorted(Path(start).glob("*adapter*")):
            if path.is_file():
                digest.update(path.read_bytes())
        found["--init-adapter"] = digest.hexdigest()[:16]
    evaluated = {VALIDATION: sets[VALIDATION]} if recipe.evaluation.val_data else {}  # may end it
    return found | _contents({"data": dataset, **evaluated})


def _contents(sets: Sets) -> dict[str, Any]:
    """Return hashes and weights of the files of each set."""
    return {
        name: [
            (sha256[:16], (group.weight, group.general))
            for (_, sha256, _), group in zip(rows.files, rows.groups, strict=True)
        ]
        for name, rows in sets.items()
    }


def _train(
    recipe: Recipe, out: RunFolder, method: Method, batches: Batches, total: int, sets: Sets,
    devices: Devices, watcher: Watcher,
) -> int:  # fmt: skip
    """Take the steps and write the result; return the exit code."""
    output, training = recipe.output, recipe.training
    prompts = _read_prompts(recipe.evaluation.sample_prompts)
    numbers = _numbers(recipe, method, total)
    scaled = str(method.computed) == "float16"
    state = devices.state(numbers.optimizer(), method.trained, loss_scaling=scaled)
    state = method.trained, state
    asked, size, programs = recipe.preference, training.batch_size, watcher.programs
    objective = {} if asked is None else {"objective": preference(asked.loss, asked.beta)}
    evaluate = make_evaluation(method, sets, prompts, size, devices, programs, **objective)
    note(
        f"{len(batches.dataset)} sequences, {total} steps; training {method.num_trained:,} of "
        f"{method.checkpoint.summary.num_params:,} parameters, computing in {method.computed}"
    )
    for line in method.checkpoint.notes:
        note(line)
    out.begin(recipe.settings())
    log_path = (output.log_jsonl or out.log) if join.is_first() else os.devnull
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(Stopping())
        checkpoints = stack.enter_context(Checkpoints(out.state, keep=output.keep))
        best, position = None, Position()
        if recipe.evaluation.early_stop is not None:
            best = stack.enter_context(Checkpoints(out.best, keep=1))
        if checkpoints.newest is not None:
            state, saved = checkpoints.restore(checkpoints.newest, state)
            position = Position.restored(saved, checkpoints.newest)
            note(f"resuming after step {position.step} of {total}")
        if position.step > 0 or output.log_jsonl is None:
            cut_log(log_path, position.step)
        log = Log(total, every=output.log_every, path=log_path, taken=position.step)
        log = stack.enter_context(log)
        config = with_attention(method.checkpoint.config, training.attention)
        step = compiling_step(
            programs, method, config, devices, numbers, log, state,
            seed=training.seed, remat=training.grad_checkpoint or "none", **objective,
        )  # fmt: skip
        loop = Loop(
            recipe, total, step, evaluate, lambda updates: float(numbers.schedule(updates)),
            devices.first, batches, log, stopping, checkpoints, best, watcher.evaluated,
        )  # fmt: skip
        remedy = "Try a smaller --batch-size with more --grad-accum, or a smaller --max-length."
        with device_errors(f"training, {training.batch_size} rows at once", lambda: ("", remedy)):
            state = loop.run(state, position)
        if stopping.agree():
            note(f"saved after step {position.step}; resume with --resume auto")
            return stopping.exit_code
        report(position, total, choosing=best is not None)
        if best is not None and best.newest is not None:
            best.finish()
            state, _ = best.restore(best.newest, state)
    watcher.finished(method, state[0], sets, position)
    note(f"the result is in {method.write(out.path, state[0])}")
    if output.plot is not None and join.is_first():
        draw(read_log(log_path), output.plot)
    return 0


def _numbers(recipe: Recipe, method: Method, total: int) -> Numbers:
    training = recipe.training
    assert training.lr is not None
    return Numbers.of(
        make_schedule(training.schedule, lr=training.lr, steps=total, warmup=training.warmup),
        method.trained if isinstance(method.trained, LoRA) else None,
        weight_decay=training.weight_decay,
        clip=training.clip,
        noise=training.neftune,
        ratio=getattr(recipe.adapter, "lora_plus_ratio", None),
    )


def _read_prompts(path: str | None) -> list[str]:
    """Return the prompts of `--sample-prompts`."""
    if path is None:
        return []
    lines = [line for line in read_utf8(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} has no prompts", fix="Write one per line.")
    return lines


def report(position: Position, total: int, *, choosing: bool) -> None:
    """Report the outcome of a run; NotFinite where nothing was learned, or there is no best
    evaluation to choose."""
    if position.skipped == position.step:
        raise NotFinite(
            f"all {position.step} steps were skipped, so nothing was learned",
            "Their losses or gradients were NaN or infinite.",
            "Lower --lr, or check the rows; use another --output.",
        )
    if choosing and position.best is None:
        raise NotFinite(
            "no validation loss was finite, so none is the best",
            f"--early-stop chooses the result by it; training ended after step {position.step}, "
            "and its last checkpoint stays.",
            "Check the validation rows, or leave --early-stop out; use another --output.",
        )
    if position.skipped:
        note(f"{position.skipped} of {position.step} steps were skipped")
    if position.step < total:
        note(f"ended after step {position.step} of {total}: the validation loss stopped improving")
    if choosing:
        note(f"the best evaluation was after step {position.best_step}, loss {position.best:.4g}")
    for line in losses(position.losses):
        note(line)
