"""Choosing by measuring: any form can win, a wrong one never does, and noise changes nothing."""

import itertools
import json
import os
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm2_jax import forms as forms_module
from glm2_jax import forward
from glm2_jax.attention import ATTENTION
from glm2_jax.cli.model_choice import EngineOptions, ModelChoice
from glm2_jax.errors import CheckpointError
from glm2_jax.forms import Attention, Forms, Product
from glm2_jax.linear import einsum
from glm2_jax.products import PRODUCTS, candidates
from glm2_jax.quant import QTensor
from infer.memory.precision import Precision
from infer.tuning import automatic, measure, store
from infer.tuning.choose import choose
from infer.tuning.kept import kept_lines
from infer.tuning.measure import USUAL, Tuned, tune
from tests.support.engine_toy import toy_engine
from tests.support.toy import TOY, jit_forward, random_tokens, toy_params

CPU = jax.devices("cpu")[0]
RIGHT = np.arange(6, dtype=np.float32)
INT8 = Precision("float32", "int8")


def builds(**results):
    return {name: lambda result=result: lambda: result for name, result in results.items()}


def prefers(wanted):
    """A clock for which forms of one name take a tenth of the time."""
    return lambda name, run: 0.1 if name.startswith(wanted) else 1.0


@pytest.mark.parametrize("wanted", ["plain", "one", "two"])
def test_the_fastest_form_is_chosen(wanted):
    forms = builds(plain=RIGHT, one=RIGHT + 1e-6, two=RIGHT)
    choice = choose(forms, "plain", RIGHT, 1e-4, prefers(wanted))
    assert (choice.name, choice.usual, choice.refused) == (wanted, "plain", {})
    assert choice.gain == (1 if wanted == "plain" else 10)


def test_a_wrong_or_failing_form_is_reported_and_never_chosen():
    def fails():
        raise NotImplementedError("no such kernel here\nand more")

    wrong = {"far": RIGHT + 0.1, "nan": RIGHT * np.nan, "shape": RIGHT[:3]}
    forms = builds(plain=RIGHT, **wrong) | {"fails": fails}
    asked = []

    def clock(name, run):
        asked.append(name)
        return 1.0 if name == "plain" else 0.01

    choice = choose(forms, "plain", RIGHT, 1e-3, clock)
    assert choice.name == "plain" and set(asked) == {"plain"}
    assert choice.refused["fails"] == "no such kernel here"
    assert "differs by 0.1" in choice.refused["far"] and "nan" in choice.refused["nan"]
    assert "(3,)" in choice.refused["shape"]
    alone = choose(forms | builds(plain=RIGHT * 2), "plain", RIGHT, 1e-3, clock)
    assert (alone.name, alone.seconds, alone.gain) == ("plain", {}, 1.0)


@pytest.mark.parametrize(
    "times",
    [
        itertools.cycle([1.0, 0.99]),  # a gain that is not worth it
        itertools.cycle([1.0, 0.2, 0.2, 1.0, 1.0, 1.2]),  # faster in a third of the turns
        itertools.chain([1.0, 0.5, 9.0, 0.8] + [9.0, 0.9] * 2, itertools.cycle([0.5, 0.5])),
    ],
)
def test_noise_is_no_reason_to_leave_the_usual_form(times):
    choice = choose(
        builds(plain=RIGHT, other=RIGHT), "plain", RIGHT, 1e-4, lambda name, run: next(times)
    )
    assert choice.name == "plain" and set(choice.seconds) == {"plain", "other"}


@pytest.mark.parametrize(("gain", "chosen"), [(0.9, "plain"), (0.97, "one")])
def test_what_is_saved_counts_from_a_share_on(gain, chosen):
    clock = lambda name, run: 1.0 if name == "plain" else 0.95  # noqa: E731
    forms = builds(plain=RIGHT, one=RIGHT)
    assert choose(forms, "plain", RIGHT, 1e-3, clock, gain).name == chosen


def test_a_choice_counts_for_the_nearest_number_of_rows():
    product = Product(4, (8, 6), "int8", "float32")
    forms = Forms(
        ((product, "chunks"), (product._replace(rows=32), "small chunks")),
        ((Attention(1, 1024), "xla"),),
    )
    names = {rows: forms.of_product(product._replace(rows=rows)) for rows in (1, 4, 11, 12, 500)}
    assert names == {
        1: "chunks",
        4: "chunks",
        11: "chunks",
        12: "small chunks",
        500: "small chunks",
    }
    assert forms.of_product(product._replace(weight="int4 by 128")) is None
    usual = replace(forms, products=((product._replace(rows=1), None), *forms.products))
    near = [usual.of_product(product._replace(rows=rows)) for rows in (1, 3, 4)]
    assert near == [None, "chunks", "chunks"] and usual.describe() == forms.describe()
    assert forms.of_attention(Attention(1, 77)) == "xla"
    assert forms.of_attention(Attention(2, 1024)) is None


@pytest.mark.parametrize("name", [*candidates("cpu", jnp.zeros((1, 1)), jnp.zeros((1, 1))), "xla"])
def test_a_model_in_chosen_forms_has_the_same_logits_and_gradients(name, monkeypatch):
    """Every number of rows takes the one measured entry; attention in the cache and without."""
    seen = []
    if name in ATTENTION:
        form = ATTENTION[name]
        monkeypatch.setitem(ATTENTION, name, lambda *args: (seen.append(1), form(*args))[1])
        forms = Forms(attention=((Attention(1, 64), name), (Attention(9, 64), name)))
    else:
        form = PRODUCTS[name]
        compute = lambda *args: (seen.append(1), form.compute(*args))[1]  # noqa: E731
        monkeypatch.setitem(PRODUCTS, name, form._replace(compute=compute))
        shapes = {(64, 48), (32, 48), (160, 48), (48, 80), (48, 64), (97, 48)}
        products = [Product(9, shape, "float32", "float32") for shape in shapes]
        forms = Forms(tuple((product, name) for product in products))
    config, tokens, params = replace(TOY, forms=forms), random_tokens(1, 9), toy_params()
    np.testing.assert_allclose(
        jit_forward(config, params, tokens)[0], jit_forward(TOY, params, tokens)[0], atol=1e-4
    )
    assert bool(seen) == (name != "dot of two rows")  # which takes one row alone

    def loss(config):
        squares = jax.grad(lambda params: jnp.sum(forward(config, params, tokens)[0] ** 2))
        return jax.jit(squares)(params)

    for ours, theirs in zip(*map(jax.tree.leaves, (loss(config), loss(TOY))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-2)


def test_a_chosen_form_that_takes_fewer_rows_gives_way():
    product = Product(1, (3, 4), "float32", "float32")
    x, w = jnp.ones((2, 4)), jnp.ones((3, 4))
    with forms_module.using(Forms(((product, "dot of two rows"),))):
        assert einsum("MC,RC->MR", x, w).tolist() == [[4.0] * 3] * 2
    assert forms_module.chosen() == Forms()


@pytest.fixture(scope="module")
def tuned() -> Tuned:
    """All in small chunks, which a clock prefers; of few weights, to be quick."""
    matrices = measure._matrices(TOY, INT8)
    with mock.patch.object(measure, "_matrices", lambda *args: [matrices[0], matrices[-1]]):
        return tune(TOY, INT8, [1], CPU, layers="list", clock=prefers(("small chunks", "chosen")))


def test_every_shape_of_a_model_is_measured_once():
    found = measure._matrices(TOY, Precision("float32", "int4"))
    *layers, head = [(x.values if isinstance(x, QTensor) else x).shape for x in found]
    assert set(layers) == {(64, 24), (32, 24), (160, 24), (48, 40), (48, 32)} and len(layers) == 5
    assert head == (97, 48) and found[0].scale.shape == (64, 3)


def test_tuning_measures_each_product_attention_and_steps(tuned):
    names = dict.fromkeys(name for _, name in tuned.forms.products)
    assert list(names) == ["small chunks"] and tuned.forms.attention == ()
    assert {product.shape for product, _ in tuned.forms.products} == {(64, 48), (97, 48)}
    assert {product.rows for product, _ in tuned.forms.products} == {1, 64}
    kinds = {product.weight for product, _ in tuned.forms.products}
    assert kinds == {"int8", "float32"} and tuned.rows == (1,) and tuned.seconds == 0.1
    assert [line.what for line in tuned.measured if line.choice.refused] == []


def test_forms_that_are_not_faster_together_are_left_out(monkeypatch):
    matrices = measure._matrices
    monkeypatch.setattr(measure, "_matrices", lambda *args: matrices(*args)[:1])
    found = tune(TOY, INT8, [1], CPU, layers="list", clock=prefers(("small chunks", USUAL)))
    assert {p.rows: name for p, name in found.forms.products} == {1: None, 64: "small chunks"}
    assert (found.layers, found.measured[-1].choice.name) == ("list", "usual, list")


def test_a_prompt_is_read_in_the_fastest_parts(monkeypatch, tmp_path):
    """Where it is measured: not on a CPU, where it takes too long."""
    monkeypatch.setattr(measure, "_CHUNKS", (16, 8))
    args = TOY, Precision("float32"), Forms(), "stacked", CPU
    choice = measure._chunk(*args, prefers("8"))
    assert (choice.name, choice.usual, choice.refused) == ("8", "16", {})
    assert set(choice.seconds) == {"16", "8"}
    tuned = Tuned(Forms(chunk=8), (1,))
    key = store.key_of(TOY, Precision("float32"), CPU)
    path = store.keep(key, tuned, tmp_path / "forms.json")
    assert path is not None and store.read(path, key) == tuned
    assert tuned.forms.describe() == "prompts are read by 8 tokens"
    config = replace(TOY, forms=tuned.forms)
    assert toy_engine(config=config).prefill_chunk == 8
    assert toy_engine(config=config, prefill_chunk=5).prefill_chunk == 5


def test_a_choice_is_kept_for_its_device_and_model_alone(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "kept"))
    key = store.key_of(TOY, INT8, CPU)
    assert store.find(key) is None
    path = store.keep(key, tuned)
    assert path is not None and store.find(key) == tuned
    (tmp_path / "kept" / "other.json").write_text("{}")
    (line,) = kept_lines()
    assert line.startswith("48 wide, float32, int8, on ")
    assert "1 x [64, 48] int8: small chunks (10.00 times)" in line
    others = (
        store.key_of(replace(TOY, hidden_size=64), INT8, CPU),
        store.key_of(TOY, Precision("bfloat16", "int8"), CPU),
        key | {"jax": ["0.0", "other"]},
        key | {"host": [64, "avx512f"]},
    )
    assert [store.find(other) for other in others] == [None] * 4
    with pytest.raises(CheckpointError, match="another case: host"):
        store.read(path, others[-1])
    # Layers beyond those measured, or a longer context, change nothing.
    assert store.key_of(replace(TOY, num_layers=9, seq_length=128), INT8, CPU) == key


def test_a_damaged_file_is_as_good_as_none(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    key = store.key_of(TOY, INT8, CPU)
    path = store.keep(key, tuned)
    assert path is not None
    text = path.read_text()
    changed = json.loads(text)
    changed["tuned"]["products"][0][-1] = "of a later version"
    for damaged in ("", "[]", "null", text[: len(text) // 2], json.dumps(changed), "[" * 100000):
        path.write_text(damaged)
        assert store.find(key) is None
        with pytest.raises(CheckpointError, match="holds no choice|another case"):
            store.read(path, key)
    assert store.keep(key, tuned) == path and store.find(key) == tuned


def test_a_kill_while_writing_leaves_the_old_file(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    key = store.key_of(TOY, INT8, CPU)
    store.keep(key, tuned)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.keep(key, replace(tuned, layers="stacked"))
    assert store.find(key) == tuned and len(list(tmp_path.iterdir())) == 1


class Asked:
    """A folder, and how often something was measured."""

    def __init__(self, monkeypatch, seconds):
        self.config, self.scheme, self.path, self.count = TOY, None, "toy", 0
        monkeypatch.setattr(automatic, "tune", self.tune)
        monkeypatch.setattr(automatic, "load_average", lambda: self.load)
        self.load = 0.0
        self.seconds = seconds

    def tune(self, config, precision, rows, device, **more):
        self.count += 1
        self.rows, product = tuple(rows), Product(len(rows), (1, 1), "int8", "float32")
        forms = Forms(((product, "chunks"),))
        return Tuned(forms, tuple(rows), "stacked", self.seconds[precision.dtype])


def test_a_model_is_measured_at_its_first_start_and_never_again(tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    folder = Asked(monkeypatch, {"float32": 1.0, "bfloat16": 0.95})
    lines: list[str] = []

    def find(note=lines.append, rows=1, dtype="float32", **options):
        choice = ModelChoice(path="x", dtype=dtype)
        return automatic.find_forms(folder, choice, EngineOptions(**options), CPU, rows, note)

    assert find()[1] == Forms() and folder.count == 0  # too small to gain anything
    monkeypatch.setattr(automatic, "_SMALL", 0)
    assert find(tuned="off")[1] == find(note=None)[1] == Forms() and folder.count == 0
    folder.load = 1e6
    assert find()[1] == Forms() and folder.count == 0 and "load 1000000.0" in lines.pop()
    folder.load = 0.0
    choice, forms = find()
    assert forms != Forms() and (choice.dtype, choice.layers) == ("float32", "stacked")
    assert find() == find(note=None) == (choice, forms) and folder.rows == (1,)
    assert folder.count == 1 and len(lines) == 1 and "--tuned off" in lines[0]
    more = find(rows=32)[1]
    assert more != forms and folder.rows == (1, 4, 32) and folder.count == 2
    assert find()[1] == more and folder.count == 2
    # float32 stays where bfloat16 is hardly faster.
    assert find(dtype="auto")[0].dtype == "auto" and folder.count == 3


def test_auto_is_the_faster_dtype_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    monkeypatch.setattr(automatic, "_SMALL", 0)
    folder = Asked(monkeypatch, {"float32": 0.0020, "bfloat16": 0.0010})
    lines: list[str] = []
    choice = ModelChoice(path="x", dtype="auto")
    args = folder, choice, EngineOptions(), CPU, 1
    assert automatic.find_forms(*args, lines.append)[0].dtype == "bfloat16"
    assert "computing in bfloat16: layers took 1 ms a step in it, 2 ms in float32" in lines[-1]
    assert automatic.find_forms(*args, None)[0].dtype == "bfloat16" and folder.count == 2


def test_a_file_names_the_choice_and_its_dtype(tuned, tmp_path, monkeypatch):
    folder = Asked(monkeypatch, {})
    key = store.key_of(TOY, Precision("bfloat16"), CPU)
    path = tmp_path / "forms.json"
    assert store.keep(key, tuned, path) == path
    options = EngineOptions(tuned=str(path))
    args = options, CPU, 1, None
    choice, found = automatic.find_forms(folder, ModelChoice(path="x", dtype="auto"), *args)
    assert (choice.dtype, choice.layers, found) == ("bfloat16", tuned.layers, tuned.forms)
    with pytest.raises(CheckpointError, match="another case: weights"):
        automatic.find_forms(folder, ModelChoice(path="x", dtype="float32"), *args)
    missing = EngineOptions(tuned=str(tmp_path / "no"))
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        automatic.find_forms(folder, ModelChoice(path="x"), missing, CPU, 1, None)
