"""The import graph: floors and rooms only import downwards, without cycles, and never torch."""

import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import grimp

from tests.support.paths import ROOT

FLOORS = ("glm2_jax", "convert", "infer", "train")  # lowest first
# Each room, lowest first: a folder with all that is in it; "infer." are the loose modules.
ROOMS = {
    "glm2_jax": ("glm2_jax.", "text", "cli", "datasets", "runtime", "processes"),
    "convert": (
        "files", "hub", "layouts", "loading", "adapters", "writing", "calibration", "convert.",
    ),
    "infer": (
        "memory", "tuning", "engine", "batching", "requests", "infer.",
        "doctor", "bench", "chat", "evaluate", "explain", "fill", "generate", "selftest", "serve",
        "lab",  # stands on evaluate and bench
    ),
    "train": ("run_folder", "data", "train.", "demo", "augment", "sweep"),
}  # fmt: skip
WINGS = set(ROOMS["infer"][6:-1])  # the rooms of the commands, of which none knows another


def room_of(module: str) -> str:
    """ "infer.chat.run" -> "chat", "infer.options" -> "infer."."""
    floor, *rest = module.split(".")
    return rest[0] if rest and rest[0] in ROOMS[floor] else f"{floor}."


def violations(imports: dict[str, set[str]]) -> list[str]:
    """Arrows of an import graph that point up, or from one command into another."""
    order = [(floor, room) for floor in FLOORS for room in ROOMS[floor]]
    found = []
    for module, targets in imports.items():
        for target in targets:
            here = module.split(".")[0], room_of(module)
            there = target.split(".")[0], room_of(target)
            up = order.index(here) < order.index(there)
            if up or (here != there and {here[1], there[1]} <= WINGS):
                found.append(f"{module} -> {target}")
    return sorted(found)


def test_imports_point_down_and_never_in_a_circle():
    """All imports anywhere in a module count, except for types alone."""
    graph = grimp.build_graph(*FLOORS, exclude_type_checking_imports=True, cache_dir=None)
    imports = {name: set(graph.find_modules_directly_imported_by(name)) for name in graph.modules}
    assert violations(imports) == []
    TopologicalSorter(imports).prepare()  # raises CycleError with the modules of a circle


def test_the_check_sees_what_it_should():
    below = {"infer.engine.engine": {"convert.loading.params"}, "infer.chat.run": {"infer.startup"}}
    assert violations(below | {"infer.chat.input": {"infer.chat.reply"}}) == []
    for module, target in (
        ("convert.loading.params", "infer.engine.engine"),
        ("infer.engine.engine", "infer.requests.request"),
        ("infer.chat.run", "infer.generate.run"),
    ):
        assert violations({module: {target}}) == [f"{module} -> {target}"]


def test_nothing_imports_torch():
    graph = grimp.build_graph(*FLOORS, include_external_packages=True, cache_dir=None)
    for name in ("torch", "transformers", "peft"):
        assert name not in graph.modules or not graph.find_modules_that_directly_import(name)
    modules = ", ".join(FLOORS)  # and importing the packages loads nothing heavy through others
    code = f"import sys, {modules}; print({{'jax', 'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_every_folder_of_code_is_a_package():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = config["tool"]["setuptools"]["packages"]["find"]["include"]
    assert included == [f"{floor}{end}" for floor in FLOORS for end in ("", ".*")]
    folders = {path.parent for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
