"""Quantized weights: the published packing, the definition of the scales, and the products."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import KVCache, compiler_options, last_logits
from glm2_jax.errors import CheckpointError
from glm2_jax.model import unstack_layers
from glm2_jax.products import PRODUCTS, candidates, in_usual_form
from glm2_jax.quant import QTensor, dequantize, pack_int4, quantize, unpack_int4
from glm2_jax.schemes import SCHEMES
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params
from tests.support.shared_data import shared_path
from tests.support.toy import (
    TOY,
    jit_forward,
    quantized,
    random_tokens,
    toy_params,
)

FORMS = ("int8", "int8-g128", "int4-row", "int4", "int4-g32")  # the others differ in sizes only


def small_weight(scheme, rows=24, columns=192, seed=0):
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    values, scale = quantize(matrix, SCHEMES[scheme])
    return matrix, QTensor(jnp.asarray(values), jnp.asarray(scale), SCHEMES[scheme].bits)


def test_packing():
    # 5, 2 -> 0x52; 0, -4 -> 0x0c; -8, -7 -> 0x89
    integers = np.array([[5, 2, 0, -4, -8, -7]], np.int8)
    assert pack_int4(integers).view(np.uint8).tolist() == [[0x52, 0x0C, 0x89]]
    pairs = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)), -1).astype(np.int8)
    np.testing.assert_array_equal(unpack_int4(pack_int4(pairs)), pairs)
    weight = QTensor(jnp.asarray(pack_int4(pairs)), jnp.ones(pairs.shape[:2]), 4)
    np.testing.assert_array_equal(dequantize(weight, 2), pairs)
    with pytest.raises(CheckpointError, match="3 columns"):
        pack_int4(np.zeros((2, 3), np.int8))

    # And the packing of the published kernel.
    case = json.loads(shared_path("reference/int4_pack_case.json").read_text(encoding="utf-8"))
    packed = np.array(case["packed_int8"], np.int8)
    np.testing.assert_array_equal(pack_int4(np.array(case["q"], np.int8)), packed)
    weight = QTensor(jnp.asarray(packed), jnp.asarray(case["scale"], jnp.float32), 4)
    np.testing.assert_allclose(dequantize(weight, 1), case["dequant"], rtol=1e-6)


def test_scales_by_hand():
    matrix = np.array([[127.0, -64.5, 0.5, 1.5], [0, 0, 0, 0]], np.float32)
    values, scale = quantize(matrix, SCHEMES["int8"])
    assert scale.tolist() == [1, 1] and values.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0]]
    row = np.tile(np.array([14.0, 3, -7, 1], np.float32), 32)  # a group of 128 columns
    values, scale = quantize(np.concatenate([row, row / 20])[None], SCHEMES["int4"])
    np.testing.assert_allclose(scale, [[2, 0.1]])
    # 3 / 2 and 1 / 2 and -7 / 2 round to even
    assert unpack_int4(values)[0, :4].tolist() == [7, 2, -4, 0]
    tiny = np.array([[1e-45, 1.4e-44], [1e-40, -2e-40], [1e-30, -1e-32], [1e-20, 0]], np.float32)
    for scheme in ("int8", "int4"):  # rows of tiny numbers are zeros
        values, scale = quantize(tiny, SCHEMES[scheme])
        assert np.isfinite(scale).all() and (scale > 1e-30).all()
        weight = QTensor(jnp.asarray(values), jnp.asarray(scale), SCHEMES[scheme].bits)
        np.testing.assert_allclose(dequantize(weight, 1), tiny, rtol=0.15, atol=2e-30)


@pytest.mark.parametrize("form", ["plain", *FORMS])
def test_products_are_those_of_the_dequantized_weight(form, monkeypatch):
    matrix, weight = small_weight("int8" if form == "plain" else form)
    if form == "plain":
        weight, expected = jnp.asarray(matrix, jnp.float16), matrix.astype(np.float16)
    else:
        expected = np.asarray(dequantize(weight, 1))
        steps = np.repeat(weight.scale, matrix.shape[1] // weight.scale[0].size, -1)
        error = np.abs(expected - matrix)
        assert (error <= steps.reshape(len(matrix), -1) * 0.5001).all() and error.max() > 0
    looped = ("cpu", "tpu") if form.startswith("int4") else ("cpu",)
    for chunk in (2**19, 500):  # of 4608 elements: at once, and in 12 chunks
        monkeypatch.setattr("glm2_jax.products.CHUNK_ELEMENTS", chunk)
        for rows in (1, 2, 5):
            x = jax.random.normal(jax.random.key(1), (rows, 192))
            product = x @ expected.T.astype(np.float32)
            for platform in ("cpu", "gpu", "tpu"):
                compute = partial(in_usual_form, platform)
                if platform in looped and chunk == 500 and rows > 1:
                    assert "length=12" in str(jax.make_jaxpr(compute)(x, weight))
                for name in candidates(platform, x, weight):
                    by_name = PRODUCTS[name].compute(x, weight, None)
                    np.testing.assert_allclose(by_name, product, atol=2e-4, err_msg=name)
                half = compute(x.astype(jnp.bfloat16), weight)
                assert half.dtype == jnp.float32
                np.testing.assert_allclose(half, product, atol=0.05 * float(jnp.abs(product).max()))


@pytest.mark.parametrize("form", FORMS)
def test_products_of_one_row_by_slices_on_a_cpu(form, monkeypatch):
    """Slices that divide the columns and those that do not, groups of one slice and of several."""
    for slices, rows, columns in ((4, 24, 192), (4, 24, 640), (4, 24, 1056), (32, 512, 3424)):
        monkeypatch.setattr("glm2_jax.products.SLICES", slices)
        _, weight = small_weight(form, rows, columns)
        x = jax.random.normal(jax.random.key(1), (1, columns)).astype(jnp.bfloat16)
        compute = partial(in_usual_form, "cpu")
        program = jax.jit(compute, compiler_options=compiler_options("cpu"))
        compiled = program.lower(x, weight).compile()
        if rows == 512:  # it writes no converted weight
            assert "while" not in compiled.as_text()
            assert compiled.memory_analysis().temp_size_in_bytes < rows * columns / 4
        # Rounded to bfloat16, it is exact from there on.
        expected = np.asarray(x, np.float64) @ np.asarray(dequantize(weight, 1), np.float64).T
        np.testing.assert_allclose(compiled(x, weight), expected, atol=2e-4 * columns / 192)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_model_has_the_logits_of_the_dequantized_one(form):
    """As stacked layers, and as a list of them."""
    small, large = quantized(toy_params(), SCHEMES[form])
    tokens = random_tokens(2, 9)

    def run(params):
        return jit_forward(TOY, params, tokens, cache=KVCache.zeros(TOY, 2, 16, jnp.float32))

    reference, cache = run(large)
    for params in (small, unstack_layers(small), unstack_layers(large)):
        logits, other = run(params)
        np.testing.assert_allclose(logits, reference, atol=1e-4)
        np.testing.assert_allclose(other.k, cache.k, atol=1e-4)
        assert other.length.tolist() == [9, 9]
    assert not np.allclose(reference, run(toy_params())[0], atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_decode_never_holds_a_whole_float_weight(form):
    """Temporaries of a compiled step stay far below the float32 copy of the quantized weights."""
    config = dataclasses.replace(TOY, num_layers=4, hidden_size=512, ffn_hidden_size=2048)
    params = abstract_params(config, Precision("float32", form), stacked=False)
    abstract = jax.eval_shape(lambda: KVCache.zeros(config, 1, 16, jnp.float32))

    def step(params, tokens, cache):
        return last_logits(config, params, tokens, jnp.zeros(1, jnp.int32), cache=cache)

    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    options = compiler_options("cpu")
    jitted = jax.jit(step, donate_argnums=2, compiler_options=options)
    compiled = jitted.lower(params, tokens, abstract).compile()
    float_weights = 4 * 4 * 3 * 512 * 2048  # bytes of the feed-forward weights alone
    assert compiled.memory_analysis().temp_size_in_bytes < float_weights / 4
