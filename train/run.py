"""One training from its flags: data, model, loop, result; of `train.lora` and `train.full`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from convert.loading.folder import Folder, fingerprint, open_folder
from glm2_jax.cli.arguments import check_plot
from glm2_jax.cli.messages import Progress, human_size, note
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser, from_flags
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import InputError, UsageError
from glm2_jax.processes import join
from glm2_jax.runtime.compile_cache import enable_compile_cache
from glm2_jax.runtime.devices import device_errors
from infer.engine.load import demo_folder
from infer.startup import model_folder, note_demo_model
from train.data.batch import Batch
from train.data.batches import Batches
from train.data.dataset import Dataset
from train.data.options import look_at, open_dataset
from train.data.split import Subset, split
from train.data.vocabulary import unknown_characters
from train.defaults import choose, warn_of_few_steps
from train.devices import Devices
from train.loop import Loop, Position, Run
from train.methods import Method
from train.optim import Numbers, make_schedule
from train.recipe import as_recipe
from train.run_folder import curve
from train.run_folder.checkpoints import Checkpoints
from train.run_folder.folder import RunFolder
from train.run_folder.log import Log, cut_log, losses, read_log
from train.step import make_step
from train.stopping import Stopping
from train.validation import GUARD, VALIDATION, Validation, answer

# Flags that change where things are and what is told, but not the parameters. Data and model count
# by their contents.
_NO_PART = {
    "model", "source", "revision", "data", "max-bad", "mix-data", "check-data", "print-sample",
    "val-data", "guard-data", "sample-prompts", "output", "checkpoints", "resume", "save-every",
    "keep", "log-every", "log-jsonl", "plot", "device", "mesh", "tp", "compile-cache",
    "data-cache", "init-adapter", "force-adapter",
}  # fmt: skip

MakeMethod = Callable[[Folder, argparse.Namespace, Devices, Any], Method]


def run(parser: Parser, args: argparse.Namespace, make_method: MakeMethod) -> int:
    """Trains as the flags say; returns the exit code.

    Raises:
        GLMError: anything that the user can mend.
    """
    _check(args)
    enable_compile_cache(args.compile_cache, warn=note)
    note_demo_model(from_flags(ModelChoice, args))
    path = model_folder(from_flags(ModelChoice, args))
    folder = open_folder(path or demo_folder(), **from_flags(ModelChoice, args).form)
    for line in folder.notes if args.check_data else ():  # a run that loads the model says them
        note(line)
    dataset = open_dataset(args, as_checkpoint(folder))
    if path is None and (line := unknown_characters(dataset)) is not None:
        note(line)
    if (code := look_at(args, dataset)) is not None:
        return code
    devices = Devices.of(args)
    learned, sets = _sets(args, folder, dataset)
    args, batches = _batches(args, learned, devices, folder.config.hidden_size)
    recipe = as_recipe(parser, args)
    looked_at = sets.get(VALIDATION)  # counts, because it may end the run early
    data = {"data": dataset, VALIDATION: looked_at}
    identity = _identity(parser.prog, recipe, folder, data, getattr(args, "init_adapter", None))
    join.compare(
        {
            "model": identity["base"],
            "data": _sums({"data": dataset, **sets}),
            "first adapter": identity.get("--init-adapter"),
        }
    )
    with RunFolder(
        args.output, resume=args.resume, identity=identity, checkpoints=args.checkpoints
    ) as out:
        with Progress("loading", show=human_size) as bar:
            method = make_method(folder, args, devices, bar.update)
        with jax.default_device(devices.first):
            return _train(args, out, method, batches, sets, devices, recipe)


def _check(args: argparse.Namespace) -> None:
    """Refuses at once what would fail at the end."""
    if args.plot is not None:
        check_plot(args.plot)
    for flag, path in (("--plot", args.plot), ("--log-jsonl", args.log_jsonl)):
        parent = os.path.dirname(path or "") or "."
        if path == "-" or not os.access(parent, os.W_OK):
            why = "It is to be a file in a folder that is there and can be written."
            raise InputError(f"{flag} {path} cannot be written", why)
    if args.early_stop is not None and args.eval_every is None:
        raise UsageError("--early-stop needs --eval-every.")


def as_checkpoint(folder: Folder) -> Any:
    """What `open_dataset` asks of a model."""
    return SimpleNamespace(
        tokenizer=folder.tokenizer, template=folder.template, config=folder.config
    )


def _sets(
    args: argparse.Namespace, folder: Folder, dataset: Dataset
) -> tuple[Dataset | Subset, dict[str, Any]]:
    """What is learned, and what is looked at."""
    sets: dict[str, Any] = {}
    learned: Dataset | Subset = dataset
    if args.val_split:
        learned, sets[VALIDATION] = split(dataset, args.val_split, args.seed)
    for name, path in ((VALIDATION, args.val_data), (GUARD, args.guard_data)):
        if path is not None:
            sets[name] = open_dataset(args, as_checkpoint(folder), path)
    if args.early_stop is not None and VALIDATION not in sets:
        raise UsageError("--early-stop needs --val-data or --val-split.")
    for name, rows in {"training": learned, **sets}.items():
        if not rows.learned.any():
            raise InputError(f"the {name} rows have no token that counts in the loss")
    return learned, sets


def _batches(
    args: argparse.Namespace, learned: Dataset | Subset, devices: Devices, hidden_size: int
) -> tuple[argparse.Namespace, Batches]:
    """The flags, with numbers for those that depend on data and model, and the batches."""
    rows = min(args.batch_size, len(learned))  # more would be empty, and computed all the same
    make = partial(
        Batches,
        learned,
        batch_size=rows,
        pack=args.pack,
        shuffle=not args.no_shuffle,
        seed=args.seed,
        rows=devices.rows(rows),
    )
    parts = make().steps_per_epoch(0)
    args = choose(args, parts, hidden_size)
    batches = make(accumulate=min(args.grad_accum, -(-len(learned) // rows)))
    warn_of_few_steps(args, parts, _steps(args, batches))
    return args, batches


def _identity(
    command: str,
    recipe: dict[str, Any],
    folder: Folder,
    sets: dict[str, Any],
    adapter: str | None,
) -> dict[str, Any]:
    """What the result depends on."""
    flags = {f"--{name}": value for name, value in recipe.items() if name not in _NO_PART}
    if adapter is not None:
        flags["--init-adapter"] = _sum_of(adapter)
    base = {"command": command, "base": fingerprint(folder), "template": folder.template}
    return base | _sums(sets) | flags


def _sums(sets: dict[str, Any]) -> dict[str, Any]:
    """Of the files that sets are read from: those that are a part of another are none."""
    found = {}
    for name, rows in sets.items():
        if isinstance(rows, Dataset):
            sums = [content[:16] for _, content, _ in rows.files]
            weights = [(group.weight, group.general) for group in rows.groups]
            found[name] = list(zip(sums, weights, strict=True))
    return found


def _sum_of(adapter: str) -> str:
    """Of an adapter's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(adapter).glob("*adapter*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _train(
    args: argparse.Namespace,
    out: RunFolder,
    method: Method,
    batches: Batches,
    sets: dict[str, Any],
    devices: Devices,
    recipe: dict[str, Any],
) -> int:
    total = _steps(args, batches)
    config = method.checkpoint.config
    schedule = make_schedule(args.schedule, lr=args.lr, steps=total, warmup=args.warmup)
    numbers = Numbers.of(
        schedule,
        None if method.base is None else method.model(method.trained)[1],
        weight_decay=args.weight_decay,
        clip=args.clip,
        noise=args.neftune,
    )
    optimizer = numbers.optimizer()
    scaled = str(method.computed) == "float16"
    state = (method.trained, devices.state(optimizer, method.trained, loss_scaling=scaled))
    position, path = Position(), args.log_jsonl or out.log
    path = path if join.is_first() else os.devnull
    prompts = _prompts(args)
    _say_what(method, batches, total)
    out.begin(recipe)
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(Stopping())
        checkpoints = stack.enter_context(Checkpoints(out.state, keep=args.keep))
        best = None
        if args.early_stop is not None:
            best = stack.enter_context(Checkpoints(out.best, keep=1))
        if checkpoints.newest is not None:
            state, saved = checkpoints.restore(checkpoints.newest, state)
            position = Position.restored(saved, checkpoints.newest)
            note(f"going on after step {position.step} of {total}")
        if position.step > 0 or args.log_jsonl is None:
            cut_log(path, position.step)
        with Log(total, every=args.log_every, path=path, taken=position.step) as log:
            step = make_step(
                config,
                dtype=method.dtype,
                remat=args.grad_checkpoint,
                effective=method.effective,
                out_shardings=devices.shardings(*state),
            )
            work = Run(
                step=_announced(step, method.base, devices, args.seed, numbers, log),
                evaluate=_evaluate(args, method, sets, prompts, devices),
                rate=lambda updates: float(schedule(updates)),
                device=devices.first,
                batches=batches,
                total=total,
                eval_every=args.eval_every,
                early_stop=args.early_stop,
                save_every=args.save_every,
                skip_bad=args.nan_policy == "skip",
            )
            with device_errors(f"training, {args.batch_size} rows at once", _smaller):
                loop = Loop(work, log, checkpoints, best, stopping)
                state = loop.go(state, position)
        stopped = stopping.agree()
        if not stopped:
            _check_outcome(position, best is not None)
        if best is not None and best.newest is not None and not stopped:
            best.finish()
            state, _ = best.restore(best.newest, state)
    if stopped:
        note(f"saved after step {position.step}; go on with --resume auto")
        return stopping.exit_code
    _say_end(position, total, best is not None)
    for line in losses(position.losses):
        note(line)
    note(f"the result is in {method.write(out.path, state[0])}")
    if args.plot is not None and join.is_first():
        curve.draw(read_log(path), args.plot)
    return 0


def _steps(args: argparse.Namespace, batches: Batches) -> int:
    """How many steps the whole run has."""
    if args.steps is not None:
        return args.steps
    if not batches.pack:  # all epochs have as many
        return max(1, round(args.epochs * batches.steps_per_epoch(0)))
    whole, part = divmod(args.epochs, 1)
    steps = sum(batches.steps_per_epoch(epoch) for epoch in range(int(whole)))
    if part:
        steps += round(part * batches.steps_per_epoch(int(whole)))
    return max(steps, 1)


def _say_what(method: Method, batches: Batches, total: int) -> None:
    summary = method.checkpoint.summary
    note(
        f"{len(batches.dataset)} sequences, {total} steps; training {method.num_trained:,} "
        f"parameters of {summary.num_params:,}, computing in {method.computed}"
    )
    for line in method.checkpoint.notes:
        note(line)


def _say_end(position: Position, total: int, chosen: bool) -> None:
    if position.skipped:
        note(f"{position.skipped} of {position.step} steps changed nothing")
    if position.step < total:
        note(f"ended after step {position.step} of {total}: the validation loss stopped improving")
    if chosen:
        note(f"the best evaluation was after step {position.best_step}, loss {position.best:.4g}")


def _check_outcome(position: Position, choosing: bool) -> None:
    """Refuses a run that changed nothing, and one of which no evaluation can be the best."""
    if position.skipped == position.step:
        raise InputError(
            f"all {position.step} steps were left out, so nothing was learned",
            "Their losses or gradients were NaN or infinite.",
            "Take a lower --lr, or look at the rows, with another --output.",
        )
    if choosing and position.best is None:
        raise InputError(
            "no validation loss was finite, so none is the best",
            f"--early-stop chooses the result by it; the training ended after step "
            f"{position.step}, and its last checkpoint stays.",
            "Look at the validation rows, or leave --early-stop out, with another --output.",
        )


def _prompts(args: argparse.Namespace) -> list[str]:
    """The questions of `--sample-prompts`."""
    if args.sample_prompts is None:
        return []
    lines = [line for line in read_utf8(args.sample_prompts).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{args.sample_prompts} has no questions", "There is one in each line.")
    return lines


def _announced(
    step: Any, base: Any, devices: Devices, seed: int, numbers: Numbers, log: Log
) -> Callable[[Any, Any, int], Any]:
    """The step, compiled ahead for each shape of batch, and that said."""
    compiled: dict[tuple[int, ...], Any] = {}
    key = devices.key(seed)

    def take(state: tuple[Any, Any], batch: Batch, number: int) -> Any:
        batch = devices.batch(batch)
        shape = batch.tokens.shape
        arguments = (base, *state, batch, key, number, numbers)
        if shape not in compiled:
            jax.block_until_ready(state)  # what still runs is not compiling
            note(f"compiling the step for {' x '.join(map(str, shape))} tokens")
            start = time.perf_counter()
            with log.apart(), devices.active():
                compiled[shape] = step.lower(*arguments).compile()
            note(f"compiled in {time.perf_counter() - start:.1f} s")
        trained, rest, metrics = compiled[shape](*arguments)
        return (trained, rest), metrics

    return take


def _evaluate(
    args: argparse.Namespace,
    method: Method,
    sets: dict[str, Any],
    prompts: list[str],
    devices: Devices,
) -> Callable[[Any], dict[str, dict[str, float]]] | None:
    """What is looked at in between, if anything."""
    if not sets and not prompts:
        return None
    validation = Validation(method.checkpoint.config, sets, args.batch_size, devices)
    answering = method.answering() if prompts else None

    def evaluate(state: tuple[Any, Any]) -> dict[str, dict[str, float]]:
        if answering is not None:
            answer(answering(state[0]), prompts, note)
        return validation(*method.model(state[0]))

    return evaluate


def _smaller() -> tuple[str, str]:
    return "", "Try a smaller --batch-size with more --grad-accum, or a smaller --max-length."
