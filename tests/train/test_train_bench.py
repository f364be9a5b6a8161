"""`python -m train.bench`: what is counted, what is measured, and what is said of it."""

import dataclasses
import json
import shlex

import jax
import pytest

from glm2_jax import compiler_options, init_lora
from glm2_jax.errors import UsageError
from infer.bench import harness
from infer.bench.ceilings import Ceilings
from infer.tuning import automatic
from infer.tuning.choose import Choice
from infer.tuning.measure import Measured, Trained, Tuned
from tests.support.toy import TOY, toy_params
from train import bench
from train.data.batch import make_batch
from train.optim import make_optimizer
from train.step import init_state, train_step

SMALL = dataclasses.replace(TOY, num_layers=1)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command on a toy, with ceilings that were not measured."""
    ceilings = Ceilings(copy=10e9, read=20e9, matmul={"float32": 1e12})
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: ceilings)
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()), encoding="utf-8")
    flags = ["--random", str(tmp_path / "config.json"), "--batch-size", "2", "--length", "16"]
    flags += ["--rank", "2", "--repeat", "2", "--device", "cpu", "--dtypes", "float32"]
    return lambda *args: bench.main([*flags, *args])


def test_operations_are_those_of_the_program():
    """For large matrices; the rest of a program hardly counts then."""
    wide = dataclasses.replace(
        SMALL, hidden_size=256, ffn_hidden_size=512, head_dim=64, vocab_size=512
    )
    lora = init_lora(wide, jax.random.key(0), rank=1)
    rows = make_batch([[([5] * 16, [True] * 16)]] * 2, 16)
    batch = jax.tree.map(lambda x: x[None], rows)
    optimizer = make_optimizer(1e-3)
    step = jax.jit(lambda *args: train_step(wide, optimizer, *args, remat="none"))
    state = init_state(optimizer, lora)
    lowered = step.lower(toy_params(wide), lora, state, batch, jax.random.key(0), 0)
    counted = lowered.compile(compiler_options=compiler_options("cpu")).cost_analysis()["flops"]
    assert counted == pytest.approx(bench.work(wide, toy_params(wide), lora, 2, 16), rel=0.1)


def test_random_weights_and_a_quantized_base(capsys, command):
    assert command("--quantize", "none,int4", "--layout", "list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] and found["not_measured"] == []
    assert [r["variant"]["quantization"] for r in found["results"]] == ["int4", "none"]
    for result in found["results"]:
        assert result["what"] == "step 2 x 16" and result["variant"]["layers"] == "list"
        assert len(result["seconds"]) == 2 and result["tokens"] == 32 and result["problem"] == ""
        assert result["tokens_per_s"] == pytest.approx(32 / min(result["seconds"]))
        assert result["of_matmul"] == pytest.approx(result["flops"] / min(result["seconds"]) / 1e12)
        assert result["ratios"] == {} and result["bytes"] is None
    assert found["results"][0]["flops"] == found["results"][1]["flops"]


def test_peft_takes_the_same_steps(capsys, monkeypatch, command):
    """The peer really computes; what we compute is in the other tests."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason="the peer is not installed")
    monkeypatch.setattr(bench, "_build", lambda *args: (lambda: 1.0, 0.0))
    assert command("--peer", "peft") == 0
    said = capsys.readouterr().out
    assert "x as fast as peft" in said and "not measured" not in said
    assert "peft 0." in said and "threads" in said
    assert "GB/s  of max" not in said  # bytes are not counted in training


def test_out_of_memory_is_reported(capsys, monkeypatch, command):
    def build(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying")

    monkeypatch.setattr(bench, "_build", build)
    assert command() == 5
    assert "layers list, step 2 x 16: out of memory" in capsys.readouterr().out


def test_usage():
    with pytest.raises(UsageError, match="matches nothing"):
        bench.main(["--target", "q_proj", "--device", "cpu"])
    for line in bench.EXAMPLE.splitlines():
        _, flags = line.split(bench.PROG)
        assert bench.parser().parse_args(shlex.split(flags)).random


def test_the_forms_of_training_are_those_that_were_measured(capsys, monkeypatch, command):
    """And a flag wins."""
    lines = (
        Measured("attention", Choice("xla", "usual")),
        Measured("recomputing", Choice("products", "none", {"none": 2.0, "products": 1.0})),
    )
    tuned = Tuned(training=(Trained(4, 64, *lines),))
    monkeypatch.setattr(automatic, "stored", lambda asked, *_: Tuned() if asked == "off" else tuned)
    built = []
    take = lambda: 1.0, 0.0  # noqa: E731
    monkeypatch.setattr(bench, "_build", lambda *args: built.append(args) or take)
    assert command() == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "step 2 x 16, recomputing products" in said
    assert "(--tuned): attention in complete texts to 512: xla" in said
    for flag in (["--no-grad-checkpoint"], ["--grad-checkpoint", "full"], ["--tuned", "off"]):
        assert command(*flag) == 0
    capsys.readouterr()
    assert [args[-1] for args in built] == ["products", "none", "full", "none"]
    forms = [args[1].forms.describe() != "" for args in built]
    assert forms == [True, True, True, False]
    kinds = [isinstance(args[2]["layers"], list) for args in built]
    assert kinds == [False, True, False, True]
