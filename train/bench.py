"""`python -m train.bench`: how fast this device trains an adapter, and what share of its limits.

Imports at the top need no jax, so that `--help` does not wait for it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from glm2_jax.cli import interrupt
from glm2_jax.cli.parser import Parser, flag, from_flags
from infer.bench import options

if TYPE_CHECKING:
    from glm2_jax import GLMConfig, LoRA
    from infer.bench.harness import Task
    from infer.bench.report import Report
    from infer.bench.subject import Variant

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
    grad_checkpoint: bool = flag(
        "gradient checkpointing: recompute activations in the backward pass",
        action=argparse.BooleanOptionalAction, default=False,
    )  # fmt: skip


def parser() -> Parser:
    """Return the parser of the command."""
    result = Parser(prog=PROG, description=DESCRIPTION, example=EXAMPLE)
    options.add_options(
        result,
        Settings,
        layout={
            "help": "layers stacked or in a list (default: by device, as train.lora; with "
            "--grad-checkpoint stacked)"
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
    if settings.layout is None and settings.grad_checkpoint:
        settings = replace(settings, layout=("stacked",))
    find_targets(settings.target)
    return harness.run(settings, partial(_tasks, settings))[1]


def _tasks(
    settings: Settings, config: GLMConfig, base: Any, variant: Variant, report: Report
) -> Iterator[Task]:
    import jax

    from glm2_jax.lora import init_lora
    from infer.bench.harness import Task
    from infer.bench.report import Result

    rows, length = settings.batch_size, settings.length
    lora = init_lora(config, jax.random.key(0), rank=settings.rank, targets=settings.target)
    shape = {"batch": rows, "length": length, "steps": settings.steps, "rank": settings.rank}
    shape["checkpointing"] = settings.grad_checkpoint
    flops = work(config, base, lora, rows, length)
    result = Result(variant, f"step {rows} x {length}", shape, rows * length, None, flops)
    yield Task(result, lambda: _build(settings, config, base, lora))


def _build(
    settings: Settings, config: GLMConfig, base: Any, lora: LoRA
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
    step = make_step(config, optimizer, remat=settings.grad_checkpoint)
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
