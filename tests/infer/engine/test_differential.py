"""Random models, answered in every way: the same greedy tokens."""

import os

from tests.support.mesh_process import run

# 40 architectures of 5 models each take an hour of one core: GLM2_JAX_DIFFERENTIAL="40 5".
MODELS = os.environ.get("GLM2_JAX_DIFFERENTIAL", "1 8 10")  # 8 of architecture 10
WAYS = {
    "stacked", "list", "alone", "other rows", "complete", "chunks", "speculate", "growth",
    "blocks", "mesh", "int8 stacked", "int8 list", "int8 mesh", "int4 stacked", "int4 list",
    "int4 mesh",
}  # fmt: skip


def test_every_way_gives_the_same_greedy_tokens():
    found = run("tests.support.differential", *MODELS.split(), timeout=4 * 3600)
    assert found["ways"].keys() >= WAYS
    for way, outcomes in found["ways"].items():
        assert "differs" not in outcomes, found["differing"]
        assert outcomes["same"] > 20 * outcomes.get("tie", 0), (way, outcomes)
    assert found["ways"]["stacked"]["same"] > 3 * found["models"]  # each answers four prompts
