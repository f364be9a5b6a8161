"""`python -m infer.explain --mesh`: what a model costs each of several devices."""

from __future__ import annotations

import math
from dataclasses import asdict

from glm2_jax.cli.tables import fold
from glm2_jax.errors import UsageError
from glm2_jax.escape import join_lines, json_line
from glm2_jax.mesh import parse_mesh
from infer.explain.run import Settings, find_precision, find_subject
from infer.memory.cards import LINKS, find_links
from infer.memory.mesh_cost import mesh_cost, report

LENGTH = 2048  # tokens of a row by default, where the context has room


def run(settings: Settings) -> int:
    """Print the costs that the flags ask for; returns the exit code."""
    settings.refuse(
        "prompt", "html", "top_k", "heads", "max_new_tokens",
        why="With --mesh only the costs of devices are shown.",
    )  # fmt: skip
    sizes = parse_mesh(settings.mesh or "")
    subject = find_subject(settings)
    config, precision = subject.config, find_precision(subject)
    length, devices = settings.length or min(LENGTH, config.seq_length), math.prod(sizes.values())
    if length > config.seq_length:
        raise UsageError(
            f"--length must be at most {config.seq_length:,}, got {length:,}",
            "It is longer than the model's context (seq_length).",
        )
    costs = [
        mesh_cost(
            config, sizes, links, batch=settings.batch, length=length,
            dtype=precision.dtype, scheme=precision.quantize,
        )
        for links in dict.fromkeys(find_links(name, devices) for name in settings.cards or LINKS)
    ]  # fmt: skip
    if settings.json:
        found = {"model": subject.name, "meshes": [asdict(cost) for cost in costs]}
        print(json_line(found, allow_nan=False), flush=True)
        return 0
    lines = [f"{subject.name}: {config.num_params:,} parameters"]
    for cost in costs:
        lines += ["", *report(cost)]
    print(join_lines(part for line in lines for part in fold(line, settings.columns)), flush=True)
    return 0
