"""What the backward pass recomputes: any policy can win, a wrong one or one that does not fit never
does, and a choice is kept with those of inference."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from glm2_jax.choices import REMAT
from glm2_jax.errors import UsageError
from glm2_jax.forms import Forms
from infer import tune
from infer.memory.precision import Precision
from infer.tuning import automatic, store, training
from infer.tuning.automatic import stored
from infer.tuning.choose import Choice
from infer.tuning.kept import kept_lines
from infer.tuning.measure import Measured, Trained, Tuned
from tests.support.toy import TOY

CPU = jax.devices("cpu")[0]
FLOAT32 = Precision("float32")


@pytest.fixture(scope="module")
def programs():
    """What compiles each policy of a toy, once."""
    return training.policies(TOY, FLOAT32, 2, 16, CPU, None)


def prefers(wanted):
    return lambda name, run: 0.1 if name == wanted else 1.0


@pytest.mark.parametrize("wanted", REMAT)
def test_any_policy_can_win(wanted, programs):
    choice = training.choose_policy(programs, FLOAT32, prefers(wanted))
    assert (choice.name, choice.usual, choice.refused) == (wanted, "none", {})
    assert set(choice.seconds) == set(REMAT)


def test_a_policy_with_a_wrong_gradient_is_never_chosen(programs):
    """Its hidden states and all gradients but one are right."""
    right = programs["products"]()()
    assert len(right) == 5 and all(np.any(x) for x in right)

    def lies():
        return [*right[:-1], right[-1].at[0].multiply(1.01)]

    given = programs | {"products": lambda: lies}
    choice = training.choose_policy(given, FLOAT32, prefers("products"))
    assert choice.name == "none" and "wrong: differs by" in choice.refused["products"]
    assert "products" not in choice.seconds


class Compiled:
    """A program that returns the right thing and takes some bytes."""

    def __init__(self, function, *args):
        self.temp_size_in_bytes = 1000

    def memory_analysis(self):
        return self

    def __call__(self, *args):
        return [np.ones(3, np.float32)]


@pytest.mark.parametrize(
    ("memory", "usual", "refused"),
    [
        (5, "none", []),
        (4, "full", ["none"]),
        (3, "full", ["none", "products"]),
        (1, "full", list(REMAT)),
    ],
)
def test_a_policy_that_does_not_fit_with_all_layers_is_not_measured(
    memory, usual, refused, monkeypatch
):
    """Each layer but the two that are compiled keeps 1 to 4 GB; GB with what is spare."""
    kept = {name: (4 - at) * 10**9 for at, name in enumerate(REMAT)}
    monkeypatch.setattr(training, "compiled", Compiled)
    monkeypatch.setattr(training, "_kept_by_layer", lambda config, precision, name, _: kept[name])
    monkeypatch.setattr(training, "SPARE", 1.0)
    deep = dataclasses.replace(TOY, num_layers=3)
    builds = training.policies(deep, FLOAT32, 2, 16, CPU, memory * 10**9)
    choice = training.choose_policy(builds, FLOAT32, prefers("none"))
    assert (choice.usual, [*choice.refused]) == (usual, refused)
    assert all("GB, available: " in why for why in choice.refused.values())
    assert choice.name == usual and set(choice.seconds) == set(REMAT) - set(refused)


def test_a_layer_keeps_what_the_policy_says():
    tokens = jax.ShapeDtypeStruct((2, 16), np.int32)
    none, full = (training._kept_by_layer(TOY, FLOAT32, name, tokens) for name in ("none", "full"))
    carry = 4 * 2 * 16 * TOY.hidden_size  # the input of a layer, once: the scan has it as a carry
    assert full == carry < none


def trained(rows, length, remat="products", form="usual", **seconds):
    seconds = seconds or {"none": 2.0, "products": 1.0}
    what = f"training {rows} x {length}"
    return Trained(
        rows, length,
        Measured(f"{what}: attention", Choice(form, "usual", {"usual": 2.0, form: 1.0})),
        Measured(f"{what}: recomputing", Choice(remat, "none", seconds, {"full": "wrong"})),
    )  # fmt: skip


def test_the_nearest_shape_counts_and_its_order_is_by_time():
    tuned = Tuned(training=(trained(1, 512), trained(8, 512), trained(4, 2048)))
    near = {(1, 600): (1, 512), (2, 2048): (4, 2048), (16, 256): (8, 512), (5, 1500): (4, 2048)}
    for shape, expected in near.items():
        found = tuned.trained(*shape)
        assert found is not None and found[:2] == expected
    assert Tuned().trained(1, 1) is None
    one = trained(1, 1, "none", none=1.0, products=0.99, attention=3.0, full=2.0)
    assert one.order == ["none", "products", "full", "attention"]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `infer.tune` on a toy, whose steps are not measured."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "kept"))
    monkeypatch.setattr(
        training,
        "tune_training",
        lambda config, precision, rows, length, *_, **__: trained(rows, length),
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TOY.to_hf()), encoding="utf-8")
    return lambda *flags: tune.main(["--random", str(path), "--device", "cpu", *flags])


def test_the_command_keeps_what_training_needs_with_the_rest(command, capsys, tmp_path):
    key = store.key_of(TOY, FLOAT32, CPU)
    before = Tuned(Forms(chunk=8), (1,), "list", 0.5, training=(trained(2, 32, "none"),))
    store.keep(key, before)
    file = tmp_path / "forms.json"
    assert command("--train", "4x64,2X32", "--output", str(file)) == 0
    after = dataclasses.replace(before, training=(trained(2, 32), trained(4, 64)))
    assert store.find(key) == store.read(file, key) == after
    assert stored("auto", TOY, FLOAT32, CPU) == stored(str(file), TOY, FLOAT32, CPU) == after
    assert stored("off", TOY, FLOAT32, CPU) == Tuned()
    shown = capsys.readouterr().out
    assert "training 4 x 64: recomputing" in shown and "2.00" in shown
    assert "refused: training 4 x 64: recomputing, full: wrong" in shown
    (line,) = kept_lines()
    assert "training 4 x 64: recomputing: products (2.00 times)" in line
    assert command("--train", "1x8", "--json") == 0
    lines = json.loads(capsys.readouterr().out)["measured"]
    assert [line["what"] for line in lines[-2:]] == [
        "training 1 x 8: attention", "training 1 x 8: recomputing",
    ]  # fmt: skip


def test_measuring_for_answers_keeps_what_was_measured_for_training(monkeypatch, tmp_path):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    monkeypatch.setattr(automatic, "_SMALL", 0)
    monkeypatch.setattr(automatic, "load_average", lambda: 0.0)
    monkeypatch.setattr(automatic, "tune", lambda *args, **options: Tuned(Forms(chunk=8), (1,)))
    store.keep(store.key_of(TOY, FLOAT32, CPU), Tuned(training=(trained(2, 32),)))
    found = automatic.known(TOY, FLOAT32, [1], CPU, "list", lambda line: None)
    assert found == Tuned(Forms(chunk=8), (1,), training=(trained(2, 32),))
    assert stored("auto", TOY, FLOAT32, CPU) == found


@pytest.mark.parametrize("text", ["4", "4x", "0x8", "4x8x2", "x", "4*8"])
def test_a_shape_is_rows_times_tokens(text, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--train", text])
    assert "--train" in capsys.readouterr().err


def test_a_training_longer_than_the_context_is_refused(command):
    with pytest.raises(UsageError, match="65 tokens are more than the model's 64"):
        command("--train", "1x65")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"products": 1.0', '"later": 1.0'),
        ('"products": 1.0', '"products": 0'),
        ('"products": 1.0', '"products": "1"'),
        ('"usual": "none"', '"usual": "attention"'),
        (r'"training": \[\s*\[\s*1', '"training": [[0'),
    ],
)
def test_a_policy_of_a_later_version_or_a_changed_file_is_not_read(old, new, tmp_path):
    key = store.key_of(TOY, FLOAT32, CPU)
    path = store.keep(key, Tuned(training=(trained(1, 1),)), tmp_path / "forms.json")
    assert path is not None
    text, count = re.subn(old, new, path.read_text())
    assert count
    path.write_text(text)
    with pytest.raises(Exception, match="holds no choice of forms"):
        store.read(path, key)
