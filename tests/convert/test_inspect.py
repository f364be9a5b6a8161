"""What `convert.inspect` shows of a folder."""

import pytest

from convert import inspect
from tests.support.family_folders import random_folder
from tests.support.paths import ROOT


def test_the_demo():
    table = inspect.as_table(inspect.describe(str(ROOT / "infer/demo")))
    assert "\nrope          plain\n" in table


@pytest.mark.parametrize(
    ("family", "rope"), [("glm", "none: learned"), ("chatglm", "two positions"), ("glm4", "base, ")]
)
def test_the_positions_of_a_family(tmp_path, family, rope):
    table = inspect.as_table(inspect.describe(str(random_folder(family, tmp_path))))
    assert f"\nrope          {rope}" in table
