"""A recipe in a file, with flags on top: both go through the same parser.

A file is YAML with the names of flags, `lr: 2e-5` for `--lr 2e-5`. Needs no jax.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.parser import Parser
from glm2_jax.cli.text_input import read_utf8
from glm2_jax.errors import InputError, UsageError, shown

_LONGEST = 100_000  # characters; PyYAML takes seconds for that many
_NOT_SETTINGS = (
    "config", "help", "version", "debug",
    # Of a process, not of what it computes.
    "coordinator", "num_processes", "process_id", "join_timeout", "heartbeat_timeout",
)  # fmt: skip


def add_config_flag(parser: Parser) -> None:
    """Adds `--config`."""
    parser.add_argument_group("recipe").add_argument(
        "--config",
        type=path_argument,
        metavar="FILE.yml",
        help="flags from a YAML file, one a line: `lr: 2e-5`; flags of the command go before it",
    )


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `argv`, and of its `--config` file those that `argv` does not have.

    Raises:
        UsageError: a name in the file is no flag of the command, or its value is none.
        InputError: the file cannot be read.
    """
    finder = Parser(prog=parser.prog, add_help=False)
    finder.add_argument("--config", type=path_argument)
    config = finder.parse_known_args(argv)[0].config
    if config is None:
        return parser.parse_args(argv)
    given = _replaced(parser, argv)
    words: dict[str, list[str]] = {}
    for name, value in read_recipe(Path(config)).items():
        action = _action(parser, name, config)
        if action.dest in words:
            raise UsageError(f"{config}: {name} is there twice")
        if action.dest not in given:
            words[action.dest] = _words(action, name, value, config)
    return parser.parse_args([*itertools.chain(*words.values()), *argv])


def _replaced(parser: Parser, argv: Sequence[str]) -> set[str]:
    """The settings that the command has itself, and those that exclude them."""
    flags = {arg.partition("=")[0].replace("_", "-") for arg in argv if arg.startswith("-")}
    given = {action.dest for action in parser._actions if flags & set(action.option_strings)}
    for group in parser._mutually_exclusive_groups:
        members = {action.dest for action in group._group_actions}
        given |= members if members & given else set()
    return given


class _Texts(yaml.BaseLoader):
    """Leaves values the texts that they are, as on a command line: `off` is no truth value there.
    A name that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(str(name.value) for name, _ in node.value)
        for name, count in names.items():
            if count > 1:
                raise yaml.YAMLError(f"{name} is there twice")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """The names and values of a recipe.

    Raises:
        InputError: the file cannot be read, is not UTF-8, too long, or no YAML mapping.
    """
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
        raise InputError(f"{path} is nested too deeply", fix="Write a flag a line.") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{path} is not YAML", problem, "Write a flag a line.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is no recipe", "It has to be lines such as `lr: 2e-5`.")
    return found


def as_recipe(parser: Parser, args: argparse.Namespace) -> dict[str, Any]:
    """Every setting with its value; a file of it given as `--config` repeats the command."""
    result = {}
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.option_strings and action.dest not in _NOT_SETTINGS and value is not None:
            result[_name(action)] = value
    return result


def _name(action: argparse.Action) -> str:
    return next(flag[2:] for flag in action.option_strings if flag.startswith("--"))


def _action(parser: Parser, name: str, path: str) -> argparse.Action:
    flag = "--" + str(name).replace("_", "-")
    action = parser._option_string_actions.get(flag)
    if action is None or action.dest in _NOT_SETTINGS or flag[2:] != _name(action):
        known = ", ".join(sorted(_name(a) for a in parser._actions if a.dest not in _NOT_SETTINGS))
        raise UsageError(f"{path}: {name} is no setting of this command", f"Known: {known}.")
    return action


def _words(action: argparse.Action, name: str, value: Any, path: str) -> list[str]:
    """A setting as the words of a command line."""
    flag = f"--{_name(action)}"
    if action.nargs == 0:
        if value not in ("true", "false"):
            raise UsageError(f"{path}: {name} is true or false, not {shown(value)}")
        opposite = f"--no-{_name(action)}"
        no = [opposite] if opposite in action.option_strings else []
        return [flag] if value == "true" else no
    several = isinstance(action, argparse._AppendAction)
    values = value if several and isinstance(value, list) else [value]
    if not all(isinstance(value, str) and value for value in values):
        raise UsageError(f"{path}: {name} cannot be {shown(value)}")
    return [f"{flag}={value}" for value in values]
