"""The argument parser of every command."""

import argparse
import dataclasses
import difflib
import re
import sys
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NoReturn, TypeVar, get_type_hints

from glm2_jax.cli.commands import as_typed
from glm2_jax.cli.foreign_flags import our_flag
from glm2_jax.cli.main import EXIT_USAGE, version
from glm2_jax.cli.messages import note

T = TypeVar("T")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the example, show defaults that say something, and a short usage."""

    def add_usage(self, usage, actions, groups, prefix=None) -> None:  # types of the base class
        """As argparse does, with "[flags]" for all that are optional."""
        if usage is None:
            needed = [a for a in actions if a.required or not a.option_strings]
            words = [
                " ".join((*a.option_strings[:1], str(a.metavar or a.dest.upper()))) for a in needed
            ]
            usage = " ".join((self._prog.replace("%", "%%"), "[flags]", *words))
        super().add_usage(usage, actions, groups, prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """As argparse does, but the spelling --no-X of a flag takes no value."""
        return re.sub(r"(--no-\S+) \[\S+\]", r"\1", super()._format_action_invocation(action))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser for which `--max_length` is `--max-length`, with one-line errors.

    `prog` and `example` are command lines as the user types them; `--help` ends with the example.
    """

    def __init__(self, *, prog: str, description: str = "", example: str = "", **kwargs: Any):
        kwargs.setdefault("epilog", f"example:\n  {as_typed(example)}" if example else None)
        super().__init__(
            prog=as_typed(prog),
            description="\n\n".join(textwrap.fill(part, 90) for part in description.split("\n\n")),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def add_common(self) -> None:
        """Add the flags that every command has: `--debug` and `--version`."""
        group = self.add_argument_group("general")
        group.add_argument("--debug", action="store_true", help="show the traceback of an error")
        group.add_argument("--version", action="version", version=version())

    def given(self, args: argparse.Namespace) -> dict[str, str]:
        """Return the destinations and names of the flags that differ from their defaults."""
        return {
            action.dest: action.option_strings[0]
            for action in self._actions
            if vars(args).get(action.dest, action.default) != action.default
        }

    def parse_known_args(self, args=None, namespace=None):  # type of the base class
        """As argparse does, after `_` in the names of flags has become `-`."""
        args = list(sys.argv[1:] if args is None else args)
        hyphenated = _hyphenate(args)
        hints = [
            f"{typed.partition('=')[0]}: use {ours}"
            for typed, arg in zip(args, takewhile("--".__ne__, hyphenated), strict=False)
            if (ours := our_flag(arg.partition("=")[0], self._option_string_actions))
        ]
        if hints:  # before argparse names the flags that are missing: they may be these
            self.error(f"unknown argument {', '.join(hints)}")
        return super().parse_known_args(hyphenated, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line of what and one of what to do, and exit with 2."""
        unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            message = f"unknown argument {unknown[1]}{self._suggestion(unknown[1])}"
        note(f"{self.prog}: {message}")
        note(f"{self.prog} --help lists the flags")
        sys.exit(EXIT_USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Unlike the base class, report a failed write (`--help > /dev/full`)."""
        (file or sys.stdout).write(message)

    def _suggestion(self, arguments: str) -> str:
        flag = arguments.split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f" (did you mean {near[0]}?)" if near else ""


def from_flags(cls: type[T], args: argparse.Namespace, **more: Any) -> T:
    """Return a dataclass that is filled from `more` and the flags of the same names, or of those
    that `flag` was given.

    A field whose type is a dataclass is filled likewise; a field without a flag takes its default.
    """
    flags, kinds, values = vars(args), get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind, known = kinds[field.name], field.metadata
        name = known.get("dest") or known.get("name") or field.name
        if field.name in more:
            continue
        if dataclasses.is_dataclass(kind):
            values[field.name] = from_flags(kind, args)  # type: ignore[arg-type]
        elif name in flags:
            values[field.name] = flags[name]
    return cls(**values, **more)


def flag(help: str, **options: Any) -> Any:
    """Return a field of a dataclass that is a flag, with the arguments of `add_argument`, with a
    `name` where the flag has another one, and other spellings in `short`; of the fields with
    `exclusive=True` a command line may have one."""
    default = options.get("default", False if options.get("action") == "store_true" else None)
    return dataclasses.field(default=default, metadata={"help": help, **options})


def add_flags(
    parser: argparse._ActionsContainer,
    title: str | None,
    cls: type,
    only: Sequence[str] = (),
    **changes: dict[str, Any],
) -> argparse._ActionsContainer:
    """Add and return a group with the flags of a dataclass: its fields that `flag` made; without a
    title, they are added to `parser`, a group.

    `only` names fields where not all are added; `changes` are other arguments of `add_argument`, by
    the names of the fields.
    """
    group = parser if title is None else parser.add_argument_group(title)
    exclusive = group if title is None else group.add_mutually_exclusive_group()
    fields = {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}
    for name in only or fields:
        options = {**fields[name].metadata, **changes.get(name, {})}
        flag_name = options.pop("name", name).replace("_", "-")
        names = (f"--{flag_name}", *options.pop("short", ()))
        (exclusive if options.pop("exclusive", False) else group).add_argument(*names, **options)
    return group


def _hyphenate(args: Sequence[str]) -> list[str]:
    """Underscores to hyphens in flag names, up to `--`; values are left alone."""
    result = list(args)
    for i, arg in enumerate(result):
        if arg == "--":
            break
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            result[i] = name.replace("_", "-") + equals + value
    return result
