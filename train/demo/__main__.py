"""Trains the bundled demo model: `python -m train.demo --output FOLDER`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument, positive, random_seed
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.parser import Parser

if TYPE_CHECKING:
    from glm2_jax import GLMConfig, Tokenizer
    from train.demo.data import Pair

PROG = "python -m train.demo"
DESCRIPTION = """Trains the small bilingual demo model on the questions in train/demo, and reports
how many it answers correctly. The same machine and versions give the same weights."""
PIECES = 2043  # 2048 with the five special ids
ROWS, WIDTH = 8, 256  # a batch: 2048 tokens
WARMUP_STEPS = 100
DROPOUT = 0.1


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        prog=PROG, description=DESCRIPTION,
        example=f"{PROG} --output demo-model && python -m infer.generate --model demo-model",
    )  # fmt: skip
    add = parser.add_argument_group("training").add_argument
    add(
        "--output", metavar="DIR", type=path_argument, default="demo-model",
        help="folder of the new model",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace that folder")
    add("--epochs", type=positive, metavar="N", default=100, help="passes over the questions")
    add("--lr", type=float, metavar="X", default=2e-3, help="highest learning rate")
    add("--seed", type=random_seed, metavar="N", default=0, help="random seed")
    parser.add_common()
    args = parser.parse_args(argv)
    if not 0 < args.lr < 1:
        parser.error(f"argument --lr: must be between 0 and 1, got {args.lr:g}")

    from convert.writing.destination import check_destination
    from convert.writing.own import save_checkpoint
    from glm2_jax import Tokenizer
    from train.demo.data import load_pairs, train_tokenizer

    check_destination(args.output, args.overwrite)
    pairs = load_pairs()
    tokenizer = Tokenizer.from_bytes(train_tokenizer(pairs, PIECES))
    config = demo_config(tokenizer)
    wordings = sum(len(pair.questions) for pair in pairs)
    note(f"{config.num_params:,} parameters, {len(pairs)} questions in {wordings} wordings")
    params = train(config, tokenizer, pairs, epochs=args.epochs, lr=args.lr, seed=args.seed)
    save_checkpoint(
        args.output, config, params, tokenizer, source=PROG, dtype="float16",
        overwrite=args.overwrite,
    )  # fmt: skip
    note(f"saved {args.output}")
    _report(args.output, pairs)
    return 0


def demo_config(tokenizer: Tokenizer) -> GLMConfig:
    """Return ChatGLM2's architecture at 1/2700 of its size."""
    from glm2_jax import GLMConfig

    return GLMConfig(
        num_layers=4, vocab_size=tokenizer.size, hidden_size=192, ffn_hidden_size=512,
        num_heads=8, num_kv_heads=2, head_dim=24, seq_length=1024,
    )  # fmt: skip


def train(
    config: GLMConfig, tokenizer: Tokenizer, pairs: list[Pair], *, epochs: int, lr: float, seed: int
) -> Any:
    """Return all parameters, trained in float32: AdamW with warm-up, cosine decay and clipping."""
    import jax
    import numpy as np
    import optax

    from glm2_jax import init_params
    from train.demo.data import epoch
    from train.step import init_state, make_step

    rng = np.random.default_rng(seed)
    key = jax.random.key(seed)
    steps_per_epoch = sum(1 for _ in epoch(pairs, tokenizer, rng, ROWS, WIDTH))
    steps = epochs * steps_per_epoch  # an estimate: packing differs a little between epochs
    warmup = min(WARMUP_STEPS, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, warmup, steps, lr * 0.02)
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    params = init_params(config, key)
    state = init_state(optimizer, params)
    dropping = dataclasses.replace(config, hidden_dropout=DROPOUT)
    step = make_step(dropping, optimizer, remat="none")
    count = 0
    with Progress("training, steps", steps, interval=30.0) as progress:
        for number in range(epochs):
            losses = []
            for batch in epoch(pairs, tokenizer, rng, ROWS, WIDTH):
                batch = jax.tree.map(lambda x: x[None], batch)  # one micro-batch per step
                params, state, metrics = step(None, params, state, batch, key, count)
                losses.append(metrics.loss)
                count += 1
                progress(count)
            if number % 10 == 9 or number == epochs - 1:
                note(f"epoch {number + 1} of {epochs}: loss {float(np.mean(losses)):.4f}")
    return params


def _report(folder: str, pairs: list[Pair]) -> None:
    """Open the saved model and report how well it answers."""
    from infer import load
    from train.demo import data

    engine, heldout = load(folder), data.load_heldout()
    wrong, missed = data.wrong_answers(engine, pairs), data.missed_wordings(engine, heldout)
    for question, expected, got in wrong:
        note(f"  wrong: {question} -> {got} (expected: {expected})")
    for question, got in missed:
        note(f"  missed: {question} -> {got}")
    note(f"correct answers: {len(pairs) - len(wrong)} of {len(pairs)} questions as trained")
    note(f"unseen wordings: {len(heldout) - len(missed)} of {len(heldout)}")


if __name__ == "__main__":
    interrupt.run(main)
