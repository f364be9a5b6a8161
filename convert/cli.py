"""What every command line of the project shares: parsing, errors, exit codes, progress.

Answers go to stdout, everything else to stderr. Exit codes: 0 ok, 1 unexpected, 2 usage, 3 bad
input or data, 4 model or checkpoint, 5 out of memory or device, 130 interrupted, 141 output closed,
143 terminated.

How signals end a tool is in `convert.interrupt`. Nothing here imports jax: `--help` must answer at
once.
"""

import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import sys
import textwrap
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TextIO

from convert.local import refuse_url
from glm2_jax.text import escape_controls, join_lines

EXIT_USAGE, EXIT_INPUT, EXIT_DEVICE = 2, 3, 5
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 130, 141, 143


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the example and shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser for which `--max_length` is `--max-length`, with one-line errors.

    Args:
      prog: the command as the user types it, e.g. "python -m infer.generate".
      description: what it does, in a sentence or two.
      example: one or more command lines, shown at the end of `--help`.
    """

    def __init__(self, *, prog: str, description: str = "", example: str = "", **kwargs: Any):
        kwargs.setdefault("epilog", f"example:\n  {example}" if example else None)
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, 90),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def add_common(self) -> None:
        """Adds the flags that every command has: `--debug` and `--version`."""
        group = self.add_argument_group("general")
        group.add_argument("--debug", action="store_true", help="show the traceback of an error")
        group.add_argument("--version", action="version", version=version())

    def parse_known_args(self, args=None, namespace=None):  # type of the base class
        """As argparse does, after `_` in the names of flags has become `-`."""
        args = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(_hyphenate(args), namespace)

    def error(self, message: str) -> NoReturn:
        """Prints one line of what and one of what to do, and exits with 2."""
        unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            message = f"unknown argument {unknown[1]}{self._suggestion(unknown[1])}"
        note(f"{self.prog}: {message}")
        note(f"{self.prog} --help lists the flags")
        sys.exit(EXIT_USAGE)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Unlike that of the base class, tells when it cannot write (`--help > /dev/full`)."""
        (file or sys.stdout).write(message)

    def _suggestion(self, arguments: str) -> str:
        flag = arguments.split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f" (did you mean {near[0]}?)" if near else ""


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


def version() -> str:
    """The installed version, as `--version` prints it."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return f"glm2-jax {installed('glm2-jax')}"
    except PackageNotFoundError:
        return "glm2-jax (not installed)"


_speaker: str | None = None  # set in a process that tells only errors, after this name


def only_errors(name: str) -> None:
    """From here on only errors are told, each line after `name`: another process tells the rest."""
    global _speaker
    _speaker = name


def note(text: str) -> None:
    """One line for the user that is not part of the answer: on stderr, escaped."""
    if _speaker is None:
        _tell(f"{escape_controls(text)}\n")


def print_path(path: str) -> None:
    """Prints a path on standard output: as it is for a program, escaped for a terminal."""
    print(escape_controls(path) if sys.stdout.isatty() else path)


def _complain(*lines: str) -> None:
    """Lines about an error: on stderr, escaped."""
    prefix = "" if _speaker is None else f"{_speaker}: "
    _tell(join_lines(prefix + line for line in lines) + "\n")


def _tell(text: str, stream: TextIO | None = None) -> None:
    """Writes at once to stderr, or to `stream`; the work goes on where nobody can read it."""
    with contextlib.suppress(OSError):
        print(text, end="", file=stream or sys.stderr, flush=True)


def run_main(
    main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Runs a command and exits with its code; expected errors become lines, not tracebacks.

    Args:
      main: takes the arguments without the program's name; returns an exit code or None for 0.
      argv: the arguments; default `sys.argv[1:]`.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a terminal that cannot show a character must not end the run
            reconfigure(errors="replace")
    code = _guarded(main, args)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # said already; without this Python would complain again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _open_streams() -> None:
    """Fills the places of closed standard streams (`>&-`), before a file of ours gets their number.

    Then nothing is read from stdin, what stdout is given is an error, and stderr is silent.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def _guarded(main: Callable[[list[str]], int | None], args: list[str]) -> int:
    try:
        try:
            code = main(args) or 0
        except SystemExit as ending:  # of the parser
            code = int(ending.code or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        note("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has left (`| head`)
        return EXIT_BROKEN_PIPE
    except Exception as error:
        return report(error, debug="--debug" in args)


def report(error: Exception, *, debug: bool = False) -> int:
    """Prints an error as one line of what, one of why, one of what to do; returns its exit code.

    An error that nobody expected keeps its traceback: it is a bug, and whoever mends it needs it.
    """
    from glm2_jax.errors import GLMError

    trace = "".join(traceback.format_exception(error)).splitlines()
    if debug:
        _complain(*trace)
    if isinstance(error, GLMError):
        _complain(*f"error: {error}".splitlines())
        return error.exit_code
    if is_out_of_memory(error):
        first_line = (str(error).splitlines() or ["the allocation failed"])[0]
        _complain("error: out of memory", first_line, "try a smaller --dtype, batch or length")
        return EXIT_DEVICE
    variable = named_variable(str(error), os.environ)
    if isinstance(error, (ValueError, RuntimeError, FloatingPointError)) and variable:
        value = os.environ[variable][:500]
        reason = str(error).splitlines()[0]
        _complain(f"error: jax cannot use {variable}={value}", reason, f"unset {variable}")
        return EXIT_DEVICE
    if isinstance(error, OSError):
        name = str(error.filename or "a standard stream or open file")[:500]
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space or write elsewhere" if full else "check the path and its rights"
        reason = error.strerror or str(error)
        _complain(f"error: {name} cannot be read or written", reason, fix)
        return EXIT_INPUT
    if not debug:
        _complain(*trace)
    _complain("unexpected error, please report it with the lines above")
    return 1


def named_variable(text: str, variables: Iterable[str]) -> str | None:
    """The environment variable of jax that an error of jax names: as it is, as "jax_...", as
    "jax.default_device" or "disable jit", or by what it disallows."""
    text = re.sub(r"Disallowed \S+ transfer", "transfer guard", text)
    for variable in variables:
        short = variable.removeprefix("JAX_").replace("_", "[ _]")
        start = "" if "_" in short else "JAX_"  # "platforms" alone may mean anything
        if re.match("JAX_|XLA_", variable) and re.search(
            rf"\b({start}|JAX_|XLA_){short}\b", text, re.IGNORECASE
        ):
            return variable
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out (jax's own error type is known only by its name)."""
    from_jax = type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError")
    return isinstance(error, MemoryError) or (from_jax and "RESOURCE_EXHAUSTED" in str(error))


def path_argument(text: str) -> str:
    """An argparse type for paths: an empty one, as an unset shell variable gives it, is refused,
    and so is a URL, with the lines of `convert.local`."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    refuse_url(text)
    return text


def size_argument(text: str) -> int:
    """An argparse type for sizes: "4GB", "500 MB", "1GiB", "123456". Returns bytes, at least 1."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 4GB or 500MB")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2] or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a size must be at least one byte")
    return size


def human_size(size: float) -> str:
    """12487168064 -> "12.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def cut_to_width(text: str, columns: int) -> str:
    """The beginning of a text that fits into so many columns of a terminal.

    East Asian wide characters take two, marks that combine with the one before take none.
    """
    for at, char in enumerate(text):
        if unicodedata.combining(char) or unicodedata.category(char) == "Cf":
            continue
        columns -= 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if columns < 0:
            return text[:at]
    return text


def _columns(terminal: TextIO) -> int:
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class Progress:
    """Progress with rate and ETA: one line that is rewritten on a terminal, plain lines elsewhere.

    Args:
      label: what is being done, e.g. "loading".
      total: how much there is to do.
      show: turns an amount into text, e.g. `human_size`.
      stream: where to write; default stderr.
      interval: seconds between two plain lines (a terminal is refreshed ten times a second).
      done: how much was there before; it has no part in the rate.
    """

    def __init__(
        self,
        label: str,
        total: float,
        *,
        show: Callable[[float], str] = lambda amount: f"{amount:.0f}",
        stream: TextIO | None = None,
        interval: float = 5.0,
        done: float = 0,
    ):
        self.label, self.total, self.show, self.before = label, total, show, done
        self.stream = sys.stderr if stream is None else stream
        silent = _speaker is not None
        self.terminal = self.stream.isatty() and not silent
        self.interval = math.inf if silent else 0.1 if self.terminal else interval
        self.start = self.last = time.monotonic()

    def __call__(self, done: float, more: str = "") -> None:
        """Says that `done` of `total` is finished; writes only when the interval has passed.

        Args:
          more: a figure to show beside the rate.
        """
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        rate = (done - self.before) / (now - self.start)
        line = f"{escape_controls(self.label)}: {self.show(done)} of {self.show(self.total)}"
        line += f", {self.show(rate)}/s, {escape_controls(more) + ', ' if more else ''}"
        line += f"{max(self.total - done, 0) / max(rate, 1e-9):.0f} s left"
        if self.terminal:  # a line that wraps could not be cleared
            line = cut_to_width(line, _columns(self.stream) - 1)
        _tell(f"\r\x1b[K{line}" if self.terminal else f"{line}\n", self.stream)

    def close(self) -> None:
        """Clears the line on a terminal; elsewhere the lines stay."""
        if self.terminal:
            _tell("\r\x1b[K", self.stream)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
