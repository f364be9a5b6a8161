"""`python -m train.bench`: what is counted, what is measured, and what is said of it."""

import dataclasses
import json
import shlex

import jax
import pytest

from glm2_jax import compiler_options, init_lora
from infer.bench import ceilings
from infer.bench import peer as bench_peer
from infer.bench.ceilings import Ceilings
from tests.support.toy import TOY, toy_params
from train import bench
from train.data.batch import make_batch
from train.optim import make_optimizer
from train.step import init_state, train_step

CEILINGS = Ceilings(copy=10e9, read=20e9, matmul={"float32": 1e12})
SMALL = dataclasses.replace(TOY, num_layers=1)
FLAGS = ("--batch-size", "2", "--length", "16", "--rank", "2", "--repeat", "2", "--device", "cpu")


@pytest.fixture
def quick(monkeypatch):
    """Ceilings that were not measured: they have a test of their own."""
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device: CEILINGS)


@pytest.fixture(scope="module")
def toy_config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(SMALL.to_hf()), encoding="utf-8")
    return str(path)


def test_operations_are_those_of_the_program():
    """For large matrices; the rest of a program hardly counts then."""
    wide = dataclasses.replace(
        SMALL, hidden_size=256, ffn_hidden_size=512, head_dim=64, vocab_size=512
    )
    lora = init_lora(wide, jax.random.key(0), rank=1)
    rows = make_batch([[([5] * 16, [True] * 16)]] * 2, 16)
    batch = jax.tree.map(lambda x: x[None], rows)
    optimizer = make_optimizer(1e-3)
    step = jax.jit(lambda *args: train_step(wide, optimizer, *args, remat=False))
    state = init_state(optimizer, lora)
    lowered = step.lower(toy_params(wide), lora, state, batch, jax.random.key(0), 0)
    counted = lowered.compile(compiler_options=compiler_options("cpu")).cost_analysis()["flops"]
    assert counted == pytest.approx(bench.work(wide, toy_params(wide), lora, 2, 16), rel=0.1)


def test_random_weights_and_a_quantized_base(capsys, quick, toy_config):
    forms = ("--dtypes", "float32", "--quantize", "none,int4", "--layout", "list")
    assert bench.main(["--random", toy_config, *forms, *FLAGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] and found["unmeasured"] == []
    assert [r["name"] for r in found["results"]] == [
        "float32, layers list, 2 x 16 tokens",
        "float32, int4 weights, layers list, 2 x 16 tokens",
    ]
    for result in found["results"]:
        assert len(result["seconds"]) == 2 and result["tokens"] == 32 and result["problem"] == ""
        assert result["tokens_per_s"] == pytest.approx(32 / min(result["seconds"]))
        assert result["of_matmul"] == pytest.approx(result["flops"] / min(result["seconds"]) / 1e12)
        assert result["ratio"] is None
    assert found["results"][0]["flops"] == found["results"][1]["flops"]


def test_peft_takes_the_same_steps(capsys, quick, toy_config):
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason="the peer is not installed")
    assert (
        bench.main(["--random", toy_config, *FLAGS, "--dtypes", "float32", "--peer", "peft"]) == 0
    )
    said = capsys.readouterr().out
    assert "x as fast as peft" in said and "not measured" not in said
    assert "peft 0." in said and "threads" in said


def test_without_peft_one_line_says_so(capsys, quick, monkeypatch, toy_config):
    real, specs = bench_peer.importlib.util.find_spec, dict.fromkeys(bench_peer.PEERS["peft"], "")
    specs["peft"] = None  # and the others are there
    monkeypatch.setattr(
        bench_peer.importlib.util,
        "find_spec",
        lambda name: specs[name] if name in specs else real(name),
    )
    assert (
        bench.main(["--random", toy_config, *FLAGS, "--dtypes", "float32", "--peer", "peft"]) == 0
    )
    said = capsys.readouterr().out
    assert "not measured: --peer peft is skipped: peft not installed" in said and "tok/s" in said


def test_out_of_memory_is_reported(capsys, quick, monkeypatch, toy_config):
    def step(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate"
        )

    monkeypatch.setattr(bench, "_steps", step)
    assert bench.main(["--random", toy_config, *FLAGS, "--dtypes", "float32"]) == 5
    assert "not measured: out of memory" in capsys.readouterr().out


def test_the_text(monkeypatch):
    result = bench.Result(
        "float32, layers stacked, 4 x 128 tokens", "float32", 512, 1e12, [2.0, 2.5], 3.25,
        peak=2**30, peer=[5.0, 6.0],
    )  # fmt: skip
    unknown = dataclasses.replace(result, dtype="float16", peer=[], peak=None)
    report = bench.Report({"model": "toy"}, CEILINGS, [result, unknown], ["the moon"])
    monkeypatch.setenv("COLUMNS", "500")
    said = bench.render(report)
    assert "256 tok/s (median 227.6), 2 s a step; 0.5 TFLOP/s = 50 % of the measured" in said
    assert "2.50 x as fast as peft, 102.4 tok/s (median 93.09)" in said
    assert "0.5 TFLOP/s; peak ?, compiled in 3.2 s" in said
    assert "not measured: the moon" in said and "stopped before the end" in said
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, bench.render(report).splitlines())) <= 40


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--random", "chatglm2-6b", "--model", "x"], "exclude each other"),
        (["--layers", "2"], "needs --random"),
        (["--target", "q_proj"], "matches nothing"),
    ],
)
def test_contradictions(flags, problem):
    from glm2_jax.errors import UsageError

    with pytest.raises(UsageError, match=problem):
        bench.main([*flags, "--device", "cpu"])


def test_the_examples_parse():
    examples = bench.EXAMPLE.splitlines()
    assert len(examples) == 2
    for line in examples:
        program, flags = line.split(bench.PROG)
        assert not program.strip() and bench.parser().parse_args(shlex.split(flags)).random
