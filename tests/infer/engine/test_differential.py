"""Random models, answered in every way: the same greedy tokens."""

import os

import pytest

from tests.support.mesh_process import run

# 40 architectures of 5 models each take an hour of one core: GLM2_JAX_DIFFERENTIAL="40 5".
# Eight models of architecture 10, a CodeGeeX2, and one of a ChatGLM-6B on meshes with tensor=2 and
# with fsdp=2,tensor=2 among others. 21 is a GLM, 7 a GLM-4, 38 a GLM-4-0414.
MODELS = ("1 8 10", "1 1 33")
ASKED = os.environ.get("GLM2_JAX_DIFFERENTIAL")
WAYS = {
    "stacked", "list", "alone", "other rows", "complete", "chunks", "speculate", "growth",
    "blocks", "mesh", "int8 stacked", "int8 list", "int8 mesh", "int4 stacked", "int4 list",
    "int4 mesh",
}  # fmt: skip


@pytest.mark.parametrize("models", [ASKED] if ASKED else MODELS)
def test_every_way_gives_the_same_greedy_tokens(models):
    found = run("tests.support.differential", *models.split(), timeout=4 * 3600)
    assert {way.replace("int4-row", "int4") for way in found["ways"]} >= WAYS
    for way, outcomes in found["ways"].items():
        assert "differs" not in outcomes, found["differing"]
        assert outcomes["same"] > 20 * outcomes.get("tie", 0), (way, outcomes)
    assert found["ways"]["stacked"]["same"] > 3 * found["models"]  # each answers four prompts
