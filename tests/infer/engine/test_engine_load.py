"""Opening a checkpoint for answering, and the devices to compute on."""

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


def test_load_gives_an_engine_that_answers(folder, monkeypatch):
    engine = infer.load(folder, dtype="float32", device="cpu", max_length=64)
    assert (engine.max_length, engine.template) == (64, "chatglm2")
    assert engine.load_s > 0
    sampling = {"temperature": 0, "max_new_tokens": 5}
    toy = toy_engine(max_length=64).generate([[5, 6, 7]], **sampling)
    assert engine.generate([[5, 6, 7]], **sampling) == toy
    assert load.demo_folder().parent.name == "infer"
    monkeypatch.setattr(load, "demo_folder", lambda: folder)
    assert infer.load().config == TOY


def test_load_refuses_what_it_cannot_do(tmp_path, folder, monkeypatch):
    with pytest.raises(CheckpointError):
        infer.load(tmp_path / "nothing")
    for name, bad, words in (
        ("device", "npu", r"npu(.|\n)*auto"),
        ("max_length", 0, "max_length"),
        ("quantize", "int3", "quantize"),
    ):
        with pytest.raises(UsageError, match=words):
            infer.load(folder, **{name: bad})

    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(load, "load_checkpoint", full)
    with pytest.raises(DeviceError, match="loading"):
        infer.load(folder)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(DeviceError, match="'tpu'(.|\n)*JAX_PLATFORMS=cuda restricts the choice"):
        devices.find_device("tpu")
    cpu = jax.devices("cpu")[0]
    assert devices.find_device("cpu") == devices.find_device(cpu) == cpu
