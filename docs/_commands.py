"""The commands of the project as HTML: what each parser has, as `--help` prints it."""

import contextlib
import html
import importlib
import importlib.util
from functools import cache

from glm2_jax.cli.commands import COMMANDS
from glm2_jax.cli.parser import Parser


def main_of(module: str):
    """The module whose `main` a command runs: of a package, its `__main__`."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    return importlib.import_module(
        f"{module}.__main__" if spec.submodule_search_locations else module
    )


@cache
def parser_of(module: str) -> Parser:
    """The parser that a command prints its help from."""
    found: list[Parser] = []
    usual, Parser.print_help = Parser.print_help, lambda self, file=None: found.append(self)
    try:
        with contextlib.suppress(SystemExit):
            main_of(module).main(["--help"])
    finally:
        Parser.print_help = usual
    return found[0]


@cache
def all_commands() -> str:
    """A section for each command: its description, its flags by group, and its example."""
    return "\n".join(_section(name, module) for name, (module, _) in COMMANDS.items())


def _section(name: str, module: str) -> str:
    parser = parser_of(module)
    formatter = parser._get_formatter()
    lines = [f"## glm2 {name}", "", f"`python -m {module}`", ""]
    paragraphs = (parser.description or "").split("\n\n")
    lines += [f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        lines += [f'<p class="flags">{html.escape(group.title or "")}</p>', '<dl class="flags">']
        for action in actions:
            names = html.escape(formatter._format_action_invocation(action))
            text = html.escape(formatter._expand_help(action)) if action.help else ""
            lines.append(f"<dt><code>{names}</code></dt><dd>{text}</dd>")
        lines.append("</dl>")
    example = (parser.epilog or "").removeprefix("example:").strip()
    if example:
        lines += ["", "```shell", *(line.strip() for line in example.splitlines()), "```"]
    return "\n".join([*lines, ""])
