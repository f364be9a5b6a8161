"""Ten steps beside the real PEFT library: same base, same new adapter, same rows, AdamW."""

import dataclasses

import jax
import numpy as np
import pytest

from convert.adapter import Adapter, load_adapter, save_adapter
from glm2_jax import init_lora
from tests.peft_oracle import oracle_of
from tests.toy import TOY, toy_params
from train.batch import Batch
from train.optim import make_optimizer
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
    """The losses of PEFT's steps; its trained adapter is saved to `folder`."""
    weights = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        batch, loss = rows(step), 0.0
        for tokens, learned in zip(batch.tokens, batch.learned, strict=True):
            ids = torch.tensor(tokens).long()
            labels = torch.where(torch.tensor(learned), ids, -100)
            logits = model(input_ids=ids)[:, :-1].flatten(0, 1)
            part = torch.nn.functional.cross_entropy(
                logits, labels[:, 1:].flatten(), reduction="sum"
            )
            (part / int(batch.learned.sum())).backward()
            loss += float(part.detach()) / batch.learned.sum()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    model.save_pretrained(str(folder))
    return losses


@pytest.mark.parametrize("targets", ["attn", "all-linear"])
def test_ten_steps_are_those_of_peft(tmp_path, targets):
    torch, peft, model = oracle_of(SMALL, toy_params(SMALL))
    start = init_lora(SMALL, jax.random.key(2), rank=4, alpha=16, targets=targets)
    save_adapter(tmp_path / "start", Adapter(start))
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "start"), is_trainable=True)
    expected = theirs(torch, wrapped, tmp_path / "end")

    optimizer = make_optimizer(LR, clip=0, weight_decay=0.01)
    step = make_step(SMALL, optimizer)
    lora = jax.tree.map(np.asarray, start)
    state, losses = init_state(optimizer, lora), []
    for number in range(STEPS):
        batch = rows(number)
        lora, state, metrics = step(
            toy_params(SMALL), lora, state, batch, jax.random.key(0), number
        )
        losses.append(float(metrics.loss))
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
