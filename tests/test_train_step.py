"""The training step: the loss by hand, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.toy import TOY, jit_forward, random_tokens, toy_params
from train.batch import Batch
from train.step import answer_loss, make_train_step


def batch_of(tokens, segment_ids, learned) -> Batch:
    positions = np.zeros(np.shape(tokens), np.int32)
    for row, segments in enumerate(np.asarray(segment_ids)):
        for segment in np.unique(segments):
            places = segments == segment
            positions[row, places] = np.arange(places.sum())
    return Batch(
        tokens=np.asarray(tokens, np.int32),
        segment_ids=np.asarray(segment_ids, np.int32),
        positions=positions,
        learned=np.asarray(learned, bool),
    )


def test_the_loss_is_the_mean_over_learned_tokens():
    tokens = np.asarray(random_tokens(2, 6))
    learned = np.array([[0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]], bool)
    log_probs = np.asarray(jax.nn.log_softmax(jit_forward(TOY, toy_params(), tokens)[0]))
    by_hand = [log_probs[r, t - 1, tokens[r, t]] for r, t in zip(*np.nonzero(learned), strict=True)]
    loss = answer_loss(TOY, toy_params(), batch_of(tokens, np.ones((2, 6)), learned))
    assert float(loss) == pytest.approx(-np.mean(by_hand), rel=1e-5)


def test_a_packed_row_has_the_loss_of_its_sequences():
    first, second = np.asarray(random_tokens(1, 4)), np.asarray(random_tokens(1, 5, seed=3))
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], axis=1)
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 3])
    learned = np.array([[0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]], bool)
    together = answer_loss(TOY, toy_params(), batch_of(packed, segments, learned))
    alone = [
        answer_loss(TOY, toy_params(), batch_of(ids, np.ones_like(ids), mask)) * mask.sum()
        for ids, mask in ((first, learned[:, :4]), (second, learned[:, 4:9]))
    ]
    assert float(together) == pytest.approx(float(sum(alone)) / 5, rel=1e-5)


def test_nothing_to_learn_is_zero_not_nan():
    tokens = random_tokens(1, 4)
    nothing = batch_of(tokens, np.ones((1, 4)), np.zeros((1, 4)))
    assert float(answer_loss(TOY, toy_params(), nothing)) == 0.0


def test_steps_lower_the_loss_and_repeat_exactly():
    learned = np.ones((2, 8), bool)
    learned[:, 0] = False
    batch = batch_of(random_tokens(2, 8), np.ones((2, 8)), learned)
    optimizer = optax.adam(1e-2)
    step = make_train_step(TOY, optimizer)

    def run():
        params = jax.tree.map(jnp.copy, toy_params())
        state, losses = optimizer.init(params), []
        for number in range(12):
            params, state, loss = step(params, state, batch, jax.random.key(number))
            losses.append(float(loss))
        return losses

    losses = run()
    assert losses[-1] < 0.5 * losses[0]
    assert run() == losses
