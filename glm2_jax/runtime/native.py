"""The form "native" of products on a CPU: a kernel in C++, built on the user's machine on request.

The library is in the user's cache, under a name for its source, jaxlib, the compiler's flags and
the processor: another machine that shares the home folder does not load it. Nothing depends on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glm2_jax.errors import DeviceError
from glm2_jax.products import PRODUCTS, Form, Weight, add
from glm2_jax.quant import QTensor
from glm2_jax.runtime.compile_cache import user_cache
from glm2_jax.runtime.machine import processor, vector_units

VARIABLE = "GLM2_JAX_NATIVE"  # folder; "off" = none is built or loaded
SOURCE = Path(__file__).with_name("products.cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared")
NAME = "native"
_SECONDS = 600  # that a compiler may take


def build() -> Path:
    """Compile the kernel and return the library's path.

    It appears complete or not at all. DeviceError: there is no compiler, it fails, or the folder
    cannot be written.
    """
    path = library_path()
    if path is None:
        raise DeviceError(
            "The native kernel cannot be kept.",
            f"{VARIABLE} is off, or there is no home folder.",
            f"Set {VARIABLE} to a folder.",
        )
    compiler = next(
        filter(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))), ""
    )
    if not compiler:
        raise DeviceError(
            "The native kernel cannot be built.",
            "No C++ compiler was found (CXX, g++, clang++).",
            "Install g++ or clang++, or go on without it: every model runs without this kernel.",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".native-") as work:
            made = Path(work) / "products.so"
            command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE)]
            subprocess.run(
                [*command, "-o", str(made)],
                check=True,
                timeout=_SECONDS,
                capture_output=True,
                text=True,
                errors="replace",
            )
            os.replace(made, path)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        why = next((line for line in said if "error" in line), said[0] if said else "")
        raise DeviceError(
            "The native kernel cannot be built.",
            f"{compiler}: {why[:300]}",
            "Try another compiler with CXX=clang++, or go on without it.",
        ) from error
    return path


def library_path() -> Path | None:
    """Return where the library is, or would be; None = nowhere."""
    folder = None
    with contextlib.suppress(RuntimeError):  # no home folder
        folder = user_cache("native", VARIABLE)
    if folder is None:
        return None
    versions = version("jaxlib"), FLAGS, processor(), vector_units()
    parts = SOURCE.read_bytes(), versions
    return folder / f"products-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.so"


def load() -> None:
    """Make "native" one of `PRODUCTS` if its library was built; a broken one is a warning."""
    path = library_path()
    if path is None or not path.is_file() or NAME in PRODUCTS:
        return
    try:
        handler = ctypes.CDLL(str(path)).glm2_products
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"The native kernel {path} cannot be loaded ({error}). Delete the file, or build it "
            "again with: python -m infer.tune --build-native",
            stacklevel=2,
        )
        return
    target = f"glm2_jax_{path.stem}"  # compiled programs may be kept longer than a version of it
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    PRODUCTS[NAME] = Form(functools.partial(_multiply, target), _suits)


def _suits(platform: str, x: jax.Array, w: Weight) -> bool:
    """Return whether the kernel computes products of this kind."""
    known = (jnp.float32, jnp.bfloat16)
    if not isinstance(w, QTensor):
        return platform == "cpu" and x.dtype in known and w.dtype in known
    group = w.size // w.scale.size  # a step of a loop is up to 32 columns
    grouped = w.bits == 4 and group % 32 == 0
    return platform == "cpu" and x.dtype in known and (w.scale.ndim == 1 or grouped)


def _multiply(target: str, x: jax.Array, w: Weight, added: jax.Array | None = None) -> jax.Array:
    """Multiply [M, C] by [R, C]: float32 [M, R]."""
    values: Any = w
    scale, bits = jnp.zeros(0, jnp.float32), 0
    if isinstance(w, QTensor):
        values, scale, bits = w.values, w.scale.astype(jnp.float32), w.bits
    result = jax.ShapeDtypeStruct((x.shape[0], values.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(target, result, vmap_method="sequential")
    return add(call(x, values, scale, bits=bits), added)
