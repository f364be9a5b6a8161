"""`python -m infer.tune`: measures which ways to compute a model are fast on a device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.messages import note
from glm2_jax.cli.model_choice import ModelChoice, add_model_options
from glm2_jax.cli.parser import Parser, add_flags, flag, from_flags
from glm2_jax.errors import UsageError

if TYPE_CHECKING:
    from glm2_jax import GLMConfig
    from infer.memory.precision import Precision
    from infer.tuning.measure import Tuned

PROG = "python -m infer.tune"
DESCRIPTION = """Measures the forms in which a model's products and its attention can be computed
on this device, for several numbers of rows, and keeps the fastest ones: every command uses them
from then on. One layer of the model's shapes with random weights is measured; no checkpoint is
loaded. Commands do this by themselves at the first start of a model (--tuned auto).

--train measures steps of training instead, which no command does by itself: the form of attention,
and how much of a layer the backward pass recomputes (--grad-checkpoint), of what fits the memory.
train.lora, train.full, train.prefix and train.preference use the fastest from then on, for batches
of any size.

Exit codes: 0 success, 2 usage, 3 --output cannot be written, 4 the checkpoint cannot be opened, 5
out of memory, device or C++ compiler, 130 interrupted."""
EXAMPLE = f"{PROG} --random chatglm2-6b --dtype bfloat16 --quantize int8"


def _rows(text: str) -> tuple[int, ...]:
    return tuple(sorted({arguments.positive(part) for part in text.split(",")}))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    found = [tuple(map(arguments.positive, part.split("x"))) for part in text.lower().split(",")]
    if any(len(shape) != 2 for shape in found):
        raise argparse.ArgumentTypeError(f"expected rows x tokens such as 4x512, got {text!r}")
    return tuple(sorted({(rows, length) for rows, length in found}))


@dataclass(frozen=True)
class Settings:
    """The flags of the command."""

    choice: ModelChoice
    random: str | None = flag(
        "instead of --model: the shapes of a published model such as chatglm2-6b, or of a "
        "config.json",
        type=path_argument, metavar="NAME|FILE",
    )  # fmt: skip
    rows: tuple[int, ...] = flag(
        "rows of a step: how many answers are computed at once", type=_rows,
        default="1,2,4,8,16,32", metavar="N,N",
    )  # fmt: skip
    train: tuple[tuple[int, int], ...] | None = flag(
        "measure steps of training instead, of N rows of M tokens: --batch-size and --max-length "
        "of the training, for example 4x512",
        type=_shapes, metavar="NxM,NxM",
    )  # fmt: skip
    output: str | None = flag(
        "also write the choice to a file, for --tuned F", type=path_argument, metavar="F"
    )
    build_native: bool = flag(
        "first build the native kernel for products on a CPU with g++ or clang++ (CXX chooses), "
        "once for this machine; it is measured like the other forms",
        action="store_true",
    )
    json: bool = flag("one JSON object instead of a table", action="store_true")


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    add_model_options(result)
    group = add_flags(result, "what is measured", Settings, ("random", "rows", "train"))
    where = ("dtype", "quantize", "quantize_embeddings", "layers", "device")
    add_flags(group, None, ModelChoice, where)
    add_flags(result, "output", Settings, ("build_native", "output", "json"))
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    args: argparse.Namespace = parser().parse_args(argv)
    if args.model and args.random:
        raise UsageError("--model and --random exclude each other.", fix="Leave one out.")
    arguments.choose_platform(args.device)
    return run(from_flags(Settings, args, choice=from_flags(ModelChoice, args)))


def run(settings: Settings) -> int:
    """Measure, keep the choice, and print it."""
    from glm2_jax.cli.files import require_file_place
    from glm2_jax.runtime import native
    from glm2_jax.runtime.devices import device_errors, find_device
    from infer.tuning import store
    from infer.tuning.measure import Tuned

    if settings.output:
        require_file_place(settings.output)
    if settings.build_native:
        note(f"the native kernel is {native.build()}")
    device = find_device(settings.choice.device)
    config, precision = _model(settings, device)
    key = store.key_of(config, precision, device)
    known = store.find(key) or Tuned()
    with device_errors("measuring the forms"):
        tuned = _measured(settings, config, precision, device, known)
    places = [store.keep(key, tuned)]
    if settings.output:
        places.append(store.keep(key, tuned, Path(settings.output)))
    _print(settings, key, tuned)
    kept = [str(place) for place in places if place is not None]
    note(f"kept in {' and '.join(kept)}" if kept else "not kept: the user's cache is off")
    return 0


def _measured(
    settings: Settings, config: GLMConfig, precision: Precision, device: Any, known: Tuned
) -> Tuned:
    """Return what is known already, and measure again what the flags name."""
    from glm2_jax.runtime.devices import faster_layers
    from infer.tuning.measure import tune
    from infer.tuning.training import tune_training

    if not settings.train:
        layers = settings.choice.layers or faster_layers(device.platform, rows=max(settings.rows))
        tuned = tune(config, precision, settings.rows, device, layers=layers, note=note)
        return replace(tuned, training=known.training)
    limit = config.context_limit
    if (longest := max(length for _, length in settings.train)) > limit:
        raise UsageError(f"--train: {longest} tokens are more than the model's {limit}.")
    others = (one for one in known.training if one[:2] not in settings.train)
    new = (tune_training(config, precision, *shape, device, note=note) for shape in settings.train)
    return replace(known, training=(*others, *new))


def _model(settings: Settings, device: Any) -> tuple[GLMConfig, Precision]:
    """Return the sizes of the model and how its weights are stored; no weights are read."""
    from convert.hub.find import find_model
    from convert.loading.folder import open_folder, target_scheme
    from convert.random import official_config
    from glm2_jax import GLMConfig
    from glm2_jax.runtime.dtypes import dtype_name, resolve_dtype
    from glm2_jax.schemes import asked_scheme
    from infer.engine.load import demo_folder
    from infer.memory.precision import Precision

    choice = settings.choice
    if settings.random is not None:
        config = GLMConfig.from_hf(official_config(settings.random, flag="--random"))
        name = asked_scheme(choice.quantize, choice.quantize_embeddings, stored=None, model="")
        scheme = None if name == "none" else name
    else:
        path = (
            demo_folder()
            if choice.path is None
            else find_model(choice.path, source=choice.source, revision=choice.revision)
        )
        folder = open_folder(path, **choice.form)
        found = target_scheme(folder, choice.quantize, choice.quantize_embeddings)
        config, scheme = folder.config, None if found is None else found.name
    dtype = resolve_dtype(choice.dtype, num_params=config.num_params, device=device)
    return config, Precision(dtype_name(dtype), scheme)


def _print(settings: Settings, key: dict[str, Any], tuned: Tuned) -> None:
    from glm2_jax.cli.tables import table
    from glm2_jax.escape import json_line

    if settings.json:
        lines = [{"what": what, **asdict(choice)} for what, choice in tuned.lines]
        print(json_line({**key, "layers": tuned.layers, "measured": lines}))
        return
    rows = [("what", "usual", "chosen", "ms", "ms", "times as fast")]
    for what, choice in tuned.lines:
        usual, best = (
            f"{choice.seconds[name] * 1e3:.3g}" if choice.seconds else "-"
            for name in (choice.usual, choice.name)
        )
        rows.append((what, choice.usual, choice.name, usual, best, f"{choice.gain:.2f}"))
    print("\n".join(table(rows, 3)))
    if tuned.layers is not None:
        print(f"layers: {tuned.layers}")
    for what, choice in tuned.lines:
        for name, why in choice.refused.items():
            print(f"refused: {what}, {name}: {why}")


if __name__ == "__main__":
    interrupt.run(main)
