"""Ten steps compared with the real PEFT library: same base, first adapter and rows, AdamW; and its
schedules, what clipping and decay apply to."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from convert import export_folder, load_checkpoint, open_folder
from convert.adapters.adapter import Adapter, load_adapter, save_adapter
from glm2_jax import LoRA, compiler_options, init_lora
from tests.support.checkpoints import random_params, save, tiny_config
from tests.support.peft_oracle import oracle_of
from tests.support.toy import TOY, toy_params
from train.data.batch import Batch
from train.optim import Numbers, make_optimizer, make_schedule, warmup_steps
from train.options import SCHEDULES
from train.step import init_state, train_step

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


def theirs(torch, model, lr=LR, decay=0.01, optimizer=None):
    """Losses and gradient norms of the steps of a torch model, such as PEFT's."""
    weights = [x for x in model.parameters() if x.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
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
    return losses, norms


def ours(config, params, lora, effective, lr=LR, decay=0.01, ratio=None):
    """The same of our steps, with numbers as arguments, and what they trained."""
    schedule = make_schedule("constant", lr=lr, steps=STEPS)
    scaled = effective(lora) if effective else lora
    scaled = scaled if isinstance(scaled, LoRA) else None
    numbers = Numbers.of(schedule, scaled, weight_decay=decay, clip=0, noise=0, ratio=ratio)
    options: Any = compiler_options("cpu")
    step = jax.jit(partial(train_step, config, None, effective=effective), compiler_options=options)
    lora = jax.tree.map(np.asarray, lora)
    state, losses, norms = init_state(numbers.optimizer(), lora), [], []
    for number in range(STEPS):
        args = rows(number), jax.random.key(0), number, numbers
        lora, state, metrics = step(params, lora, state, *args)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return losses, norms, lora


def compare(folder, torch, wrapped, config, params, optimizer=None, ratio=None):
    """An adapter of PEFT is trained by both: the same losses, norms and tensors."""
    wrapped.save_pretrained(str(folder / "start"))
    losses, norms = theirs(torch, wrapped, optimizer=optimizer)
    wrapped.save_pretrained(str(folder / "end"))
    start = load_adapter(folder / "start", config, apart=True)
    assert start.shape is not None
    effective = None if start.shape.is_plain else start.shape.effective
    found = ours(config, params, start.lora, effective, ratio=ratio)
    print(f"losses differ by {np.abs(np.divide(found[0], losses) - 1).max():.1e}")
    np.testing.assert_allclose(found[0], losses, rtol=1e-5)
    np.testing.assert_allclose(found[1], norms, rtol=1e-3)
    save_adapter(folder / "ours", dataclasses.replace(start, lora=found[2]))
    before, after, mine = (
        load_file(folder / x / "adapter_model.safetensors") for x in ("start", "end", "ours")
    )
    assert mine.keys() == after.keys()
    moved = np.concatenate([np.abs(after[name] - before[name]).ravel() for name in mine])
    differing = np.concatenate([np.abs(after[name] - mine[name]).ravel() for name in mine])
    print(f"adapter moved by {moved.mean():.1e}, differs by {differing.mean():.1e} on average")
    assert differing.mean() < 1e-5 < 0.1 * moved.mean()


@pytest.mark.parametrize("targets", ["attn", "all-linear"])
def test_ten_steps_are_those_of_peft(tmp_path, targets):
    torch, peft, model = oracle_of(SMALL, toy_params(SMALL))
    new = init_lora(SMALL, jax.random.key(2), rank=4, alpha=16, targets=targets)
    save_adapter(tmp_path / "new", Adapter(new))
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "new"), is_trainable=True)
    compare(tmp_path, torch, wrapped, SMALL, toy_params(SMALL))


def trainable(torch, peft, model, **raw):
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | raw))


def test_ten_steps_of_dora_at_the_rates_of_lora_plus(tmp_path):
    torch, peft, model = oracle_of(SMALL, toy_params(SMALL))
    targets = ["query_key_value", "dense_4h_to_h"]
    settings = {"use_dora": True, "use_rslora": True, "target_modules": targets}
    wrapped = trainable(torch, peft, model, **settings)
    optimizers = pytest.importorskip("peft.optimizers", reason="this PEFT has no LoRA+")
    optimizer = optimizers.create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.01
    )
    groups = {group["lr"] for group in optimizer.param_groups if group["params"]}
    assert groups == {LR, 4 * LR}
    compare(tmp_path, torch, wrapped, SMALL, toy_params(SMALL), optimizer, 4.0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_ten_steps_of_an_adapter_for_q_and_v(tmp_path):
    torch = pytest.importorskip("torch", reason="the PyTorch reference is not installed")
    peft = pytest.importorskip("peft", reason="the PEFT library is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = tiny_config()
    save(tmp_path / "base", random_params(config), config)
    export_folder(open_folder(tmp_path / "base"), tmp_path / "glm", layout="glm")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "glm", dtype=torch.float32)
    wrapped = trainable(
        torch, peft, model.eval(), target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        exclude_modules=["layers.0.self_attn.k_proj"], rank_pattern={"v_proj": 3},
        alpha_pattern={"layers.0.self_attn.q_proj": 1, "v_proj": 20},
    )  # fmt: skip
    params = load_checkpoint(tmp_path / "base", dtype="float32").params
    compare(tmp_path, torch, wrapped, config, params)


def test_schedules_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for name, warmup in itertools.product(SCHEDULES, (0, 6, 20)):
        kind = {"constant": "constant_with_warmup"}.get(name, name)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
        theirs = transformers.get_scheduler(
            kind, optimizer, num_warmup_steps=warmup, num_training_steps=20
        )
        ours = jax.jit(make_schedule(name, lr=LR, steps=20, warmup=warmup))
        for step in range(20):
            assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6 * LR)
            optimizer.step()
            theirs.step()


def test_a_warmup_below_one_is_a_share_of_the_steps():
    steps = [warmup_steps(*x) for x in ((0, 9), (0.03, 100), (0.03, 110), (20, 9), (0.03, 1))]
    assert steps == [0, 3, 4, 20, 0]


def test_clipping_is_by_the_global_norm_and_norms_and_biases_do_not_decay():
    params = {name: jnp.ones(2) for name in ("q", "b", "q_bias", "final_norm")}
    gradient = {name: jnp.zeros(2) for name in params}
    gradient |= {"q": jnp.array([6.0, 0.0]), "b": jnp.array([0.0, 8.0])}  # norm 10
    for clip, factor in ((0.0, 1), (2.0, 0.2), (20.0, 1)):
        optimizer = make_optimizer(0.1, clip=clip)
        state = optimizer.update(gradient, optimizer.init(params), params)[1]
        for name, moment in optax.tree.get(state, "mu").items():
            np.testing.assert_allclose(moment, 0.1 * factor * gradient[name], rtol=1e-6)
    optimizer, none = make_optimizer(0.1, weight_decay=0.5), jax.tree.map(jnp.zeros_like, params)
    change, _ = optimizer.update(none, optimizer.init(params), params)
    decayed = {name: bool(x.any()) for name, x in change.items()}
    assert decayed == {"q": True, "b": True, "q_bias": False, "final_norm": False}
