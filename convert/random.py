"""`python -m convert.random DST`: write a checkpoint folder of real shapes with random weights.

The layout, the names and the order are those of the published folders. The norms are ones, the rest
is normal with the standard deviation 0.02, so that activations stay finite at any depth. Drawing
six billion numbers would take longer than writing them: one block of a few million is drawn, and
the pieces of each tensor are copied from random places in it. Memory is that block.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import options
from glm2_jax.choices import STORED_DTYPES
from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument, positive, random_seed
from glm2_jax.cli.bundled import MODELS, find_bundled
from glm2_jax.cli.messages import Progress, human_size
from glm2_jax.cli.parser import Parser

if TYPE_CHECKING:
    import numpy as np

    from convert.files.safetensors_writer import Entry
    from glm2_jax.config import GLMConfig

_DEVIATION = 0.02
_BLOCK, _STRETCH = 2**22, 2**20  # numbers drawn once, and taken from them at a time
NAME = "random weights"  # `_name_or_path` of the folder, which must not be a model's name


def build_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(
        prog="python -m convert.random",
        description=(
            "Writes a checkpoint folder in the published layout with random weights of real "
            "shapes, to measure loading and speed without a download. Its answers make no sense. "
            "The folder appears complete or not at all."
        ),
        example="python -m convert.random ./random-6b --config chatglm2-6b --layers 6 "
        "--tokenizer tokenizer.model",
    )
    parser.add_argument(
        "destination", metavar="DST", type=path_argument, help="the folder to write"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--config", type=path_argument, required=True, metavar="NAME|FILE",
        help="a published model such as chatglm2-6b or glm-4-9b, or a config.json",
    )  # fmt: skip
    model.add_argument(
        "--layers", type=positive, metavar="N", help="number of layers (default: that of the model)"
    )
    model.add_argument(
        "--tokenizer", type=path_argument, required=True, metavar="FILE|DIR",
        help="the vocabulary to copy into the folder (for example tokenizer.model), or a folder "
        "that holds it, or demo",
    )  # fmt: skip
    weights = parser.add_argument_group("weights")
    weights.add_argument("--seed", type=random_seed, default=0, metavar="N", help="random seed")
    weights.add_argument("--dtype", choices=STORED_DTYPES, default="float16", help="type to store")
    options.add_shard_size(weights, default="2GB")
    parser.add_common()
    return parser


def official_config(
    name: str, *, layers: int | None = None, dtype: str = "float16", flag: str = "--config"
) -> dict[str, Any]:
    """Return the config.json to write: that of one of `glm2_jax.PRESETS`, or of a file of that
    name, with weights of `dtype`. Errors call the name by its `flag`."""
    from convert.files.shards import read_json
    from convert.layouts.family import find_family, read_side_files
    from glm2_jax.config import PRESETS, GLMConfig
    from glm2_jax.errors import UsageError

    raw: dict[str, Any] = {"_name_or_path": name}
    family = None
    if name in PRESETS:
        raw |= PRESETS[name].to_hf()
    elif Path(name).exists():
        raw = read_json(Path(name))
        family, _ = find_family(read_side_files(Path(name).parent, raw, None), None)
    else:
        raise UsageError(
            f"{flag} {name}: no such model or file.",
            f"Known models: {', '.join(PRESETS)}.",
            "Give one of them or the path of a config.json.",
        )
    if raw.get("quantization_bit") or name.endswith(("int4", "int8")):
        raise UsageError(
            f"{flag} {name} is a quantized model.",
            "Random weights are written as floats.",
            "Use the model that it was made from, for example chatglm2-6b.",
        )
    config = GLMConfig.from_hf(raw, family=family)
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    # It refers to Python files, which the folder does not have.
    raw.pop("auto_map", None)
    return raw | config.to_hf() | {"torch_dtype": dtype, "_name_or_path": NAME}


def write_random(
    destination: str | Path,
    raw: dict[str, Any],
    tokenizer_path: str | Path,
    *,
    dtype: str = "float16",
    max_shard_size: int = 2 * 10**9,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the folder, complete or not at all, and return the bytes of the weights.

    `raw` is its config.json, as `official_config` gives it; `tokenizer_path` a file of its
    vocabulary, or a folder that holds it under its published name. The same seed gives the
    same bytes.
    """
    from convert.files.safetensors_writer import write_file, write_shards
    from convert.loading.folder import check_fit
    from convert.writing.destination import check_destination, new_destination
    from glm2_jax.config import GLMConfig
    from glm2_jax.text.tokenizer import SCHEMES, Tokenizer

    config, path = GLMConfig.from_hf(raw), Path(find_bundled(tokenizer_path, MODELS))
    vocabulary = SCHEMES[config.family].file
    path = path / vocabulary if path.is_dir() else path
    tokenizer = Tokenizer.from_file(path, family=config.family)
    check_fit(config, tokenizer, config.default_template, asked=False)
    size = config.num_params * (4 if dtype == "float32" else 2)
    check_destination(destination, needed=size)  # any number of layers may be asked for
    entries = random_entries(config, dtype, seed)
    size = sum(entry.nbytes for entry in entries)
    with new_destination(destination, needed=size) as temporary:
        write_file(temporary / "config.json", (json.dumps(raw, indent=2) + "\n").encode())
        write_file(temporary / vocabulary, tokenizer.model_bytes)
        write_shards(temporary, entries, max_shard_size, progress)
    return size


def random_entries(config: "GLMConfig", dtype: str, seed: int) -> "list[Entry]":
    """Return the tensors of an official folder in their order, with random numbers."""
    import numpy as np

    from convert.files.safetensors_writer import Entry
    from convert.files.tensor import BFLOAT16
    from convert.layouts.names import rules_of
    from convert.writing.official import with_computed

    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    normal = np.random.default_rng(seed).standard_normal(_BLOCK, np.float32) * _DEVIATION
    block, ones = normal.astype(kind), np.ones(_STRETCH, kind)

    def stretches(
        source: "np.ndarray", own: "np.dtype", count: int, place: int
    ) -> "Iterator[np.ndarray]":
        """Yield `count` numbers of a tensor's own dtype, from places in `source` that the seed
        decides."""
        random = np.random.default_rng([seed, place])
        for begin in range(0, count, _STRETCH):
            start = int(random.integers(len(source) - _STRETCH + 1))
            part = source[start : start + min(_STRETCH, count - begin)]
            yield part.astype(own, copy=False)

    entries = []
    for _, group in itertools.groupby(rules_of(config), key=lambda rule: "{layer}" in rule.name):
        rules = list(group)
        for layer in rules[0].layers(config):
            for rule in rules:
                name, shape = rule.full_name(layer), rule.shape(config)
                source = ones if name.endswith("norm.weight") else block
                own = np.dtype(rule.dtype or kind)
                chunks = partial(stretches, source, own, math.prod(shape), len(entries))
                entries.append(Entry(name, shape, own, chunks))
    return with_computed(config, entries, kind)


def main(argv: list[str]) -> None:
    """Parse the flags and write."""
    args = build_parser().parse_args(argv)
    from glm2_jax.config import GLMConfig

    raw = official_config(args.config, layers=args.layers, dtype=args.dtype)
    with Progress("writing", show=human_size) as bar:
        size = write_random(
            args.destination, raw, args.tokenizer, dtype=args.dtype, seed=args.seed,
            max_shard_size=args.max_shard_size, progress=bar.update,
        )  # fmt: skip
    layers = f"{GLMConfig.from_hf(raw).num_layers} layers"
    options.print_written(args.destination, size, f"{args.dtype}, random weights, {layers}")


if __name__ == "__main__":
    interrupt.run(main)
