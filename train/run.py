"""One run of a command that trains, from its recipe: data, model, loop, result."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
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
from train.data.batch import Batch
from train.data.batches import Batches
from train.data.check import print_checks
from train.data.dataset import Dataset, open_dataset
from train.data.plan import split
from train.defaults import choose, warn_of_few_steps
from train.devices import Devices
from train.loop import Loop, Position
from train.methods import Method
from train.optim import Numbers, make_schedule
from train.options import TrainingOptions
from train.preferences import preference
from train.recipe import Recipe
from train.remat import choose_remat
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.folder import RunFolder
from train.run_folder.log import Log, cut_log, draw, losses, read_log
from train.step import make_step
from train.stopping import Stopping
from train.validation import GUARD, VALIDATION, make_evaluation

MakeMethod = Callable[[Folder, Recipe, Devices, Any], Method]
Sets = dict[str, Dataset]


def run(recipe: Recipe, make_method: MakeMethod) -> int:
    """Train as the recipe says, and return the exit code; raises GLMError for what the user can
    fix."""
    _check(recipe)
    output = recipe.output
    enable_compile_cache(recipe.compile_cache, warn=note)
    note_demo_model(recipe.choice)
    path = find_choice(recipe.choice).path
    folder = open_folder(path or demo_folder(), **recipe.choice.form)
    for line in folder.notes if recipe.data.check_data else ():  # a run notes them when it loads
        note(line)
    dataset = open_dataset(recipe.data, folder)
    if (code := print_checks(recipe.data, dataset, output.plot)) is not None:
        return code
    mesh = find_mesh(recipe.choice.mesh, recipe.choice.device)
    first = find_device(recipe.choice.device) if mesh is None else mesh.local_devices[0]
    devices = Devices(first, mesh)
    learned, sets = _split(recipe, folder, dataset)
    recipe, batches, total = _plan(recipe, learned, devices, folder.config.hidden_size)
    recipe = choose_remat(recipe, folder, batches, devices)
    recipe = choose_attention(recipe, folder, devices)
    identity = _identity(recipe, folder, dataset, sets)
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
            return _train(recipe, out, method, batches, total, sets, devices)


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


def _split(recipe: Recipe, folder: Folder, dataset: Dataset) -> tuple[Dataset, Sets]:
    """Return the rows to learn from, and the sets to evaluate by name."""
    evaluation, learned, sets = recipe.evaluation, dataset, Sets()
    if evaluation.val_split:
        learned, sets[VALIDATION] = split(dataset, evaluation.val_split, recipe.training.seed)
    for name, path in ((VALIDATION, evaluation.val_data), (GUARD, evaluation.guard_data)):
        if path is not None:
            sets[name] = open_dataset(recipe.data, folder, path)
    return learned, sets


def _plan(
    recipe: Recipe, learned: Dataset, devices: Devices, hidden_size: int
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


def _identity(recipe: Recipe, folder: Folder, dataset: Dataset, sets: Sets) -> dict[str, Any]:
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
    devices: Devices,
) -> int:  # fmt: skip
    """Take the steps and write the result; return the exit code."""
    output, training = recipe.output, recipe.training
    prompts = _read_prompts(recipe.evaluation.sample_prompts)
    ratio = getattr(recipe.adapter, "lora_plus_ratio", None)
    numbers = _numbers(training, method, total, ratio)
    scaled = str(method.computed) == "float16"
    state = devices.state(numbers.optimizer(), method.trained, loss_scaling=scaled)
    state = method.trained, state
    objective: dict[str, Any] = {}
    if (asked := recipe.preference) is not None:
        objective["objective"] = preference(asked.loss, asked.beta)
    evaluate = make_evaluation(method, sets, prompts, training.batch_size, devices, **objective)
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
        step = _compiling_step(recipe, method, devices, numbers, log, state, **objective)
        loop = Loop(
            recipe, total, step, evaluate, lambda updates: float(numbers.schedule(updates)),
            devices.first, batches, log, stopping, checkpoints, best,
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
    note(f"the result is in {method.write(out.path, state[0])}")
    if output.plot is not None and join.is_first():
        draw(read_log(log_path), output.plot)
    return 0


def _numbers(training: TrainingOptions, method: Method, total: int, ratio: float | None) -> Numbers:
    assert training.lr is not None
    return Numbers.of(
        make_schedule(training.schedule, lr=training.lr, steps=total, warmup=training.warmup),
        method.trained if isinstance(method.trained, LoRA) else None,
        weight_decay=training.weight_decay,
        clip=training.clip,
        noise=training.neftune,
        ratio=ratio,
    )


def _read_prompts(path: str | None) -> list[str]:
    """Return the prompts of `--sample-prompts`."""
    if path is None:
        return []
    lines = [line for line in read_utf8(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} has no prompts", fix="Write one per line.")
    return lines


def _compiling_step(
    recipe: Recipe, method: Method, devices: Devices, numbers: Numbers, log: Log, state: Any,
    **objective: Any,
) -> Callable[[Any, Any, int], Any]:  # fmt: skip
    """Return the step, which reports when it compiles for a new shape of a batch."""
    step = make_step(
        with_attention(method.checkpoint.config, recipe.training.attention),
        dtype=method.dtype,
        remat=bool(recipe.training.grad_checkpoint),
        effective=method.effective,
        out_shardings=devices.shardings(*state),
        **objective,
    )
    compiled: dict[tuple[int, ...], Any] = {}
    key = devices.key(recipe.training.seed)

    def take(state: tuple[Any, Any], batch: Batch, number: int) -> Any:
        batch = devices.batch(batch)
        shape = batch.tokens.shape
        arguments = (method.base, *state, batch, key, number, numbers)
        if shape not in compiled:
            jax.block_until_ready(state)  # the time of earlier steps does not count as compiling
            note(f"compiling the step for {' x '.join(map(str, shape))} tokens")
            start = time.perf_counter()
            with log.apart(), devices.active():
                compiled[shape] = step.lower(*arguments).compile()
            note(f"compiled in {time.perf_counter() - start:.1f} s")
        trained, rest, metrics = compiled[shape](*arguments)
        return (trained, rest), metrics

    return take


def report(position: Position, total: int, *, choosing: bool) -> None:
    """Report the outcome of a run; InputError where nothing was learned, or there is no best
    evaluation to choose."""
    if position.skipped == position.step:
        raise InputError(
            f"all {position.step} steps were skipped, so nothing was learned",
            "Their losses or gradients were NaN or infinite.",
            "Lower --lr, or check the rows; use another --output.",
        )
    if choosing and position.best is None:
        raise InputError(
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
