"""What `--dry-run` says of a compiler's own figures for a TPU that is not here."""

import dataclasses
import json

import pytest

from glm2_jax import PRESETS
from infer.generate.__main__ import main
from infer.memory import compiler
from infer.memory.cards import CARDS
from infer.memory.plan import Plan, weight_bytes
from infer.memory.precision import Precision

SIX = PRESETS["chatglm2-6b"]
SMALL = dataclasses.replace(
    SIX, num_layers=1, vocab_size=1024, hidden_size=256, ffn_hidden_size=512, num_heads=4
)
FULL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, 24.13G exceeds "
    "15.75G. HLO module: jit_forward.\nSee elsewhere."
)
BF16 = Precision("bfloat16")


def dry(capsys, *args: str, device: str = "v5e-1") -> str:
    assert main(["--dry-run", "--config", "chatglm2-6b", "--device", device, *args]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_without_the_compiler_one_line_says_where_it_is(capsys, monkeypatch):
    monkeypatch.setattr(compiler, "installed", lambda: False)
    monkeypatch.setattr(compiler, "_run", lambda request: pytest.fail("asked"))
    assert dry(capsys).count("pip install 'jax[tpu]'") == 1
    assert json.loads(dry(capsys, "--json"))["compiled"] == []
    assert "tpu-compile" not in dry(capsys, device="3090")
    assert {card.platform for card in CARDS.values() if card.topology} == {"tpu"}


def test_the_figures_stand_beside_the_plan(capsys, monkeypatch):
    asked = []

    def run(request):
        asked.append(request)
        if request["dtype"] == "float32":
            return {"peak": {}, "error": FULL}
        return {"peak": {"step": 7 * 10**9, "prompt": 8 * 10**9}}

    monkeypatch.setattr(compiler, "installed", lambda: True)
    monkeypatch.setattr(compiler, "_run", run)
    text = dry(capsys, "--max-length", "4096", "--prefill-chunk", "512")
    planned = Plan(SIX, BF16, 4096, platform="tpu", chunk=512).total / 1e9
    assert f"bfloat16, 4,096 tokens: step 7.0 GB, prompt 8.0 GB; planned {planned:.1f} GB" in text
    assert "float32, 4,096 tokens: does not fit, Ran out of memory on HBM, 24.13G exceeds" in text
    assert "15.75G; planned" in text and "E1000" not in text and "HLO module" not in text
    assert [request["programs"] for request in asked] == [{"step": 1, "prompt": 512}] * 4
    assert asked[0]["topology"] == "v5e:1x1" and asked[0]["slots"] == 4096
    found = json.loads(dry(capsys, "--json", "--quantize", "int8", "--memory-limit", "7.8"))
    (one,) = found["compiled"]
    assert one["quantize"] == "int8" and one["prompt_peak"] == 8 * 10**9
    assert one["fits"] is False  # there is room on the card, but not in what the user allows


def test_the_process_is_ours_and_its_failure_decides_nothing(tmp_path, monkeypatch):
    (tmp_path / "infer").mkdir()
    (tmp_path / "infer" / "__init__.py").write_text("raise SystemExit('the user's own file')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ".")
    assert compiler._run({}) == {"error": "KeyError: 'config'"}  # of our own module
    monkeypatch.setattr(compiler, "_MODULE", "infer.memory.no_such_module")
    verdict = compiler.ask(Plan(SMALL, BF16, 64), "v5e-1", None)
    assert verdict.fits is None and "no_such_module" in verdict.problem
    assert (verdict.step, verdict.prompt) == (None, None)


@pytest.mark.skipif(not compiler.installed(), reason="libtpu is not installed")
def test_the_real_compiler_answers_and_refuses():
    verdict = compiler.ask(Plan(SMALL, BF16, 128, chunk=64), "v5e-1", None)
    assert verdict.fits and not verdict.problem
    assert verdict.step is not None and verdict.step >= weight_bytes(SMALL, BF16)
    verdict = compiler.ask(Plan(SIX, Precision("float32"), 2048), "v5e-1", None)
    assert verdict.fits is False and "exceeds" in verdict.problem and verdict.step is None
