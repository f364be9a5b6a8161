"""Commands that are run in this process."""

import pytest

from glm2_jax.cli.main import run_main


def exit_code(main, *argv):
    """The exit code that a command ends with; arguments may be paths."""
    with pytest.raises(SystemExit) as caught:
        run_main(main, [str(x) for x in argv])
    return caught.value.code
