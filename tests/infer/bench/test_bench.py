"""`python -m infer.bench`: what is counted, what is measured, and what is said of it."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.loading.folder import open_folder
from glm2_jax import GLMConfig
from glm2_jax.cli import arguments
from glm2_jax.errors import CheckpointError, InputError, UsageError
from glm2_jax.schemes import SCHEMES
from infer.bench import __main__ as bench
from infer.bench import consumer, harness, plot, programs
from infer.bench import peer as bench_peer
from infer.bench.ceilings import Ceilings, measure_ceilings
from infer.bench.harness import Task, take_turns
from infer.bench.programs import Shape, work
from infer.bench.report import Report, Result, as_json, render
from infer.bench.subject import Variant
from infer.engine.load import demo_folder
from infer.memory.precision import Precision
from infer.memory.shares import abstract_params
from infer.tuning.random_params import random_params
from tests.support.checkpoints import convert_folder
from tests.support.paths import ROOT
from tests.support.toy import TOY, jit_forward, random_tokens

CEILINGS = Ceilings(copy=10e9, read=20e9, matmul={"bfloat16": 2e12, "float32": 1e12})
CPU = jax.devices("cpu")[0]
FLOAT32 = Precision("float32")
DECODE = ("--prompts", "none", "--contexts", "4")


@pytest.fixture
def quick(monkeypatch):
    """Ceilings that were not measured: their own test measures them."""
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: CEILINGS)


@pytest.fixture
def nothing_measured(monkeypatch):
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: pytest.fail("measures"))


@pytest.fixture(scope="module")
def toy_config(tmp_path_factory) -> str:
    raw = dataclasses.replace(TOY, num_layers=1).to_hf()
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return str(path)


def measured(capsys, *args: str, code: int = 0) -> dict:
    """What `--json` prints."""
    small = ("--steps", "2", "--repeat", "2", "--json", "--device", "cpu")
    assert bench.main([*args, *small]) == code
    return json.loads(capsys.readouterr().out)


def result_of(variant: Variant, shape: Shape, *rest) -> Result:
    return Result(variant, shape.name, dataclasses.asdict(shape), shape.tokens, *rest)


def hand_made() -> Report:
    """A report of two results, the second with a peer."""
    first = result_of(
        Variant("float32", "int8", "list"), Shape(1, prompt=128), 1e6, 4e9, [0.5, 0.25]
    )
    second = result_of(
        Variant("float32", "none", "list", 4_000_000), Shape(2, context=100, steps=4),
        4e9, 8e9, [0.5, 0.4, 0.9], 2.5, 6_000_000, {"eager": [0.8, 1.0]},
    )  # fmt: skip
    about = {"device": "some device", "command": "python -m infer.bench --json"}
    return Report(about, CEILINGS, [first, second], complete=True, peer="transformers")


# What is counted


def test_bytes_and_operations():
    config = GLMConfig(
        num_layers=2, vocab_size=10, hidden_size=4, ffn_hidden_size=6, num_heads=2,
        num_kv_heads=1, head_dim=4, seq_length=64,
    )  # fmt: skip
    moved, flops = work(config, FLOAT32, Shape(batch=3, context=7, steps=5), "cpu")
    # A layer: q 2*4*4, k and v 4*4 each, o 4*8, gate and up 2*6*4, down 4*6.
    matrices = 2 * (32 + 16 + 16 + 32 + 48 + 24)
    vectors = 2 * (4 + 8 + 4 + 4 + 4) + 4
    keys = 3 * (7 + 3)  # 8, 9, ... 12 of each row
    assert moved == 4 * (matrices + vectors + 10 * 4 + 3 * 4 + keys * 2 * 2 * 4)
    assert flops == 2 * 3 * (matrices + 10 * 4) + 4 * 2 * 2 * 4 * keys
    shapes = (Shape(1), Shape(1, prompt=1), Shape(1, prompt=2), Shape(2, prompt=2))
    step, one, two, four = (work(TOY, FLOAT32, shape, "cpu")[1] for shape in shapes)
    head, pair = 2 * 97 * 48, 4 * 3 * 4 * 16
    assert step == one and four == 2 * two
    assert two == 2 * (one - head - pair) + head + 3 * pair  # a head for the last, three pairs


@pytest.mark.parametrize(("name", "as_list"), [("int8", True), ("int4", False)])
def test_random_params_are_laid_out_as_loaded_ones(name, as_list):
    form = {"scheme": SCHEMES[name], "as_list": as_list}
    params = random_params(TOY, jnp.float32, **form, device=CPU)
    expected = abstract_params(TOY, Precision("float32", name), stacked=not as_list)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    logits, _ = jit_forward(TOY, params, random_tokens(2, 5))
    assert np.isfinite(logits).all() and np.ptp(logits) > 0


def test_random_numbers_are_small_and_all_different():
    params = random_params(dataclasses.replace(TOY, vocab_size=2000), jnp.bfloat16)
    embed, head = (np.asarray(params[name], np.float32) for name in ("embed", "head"))
    for matrix in (embed, head):
        assert abs(matrix.mean()) < 1e-3 and matrix.std() == pytest.approx(0.02, rel=0.05)
        assert len(np.unique(matrix, axis=0)) == len(matrix)
    assert abs(np.corrcoef(embed.ravel(), head.ravel())[0, 1]) < 0.02


def test_ceilings_are_of_this_device():
    found = measure_ceilings(CPU, array_bytes=2**22, matrix=64)
    assert 1e6 < found.copy < 1e14 and 1e6 < found.read < 1e14
    assert set(found.matmul) == {"bfloat16", "float32"} and min(found.matmul.values()) > 1e3
    assert found.bandwidth == max(found.copy, found.read)
    other = Ceilings(copy=11e9, read=1e9, matmul={"bfloat16": 1e12, "float32": 3e12})
    expected = Ceilings(11e9, 20e9, {"bfloat16": 2e12, "float32": 3e12})
    assert CEILINGS.better(other) == other.better(CEILINGS) == expected


# Measuring


def test_the_demo(capsys, quick):
    found = measured(
        capsys, "--prompts", "8,2000", "--batches", "2", "--contexts", "8", "--layout", "list",
    )  # fmt: skip
    assert [result["what"] for result in found["results"]] == ["prefill 1 x 8", "decode 2 at 8"]
    assert found["not_measured"] == ["not measured: 2000 tokens, the model's context is 1024"]
    assert found["complete"] and "infer.bench --prompts 8,2000" in found["about"]["command"]
    for name in ("device", "host", "versions", "load average", "model"):
        assert found["about"][name]
    for result in found["results"]:
        assert result["variant"]["layers"] == "list" and result["tokens"] in (8, 2)
        assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
        assert result["compile_s"] > 0 and result["peak"] > 0
        assert result["bytes_per_s"] == result["bytes"] / min(result["seconds"])
        assert result["of_bandwidth"] == pytest.approx(result["bytes_per_s"] / 20e9)
        assert result["of_matmul"] == pytest.approx(result["flops_per_s"] / 1e12)
        assert result["tokens_per_s"] >= result["tokens_per_s_median"] > 0


def test_forms_and_batches_of_which_one_does_not_fit(capsys, quick, monkeypatch, toy_config):
    def decode(work, shape):
        if shape.batch == 2:
            raise MemoryError
        return lambda: 1.0

    monkeypatch.setattr(programs.Workload, "decode", decode)
    found = measured(
        capsys, "--random", toy_config, *DECODE, "--batches", "1,2,4",
        "--dtypes", "float32,bfloat16", "--quantize", "none,int8", "--layout", "stacked", code=5,
    )  # fmt: skip
    assert found["about"]["model"] == "config.json, random weights"
    variants = [result["variant"] for result in found["results"][::3]]
    forms = [(variant["dtype"], variant["quantization"]) for variant in variants]
    assert set(forms[:2]) == {("float32", "int8"), ("bfloat16", "int8")}  # the smaller ones first
    assert forms[2:] == [("bfloat16", "none"), ("float32", "none")]
    assert [bool(result["seconds"]) for result in found["results"][:3]] == [True, False, True]
    problem = "not measured: float32, layers stacked, decode 2 at 4: out of memory"
    assert found["not_measured"][-1] == problem and len(found["not_measured"]) == 4


class FakePeer(bench_peer.Peer):
    """Answers at once, and writes down when it was asked."""

    def __init__(self, calls: list, fail: str):
        self.calls, self.fail, self.modes = calls, fail, ("eager", "compiled")

    def ask(self, **request):
        if request["mode"] == self.fail:
            raise bench_peer.PeerError("transformers: too much")
        self.calls.append(request["mode"])
        return {}

    def measure(self):
        self.calls.append("theirs")
        return 2.0


@pytest.mark.parametrize("fail", ["", "eager", "compiled"])
def test_the_peer_takes_turns_and_may_fail(fail):
    calls: list[str] = []
    shape = Shape(1, context=4)
    result = result_of(Variant("float32", "none", "stacked"), shape, 1.0, 1.0)
    task = Task(result, lambda: (lambda: calls.append("ours") or 1.0, 0.5))
    take_turns(task, 3, FakePeer(calls, fail))
    modes = [mode for mode in ("eager", "compiled") if mode != fail]
    assert calls == [call for mode in modes for call in (mode, *["ours", "theirs"] * 3)]
    assert list(result.peers) == modes and {result.ratio(mode) for mode in modes} == {2.0}
    assert len(result.seconds) == 3 * len(modes) and ("too much" in result.problem) == bool(fail)


def test_without_a_peer_one_line_says_so(capsys, quick, monkeypatch, toy_config):
    monkeypatch.setattr(bench_peer, "PEERS", dict.fromkeys(bench_peer.PEERS, ("no_such_package",)))
    flags = ("--prompts", "none", "--batches", "none", "--peer", "transformers")
    found = measured(capsys, "--random", toy_config, *flags)
    problem = "--peer transformers is skipped: no_such_package not installed"
    assert found["not_measured"] == [f"not measured: {problem}"]


def test_transformers(capsys, quick, monkeypatch, toy_config):
    """The peer really computes; what we compute is in the other tests."""
    pytest.importorskip("torch", reason="the peer is not installed")
    pytest.importorskip("transformers", reason="the peer is not installed")
    for name in ("prefill", "decode"):
        monkeypatch.setattr(programs.Workload, name, lambda work, shape: lambda: 1.0)
    found = measured(
        capsys, "--random", toy_config, "--prompts", "8", "--contexts", "8",
        "--batches", "2", "--quantize", "none,int8", "--peer", "transformers",
    )  # fmt: skip
    assert found["not_measured"] == [] and "transformers 5" in found["about"]["peer"]
    for result in found["results"]:
        quantized = result["variant"]["quantization"] != "none"
        assert list(result["ratios"]) == ([] if quantized else ["eager"])
        assert all(len(seconds) == 2 for seconds in result["peers"].values())


# What is said


def test_table_and_paragraphs():
    report = hand_made()
    wide = render(report, 200)
    rows = [line for line in wide.splitlines() if line.startswith("float32  ")]
    assert len(rows) == 2 and "prefill 1 x 128" in rows[0] and "512" in rows[0]
    assert "decode 2 at 100" in rows[1] and "50 %" in rows[1] and "6.0 MB" in rows[1]
    assert "2.00 x as fast as transformers eager, 2.5 tok/s" in wide
    narrow = render(report, 40)
    assert max(map(len, narrow.splitlines())) <= 40
    for text in ("decode 2 at 100", "tok/s", "peak 6.0 MB", "2.5 s", "--json"):
        assert text in " ".join(narrow.split())
    nothing = Report({"device": "x"})  # stopped at once
    assert "not measured: the rest" in render(nothing, 80) and not as_json(nothing)["complete"]
    assert as_json(nothing)["ceilings"] is None


def test_the_consumer_preset(capsys, nothing_measured):
    assert bench.main(["--preset", "consumer"]) == 0
    text = capsys.readouterr().out
    assert text.count("planned, RTX 3090 24 GB: ") == text.count("measured: nothing") == 3
    assert "not measured: no accelerator found" in text
    assert " ".join(text.split()).count(f"--prefill-chunk {consumer.CHUNK} --max-length 4096") == 3
    with pytest.raises(UsageError, match="nothing to draw"):
        bench.main(["--preset", "consumer", "--plot", "roofline.png"])
    text = consumer.render(hand_made(), 100)
    assert "measured, some device: 6.0 MB, 5 tok/s" in text and text.count("nothing") == 2
    assert consumer.unmeasured("cpu") == ""


def test_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    path = tmp_path / "roofline.png"
    arguments.check_plot(str(path))
    plot.draw(hand_made(), str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    with pytest.raises(UsageError, match="must end in .png"):
        bench.main(["--plot", "roofline.txt"])
    with pytest.raises(InputError, match="folder not found"):
        bench.main(["--plot", "no/such/folder/a.png"])

    def damaged(name):
        raise ImportError(f"{name}: numpy.core.multiarray failed to import")

    monkeypatch.setattr(arguments.importlib, "import_module", damaged)
    with pytest.raises(UsageError, match=r"pip install matplotlib") as error:
        bench.main(["--plot", "roofline.png"])
    assert "multiarray failed" in error.value.why


# Usage, and the end


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--random", "chatglm2-6b", "--model", "x"], "--model and --random"),
        (["--random", "x", "--preset", "consumer"], "--random and --preset"),
        (["--random", "no-such-model"], "--random no-such-model: no such model"),
    ],
)
def test_contradictions(args, message):
    with pytest.raises(UsageError, match=message):
        bench.main(args)
    for bad in (["--dtypes", "float31"], ["--prompts", "0"]):
        with pytest.raises(SystemExit, match="2"):
            bench.main(bad)


def test_forms_are_checked_before_anything_is_measured(tmp_path, nothing_measured):
    convert_folder(open_folder(demo_folder()), tmp_path / "q8", quantize="int8")
    argv = ["--model", str(tmp_path / "q8"), "--quantize", "none,int8", "--device", "cpu"]
    with pytest.raises(UsageError, match="quantized already"):
        bench.main(argv)
    with pytest.raises(CheckpointError):
        bench.main(["--model", str(tmp_path), "--device", "cpu"])


def test_without_ceilings_there_are_no_shares(capsys, nothing_measured, toy_config):
    argv = "--random", toy_config, "--no-ceilings", *DECODE, "--batches", "1"
    found = measured(capsys, *argv)
    (result,) = found["results"]
    assert found["ceilings"] is None and found["complete"] and result["tokens_per_s"] > 0
    assert (result["of_bandwidth"], result["of_matmul"]) == (None, None)


def test_what_ends_early_is_shown_as_far_as_it_was_measured(capsys, quick, monkeypatch, toy_config):
    def end(task, repeats, peer):
        take_turns(task, repeats, peer)
        raise RuntimeError("ended")

    monkeypatch.setattr(harness, "take_turns", end)
    argv = ["--random", toy_config, *DECODE, "--batches", "1", "--repeat", "2", "--json"]
    with pytest.raises(RuntimeError, match="ended"):
        bench.main([*argv, "--device", "cpu"])
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] is False and len(found["results"][0]["seconds"]) == 2


def test_ctrl_c_shows_what_there_is(toy_config):
    code = (
        "from glm2_jax.cli import interrupt\nfrom infer.bench import harness\n"
        "from infer.bench.__main__ import main\nfrom infer.bench.ceilings import Ceilings\n"
        "harness.measure_ceilings = lambda device: Ceilings(1e9, 1e9, {})\ninterrupt.run(main)"
    )
    command = [
        sys.executable, "-c", code, "--random", toy_config, "--prompts", "none",
        "--contexts", "8", "--batches", "1,2,4,8,16,32,64,128", "--repeat", "100000", "--json",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "of weights" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "interrupted" in err
    assert json.loads(out)["complete"] is False
