"""`python -m infer.generate`: answer one prompt, or a file of prompts."""

from collections.abc import Sequence

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.messages import note
from glm2_jax.cli.parser import from_flags
from glm2_jax.errors import UsageError
from glm2_jax.processes import join
from infer.generate.options import Settings, parser
from infer.memory.cards import CARDS
from infer.options import SamplingFlags

_UNPLANNED = (
    "prompt", "prompt_file", "batch_file", "history", "system", "adapter", "output"
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, raises GLMError for an expected error."""
    args = parser().parse_args(argv)
    sampling = from_flags(SamplingFlags, args)
    if args.dry_run:
        from infer.generate import dry_run

        if unused := [name for name in _UNPLANNED if vars(args)[name] is not None]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            note(f"--dry-run answers nothing, and the plan is without {flags}")
        return dry_run.run(from_flags(dry_run.Settings, args))
    if args.config is not None:
        raise UsageError("--config needs --dry-run", fix="To answer, name a model: --model DIR.")
    if args.device in CARDS:
        raise UsageError(
            f"--device {args.device} needs --dry-run", fix="To compute, use auto, cpu, gpu or tpu."
        )
    with join.start(from_flags(join.Hosts, args), vars(args)):
        arguments.choose_platform(args.device)
        from infer.generate import run

        return run.run(from_flags(Settings, args, sampling=sampling))


if __name__ == "__main__":
    interrupt.run(main)
