"""Opening a checkpoint for answering, and the devices to compute on."""

import os
import subprocess
import sys

import jax
import pytest

import infer
from convert import save_checkpoint
from glm2_jax import Tokenizer
from glm2_jax.errors import CheckpointError, DeviceError, UsageError
from glm2_jax.runtime import devices
from infer.engine import load
from tests.support.engine_toy import TOY, toy_engine, toy_params
from tests.support.sp_model import sp_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "toy"
    save_checkpoint(path, TOY, toy_params(), Tokenizer.from_bytes(sp_model()), source="test")
    return path


def test_load_gives_an_engine_that_answers(folder):
    engine = infer.load(folder, dtype="float32", device="cpu", max_length=64)
    assert (engine.max_length, engine.template) == (64, "chatglm2")
    assert engine.load_s > 0
    sampling = {"temperature": 0, "max_new_tokens": 5}
    assert engine.generate([[5, 6, 7]], **sampling) == toy_engine(max_length=64).generate(
        [[5, 6, 7]], **sampling
    )


def test_without_a_path_the_bundled_folder_is_opened(folder, monkeypatch):
    assert load.demo_folder().parent.name == "infer"
    monkeypatch.setattr(load, "demo_folder", lambda: folder)
    assert infer.load().config == TOY


def test_load_refuses_what_it_cannot_do(tmp_path, folder):
    with pytest.raises(CheckpointError):
        infer.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"npu(.|\n)*auto"):
        infer.load(folder, device="npu")
    with pytest.raises(UsageError, match="max_length"):
        infer.load(folder, max_length=0)
    with pytest.raises(UsageError, match="quantize"):
        infer.load(folder, quantize="int3")


def test_a_device_that_is_not_there_is_a_device_error():
    with pytest.raises(DeviceError, match="'tpu'"):
        devices.find_device("tpu")
    cpu = jax.devices("cpu")[0]
    assert devices.find_device("cpu") == devices.find_device(cpu) == cpu


def test_a_platform_that_is_not_there():
    code = "from infer.engine.load import find_device; find_device('auto')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert "DeviceError: no device 'auto' was found" in result.stderr
    assert "JAX_PLATFORMS=cuda restricts the choice" in result.stderr


def test_memory_that_does_not_suffice_while_loading(folder, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(load, "load_checkpoint", full)
    with pytest.raises(DeviceError, match="loading"):
        infer.load(folder)
