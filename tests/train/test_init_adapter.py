"""`python -m train.lora --init-adapter`: the adapter keeps its shape, flags do not change it."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from glm2_jax.errors import CheckpointError, UsageError
from tests.convert.adapters.test_adapter import changed, trained
from tests.convert.adapters.test_adapter_layouts import native_folder
from tests.support.checkpoints import save, tiny_config
from tests.support.training_data import alpaca, write_rows
from train import lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TINY = tiny_config(num_layers=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(path, config=TINY)
    return path


@pytest.fixture
def train(tmp_path, model):
    rows = write_rows(tmp_path / "d.jsonl", [alpaca()])

    def run(adapter, *flags):
        return lora.main([
            "--model", str(model), "--data", str(rows), "--output", str(tmp_path / "out"),
            "--steps", "2", "--lr", "1e-2", "--warmup", "0", "--batch-size", "1", "--dropout", "0",
            "--compile-cache", "off", "--device", "cpu", "--init-adapter", str(adapter), *flags,
        ])  # fmt: skip

    return run


def test_an_adapter_of_peft_keeps_its_shape_and_flags_may_not_contradict_it(
    tmp_path, train, capsys
):
    q_v = native_folder(
        tmp_path / "q_v", TINY, ("q_proj", "v_proj"), ranks={"v_proj": 3}, only=(0, 2),
        layers_to_transform=[0, 2],
    )  # fmt: skip
    for flags, said in (
        ("--rank 2", "--rank 2 (it has 2, 3)"),
        ("--alpha 32", "--alpha 32 (it has 6)"),
        ("--target attn", "--target attn (it has q_proj, v_proj in 2 layers)"),
        ("--rank 8 --rslora", "--rank 8 (it has 2, 3); --rslora (it has none)"),
    ):
        with pytest.raises(UsageError) as caught:
            train(q_v, *flags.split())
        assert said in caught.value.what and "--init-adapter" in caught.value.fix
        assert not (tmp_path / "out" / "recipe.yml").exists()
    assert train(q_v, "--alpha", "6") == 0
    before, after = (load_file(x / WEIGHTS) for x in (q_v, tmp_path / "out"))
    assert after.keys() == before.keys() and len(after) == 2 * 2 * 2
    assert all(after[name].shape == x.shape for name, x in before.items())
    assert not any(np.array_equal(after[name], x) for name, x in before.items())
    parameters = sum(x.size for x in after.values())
    assert f"training {parameters:,} of" in capsys.readouterr().err
    one, other = (json.loads((x / CONFIG).read_text()) for x in (q_v, tmp_path / "out"))
    for key in ("target_modules", "layers_to_transform", "r", "lora_alpha", "rank_pattern"):
        assert other[key] == one[key]
    found = load_adapter(tmp_path / "out", TINY).lora.layers["query_key_value"]
    assert not found["k"].any() and not found["q"][..., 2:].any() and not found["v"][..., :2].any()
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yml").read_text())
    assert recipe["alpha"] == 6 and not {"rank", "target", "rslora"} & recipe.keys()


class Reached(Exception):
    """The flags were accepted."""


@pytest.fixture
def until_loaded(monkeypatch):
    def load(*args, **kwargs):
        raise Reached

    monkeypatch.setattr("train.methods.load_checkpoint", load)


@pytest.mark.parametrize("layout", ["chatglm", "glm"])
def test_flags_that_agree_with_an_adapter(tmp_path, train, until_loaded, layout):
    save_adapter(tmp_path / "a", Adapter(trained(TINY), rslora=True), layout=layout)
    targets = "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"
    with pytest.raises(Reached):
        train(tmp_path / "a", "--rank", "4", "--alpha", "4", "--rslora", "--target", targets)


@pytest.mark.parametrize("change", [{"base_fingerprint": "0" * 64}, {"template": "chatglm3"}])
def test_an_adapter_of_another_base_can_be_forced(tmp_path, train, until_loaded, change):
    save_adapter(tmp_path / "a", Adapter(trained(TINY)))
    changed(tmp_path / "a", lambda extras: extras.update(change), "glm2_jax_adapter.json")
    with pytest.raises(CheckpointError, match="--force-adapter"):
        train(tmp_path / "a")
    with pytest.raises(Reached):
        train(tmp_path / "a", "--force-adapter")
