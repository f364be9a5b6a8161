"""`python -m infer.explain --mesh`: what a model costs each of several devices."""

from __future__ import annotations

import argparse
import math
import shutil
from dataclasses import asdict

from glm2_jax.cli.tables import fold
from glm2_jax.errors import UsageError
from glm2_jax.escape import join_lines, json_line
from glm2_jax.mesh import parse_mesh
from infer.explain.run import find_precision, find_subject
from infer.memory.links import LINKS, find_links
from infer.memory.mesh_cost import mesh_cost, report

LENGTH = 2048  # tokens of a row, where no other number is asked for and the context has room


def run(args: argparse.Namespace) -> int:
    """Prints the costs that the flags ask for; returns the exit code."""
    _refuse_others(args)
    sizes = parse_mesh(args.mesh)
    subject = find_subject(args)
    precision = find_precision(args, subject)
    length = args.length or min(LENGTH, subject.config.seq_length)
    if length > subject.config.seq_length:
        raise UsageError(
            f"--length {length:,} is longer than the model's context.",
            f"That (seq_length) is {subject.config.seq_length:,}.",
        )
    devices = math.prod(sizes.values())
    costs = [
        mesh_cost(
            subject.config,
            sizes,
            links,
            batch=args.batch,
            length=length,
            dtype=precision.dtype,
            scheme=precision.quantize,
        )
        for links in dict.fromkeys(find_links(name, devices) for name in args.cards or LINKS)
    ]
    if args.json:
        found = {"model": subject.name, "meshes": [asdict(cost) for cost in costs]}
        print(json_line(found, allow_nan=False), flush=True)
        return 0
    columns = max(args.width or shutil.get_terminal_size((100, 24)).columns, 30)
    lines = [f"{subject.name}: {subject.config.num_params:,} parameters"]
    for cost in costs:
        lines += ["", *report(cost)]
    print(join_lines(part for line in lines for part in fold(line, columns)), flush=True)
    return 0


def _refuse_others(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that a mesh has no use for."""
    names = ("prompt", "html", "top_k", "heads", "max_new_tokens")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)}: without effect",
            "With --mesh only the costs of devices are told.",
            "Leave it out.",
        )
