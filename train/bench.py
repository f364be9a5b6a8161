"""`python -m train.bench`: how fast this device trains an adapter, and what share of its limits.

Imports at the top need no jax, so that `--help` does not wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument
from glm2_jax.cli.parser import Parser, flag, from_flags
from infer.bench import options
from train.options import TUNED, remat_flag

if TYPE_CHECKING:
    from glm2_jax import GLMConfig, LoRA
    from infer.bench.harness import Task
    from infer.bench.report import Report
    from infer.bench.subject import Subject, Variant
    from infer.memory.precision import Precision

PROG = "python -m train.bench"
DESCRIPTION = """Measures optimizer steps of a LoRA adapter: tokens per second, and the share of
the measured matrix product rate.

Operations per token: 4 for each element of a matrix (2 forward, 2 for the gradient of the
activations; the frozen base needs no weight gradient), 6 for each parameter of the adapter, and
12 for each pair of query and key, head and dimension. Recomputation by --grad-checkpoint is not
counted.

Exit codes: 0 success, 2 usage, 3 bad input, 4 model or checkpoint, 5 out of memory or device,
130 interrupted, 143 terminated."""
EXAMPLE = f"""{PROG} --random chatglm2-6b --dtypes bfloat16 --quantize none,int4
  {PROG} --random config.json --batch-size 4 --length 128 --peer peft"""
PEER = """alternate with the same steps in peft and transformers' GlmForCausalLM, with random
weights; needs torch and a source checkout"""


@dataclass(frozen=True, kw_only=True)
class Settings(options.Settings):
    """The flags of the command."""

    batch_size: int = options.count("rows per step", default=4)
    length: int = options.count("tokens per row", default=512)
    rank: int = options.count("rank of the adapter", default=8)
    target: str = flag("matrices to adapt, see train.lora", default="attn", metavar="NAMES")
    grad_checkpoint: str | None = remat_flag("as train.lora chooses")
    measured: str = flag(
        TUNED.replace("--attention", "attention"),
        name="tuned", type=path_argument, default="auto", metavar="auto|off|F",
    )  # fmt: skip


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    options.add_options(
        result,
        Settings,
        layout={
            "help": "layers stacked or in a list (default: by device, as train.lora; on a CPU "
            "stacked with --grad-checkpoint)"
        },
        steps={"default": 1},
        peer={"choices": ("peft",), "metavar": "peft", "help": PEER},
    )
    result.add_common()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises GLMError for what the user can fix."""
    args, values = options.parse(parser(), argv)
    from glm2_jax.lora import find_targets
    from infer.bench import harness

    settings = from_flags(Settings, args, **values)
    find_targets(settings.target)
    tasks, layouts = partial(_tasks, settings), partial(_layout, settings)
    return harness.run(settings, tasks, layouts=layouts)[1]


def _layout(settings: Settings, subject: Subject, dtype: str, quantize: str | None) -> str:
    """Return the layout of the layers for flags of these values, as train.lora has it."""
    from glm2_jax.runtime.devices import layers_to_train

    precision = subject.precision(dtype, quantize)
    remat, _ = _chosen(settings, subject.config, precision, subject.device)
    return layers_to_train(subject.device.platform, remat)


def _chosen(
    settings: Settings, config: GLMConfig, precision: Precision, device: Any
) -> tuple[str, str | None]:
    """Return what is recomputed, and the form of attention, as train.lora chooses them."""
    from infer.memory.shortage import budget_of
    from infer.tuning.automatic import stored
    from train.attention import measured_form
    from train.memory import NewAdapter, TrainingPlan
    from train.remat import fastest

    tuned = stored(settings.measured, config, precision, device)
    rows, length = settings.batch_size, settings.length
    adapter = NewAdapter(settings.rank, settings.target, 0.0)
    plan = TrainingPlan(config, precision, rows, length, "none", adapter, 1, device.platform)
    remat = settings.grad_checkpoint or fastest(plan, budget_of(device).memory, tuned)[0]
    return remat, measured_form(tuned, rows, length)


def _tasks(
    settings: Settings, config: GLMConfig, base: Any, variant: Variant, report: Report
) -> Iterator[Task]:
    import jax

    from glm2_jax.lora import init_lora
    from infer.bench.harness import Task, devices_of
    from infer.bench.report import Result
    from train.attention import with_attention

    remat, form = _chosen(settings, config, variant.precision, devices_of(base)[0])
    config = with_attention(config, form)
    variant = replace(variant, forms=config.forms)
    rows, length = settings.batch_size, settings.length
    lora = init_lora(config, jax.random.key(0), rank=settings.rank, targets=settings.target)
    shape = {"batch": rows, "length": length, "steps": settings.steps, "rank": settings.rank}
    shape["checkpointing"] = remat != "none"
    flops = work(config, base, lora, rows, length)
    what = f"step {rows} x {length}{'' if remat == 'none' else f', recomputing {remat}'}"
    result = Result(variant, what, shape, rows * length, None, flops)
    yield Task(result, lambda: _build(settings, config, base, lora, remat))


def _build(
    settings: Settings, config: GLMConfig, base: Any, lora: LoRA, remat: str
) -> tuple[Callable[[], float], float]:
    """Compile `--steps` steps; returns what takes them and returns the seconds of one, and the
    seconds of compiling."""
    import jax
    import numpy as np

    from train.data.batch import Batch
    from train.optim import make_optimizer
    from train.step import init_state, make_step

    shape = 1, settings.batch_size, settings.length
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(settings.length, dtype=np.int32), shape)
    batch = Batch(tokens, np.ones(shape, np.int32), positions, positions > 0)
    optimizer = make_optimizer(5e-5)
    trained, state = lora, init_state(optimizer, lora)
    rest = batch, jax.random.key(0), np.int32(0)
    start = time.perf_counter()
    step = make_step(config, optimizer, remat=remat)
    program = step.lower(base, trained, state, *rest).compile()
    compile_s = time.perf_counter() - start

    def take() -> float:
        nonlocal trained, state
        start = time.perf_counter()
        for _ in range(settings.steps):
            trained, state, metrics = program(base, trained, state, *rest)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / settings.steps

    take()  # the first one is slower
    return take, compile_s


def work(config: GLMConfig, base: Any, lora: LoRA, batch: int, length: int) -> float:
    """Return the operations that a step of `batch` rows of `length` tokens cannot do without."""
    from glm2_jax.schemes import COLUMN_AXES

    c, layers = config, base["layers"]
    matrices = base[config.block.head].size + sum(
        weight.size
        for layer in (layers if isinstance(layers, list) else [layers])
        for name, weight in layer.items()
        if name in COLUMN_AXES
    )
    pairs = batch * length * (length + 1) / 2
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * pairs
    return (4 * matrices + 6 * lora.num_params) * batch * length + attention


if __name__ == "__main__":
    interrupt.run(main)
