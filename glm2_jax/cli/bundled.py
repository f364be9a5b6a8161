"""What is installed with the packages and is found by its name from any folder: the demo model, the
rows that it learned from, and recipes."""

import os
from collections.abc import Mapping
from pathlib import Path

HOME = Path(__file__).parents[2]  # where the packages are installed, next to each other
MODELS = {"demo": "infer/demo"}
RECIPES = {name: f"train/recipes/{name}.yml" for name in ("demo", "lora_r8", "small")}
ROWS = {place: place for place in ("train/demo/pairs.jsonl", "train/demo/heldout.jsonl")}


def find_bundled(path: str | os.PathLike[str], names: Mapping[str, str]) -> str:
    """Return where a bundled model, recipe or file of rows is: `path` may be one of `names`, or the
    place that this stands for. What exists at `path` comes first; other paths stay as they are."""
    path = os.fspath(path)
    place = path.rstrip("/")
    place = names.get(place, place)
    return str(HOME / place) if place in names.values() and not os.path.lexists(path) else path
