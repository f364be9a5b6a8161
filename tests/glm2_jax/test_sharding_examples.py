"""The examples of docs/scale/meshes.md run, and the page says what they print."""

import importlib
import json
import math
import os
import re
import subprocess
import sys

import pytest

from glm2_jax import parse_mesh
from infer.memory.cards import LINKS
from infer.memory.mesh_cost import mesh_cost
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/scale/meshes.md").read_text(encoding="utf-8")


def example(name: str, *args: str) -> str:
    """What an example prints, warnings being errors."""
    flags = "--xla_backend_optimization_level=0"  # what is made of the partitioned program
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", f"examples/sharding/{name}", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_page_has_the_collectives_that_are_compiled():
    rows = json.loads(example("compare.py", "--json"))
    columns = ("way", "mesh", "forward", "gradient", "KB")
    header = PAGE.index("| way | mesh |")
    lines = PAGE[header : PAGE.index("\n\n", header)].splitlines()[2:]
    shown = [[cell.strip() for cell in line.split("|")[1:6]] for line in lines]
    assert shown == [[row[column] for column in columns] for row in rows]
    same = {(row["mesh"], row["forward"], row["gradient"]) for row in rows}
    # Whoever cuts the same way gets the same program; only fsdp and the crossed cut differ.
    assert len(same) == 7
    assert {row["way"] for row in rows} == {"pmap", "jit", "shard_map", "jit, crossed"}


def test_the_model_on_four_devices_holds_and_says_what_its_cost_tells():
    text = example("model.py", "--mesh", "data=2,tensor=2")
    assert "the 32 tokens of one device" in text
    sizes = {"weights": 0, "cache": 0}
    for name, shape in re.findall(r"^(\S+) .* per device \(([\d, ]+)\)", text, re.M):
        if name != "cache.length":
            size = 4 * math.prod(map(int, re.findall(r"\d+", shape)))
            sizes["cache" if name == "cache.k" else "weights"] += size
    config = load("model").config_of(2)
    cost = mesh_cost(
        config, parse_mesh("data=2,tensor=2"), LINKS["v5e"], batch=8, length=16, dtype="float32"
    )
    assert sizes == {"weights": cost.weights, "cache": cost.cache // 2}
    listed = re.findall(r"^  (\S+) of ([\d,]+) bytes$", text, re.M)
    assert [kind for kind, _ in listed] == ["all-reduce"] * 3 + ["all-gather"]
    *reduced, gathered = (int(size.replace(",", "")) for _, size in listed)
    assert len(set(reduced)) == 1
    # Two of them are in the loop over the layers. Of 2 devices each sends all of an
    # all-reduce, and half of what is gathered.
    talk = cost.steps["decode"].talk
    assert talk.calls == 2 * config.num_layers + 2
    assert talk.link_bytes == (2 * config.num_layers + 1) * reduced[0] + gathered / 2


def test_the_page_has_the_tables_of_the_plan():
    for heading, lines in load("plan").tables().items():
        table = "\n".join([f"### {heading}", "", *lines, "", ""])
        assert table in PAGE, f"docs/scale/meshes.md: {heading}: run examples/sharding/plan.py"


def test_the_picture_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "sharding.png"
    example("picture.py", str(drawn))
    known = (ROOT / "docs/scale/meshes.png").read_bytes()
    assert drawn.read_bytes()[:24] == known[:24]  # a PNG of the same size


def load(name: str):
    """An example as a module."""
    folder = str(ROOT / "examples/sharding")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
