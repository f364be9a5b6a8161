"""A recipe in a file, with flags on top: both go through the same parser.

A file is YAML with the names of flags, `lr: 2e-5` for `--lr 2e-5`. Needs no jax.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from convert.cli import Parser, path_argument
from glm2_jax.errors import InputError, UsageError
from infer.text_input import read_utf8

_NOT_SETTINGS = ("config", "help", "version", "debug")


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
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=path_argument)
    config = finder.parse_known_args(argv)[0].config
    if config is None:
        return parser.parse_args(argv)
    given = {arg.partition("=")[0].replace("_", "-") for arg in argv if arg.startswith("-")}
    words = []
    for name, value in read_recipe(Path(config)).items():
        action = _action(parser, name, config)
        if not given & set(action.option_strings):
            words += _words(action, name, value, config)
    return parser.parse_args([*words, *argv])


def read_recipe(path: Path) -> dict[str, Any]:
    """The names and values of a recipe.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or no YAML mapping.
    """
    text = read_utf8(path)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{path} is not YAML", problem, "Write a flag a line.") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
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


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Writes a recipe as YAML."""
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _name(action: argparse.Action) -> str:
    return next(flag[2:] for flag in action.option_strings if flag.startswith("--"))


def _action(parser: Parser, name: str, path: str) -> argparse.Action:
    action = parser._option_string_actions.get("--" + name.replace("_", "-"))
    if action is None or action.dest in _NOT_SETTINGS:
        known = ", ".join(sorted(_name(a) for a in parser._actions if a.dest not in _NOT_SETTINGS))
        raise UsageError(f"{path}: {name} is no setting of this command", f"Known: {known}.")
    return action


def _words(action: argparse.Action, name: str, value: Any, path: str) -> list[str]:
    """A setting as the words of a command line."""
    flag = f"--{_name(action)}"
    if isinstance(value, bool):
        if action.nargs != 0:
            raise UsageError(f"{path}: {name} takes a value, not {str(value).lower()}")
        if value:
            return [flag]
        opposite = f"--no-{_name(action)}"
        return [opposite] if opposite in action.option_strings else []
    values = value if isinstance(value, list) else [value]
    if action.nargs == 0 or value is None or any(isinstance(v, (dict, list)) for v in values):
        raise UsageError(f"{path}: {name} cannot be {value!r}")
    return [f"{flag}={value}" for value in values]
