"""The native kernel: built on request, right for every kind of weight, and never needed."""

import os
import platform
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import forms
from glm2_jax.errors import DeviceError
from glm2_jax.forms import Forms
from glm2_jax.linear import einsum
from glm2_jax.products import PRODUCTS, candidates, describe, usual_form
from glm2_jax.quant import QTensor, dequantize, quantize
from glm2_jax.runtime import native
from glm2_jax.schemes import SCHEMES
from infer.memory.precision import Precision
from infer.tuning import store
from infer.tuning.measure import Tuned
from tests.support.toy import TOY

COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs g++ or clang++")
X86 = platform.machine() == "x86_64"
# For the processor of this machine, and for an older one.
PROCESSORS = ("native", "x86-64-v3") if X86 else ("native",)
KINDS = ("float32", "bfloat16", "int8", "int4-row", "int4")


@pytest.fixture(scope="module", params=PROCESSORS)
def kernel(request, tmp_path_factory):
    """The kernel, built for one kind of processor; "native" is a form until the end."""
    if not COMPILER:
        pytest.skip("needs g++ or clang++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.VARIABLE, str(tmp_path_factory.mktemp("native")))
        flags = [f for f in native.FLAGS if not f.startswith(("-march", "-O"))]
        patch.setattr(native, "FLAGS", (*flags, "-O1", f"-march={request.param}"))
        path = native.build()
        native.load()
        yield path
        PRODUCTS.pop(native.NAME, None)


def weight(kind, rows, columns):
    matrix = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    if kind not in SCHEMES:
        return jnp.asarray(matrix, kind)
    values, scale = quantize(matrix, SCHEMES[kind])
    return QTensor(jnp.asarray(values), jnp.asarray(scale), SCHEMES[kind].bits)


def exact(x, w, change=lambda array: array):
    """The product in float64, of changed arrays."""
    full = dequantize(w, 1) if isinstance(w, QTensor) else w
    return change(np.asarray(x, np.float64)) @ change(np.asarray(full, np.float64)).T


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_exact_up_to_rounding(kernel, kind):
    """Few and many rows; columns that fill no vector; rows for several threads; odd groups."""
    shapes = [(1, 384), (37, 384)] if kind == "int4" else [(1, 2), (37, 202), (700, 1030)]
    for rows, columns in shapes:
        w = weight(kind, rows, columns)
        for count in (1, 7, 8, 33):
            normal = np.random.default_rng(count).standard_normal((count, columns))
            for x in (jnp.asarray(normal, dtype) for dtype in ("float32", "bfloat16")):
                assert native.NAME in candidates("cpu", x, w)
                assert usual_form("cpu", x, w) != native.NAME
                result = PRODUCTS[native.NAME].compute(x, w, None)
                assert (result.shape, result.dtype) == ((count, rows), jnp.float32)
                error = np.abs(result - exact(x, w))
                assert (error <= 1e-6 * exact(x, w, np.abs)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kernel, kind):
    w = weight(kind, 3, 128)
    for dtype in (jnp.float32, jnp.bfloat16):
        for value in (jnp.nan, jnp.inf):
            for place in (0, 77, 127):
                x = jnp.ones((9, 128), dtype).at[4, place].set(value)
                result = np.asarray(PRODUCTS[native.NAME].compute(x, w, None))
                finite = np.isfinite(result)
                assert not finite[4].any() and np.delete(finite, 4, 0).all()


def test_other_products_are_left_to_other_forms(kernel):
    x = jnp.ones((1, 48))
    grouped = weight("int4", 3, 48)  # in groups of 16 columns
    for activations, w in ((x, grouped), (x.astype(jnp.float16), weight("int8", 3, 48))):
        assert native.NAME not in candidates("cpu", activations, w)
    assert native.NAME not in candidates("gpu", x, weight("int8", 3, 48))


def test_gradients_and_added_values_are_those_of_the_dot(kernel):
    x, w = jnp.linspace(-1, 1, 3 * 64).reshape(3, 64), weight("float32", 5, 64)
    added = jnp.ones((3, 5))

    values = []
    for form in (native.NAME, "dot"):

        def loss(x, w, added):
            return jnp.sum(einsum("MC,RC->MR", x, w, added) ** 2)

        with forms.using(Forms(((describe(x, w), form),))):
            program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
            assert ("ffi_call" in str(jax.make_jaxpr(loss)(x, w, added))) == (form != "dot")
            values.append(jax.tree.leaves(program(x, w, added)))
            assert jnp.array_equal(einsum("MC,RC->MR", x, w, 0 * added), einsum("MC,RC->MR", x, w))
    for ours, theirs in zip(*values, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_choice_of_it_counts_only_where_it_is(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    device, precision = jax.devices("cpu")[0], Precision("float32", "int8")
    key = store.key_of(TOY, precision, device)
    assert native.NAME in key["forms"]
    x, w = jnp.ones((1, 48)), weight("int8", 64, 48)
    path = store.keep(key, Tuned(Forms(((describe(x, w), native.NAME),)), (1,)))
    found = store.find(key)
    assert found is not None and found.forms.of_product(describe(x, w)) == native.NAME
    with monkeypatch.context() as gone:
        gone.setenv(native.VARIABLE, str(tmp_path / "empty"))
        gone.delitem(PRODUCTS, native.NAME)
        other = store.key_of(TOY, precision, device)
        assert native.NAME not in other["forms"] and store.find(other) is None
        assert path is not None and store.find(key) is None  # a form that is not known here
    assert store.find(key) == found


@needs_compiler
def test_two_processes_may_build_at_once(tmp_path):
    """With a compiler that waits for the other one."""
    script = tmp_path / "compiler"
    script.write_text(
        f"#!/bin/sh\ntouch {tmp_path}/$$.started\n"
        f"for i in $(seq 600); do [ $(ls {tmp_path} | grep -c started) = 2 ] && break; "
        'sleep 0.1; done\nfor last; do true; done; echo library > "$last"\n'
    )
    script.chmod(0o700)
    folder = tmp_path / "kept"
    env = os.environ | {"CXX": str(script), native.VARIABLE: str(folder)}
    code = "from glm2_jax.runtime import native; print(native.build())"
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (path,) = folder.iterdir()
    assert said == {str(path)} and path.read_text() == "library\n"


def test_a_broken_library_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv(native.VARIABLE, str(tmp_path))
    path = native.library_path()
    assert path is not None
    path.write_text("library")
    monkeypatch.delitem(PRODUCTS, native.NAME, raising=False)
    with pytest.warns(UserWarning, match="cannot be loaded.*--build-native"):
        native.load()
    assert native.NAME not in PRODUCTS
    path.unlink()
    native.load()  # without a library nothing is said


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    monkeypatch.setenv(native.VARIABLE, str(folder))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="No C.. compiler was found"):
        native.build()
    fails = tmp_path / "fails"
    fails.write_text('#!/bin/sh\necho "products.cc:1: error: no such header" >&2\nexit 1\n')
    fails.chmod(0o700)
    monkeypatch.setenv("CXX", str(fails))
    with pytest.raises(DeviceError, match="error: no such header"):
        native.build()
    assert list(folder.iterdir()) == []
    monkeypatch.setenv(native.VARIABLE, "off")
    with pytest.raises(DeviceError, match="is off"):
        native.build()
