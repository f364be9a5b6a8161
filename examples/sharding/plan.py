"""Prints the tables of docs/scale/meshes.md: what limits 2, 8, 64 and 512 devices on paper.

    python examples/sharding/plan.py

Nothing is run or measured: it is arithmetic at the makers' rates, see `infer.memory.mesh_cost`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from glm2_jax import PRESETS, parse_mesh
from infer.memory.cards import LINKS, find_links
from infer.memory.mesh_cost import MeshCost, mesh_cost

CONFIG = PRESETS["chatglm2-6b"]
LENGTH = 2048

# Devices -> meshes: tensor only spans devices that links join.
ANSWERING = {2: "tensor=2", 8: "tensor=8", 64: "data=8,tensor=8", 512: "data=64,tensor=8"}
TRAINING = {2: "fsdp=2", 8: "fsdp=8", 64: "data=8,fsdp=8", 512: "data=64,fsdp=8"}
ONE_ROW = (1, 2, 4, 8, 16, 32)


def cost(kind: str, mesh: str, batch: int) -> MeshCost:
    sizes = parse_mesh(mesh)
    links = find_links(kind, math.prod(sizes.values()))
    return mesh_cost(CONFIG, sizes, links, batch=batch, length=LENGTH)


def one_row() -> Iterator[str]:
    """Yield the table of one answer: how much shorter a step gets with more devices."""
    yield "| devices | " + " | ".join(f"{kind}: memory, links, tokens/s" for kind in LINKS) + " |"
    yield "|---" * (1 + len(LINKS)) + "|"
    for count in ONE_ROW:
        cells = [f"tensor={count}"]
        for kind in LINKS:
            step = cost(kind, f"tensor={count}", 1).steps["decode"]
            rate = 1 / step.serial_s
            cells.append(f"{ms(step.memory_s)}, {ms(step.talk.seconds)}, **{rate:.0f}**")
        yield row(cells)


def steps(name: str, meshes: dict[int, str], rows: int) -> Iterator[str]:
    """Yield the table of a kind of step on all meshes, with `rows` rows per device."""
    yield row("device mesh GB memory products links longest tokens/s needed".split())
    yield "|---" * 9 + "|"
    for kind in LINKS:
        for count, mesh in meshes.items():
            found = cost(kind, mesh, rows * count)
            step = found.steps[name]
            there = {"lora": found.weights, "full": found.trained}
            size = there.get(name, found.weights + found.cache)
            full = " (too much)" if size > found.links.card.memory else ""
            needed = step.tokens_needed
            yield row(
                [
                    f"{count} x {kind}",
                    mesh,
                    f"{size / 1e9:.1f}{full}",
                    ms(step.memory_s),
                    ms(step.products_s),
                    ms(step.talk.seconds),
                    step.limit,
                    f"{step.tokens / step.overlapped_s:,.0f}",
                    "never" if needed is None else f"{needed:,}",
                ]
            )


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.{2 if seconds < 0.1 else 0}f} ms"


def tables() -> dict[str, list[str]]:
    """Return heading -> lines."""
    return {
        "One answer": list(one_row()),
        "Decode, 8 rows a device": list(steps("decode", ANSWERING, 8)),
        "Prefill, 1 prompt a device": list(steps("prefill", ANSWERING, 1)),
        "LoRA, 2 rows a device": list(steps("lora", TRAINING, 2)),
        "Full training, 2 rows a device": list(steps("full", TRAINING, 2)),
    }


if __name__ == "__main__":
    for heading, lines in tables().items():
        print(f"\n### {heading}\n", *lines, sep="\n")
