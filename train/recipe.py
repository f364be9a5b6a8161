"""The settings of a training run as one value, and as a YAML file.

A file holds flags by their names, `lr: 2e-5` for `--lr 2e-5`. The command line overrides it, and
both go through the same parser. Imports no jax.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.bundled import RECIPES, find_bundled
from glm2_jax.cli.foreign_flags import our_flag
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.cli.parser import Parser
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import InputError, UsageError, shorten
from train.data.options import DataOptions
from train.options import (
    AdapterOptions,
    EvaluationOptions,
    OutputOptions,
    PreferenceOptions,
    PrefixOptions,
    TrainingOptions,
)

_LONGEST = 100_000  # characters; PyYAML takes seconds for that many
NOT_SETTINGS = (
    "config", "help", "version", "debug", "dry_run",
    # Flags of a process, not of its result.
    "coordinator", "num_processes", "process_id", "join_timeout", "heartbeat_timeout",
)  # fmt: skip
# Flags that do not change the trained parameters. Data and models count by their contents.
NO_EFFECT = {
    "model", "source", "revision", "data", "max-bad", "mix-data", "check-data", "print-sample",
    "val-data", "guard-data", "sample-prompts", "output", "checkpoints", "resume", "save-every",
    "keep", "log-every", "log-jsonl", "plot", "device", "mesh", "tp", "tuned", "compile-cache",
    "data-cache", "init-adapter", "force-adapter", "stop-diverged",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run."""

    command: str  # such as "python -m train.lora"
    default_lr: float  # learning rate for a wide model, where none is given
    choice: ModelChoice  # the base model, its dtype, and the devices
    data: DataOptions  # the rows to learn from
    # what is trained on a frozen base; None = train all parameters
    adapter: AdapterOptions | PrefixOptions | None
    # Numbers of it that depend on data and model may be None, see `train.defaults.choose`.
    training: TrainingOptions
    evaluation: EvaluationOptions
    output: OutputOptions
    # folder of compiled programs, or "off"; None = in the user's cache folder
    compile_cache: str | None
    preference: PreferenceOptions | None = None  # None = the loss of the answers
    tuned: str = "auto"  # measured forms: "auto", "off" or a file, see `EngineOptions`

    def settings(self) -> dict[str, Any]:
        """Return all settings by the names of their flags: a file of them repeats the run."""
        choice = self.choice
        found = {
            "model": choice.path, "source": choice.source, "revision": choice.revision,
            "rope-scaling": choice.rope_kind, "template": choice.template,
            "family": choice.family, "quantize-base": choice.quantize, **vars(self.data),
            **(vars(self.adapter) if self.adapter else {}),
            **(vars(self.preference) if self.preference else {}), **vars(self.training),
            "dtype": choice.dtype, "device": choice.device, "mesh": choice.mesh,
            "tuned": self.tuned, "compile-cache": self.compile_cache, **vars(self.evaluation),
            **vars(self.output),
        }  # fmt: skip
        return {name.replace("_", "-"): x for name, x in found.items() if x is not None}

    def identity(self) -> dict[str, Any]:
        """Return the settings that the trained parameters depend on, by their flags."""
        found = {f"--{name}": x for name, x in self.settings().items() if name not in NO_EFFECT}
        return {"command": self.command} | found


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`, and from its `--config` file the flags that `argv` does not have; UsageError
    where a name or a value in the file cannot be one of a flag, InputError where it is not read."""
    finder = Parser(prog=parser.prog, add_help=False)
    finder.add_argument("--config", type=path_argument)
    config = finder.parse_known_args(argv)[0].config
    if config is None:
        return parser.parse_args(argv)
    flags = {arg.partition("=")[0].replace("_", "-") for arg in argv if arg.startswith("-")}
    given = {action.dest for action in parser._actions if flags & set(action.option_strings)}
    for group in parser._mutually_exclusive_groups:
        members = {action.dest for action in group._group_actions}
        given |= members if members & given else set()
    words: dict[str, list[str]] = {}
    known = {name_of(x): x for x in parser._actions if x.dest not in NOT_SETTINGS}
    for name, value in read_settings(_find_recipe(config)).items():
        action = known.get(str(name).replace("_", "-"))
        if action is None:
            names = ", ".join(sorted(known))
            what = f"{config}: {name} is not a setting of this command."
            flag = f"--{name}".replace("_", "-")
            ours = our_flag(flag, parser._option_string_actions)
            fix = "" if ours is None else f"Use {ours.removeprefix('--').replace(' ', ': ')}."
            raise UsageError(what, f"Known: {names}.", fix)
        if action.dest in words:
            raise UsageError(f"{config}: {name} is given twice.")
        # A default says nothing, but would exclude the other flag of a group.
        said = action.dest not in given and value != str(action.default)
        words[action.dest] = words_of(action, name, value, config) if said else []
    return parser.parse_args([*sum(words.values(), []), *argv])


def _find_recipe(name: str) -> Path:
    path = Path(find_bundled(name, RECIPES))
    if path.exists():
        return path
    raise InputError(
        f"recipe not found: {name}",
        f"It is neither a file nor a bundled recipe: {', '.join(RECIPES)}.",
        "Check the name.",
    )


class _Texts(yaml.BaseLoader):
    """Leaves values as text, as on a command line, so that `off` is not a truth value. A name that
    is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for name, count in Counter(str(name.value) for name, _ in node.value).items():
            if count > 1:
                raise yaml.YAMLError(f"{name} is given twice")
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the names and values of a file of settings, values as text; InputError where it holds
    others."""
    text = read_utf8(path)
    if len(text) > _LONGEST:
        raise InputError(
            f"{path} is too long for a recipe: {len(text):,} characters",
            f"At most {_LONGEST:,} are read.",
            "Check that it is the file you mean.",
        )
    try:
        found = yaml.load(text, _Texts)
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply", fix="Write one flag per line.") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{path} is not YAML", problem, "Write one flag per line.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a recipe", fix="Write lines such as `lr: 2e-5`.")
    return found


def name_of(action: argparse.Action) -> str:
    return next(flag[2:] for flag in action.option_strings if flag.startswith("--"))


def words_of(action: argparse.Action, name: str, value: Any, path: str) -> list[str]:
    """Return a setting as the words of a command line."""
    flag = f"--{name_of(action)}"
    if action.nargs == 0:
        if value not in ("true", "false"):
            raise UsageError(f"{path}: {name} must be true or false, got {shorten(value)}.")
        opposite = f"--no-{name_of(action)}"
        no = [opposite] if opposite in action.option_strings else []
        return [flag] if value == "true" else no
    several = isinstance(action, argparse._AppendAction)
    values = value if several and isinstance(value, list) else [value]
    if not all(isinstance(value, str) and value for value in values):
        texts = isinstance(value, list) and value and all(isinstance(x, str) for x in value)
        fix = f"Write one value, as on a command line: {','.join(value)[:100]}" if texts else ""
        raise UsageError(f"{path}: {name} cannot be {shorten(value)}.", fix=fix)
    return [f"{flag}={value}" for value in values]
