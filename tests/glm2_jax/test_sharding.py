"""Meshes as users write them, and what they refuse; no program is compiled."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from glm2_jax import (
    PRESETS,
    GLMConfig,
    UsageError,
    check_mesh,
    make_mesh,
    param_shapes,
    params_sharding,
    parse_mesh,
)
from glm2_jax.choices import FAMILIES
from glm2_jax.mesh import active_mesh, constrain, partition
from glm2_jax.quant import QTensor
from glm2_jax.schemes import SCHEMES

SIX = PRESETS["chatglm2-6b"]


def test_a_mesh_keeps_its_order_and_absent_axes_come_last():
    for text, sizes in (
        (" tensor = 4 , data=2", {"tensor": 4, "data": 2, "fsdp": 1}),
        ("fsdp=8", {"fsdp": 8, "data": 1, "tensor": 1}),
    ):
        assert list(parse_mesh(text).items()) == list(sizes.items())
    assert make_mesh({"tensor": 1}, jax.devices()[:1]).axis_names == ("tensor", "data", "fsdp")


def test_a_mesh_that_makes_no_sense_is_refused():
    for text, why in {
        "model=2": "'model' is not an axis: the axes are data, fsdp, tensor",
        "": "'' is not an axis",
        "data=2,data=4": "data is given twice",
        "data": "size of data must be a whole number of at least 1, got ''",
        "tensor=-1": "got '-1'",
    }.items():
        with pytest.raises(UsageError, match="is not valid") as caught:
            parse_mesh(text)
        assert why in caught.value.why and "data=2,tensor=4" in caught.value.fix
    with pytest.raises(UsageError, match="needs 16 devices(.|\n)*There are 8 devices") as caught:
        make_mesh(parse_mesh("data=2,tensor=8"), [None] * 8)
    assert "tensor=8 or data=2,tensor=4" in caught.value.fix


SMALL = GLMConfig(1, 96, 64, 20, 12, 4, 16, 64)


@pytest.mark.parametrize(
    ("config", "scheme", "sizes", "why", "fix"),
    [
        (SIX, None, {"tensor": 3}, "32 heads, an ffn of 13696 and a vocabulary of 65024",
         "Use tensor=1, 2, 4, 8, 16, 32."),
        (SIX, None, {"fsdp": 3, "data": 2}, "hidden size of 4096", "Use fsdp=1, 2, 4, 8, 16"),
        # Queries stay with their key heads, and two columns of int4 together.
        (SMALL, None, {"tensor": 6}, "a divisor of the 4 key/value heads", "Use tensor=1, 2, 4."),
        (SMALL, "int4-row", {"tensor": 4}, "an ffn of 20 / 2 (two columns share a byte)",
         "Use tensor=1, 2."),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_the_model_is_refused_with_sizes_that_do(
    config, scheme, sizes, why, fix
):
    with pytest.raises(UsageError, match="does not fit the model") as caught:
        check_mesh(config, sizes, scheme and SCHEMES[scheme])
    assert why in caught.value.why and caught.value.fix.startswith(fix)


def test_meshes_that_fit_the_model():
    for sizes in ({"tensor": 1}, {"tensor": 32, "fsdp": 4}, {"data": 3}):
        check_mesh(SIX, sizes)
        check_mesh(SIX, sizes, SCHEMES["int4"])
    check_mesh(SMALL, {"tensor": 4}, SCHEMES["int8"])


def test_an_axis_that_is_not_divided_stays_complete():
    mesh = {"data": 2, "fsdp": 1, "tensor": 4}
    assert tuple(partition("LBKSH", (28, 4, 2, 64, 128), mesh)) == (None, "data")
    assert tuple(partition("LBKSH", (28, 3, 4, 64, 128), mesh)) == (None, None, "tensor")


def test_without_a_mesh_or_on_a_foreign_one_nothing_is_constrained():
    x = jax.numpy.ones((4, 4))
    assert active_mesh() == {} and constrain(x, "B", None) is x
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("model",), (AxisType.Auto,))):
        assert active_mesh() == {} and constrain(x, "B", None) is x


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tree_of_places_is_that_of_the_params(family):
    ids = dict.fromkeys(("sop_token_id", "mask_token_id", "gmask_token_id"), 1)
    config, mesh = (
        dataclasses.replace(SMALL, family=family, **ids),
        make_mesh({}, jax.devices()[:1]),
    )
    shapes = jax.tree.structure(param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    assert jax.tree.structure(params_sharding(config, mesh)) == shapes


def test_biases_are_cut_like_the_rows_of_their_products():
    config, mesh = PRESETS["chatglm-6b"], AbstractMesh((2, 4), ("fsdp", "tensor"))
    places = params_sharding(config, mesh, scheme=SCHEMES["int8+embeddings"])
    layer = {name: tuple(getattr(x, "values", x).spec) for name, x in places["layers"].items()}
    assert layer["q_bias"] == layer["k_bias"] == (None, "tensor")
    assert layer["gate_up_bias"] == (None, None, "tensor") and layer["down"][-1] == "tensor"
    assert not any(any(spec) for name, spec in layer.items() if name in (
        "o_bias", "down_bias", "attn_norm", "attn_norm_bias", "mlp_norm", "mlp_norm_bias"
    ))  # fmt: skip
    assert "head" not in places and tuple(places["embed"].values.spec) == ("tensor", "fsdp")


def test_quantized_weights_and_lists_of_layers_have_places():
    mesh = make_mesh({}, jax.devices()[:1])
    places = params_sharding(SMALL, mesh, scheme=SCHEMES["int4+embeddings"], as_list=True)
    assert len(places["layers"]) == 1 and isinstance(places["layers"][0]["down"], QTensor)
    assert isinstance(places["head"], QTensor) and places["head"].bits == 4
