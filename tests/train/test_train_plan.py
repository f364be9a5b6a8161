"""What a training step takes: planned, compiled, and chosen by it."""

import dataclasses
import math
import re

import pytest

from convert.loading.folder import open_folder
from glm2_jax import PRESETS
from glm2_jax.errors import UsageError
from glm2_jax.forms import Attention, Forms
from infer.engine.load import demo_folder
from infer.memory.budget import Budget
from infer.memory.precision import Precision
from infer.tuning.measure import Tuned
from tests.support.mesh_shapes import device
from tests.support.paths import ROOT
from tests.support.program_text import operations
from train import attention, compiler, full, lora, memory, remat
from train.bench import work
from train.compiler import compile_step
from train.devices import Devices
from train.memory import NewAdapter, TrainingPlan
from train.recipe import parse

SIX = PRESETS["chatglm2-6b"]
DEMO = open_folder(demo_folder()).config
TOY = dataclasses.replace(
    SIX, num_layers=4, vocab_size=8192, hidden_size=256, ffn_hidden_size=704, num_heads=8,
    head_dim=32,
)  # fmt: skip
ADAPTER = NewAdapter(8, "attn", 0.0)
FLOAT32, BF16, SMALLER = Precision("float32"), Precision("bfloat16"), ("int8", "int4")


def plan(config=SIX, rows=4, length=512, *, keep=True, adapter=ADAPTER, **more) -> TrainingPlan:
    more = {"precision": BF16, "accumulate": 1} | more
    return TrainingPlan(
        config=config, batch=rows, length=length, remat=not keep, adapter=adapter, **more
    )


def on_cpu(*args, **more) -> TrainingPlan:
    return plan(*args, platform="cpu", precision=FLOAT32, **more)


@pytest.mark.parametrize(
    "planned",
    [
        on_cpu(DEMO, 4, 64),
        on_cpu(TOY, 4, 256, keep=False),
        on_cpu(TOY, 4, 128, adapter=None),
        plan(),
        plan(keep=False),
        plan(rows=1, length=2048),
        plan(precision=Precision("bfloat16", "int4"), keep=False),
        plan(dataclasses.replace(SIX, num_layers=4), adapter=None),
        plan(dataclasses.replace(SIX, num_layers=4), adapter=None, keep=False),
    ],
)
def test_the_plan_is_near_the_compiled_step(planned):
    platform = {"gpu": "cuda"}.get(planned.platform, planned.platform)
    found = compile_step(planned, device(platform)).memory_analysis()
    needed = planned.activations + planned.gradients
    print(f"{found.temp_size_in_bytes / 1e6:.1f} MB of temporaries, planned {needed / 1e6:.1f}")
    assert needed == pytest.approx(found.temp_size_in_bytes, rel=0.12, abs=2e6)
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert planned.total - planned.runtime == pytest.approx(total, rel=0.1)


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 8), ("cuda", 4)])
def test_a_step_of_an_adapter_multiplies_no_more_than_the_model_needs(platform, rows, monkeypatch):
    """Forward, and backward through activations alone; also where logits come in chunks."""
    config = SIX if platform == "cuda" else dataclasses.replace(TOY, num_layers=2, vocab_size=4096)
    base = memory.abstract_params(config, BF16)
    own = work(config, base, memory.abstract_adapter(config, ADAPTER), rows, 512 // (8 // rows))
    monkeypatch.setattr("train.step.LOGITS", min(2**25, 2 * rows * 64 * config.vocab_size))
    kind = "gpu" if platform == "cuda" else platform
    shape = config, rows, 512 // (8 // rows)
    ratios = []
    for keep in (True, False):
        step = compile_step(
            plan(*shape, keep=keep, platform=kind, precision=BF16 if kind == "gpu" else FLOAT32),
            device(platform),
        )
        ratios.append(operations(step.as_text()) / own)
    print(f"{platform}: {ratios[0]:.3f} of the model's operations, {ratios[1]:.3f} recomputing")
    assert 1 <= ratios[0] <= 1.15
    assert 1.2 < ratios[1] < 1.5  # the check sees what it should


@pytest.mark.parametrize("adapter", [ADAPTER, None])
def test_the_loss_of_a_large_vocabulary_fits_a_small_memory(adapter):
    """No array of the program has as many elements as the logits of all positions."""
    config = dataclasses.replace(TOY, num_layers=1, vocab_size=65024, num_heads=2)
    step = compile_step(on_cpu(config, 1, 2048, adapter=adapter), device("cpu"))
    logits = 2048 * config.vocab_size
    shapes = set(re.findall(r"\[([\d,]+)\]", step.as_text()))
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert max(sizes) < logits / 3
    gradients = 0 if adapter else 4 * config.num_params
    assert step.memory_analysis().temp_size_in_bytes - gradients < 4 * logits


def test_frozen_weights_are_not_kept_once_more():
    """Twice as wide an MLP has twice as much to keep, whatever its weights take."""
    narrow, wide = (
        memory.kept_bytes(
            dataclasses.replace(TOY, ffn_hidden_size=size), "float32", ADAPTER, 1, 2, False
        )
        for size in (1024, 2048)
    )
    # [B, T, 2, F] of each layer, and nothing of the matrices: those would be 3 x 1024 x 256 x 4.
    assert wide - narrow == TOY.num_layers * 2 * 2 * 1024 * 4


def dry(capsys, *flags: str, command=lora) -> tuple[int, str]:
    code = command.main(["--dry-run", *flags])
    return code, " ".join(capsys.readouterr().out.split())


def test_a_dry_run_needs_neither_weights_nor_data(capsys):
    code, text = dry(capsys, "--model", "chatglm2-6b", "--device", "3090", "--max-length", "512")
    assert code == 0 and "24.5 GB to use" in text and "4 rows of 512 tokens" in text
    assert "bfloat16 no 12.5 GB" in text and "int4 yes 4.1 GB" in text
    planned = TrainingPlan(SIX, BF16, 4, 512, True, NewAdapter(8, "attn", 0.1))
    assert f"{planned.total / 1e9:.1f} GB yes" in text
    page = (ROOT / "docs/tune/memory.md").read_text(encoding="utf-8")
    quantized = (dataclasses.replace(planned, precision=Precision("bfloat16", x)) for x in SMALLER)
    cells = [f"{one.total / 1e9:.1f}" for one in (planned, *quantized)]
    assert f"| chatglm2-6b | 4 x 512 | {' | '.join(cells)} |" in page


def test_a_dry_run_says_what_to_change(capsys):
    flags = ["--model", "chatglm2-6b", "--max-length", "64"]
    code, text = dry(capsys, *flags, "--device", "a100", command=full)
    assert code == 5 and "does not fit. What fits: no smaller batch" in text
    code, text = dry(capsys, *flags, "--device", "4060", "--no-grad-checkpoint")
    assert code == 0 and "bfloat16 does not fit. What fits: --quantize-base int4" in text
    code, text = dry(capsys, *flags, "--device", "v5e-8", "--batch-size", "8")
    assert code == 0 and "each device of fsdp=8 (v5e-1)" in text
    assert "bfloat16 no 1.6 GB" in text  # an eighth of the base
    with pytest.raises(UsageError, match="--device h200 needs --dry-run"):
        lora.main(["--data", "d", "--device", "h200"])


def test_a_compiler_that_is_here_is_asked(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(compiler, "ask", lambda plan, name: asked.append(plan) or (10**9, ""))
    _, text = dry(capsys, "--device", "cpu", "--max-length", "64")
    assert "the compiler's own figure for float32: 1.4 GB in total" in text  # with jax itself
    assert [(one.config, one.length, one.remat) for one in asked] == [(DEMO, 64, False)]


def test_the_compiler_answers_from_a_process_of_its_own():
    small = dataclasses.replace(TOY, num_layers=1, vocab_size=512)
    peak, problem = compiler.ask(on_cpu(small, 1, 64), "cpu")
    assert problem == "" and peak is not None
    assert on_cpu(small, 1, 64).weights < peak < 50e6


@pytest.mark.parametrize(
    ("flags", "memory", "recorded", "chosen"),
    [
        ([], 10**12, None, False),
        ([], 10**6, None, True),
        ([], None, None, True),
        (["--grad-checkpoint"], 10**12, None, True),
        (["--no-grad-checkpoint"], 10**6, True, False),
        (["--resume", "auto"], 10**12, True, True),
        (["--resume", "auto"], 10**6, False, False),
        (["--resume", "auto"], 10**6, None, True),
    ],
)
def test_activations_are_recomputed_where_they_do_not_fit(
    flags, memory, recorded, chosen, capsys, monkeypatch
):
    given = parse(lora.parser(), ["--data", "d", "--output", "out", *flags])
    recipe = lora.make_recipe(given)
    monkeypatch.setattr(remat, "budget_of", lambda _: Budget("here", "cpu", memory))
    monkeypatch.setattr(remat, "recorded", lambda path, name: recorded)
    monkeypatch.setattr(remat, "plan_of", lambda *args: on_cpu(DEMO, 1, 8))
    devices: object = type("One", (), {"mesh": None, "first": None})
    found = remat.choose_remat(recipe, *[None] * 2, devices)  # type: ignore[arg-type]
    assert found.training.grad_checkpoint is chosen
    decided = recorded is None and not any("grad-checkpoint" in flag for flag in flags)
    assert ("gradient checkpointing is" in capsys.readouterr().err) == decided


KEPT = Tuned(Forms(attention=((Attention(512, 512, whole=True), "xla"),)))


@pytest.mark.parametrize(
    ("flags", "kept", "recorded", "chosen"),
    [
        ([], None, None, None),
        ([], KEPT, None, "xla"),
        (["--attention", "usual"], KEPT, None, "usual"),
        (["--resume", "auto"], KEPT, {"command": "train"}, None),
        (["--resume", "auto"], None, {"command": "train", "--attention": "xla"}, "xla"),
        (["--resume", "auto"], KEPT, {"command": "train", "--attention": "splash"}, None),
    ],
)
def test_attention_is_as_measured_and_stays_as_a_run_began(
    flags, kept, recorded, chosen, capsys, monkeypatch
):
    recipe = lora.make_recipe(parse(lora.parser(), ["--data", "d", "--output", "out", *flags]))
    monkeypatch.setattr(attention, "recorded", lambda path, name: (recorded or {}).get(name))
    monkeypatch.setattr(attention.store, "find", lambda key: kept)
    folder, devices = open_folder(demo_folder()), Devices(device("cpu"))
    found = attention.choose_attention(recipe, folder, devices).training.attention
    assert found == chosen
    assert ("form xla, as measured" in capsys.readouterr().err) == (chosen == "xla")
    config = attention.with_attention(DEMO, found)
    assert (config.forms == Forms()) == (chosen in (None, "usual"))


def test_a_form_of_attention_of_another_device_is_refused():
    recipe = parse(lora.parser(), ["--data", "d", "--output", "out", "--attention", "cudnn"])
    arguments = lora.make_recipe(recipe), open_folder(demo_folder()), Devices(device("cpu"))
    with pytest.raises(UsageError, match="cudnn is not available for float32 on this device"):
        attention.choose_attention(*arguments)
