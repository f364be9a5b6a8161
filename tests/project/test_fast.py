"""`pytest -m fast`: what it leaves out is there."""

from tests.conftest import SLOW
from tests.support.paths import ROOT


def test_the_slow_files_exist():
    assert [name for name in SLOW if not (ROOT / "tests" / f"{name}.py").exists()] == []
