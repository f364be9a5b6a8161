"""How every command runs: answers go to stdout, all else to stderr, and errors become lines and
exit codes: 0 success, 1 unexpected, 2 usage, 3 bad input or data, 4 model or checkpoint, 5 out of
memory or device, 130 interrupted, 141 output closed, 143 terminated.
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from glm2_jax.cli.messages import complain, note
from glm2_jax.errors import GLMError
from glm2_jax.escape import escape_controls

EXIT_USAGE, EXIT_INPUT, EXIT_DEVICE = 2, 3, 5
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 130, 141, 143


def version() -> str:
    """Return the installed version, as `--version` prints it."""
    from importlib import metadata

    try:
        return f"glm2-jax {metadata.version('glm2-jax')}"
    except metadata.PackageNotFoundError:
        return "glm2-jax (not installed)"


def print_path(path: str) -> None:
    """Print a path on standard output: as it is for a program, escaped for a terminal."""
    print(escape_controls(path) if sys.stdout.isatty() else path)


def run_main(
    main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run a command, with `sys.argv[1:]` by default, and exit with its code (None = 0).

    Expected errors become lines, not tracebacks.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # whatever the locale says (LANG=C, old Windows)
            reconfigure(encoding="utf-8", errors="replace")
    code = _guarded(main, args)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # reported already; without this Python would report it again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _open_streams() -> None:
    """Replace closed standard streams (`>&-`), before another file gets their number.

    Then stdin is empty, writing to stdout is an error, and stderr is silent.
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
    except BrokenPipeError:  # the reader of our output is gone (`| head`)
        return EXIT_BROKEN_PIPE
    except Exception as error:
        return report(error, debug="--debug" in args)


def report(error: Exception, *, debug: bool = False) -> int:
    """Print an error as what, why and what to do, a line each; return its exit code.

    An unexpected error is a bug and keeps its traceback.
    """
    trace = "".join(traceback.format_exception(error)).splitlines()
    if debug:
        complain(*trace)
    if isinstance(error, GLMError):
        complain(*f"error: {error}".splitlines())
        return error.exit_code
    reason = (str(error).splitlines() or ["the allocation failed"])[0]
    if is_out_of_memory(error):
        complain("error: out of memory", reason, "try a smaller --dtype, batch or length")
        return EXIT_DEVICE
    variable = named_variable(str(error), os.environ)
    if isinstance(error, (ValueError, RuntimeError, FloatingPointError)) and variable:
        value = os.environ[variable][:500]
        complain(f"error: jax cannot use {variable}={value}", reason, f"unset {variable}")
        return EXIT_DEVICE
    if isinstance(error, OSError):
        name = str(error.filename or "a standard stream or open file")[:500]
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space or write elsewhere" if full else "check the path and its permissions"
        complain(f"error: {name} cannot be read or written", error.strerror or str(error), fix)
        return EXIT_INPUT
    if not debug:
        complain(*trace)
    complain("unexpected error, please report it with the lines above")
    return 1


def named_variable(text: str, variables: Iterable[str]) -> str | None:
    """Return the environment variable of jax that an error of jax is about: named as it is, as
    "jax_...", "jax.default_device" or "disable jit", or by what it disallows."""
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
    """Return whether host or device memory ran out; jax's own error type is known by its name."""
    from_jax = type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError")
    return isinstance(error, MemoryError) or (from_jax and "RESOURCE_EXHAUSTED" in str(error))
