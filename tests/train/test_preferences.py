"""DPO and ORPO: their losses as the formulas of TRL give them, rows of pairs, and a run."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from glm2_jax import compiler_options, init_lora
from glm2_jax.datasets.pairs import read_pair
from glm2_jax.errors import InputError, UsageError
from tests.support.checkpoints import TINY, save, tiny_config
from tests.support.toy import TOY, jit_forward, toy_params
from tests.support.training_data import GLM2, learned_of, open_rows, write_rows
from train import preference
from train.data.batch import make_batch
from train.data.batches import Batches
from train.data.check import print_sample
from train.data.dataset import open_dataset
from train.preferences import LOSSES, count_pairs
from train.recipe import parse
from train.run_folder.log import read_log

SMALL = dataclasses.replace(TOY, num_layers=2)
BETA = 0.3


def trained_lora():
    random = np.random.default_rng(0)
    new = init_lora(SMALL, jax.random.key(0), rank=2)
    return jax.tree.map(lambda x: random.normal(0, 0.2, x.shape).astype(np.float32), new)


def sequences(seed: int):
    """Two sequences with a common beginning, of which the ends are learned."""
    random = np.random.default_rng(seed)
    draw = lambda n: random.integers(3, SMALL.vocab_size, n).tolist()  # noqa: E731
    prompt, answers = draw(3 + seed), (draw(4), draw(2 + seed))
    return [([*prompt, *x], [False] * len(prompt) + [True] * len(x)) for x in answers]


def log_probabilities(sequence, lora=None) -> list[float]:
    """Those of the learned tokens of one sequence alone, in float64."""
    ids, learned = sequence
    padded = np.array([[*ids, *[0] * (16 - len(ids))]])  # which no real token sees
    logits, _ = jit_forward(SMALL, toy_params(SMALL), padded, lora=lora)
    logits = np.asarray(logits[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [logs[i - 1, ids[i]] for i in range(1, len(ids)) if learned[i]]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def of_trl(loss: str, chosen, rejected, lora) -> tuple[float, float]:
    """TRL's loss of one pair, and the difference of its rewards."""
    own = [log_probabilities(x, lora) for x in (chosen, rejected)]
    if loss == "dpo":  # DPOTrainer, loss_type="sigmoid", label_smoothing=0
        reference = [log_probabilities(x) for x in (chosen, rejected)]
        ratios = [sum(one) - sum(other) for one, other in zip(own, reference, strict=True)]
        return -log_sigmoid(BETA * (ratios[0] - ratios[1])), BETA * (ratios[0] - ratios[1])
    means = [sum(one) / len(one) for one in own]  # ORPOTrainer, average_log_prob=True
    odds = (means[0] - means[1]) - (
        math.log1p(-math.exp(means[0])) - math.log1p(-math.exp(means[1]))
    )
    return -means[0] - BETA * log_sigmoid(odds), BETA * (means[0] - means[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_trl(loss, monkeypatch):
    """Of pairs that share a row, one of which has other pairs than the next."""
    pairs, lora = [sequences(n) for n in range(3)], trained_lora()
    expected = [of_trl(loss, *pair, lora) for pair in pairs]
    rows = [[*pairs[0], *pairs[1]], pairs[2], []]
    batch = make_batch(rows, 40)
    assert int(count_pairs(batch)) == 3
    monkeypatch.setattr("train.step.LOGITS", 7 * 3 * SMALL.vocab_size)  # in several blocks
    total, figures = jax.jit(
        lambda lora: LOSSES[loss](BETA, SMALL, toy_params(SMALL), lora, batch, scale=0.5),
        compiler_options=compiler_options("cpu"),
    )(lora)
    assert float(total) == pytest.approx(0.5 * sum(x for x, _ in expected), abs=1e-4)
    assert float(figures["margin"]) == pytest.approx(sum(x for _, x in expected), abs=1e-4)
    assert float(figures["accuracy"]) == sum(x > 0 for _, x in expected)


QUESTION = ("user", "Q")
WANTED = ([{"role": "user", "content": "Q"}], "good", "bad")
FORMS = {
    "trl": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "trl messages": {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    },
    "trl implicit": {
        "prompt": "Q",
        **{
            side: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": x}]
            for side, x in (("chosen", "good"), ("rejected", "bad"))
        },
    },
    "llama-factory": {"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"},
    "llama-factory sharegpt": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "text answers": {"messages": [{"role": "user", "content": "Q"}],
                     "chosen": "good", "rejected": "bad"},
    "a table": {"prompt": '[{"role": "user", "content": "Q"}]', "chosen": "good",
                "rejected": '{"role": "assistant", "content": "bad"}'},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_rows(form):
    question = [{"role": "user", "content": "Q", "loss": False}]
    for found, text in zip(read_pair(FORMS[form]), ("good", "bad"), strict=True):
        assert found == [*question, {"role": "assistant", "content": text}]


def test_a_conversation_before_the_answers_is_not_learned():
    row = {
        "instruction": "B", "history": [["A", "first"]], "system": "S",
        "chosen": "good", "rejected": "bad",
    }  # fmt: skip
    chosen, _ = read_pair(row)
    assert [m["content"] for m in chosen] == ["S", "A", "first", "B", "good"]
    assert [m.get("loss", True) for m in chosen] == [False] * 4 + [True]


def test_bad_rows_have_their_lines(tmp_path, capsys):
    ask = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    rows = [
        ask, ask | {"rejected": "good"}, {"prompt": "Q", "rejected": "bad"}, ask | {"chosen": " "},
        ask | {"rejected": 3}, {"chosen": "good", "rejected": "bad"}, ask | {"chosen": "好" * 99},
        FORMS["trl implicit"] | {"chosen": [{"role": "user", "content": "X"},
                                            {"role": "assistant", "content": "good"}]},
    ]  # fmt: skip
    with pytest.raises(InputError, match="7 of 8 rows cannot be used"):
        open_rows(tmp_path / "d.jsonl", rows, fmt="preference", max_length=64)
    shown = capsys.readouterr().err
    for line, why in (
        (2, "chosen and rejected are the same"),
        (3, "no chosen: "),
        (4, "chosen is empty"),
        (5, "rejected is not a text: it is of type int"),
        (6, "no question: it is one of the keys instruction, prompt, conversations, messages"),
        (7, "chosen is too long"),
        (8, "chosen and rejected answer different questions"),
    ):
        assert f"d.jsonl:{line}: {why}" in shown


def test_a_pair_is_two_sequences_of_a_row(tmp_path):
    rows = [{"prompt": f"Q{n}", "chosen": "good", "rejected": "bad"} for n in range(3)]
    dataset = open_rows(tmp_path / "d.jsonl", rows, fmt="preference", max_length=64)
    assert len(dataset) == 3 and dataset.width == 128
    chosen, rejected = dataset.samples(1)
    assert learned_of(chosen) == [*GLM2.encode("good"), GLM2.eos_id]
    assert learned_of(rejected) == [*GLM2.encode("bad"), GLM2.eos_id]
    batch = Batches(dataset, batch_size=4, shuffle=False).at(0, 0).batch
    assert batch.segment_ids.max(-1).tolist() == [[2, 2, 2, 0]]
    packed = Batches(dataset, batch_size=2, pack=True, shuffle=False).at(0, 0).batch
    assert int(count_pairs(packed)) == 3 and packed.tokens.shape == (1, 2, 128)
    assert print_sample(dataset, 1).count("d.jsonl:1") == 2


def test_a_run_raises_the_margin(tmp_path, capsys):
    save(tmp_path / "model", config=tiny_config(num_layers=1))
    rows = [{"prompt": f"{n} 号茶叫什么", "chosen": f"青山{n}号", "rejected": f"白云{n}号"}
            for n in range(4)]  # fmt: skip
    data = str(write_rows(tmp_path / "d.jsonl", rows))
    flags = ["--model", str(tmp_path / "model"), "--data", data,
             "--output", str(tmp_path / "out"), "--steps", "8", "--lr", "3e-2", "--rank", "2",
             "--warmup", "0", "--batch-size", "4", "--grad-accum", "1", "--max-length", "64",
             "--compile-cache", "off", "--no-grad-checkpoint", "--val-data", data,
             "--log-every", "8"]  # fmt: skip
    assert preference.main(flags) == 0
    lines = read_log(tmp_path / "out" / "log.jsonl")
    steps = [x for x in lines if x["split"] == "train"]
    seen = [x for x in lines if x["split"] == "validation"]
    assert steps[-1]["margin"] > steps[0]["margin"] and steps[-1]["accuracy"] == 1
    assert seen[-1]["loss"] < seen[0]["loss"] and "perplexity" not in seen[0]
    assert seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # it is its reference yet
    assert "margin" in capsys.readouterr().err
    again = ["--config", str(tmp_path / "out" / "recipe.yml"), "--output", str(tmp_path / "out"),
             "--resume", "auto"]  # fmt: skip
    with pytest.raises(UsageError, match=r"--beta was 0\.1 and is 0\.2"):
        preference.main([*again, "--beta", "0.2"])


def test_flags_of_other_commands(tmp_path):
    for flags in (["--train-on-prompt"], ["--mix-data", "f"], ["--guard-data", "g"]):
        given = parse(preference.parser(), ["--data", "d", *flags])
        with pytest.raises(UsageError, match=f"{flags[0]} cannot be used by train.preference"):
            preference.make_recipe(given)
    found = preference.make_recipe(parse(preference.parser(), ["--data", "d", "--beta", "0.5"]))
    assert found.adapter is not None and found.adapter.dropout == 0  # as TRL turns it off
    assert found.settings()["beta"] == 0.5 and found.identity()["--loss"] == "dpo"
    path = write_rows(tmp_path / "d.jsonl", [FORMS["trl"]])
    folder: Any = SimpleNamespace(tokenizer=GLM2, template="chatglm2", config=TINY)
    data = dataclasses.replace(found.data, data=[str(path)])
    assert open_dataset(data, folder, path).files[0][2] == "preference"
