"""P-Tuning v2: ten steps compared with torch, and `python -m train.prefix` to its result."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_checkpoint, open_folder
from convert.adapters.prefix import attach_prefix, encode, init_encoder, load_prefix, save_prefix
from glm2_jax import PRESETS, GLMConfig
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.prefix import Prefix, of_layer
from tests.support.checkpoints import save, tiny_config
from tests.support.peft_oracle import torch_oracle
from tests.support.prefixes import START
from tests.support.toy import toy_params
from tests.support.training_data import alpaca, write_rows
from tests.train.test_train_peft import SMALL, ours, theirs
from train import memory, prefix
from train.run_folder.log import read_log

P = 5


def official(torch, config: GLMConfig, oracle, tensors):
    """The official encoder of a prefix in torch, with the model that it is trained with."""
    D, width = config.hidden_size, 2 * config.num_layers * config.num_kv_heads * config.head_dim
    nn = torch.nn

    class Official(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(P, width)
            if len(tensors) > 1:
                self.trans = nn.Sequential(nn.Linear(width, D), nn.Tanh(), nn.Linear(D, width))
            names = {name.removeprefix(START): torch.tensor(x) for name, x in tensors.items()}
            self.load_state_dict(names, strict=True)

        def forward(self, input_ids):
            past = self.embedding(torch.arange(P))
            past = self.trans(past) if len(tensors) > 1 else past
            past = past.view(P, 2 * config.num_layers, config.num_kv_heads, config.head_dim)
            oracle.prefix = past.permute(1, 2, 0, 3).unflatten(0, (-1, 2)).transpose(0, 1)
            return oracle(input_ids)

    return Official()


@pytest.mark.parametrize("projection", [False, True])
def test_ten_steps_are_those_of_torch(tmp_path, projection):
    torch, oracle = torch_oracle(SMALL, toy_params(SMALL))
    oracle.requires_grad_(False)
    init = jax.jit(partial(init_encoder, SMALL, length=P, projection=projection))
    encoder = jax.tree.map(np.asarray, init(jax.random.key(2)))
    save_prefix(tmp_path, SMALL, encoder)
    started = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    model = official(torch, SMALL, oracle, {name: x.numpy() for name, x in started.items()})
    losses, norms = theirs(torch, model, lr=2e-2, decay=0)
    make = partial(encode, SMALL)
    found = ours(SMALL, toy_params(SMALL), encoder, make, lr=2e-2, decay=0)
    print(f"losses differ by {np.abs(np.subtract(found[0], losses)).max():.1e}")
    np.testing.assert_allclose(found[0], losses, atol=1e-4)
    np.testing.assert_allclose(found[1], norms, rtol=1e-3)
    save_prefix(tmp_path, SMALL, found[2])
    ended = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert list(ended) == [START + name for name in model.state_dict()]
    for name, x in model.state_dict().items():
        np.testing.assert_allclose(ended[START + name], x, atol=2e-3)
        assert float(abs(started[START + name] - x).mean()) > 0.02
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"]) == (P, projection)
    assert GLMConfig.from_hf(config) == SMALL
    read, made = load_prefix(tmp_path, SMALL), jax.jit(make)(found[2])
    np.testing.assert_allclose(read.k, made.k, atol=1e-5)
    np.testing.assert_allclose(read.v, made.v, atol=1e-5)
    with pytest.raises(CheckpointError, match="NaN"):
        save_prefix(tmp_path, SMALL, {"embedding": np.full((P, 2), np.nan)})


def test_the_encoder_of_chatglm_6b_reads_a_vector_of_the_hidden_size():
    config = tiny_config(family="chatglm", num_kv_heads=4)
    made = jax.eval_shape(lambda: init_encoder(config, jax.random.key(0), P, projection=True))
    width = 2 * config.num_layers * 4 * config.head_dim
    assert made["embedding"].shape == (P, config.hidden_size)
    assert made["up"].shape == (width, config.hidden_size)
    assert jax.eval_shape(partial(encode, config), made).k.shape == (2, P, 4, config.head_dim)


def test_every_row_drops_other_elements():
    one = Prefix(jnp.ones((2, 50, 2, 8)), jnp.ones((2, 50, 2, 8)), dropout=0.1)
    k, v = of_layer(one, 1, 2, jnp.float32, jax.random.key(0))
    assert {float(x) for x in np.unique(k)} == {0.0, np.float32(1 / 0.9)}
    assert abs(k.mean() - 1) < 0.05 and (k[0] != k[1]).any() and (k != v).any()
    assert (of_layer(one, 1, 2, jnp.float32)[0] == 1).all()


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save(path, config=tiny_config(num_layers=1))
    rows = [alpaca(f"{i} 号茶叫什么", f"它叫青山{i}号。") for i in range(8)]
    data = write_rows(path.parent / f"{path.name}.jsonl", rows)
    return ["--model", str(path), "--data", str(data), "--max-length", "64", "--batch-size", "2",
            "--grad-accum", "2", "--pre-seq-len", "3", "--quantize-base", "int8",
            "--compile-cache", "off", "--log-every", "1", "--no-grad-checkpoint"]  # fmt: skip


def test_a_run_resumes_and_its_prefix_is_read(flags, tmp_path, capsys):
    out, data = tmp_path / "a", flags[3]
    more = ["--steps", "4", "--save-every", "2", "--val-data", data, "--output", str(out)]
    assert prefix.main([*flags, *more]) == 0
    assert "training 96 of" in capsys.readouterr().err
    kept = (out / "pytorch_model.bin").read_bytes()
    lines = read_log(out / "log.jsonl")
    seen = [x["loss"] for x in lines if x["split"] == "validation"]
    assert seen[1] < seen[0]
    folder = open_folder(flags[1])
    base = load_checkpoint(flags[1], quantize="int8")
    before = attach_prefix(base, load_prefix(out, folder.config))
    assert before.notes[-1].endswith("3 tokens (P-Tuning v2)")

    shutil.rmtree(out / "state" / "4")
    (out / "pytorch_model.bin").unlink()
    assert prefix.main([*flags, *more, "--resume", "auto"]) == 0
    assert "resuming after step 2 of 4" in capsys.readouterr().err
    assert (out / "pytorch_model.bin").read_bytes() == kept
    with pytest.raises(UsageError, match="--pre-seq-len was 3 and is 4") as refusal:
        prefix.main([*flags, *more, "--resume", "auto", "--pre-seq-len", "4"])
    assert "start from its result" not in refusal.value.fix


def test_what_cannot_be_trained(flags, tmp_path):
    for words, said in (
        ("--pre-seq-len 257", "--pre-seq-len must be at most 256, got 257"),
        ("--dropout 1", "The dropout rate"),
    ):
        with pytest.raises(UsageError, match=said):
            prefix.main([*flags, "--output", str(tmp_path / "a"), *words.split()])


def test_the_official_recipe_is_the_default(capsys):
    args = ["--dry-run", "--model", "chatglm2-6b", "--device", "3090", "--max-length", "193"]
    assert prefix.main([*args, "--grad-checkpoint", "--quantize-base", "int4"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "a prefix of 128 tokens" in text and "1 row of 193 tokens" in text
    assert "16 micro-batches per step" in text
    sizes = [memory.NewPrefix(128, projection, 0.1) for projection in (False, True)]
    found = [memory.abstract_adapter(PRESETS["chatglm2-6b"], size) for size in sizes]
    assert [sum(x.size for x in one.values()) for one in found] == [1_835_008, 119_293_952]
    training = prefix.make_recipe(prefix.parser().parse_args(["--data", "d"])).training
    assert (training.lr, training.steps, training.schedule, training.warmup) == (
        2e-2, 3000, "linear", 0,
    )  # fmt: skip
    epochs = prefix.make_recipe(prefix.parser().parse_args(["--data", "d", "--epochs", "2"]))
    assert epochs.training.steps is None
