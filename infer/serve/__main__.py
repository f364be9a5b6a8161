"""`python -m infer.serve`: an HTTP server with the API of OpenAI, and a chat page."""

from collections.abc import Sequence
from importlib.util import find_spec

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import UsageError
from glm2_jax.extras import pip_install
from infer.serve.options import PROG, Settings, parser

_NEEDED = ("fastapi", "prometheus_client", "sse_starlette", "uvicorn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    settings = from_flags(Settings, parser().parse_args(argv))
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(
            f"{PROG} needs packages that are not installed: {', '.join(missing)}",
            fix=f"Install them: {pip_install('serve')}",
        )
    arguments.choose_platform(settings.choice.device)
    from infer.serve import run

    return run.run(settings)


if __name__ == "__main__":
    interrupt.run(main)
