"""Draws docs/scale/meshes.png: which devices have which part of what, for the 6B model, two meshes.

    python examples/sharding/picture.py docs/scale/meshes.png

Needs matplotlib (the extra `plot`). Nothing is computed: it draws what `glm2_jax.sharding` returns.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from glm2_jax import PRESETS, cache_sharding, make_mesh, params_sharding, parse_mesh, rows_sharding
from glm2_jax.mesh import axis_sizes

MESHES = ("data=2,tensor=4", "fsdp=2,tensor=4")
# What is drawn: its name, its axes, and the two of them that span the picture.
ARRAYS = [
    ("tokens", "BT", "BT"),
    ("embed, head", "VD", "VD"),
    ("q", "LNHD", "ND"),
    ("k, v", "LKHD", "KD"),
    ("o", "LDNH", "DN"),
    ("gate_up", "LCFD", "FD"),
    ("down", "LDF", "DF"),
    ("norms", "LD", "LD"),
    ("cache k, v", "LBKSH", "BK"),
]
# Of the first device that has a part: 4 to 7 are lighter than 0 to 3.
COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#a0cbe8", "#ffbe7d", "#8cd17d", "#d4a6c8"]


def places(mesh: Any) -> dict[str, Any]:
    """Return name -> sharding."""
    config = PRESETS["chatglm2-6b"]
    params, cache = params_sharding(config, mesh), cache_sharding(config, mesh)
    layers = params["layers"]
    return {
        "tokens": rows_sharding(mesh),
        "embed, head": params["head"],
        "k, v": layers["k"],
        "norms": layers["mlp_norm"],
        "cache k, v": cache.k,
        **{name: layers[name] for name in ("q", "o", "gate_up", "down")},
    }


def draw(axes: Any, name: str, letters: str, spanned: str, sharding: Any) -> None:
    """Draw an array as a square, cut into the parts of the devices."""
    sizes = {**axis_sizes(PRESETS["chatglm2-6b"]), "B": 8, "T": 64, "S": 64}
    shape = tuple(sizes[letter] for letter in letters)
    owners: dict[tuple[float, ...], list[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        place = []
        for letter in spanned:
            start, stop, _ = index[letters.index(letter)].indices(sizes[letter])
            place += [start / sizes[letter], stop / sizes[letter]]
        owners.setdefault(tuple(place), []).append(device.id)
    for (top, bottom, left, right), devices in owners.items():
        color = COLOURS[min(devices)] if len(owners) > 1 else "#d9d9d9"
        corner = left, 1 - bottom
        part = Rectangle(corner, right - left, bottom - top, facecolor=color, edgecolor="white")
        axes.add_patch(part)
        text = "all" if len(devices) == 8 else " ".join(map(str, sorted(devices)))
        middle = (left + right) / 2, 1 - (top + bottom) / 2
        turned = 90 if right - left < 0.3 and len(text) > 3 else 0
        axes.text(*middle, text, ha="center", va="center", fontsize=9, rotation=turned)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect="equal")
    axes.set_title(f"{name}\n[{', '.join(letters)}]", fontsize=9)
    axes.set_ylabel(spanned[0], fontsize=9, rotation=0, labelpad=7, va="center")
    axes.set_xlabel(spanned[1], fontsize=9, labelpad=2)


def main(path: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    rows: Any = figure.subfigures(len(MESHES), 1)
    for row, text in zip(rows, MESHES, strict=True):
        row.suptitle(f"mesh {text}", fontsize=11, fontfamily="monospace", x=0.01, ha="left")
        where = places(make_mesh(parse_mesh(text), jax.devices()[:8]))
        for axes, (name, letters, spanned) in zip(
            row.subplots(1, len(ARRAYS)), ARRAYS, strict=True
        ):
            draw(axes, name, letters, spanned, where[name])
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
