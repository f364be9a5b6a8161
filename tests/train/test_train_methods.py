"""What is trained and what comes of it, validation, and devices: on a tiny checkpoint."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from convert import load_checkpoint, open_folder
from convert.adapters.adapter import load_adapter
from glm2_jax import init_lora
from glm2_jax.errors import UsageError
from tests.support.checkpoints import save, tiny_config
from tests.support.training_data import alpaca, learned_of, open_rows
from train import full, lora, validation
from train.devices import Devices
from train.methods import AdapterMethod, FullMethod
from train.recipe import Recipe, parse

ONE = Devices(jax.devices()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(path, config=tiny_config(num_layers=1))
    return open_folder(path)


def recipe(command, *flags: str) -> Recipe:
    return command.make_recipe(parse(command.parser(), ["--data", "d", *flags]))


def quiet(done, total):
    pass


def test_an_adapter_is_trained_beside_a_frozen_base(folder, tmp_path):
    settings = recipe(lora, "--rank", "2", "--dtype", "float32", "--quantize-base", "int8")
    method = AdapterMethod(folder, settings, ONE, quiet)
    assert method.checkpoint.summary.quantization == "int8" and method.dtype is None
    assert method.num_trained == sum(x.size for x in jax.tree.leaves(method.trained))
    params, adapter = method.model(method.trained)
    assert params is method.base and adapter is method.trained
    changed = jax.tree.map(lambda x: x + 1, method.trained)
    assert method.write(tmp_path, changed) == tmp_path
    written = load_adapter(tmp_path, folder.config)
    jax.tree.map(np.testing.assert_array_equal, written.lora.layers, changed.layers)
    assert written.base == method.checkpoint.fingerprint


def test_a_new_adapter_of_dora_keeps_the_lengths_of_its_base(folder, tmp_path):
    flags = ["--rank", "2", "--dtype", "float32", "--dora"]
    method = AdapterMethod(folder, recipe(lora, *flags), ONE, quiet)
    _, adapter = method.model(method.trained)
    assert adapter is not None
    for part in "qkv":
        gain = adapter.layers["query_key_value"][f"gain_{part}"]
        np.testing.assert_allclose(gain, 1, rtol=1e-6)
    stored = method.trained.layers["query_key_value"]["magnitude_q"]
    weights = np.asarray(method.base["layers"][0]["q"])
    np.testing.assert_allclose(stored[0], np.linalg.norm(weights, axis=-1), rtol=1e-5)
    method.write(tmp_path / "dora", method.trained)
    start = ["--dtype", "float32", "--init-adapter", str(tmp_path / "dora")]
    further = AdapterMethod(folder, recipe(lora, *start, "--dora"), ONE, quiet)
    jax.tree.map(np.testing.assert_array_equal, further.trained.layers, method.trained.layers)
    assert further.num_trained == method.num_trained
    AdapterMethod(folder, recipe(lora, *flags[:-1]), ONE, quiet).write(
        tmp_path / "plain", init_lora(folder.config, jax.random.key(0), rank=2)
    )
    with pytest.raises(UsageError, match=r"--dora \(it has none\)"):
        AdapterMethod(
            folder, recipe(lora, *start[:-1], str(tmp_path / "plain"), "--dora"), ONE, quiet
        )


def test_all_parameters_are_trained_in_float32(folder, tmp_path):
    method = FullMethod(folder, recipe(full, "--dtype", "bfloat16"), ONE, quiet)
    assert method.base is None and method.num_trained == folder.config.num_params
    assert {x.dtype for x in jax.tree.leaves(method.trained)} == {np.dtype("float32")}
    params, adapter = method.model(method.trained)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"} and adapter is None
    result = method.write(tmp_path, method.trained)
    again = load_checkpoint(result, dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, again, method.trained)


@dataclass
class Checkpoint:
    params: Any = None
    config: Any = None


@dataclass
class Echo:
    """An engine that answers with the question and its parameters."""

    checkpoint: Checkpoint

    def generate(self, prompts, **options):
        return [SimpleNamespace(text=f"{x}\n{self.checkpoint.params}") for x in prompts]


def test_an_evaluation_is_the_mean_over_learned_tokens_and_answers(tmp_path, monkeypatch, capsys):
    def loss_of(params, lora, batch):
        return (batch.tokens * batch.learned).sum() * params, batch.learned.sum()

    monkeypatch.setattr(validation, "make_eval", lambda config: loss_of)
    monkeypatch.setattr(validation, "Engine", Echo)
    rows = [alpaca(f"Q{n}" * (n + 1), "好" * (n + 1)) for n in range(5)]
    sets = {
        "validation": open_rows(tmp_path / "a", rows),
        "guard": open_rows(tmp_path / "b", rows[:2]),
    }
    method: Any = SimpleNamespace(checkpoint=Checkpoint(), model=lambda trained: (trained, None))
    evaluate = validation.make_evaluation(method, sets, ["a", "b"], 2, ONE)
    assert evaluate is not None
    found = evaluate((1e-3, None))
    assert capsys.readouterr().err == "  a -> a 0.001\n  b -> b 0.001\n"
    for name, dataset in sets.items():
        learned = [i for n in range(len(dataset)) for i in learned_of(dataset.sample(n))]
        assert found[name]["loss"] == pytest.approx(1e-3 * np.mean(learned))
        assert found[name]["perplexity"] == pytest.approx(math.exp(found[name]["loss"]))
    assert math.isnan(evaluate((math.nan, None))["guard"]["loss"])
    assert evaluate((1e9, None))["guard"]["perplexity"] == math.inf
