"""Ten steps compared with the real PEFT library: same base, same new adapter, same rows, AdamW."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import export_folder, load_checkpoint, open_folder
from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from glm2_jax import init_lora
from tests.support.checkpoints import random_params, save, tiny_config
from tests.support.peft_oracle import oracle_of
from tests.support.toy import TOY, toy_params
from train.data.batch import Batch
from train.optim import Numbers, make_schedule
from train.step import init_state, make_step

SMALL = dataclasses.replace(TOY, num_layers=2)
LR, STEPS = 1e-3, 10


def rows(step: int) -> Batch:
    """Two batches of two rows [2, 2, 12] with different numbers of learned tokens."""
    rng = np.random.default_rng(step)
    shape = 2, 2, 12
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), shape)
    prompts = rng.integers(1, 10, (2, 2, 1))
    tokens = rng.integers(3, SMALL.vocab_size, shape, np.int32)
    return Batch(tokens, np.ones(shape, np.int32), positions, positions >= prompts)


def theirs(torch, model, folder):
    """Losses and gradient norms of PEFT's steps; its trained adapter is saved to `folder`."""
    weights = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.01)
    losses, norms = [], []
    for step in range(STEPS):
        batch, loss = rows(step), 0.0
        for tokens, learned in zip(batch.tokens, batch.learned, strict=True):
            ids = torch.tensor(tokens).long()
            labels = torch.where(torch.tensor(learned), ids, -100)
            logits = model(input_ids=ids)
            logits = getattr(logits, "logits", logits)[:, :-1].flatten(0, 1)
            part = torch.nn.functional.cross_entropy(
                logits, labels[:, 1:].flatten(), reduction="sum"
            )
            (part / int(batch.learned.sum())).backward()
            loss += float(part.detach()) / batch.learned.sum()
        norms.append(float(torch.nn.utils.get_total_norm([x.grad for x in weights])))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    model.save_pretrained(str(folder))
    return losses, norms


def ours(config, params, lora, effective=None):
    """The same of our steps, with numbers as arguments, and what they trained."""
    schedule = make_schedule("constant", lr=LR, steps=STEPS)
    numbers = Numbers.of(
        schedule, effective(lora) if effective else lora, weight_decay=0.01, clip=0, noise=0
    )
    optimizer = numbers.optimizer()
    step = make_step(config, effective=effective)
    lora = jax.tree.map(np.asarray, lora)
    state, losses, norms = init_state(optimizer, lora), [], []
    for number in range(STEPS):
        batch = rows(number)
        key = jax.random.key(0)
        lora, state, metrics = step(params, lora, state, batch, key, number, numbers)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return losses, norms, lora


@pytest.mark.parametrize("targets", ["attn", "all-linear"])
def test_ten_steps_are_those_of_peft(tmp_path, targets):
    torch, peft, model = oracle_of(SMALL, toy_params(SMALL))
    start = init_lora(SMALL, jax.random.key(2), rank=4, alpha=16, targets=targets)
    save_adapter(tmp_path / "start", Adapter(start))
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "start"), is_trainable=True)
    expected, _ = theirs(torch, wrapped, tmp_path / "end")
    losses, _, lora = ours(SMALL, toy_params(SMALL), start)
    print(f"{targets}: losses differ by {np.abs(np.divide(losses, expected) - 1).max():.1e}")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)

    end = load_adapter(tmp_path / "end", SMALL).lora
    moved, differing = (
        np.concatenate(
            [
                np.abs(np.asarray(x) - np.asarray(y)).ravel()
                for x, y in zip(*map(jax.tree.leaves, pair), strict=True)
            ]
        )
        for pair in ((lora, start), (lora, end))
    )
    print(f"adapter moved by {moved.mean():.1e}, differs by {differing.mean():.1e} on average")
    assert differing.mean() < 1e-5 < 0.1 * moved.mean()


def test_ten_more_steps_of_an_adapter_of_peft(tmp_path):
    raw = {
        "target_modules": r".*(query_key_value|mlp\.dense_4h_to_h)",
        "exclude_modules": r".*layers\.1\.mlp.*",
        "rank_pattern": {r".*layers\.0\..*": 1},
        "alpha_pattern": {r"layers\.1\..*value": 12},
    }
    torch, peft, model = oracle_of(SMALL, toy_params(SMALL))
    compare_going_on(tmp_path, torch, peft, model, SMALL, toy_params(SMALL), raw)


@pytest.mark.parametrize(
    "raw",
    [
        {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": True},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
            "exclude_modules": ["layers.0.self_attn.k_proj"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 1, "v_proj": 20},
        },
    ],
    ids=["q and v", "patterns"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_ten_more_steps_of_an_adapter_for_q_and_v(tmp_path, raw):
    torch = pytest.importorskip("torch", reason="the PyTorch reference is not installed")
    peft = pytest.importorskip("peft", reason="the PEFT library is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = tiny_config()
    params = random_params(config)
    save(tmp_path / "base", params, config)
    export_folder(open_folder(tmp_path / "base"), tmp_path / "glm", layout="glm")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "glm", dtype=torch.float32)
    params = load_checkpoint(tmp_path / "base", dtype="float32").params
    compare_going_on(tmp_path, torch, peft, model.eval(), config, params, raw)


def compare_going_on(tmp_path, torch, peft, model, config, params, raw):
    """An adapter of PEFT is trained further by both: the same losses, norms and tensors."""
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings | raw))
    wrapped.save_pretrained(str(tmp_path / "start"))
    losses, norms = theirs(torch, wrapped, tmp_path / "end")

    start = load_adapter(tmp_path / "start", config, apart=True)
    assert start.shape is not None
    found = ours(config, params, start.lora, start.shape.effective)
    np.testing.assert_allclose(found[0], losses, rtol=1e-5)
    np.testing.assert_allclose(found[1], norms, rtol=1e-3)
    save_adapter(tmp_path / "ours", dataclasses.replace(start, lora=found[2]))
    before, after, mine = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("start", "end", "ours")
    )
    assert mine.keys() == after.keys()
    moved = np.concatenate([np.abs(after[name] - before[name]).ravel() for name in mine])
    differing = np.concatenate([np.abs(after[name] - mine[name]).ravel() for name in mine])
    assert differing.mean() < 1e-5 < 0.1 * moved.mean()
