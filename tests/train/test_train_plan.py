"""What a training step takes: planned, compiled, and chosen by it."""

import dataclasses
import math
import re
from typing import Any

import pytest

from convert.loading.folder import open_folder
from glm2_jax import PRESETS
from glm2_jax.choices import REMAT
from glm2_jax.errors import CheckpointError, UsageError
from glm2_jax.forms import Attention, Forms
from infer.engine.load import demo_folder
from infer.memory.budget import SPARE, Budget
from infer.memory.precision import Precision
from infer.tuning import automatic
from infer.tuning.choose import Choice
from infer.tuning.measure import Measured, Trained, Tuned
from tests.support.mesh_shapes import device
from tests.support.paths import ROOT
from tests.support.program_text import operations
from train import attention, compiler, full, lora, memory, remat
from train.bench import work
from train.compiler import compile_step
from train.devices import Devices
from train.memory import NewAdapter, TrainingPlan
from train.recipe import Recipe, parse

SIX = PRESETS["chatglm2-6b"]
DEMO = open_folder(demo_folder()).config
TOY = dataclasses.replace(
    SIX, num_layers=4, vocab_size=8192, hidden_size=256, ffn_hidden_size=704, num_heads=8,
    head_dim=32,
)  # fmt: skip
ADAPTER = NewAdapter(8, "attn", 0.0)
FLOAT32, BF16, SMALLER = Precision("float32"), Precision("bfloat16"), ("int8", "int4")


def plan(config=SIX, rows=4, length=512, *, adapter=ADAPTER, **more) -> TrainingPlan:
    more = {"precision": BF16, "accumulate": 1, "remat": "none"} | more
    return TrainingPlan(config=config, batch=rows, length=length, adapter=adapter, **more)


def on_cpu(*args, **more) -> TrainingPlan:
    return plan(*args, platform="cpu", precision=FLOAT32, **more)


@pytest.mark.parametrize(
    "planned",
    [
        on_cpu(DEMO, 4, 64),
        on_cpu(TOY, 4, 256, remat="full"),
        on_cpu(TOY, 4, 256, remat="products"),
        on_cpu(TOY, 4, 128, adapter=None),
        plan(),
        plan(remat="full"),
        plan(remat="attention"),
        plan(rows=1, length=2048),
        plan(precision=Precision("bfloat16", "int4"), remat="full"),
        plan(dataclasses.replace(SIX, num_layers=4), adapter=None),
        plan(dataclasses.replace(SIX, num_layers=4), adapter=None, remat="full"),
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
    for policy in ("none", "full"):
        step = compile_step(
            plan(*shape, remat=policy, platform=kind, precision=BF16 if kind == "gpu" else FLOAT32),
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
            dataclasses.replace(TOY, ffn_hidden_size=size), "float32", ADAPTER, 1, 2, "none"
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
    assert "bfloat16 none 12.5 GB" in text and "int4 full 4.1 GB" in text
    planned = TrainingPlan(SIX, BF16, 4, 512, "full", NewAdapter(8, "attn", 0.1))
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
    assert "bfloat16 none 1.6 GB" in text  # an eighth of the base
    with pytest.raises(UsageError, match="--device h200 needs --dry-run"):
        lora.main(["--data", "d", "--device", "h200"])


def test_a_compiler_that_is_here_is_asked(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(compiler, "ask", lambda plan, name: asked.append(plan) or (10**9, ""))
    _, text = dry(capsys, "--device", "cpu", "--max-length", "64")
    assert "the compiler's own figure for float32: 1.4 GB in total" in text  # with jax itself
    assert [(one.config, one.length, one.remat) for one in asked] == [(DEMO, 64, "none")]


def test_the_compiler_answers_from_a_process_of_its_own():
    small = dataclasses.replace(TOY, num_layers=1, vocab_size=512)
    peak, problem = compiler.ask(on_cpu(small, 1, 64), "cpu")
    assert problem == "" and peak is not None
    assert on_cpu(small, 1, 64).weights < peak < 50e6


@pytest.mark.parametrize(
    ("flags", "memory", "recorded", "chosen"),
    [
        ([], 10**12, None, "none"),
        ([], 10**6, None, "full"),
        ([], None, None, "full"),
        (["--grad-checkpoint"], 10**12, None, "full"),
        (["--grad-checkpoint", "attention"], 10**12, None, "attention"),
        (["--no-grad-checkpoint"], 10**6, "full", "none"),
        (["--resume", "auto"], 10**12, "products", "products"),
        (["--resume", "auto"], 10**6, "none", "none"),
        (["--resume", "auto"], 10**6, None, "full"),
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
    found = remat.choose_remat(recipe, *[None] * 2, devices, Tuned())  # type: ignore[arg-type]
    assert found.training.grad_checkpoint == chosen
    decided = recorded is None and not any("grad-checkpoint" in flag for flag in flags)
    assert ("gradient checkpointing is" in capsys.readouterr().err) == decided


def measured(remat, usual="none", form="usual", **seconds) -> Tuned:
    """What `infer.tune --train 4x64` may have found."""
    lines = (
        Measured("attention", Choice(form, "usual")),
        Measured("recomputing", Choice(remat, usual, seconds)),
    )
    return Tuned(training=(Trained(4, 64, *lines),))


NEEDED = {name: on_cpu(DEMO, 4, 64, remat=name).total * SPARE for name in REMAT}
ALL = {"none": 1.0, "products": 0.8, "attention": 0.9, "full": 0.7}


@pytest.mark.parametrize(
    ("memory", "found", "chosen"),
    [
        (10**12, measured("products", **ALL | {"full": 0.79}), "products"),  # by more than noise
        (10**12, measured("full", **ALL), "full"),
        (10**12, measured("none", none=1.0, full=0.99), "none"),
        # What does not fit is left out, whatever it was measured as.
        (NEEDED["products"] - 1, measured("products", **ALL), "full"),
        (NEEDED["products"] - 1, measured("products", **ALL | {"full": 1.2}), "attention"),
        (NEEDED["none"] - 1, measured("none", **ALL | {"none": 0.1, "full": 0.9}), "products"),
        (10**6, measured("none", **ALL), "full"),
        (None, measured("products", **ALL), "full"),
        # What is taken without measuring was not compared with anything.
        (10**12, measured("products", "full", products=1.0, full=2.0), "none"),
        (10**12, measured("full", "full"), "none"),
        (10**12, Tuned(), "none"),
    ],
)
def test_the_fastest_of_what_fits_is_chosen(memory, found, chosen):
    policy, why = remat.fastest(on_cpu(DEMO, 4, 64), memory, found)
    assert policy == chosen
    by_measuring = why.startswith(f"gradient checkpointing: {chosen}, the fastest of what fits as")
    assert by_measuring or why.startswith("gradient checkpointing is")


def test_needs_differ_by_what_is_recomputed():
    assert sorted(REMAT, key=NEEDED.__getitem__) == [*reversed(REMAT)]


KEPT = Tuned(Forms(attention=((Attention(512, 512, whole=True), "xla"),)))


def choose_attention(recipe, folder, devices) -> Recipe:
    """As for a run of four rows of 64 tokens."""
    batches: Any = type("Some", (), {"shape": (1, 4), "width": 64})
    tuned = remat.find_tuned(recipe, folder, devices)
    return attention.choose_attention(recipe, folder, devices, tuned, batches)


@pytest.mark.parametrize(
    ("flags", "kept", "recorded", "chosen"),
    [
        ([], None, None, None),
        ([], KEPT, None, "xla"),
        (["--tuned", "off"], KEPT, None, None),
        ([], measured("none"), None, None),
        ([], measured("none", form="xla"), None, "xla"),
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
    monkeypatch.setattr(automatic.store, "find", lambda key: kept)
    folder, devices = open_folder(demo_folder()), Devices(device("cpu"))
    found = choose_attention(recipe, folder, devices).training.attention
    assert found == chosen
    assert ("form xla, as measured" in capsys.readouterr().err) == (chosen == "xla")
    config = attention.with_attention(DEMO, found)
    assert (config.forms == Forms()) == (chosen in (None, "usual"))


def test_on_a_mesh_nothing_counts_that_another_process_may_not_have(capsys):
    recipe = lora.make_recipe(parse(lora.parser(), ["--data", "d", "--tuned", "missing.json"]))
    mesh: Any = object()
    folder = open_folder(demo_folder())
    assert remat.find_tuned(recipe, folder, Devices(device("cpu"), mesh)) == Tuned()
    assert "--tuned missing.json is not used" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"missing.json holds no choice of forms"):
        remat.find_tuned(recipe, folder, Devices(device("cpu")))


def test_a_form_of_attention_of_another_device_is_refused():
    recipe = parse(lora.parser(), ["--data", "d", "--output", "out", "--attention", "cudnn"])
    arguments = lora.make_recipe(recipe), open_folder(demo_folder()), Devices(device("cpu"))
    with pytest.raises(UsageError, match="cudnn is not available for float32 on this device"):
        choose_attention(*arguments)
