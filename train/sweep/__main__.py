"""`python -m train.sweep`: searches for good settings of `train.lora`."""

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from itertools import chain

from glm2_jax.choices import DEVICES
from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import choose_platform, whole
from glm2_jax.cli.messages import speak_as
from glm2_jax.cli.parser import Parser, add_flags, from_flags
from glm2_jax.errors import UsageError
from glm2_jax.extras import pip_install
from glm2_jax.processes.supervise import connect, is_supervised
from infer.memory.budget import find_budget, take_gpu_share
from train.command import make_parser
from train.lora import ADAPTER, LR, make_recipe
from train.recipe import Recipe, name_of, parse, words_of
from train.sweep.jobs import find_gpus, run_jobs
from train.sweep.options import SweepOptions
from train.sweep.space import Point, Space, first_point, read_space

PROG = "python -m train.sweep"
DESCRIPTION = """Searches for good settings of train.lora: trains adapters with settings from
--space, and compares them on rows that they were not trained on.

All flags of train.lora hold for every trial. --output holds the study, which --resume auto
continues after any end: no trial is lost, and none is run twice. At the end: a table on standard
output, report.json, three pictures, and best.yml, with which train.lora trains the best settings
on all rows. Needs the packages optuna, cmaes and matplotlib.

Exit codes: 0 success, 2 usage, 3 bad data or no trial with a result, 4 model or checkpoint, 5 out
of memory or device, 130 interrupted, 143 terminated (the study can be resumed)."""
EXAMPLE = f"""{PROG} --data data.jsonl --space lr=1e-5..1e-3:log rank=4,8,16 --trials 20
  {PROG} --data data.jsonl --space space.yml --search random --folds 5 --metric bleu-4"""


def parser() -> Parser:
    """Return the parser of the command."""
    result = make_parser(PROG, DESCRIPTION, EXAMPLE, lr=LR, output="sweep", adapter=ADAPTER)
    add_flags(result, "sweep", SweepOptions)
    result.add_argument("--job", type=whole, help=argparse.SUPPRESS)  # which of --jobs this is
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; raises GLMError for what the user can fix."""
    words = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    space = _space(made, words)
    args = _parse(made, words, first_point(space))
    _check(args)
    several = args.jobs > 1 and args.job is None
    gpus = find_gpus(args.jobs, args.device) if several else []
    if is_supervised():
        connect()
        speak_as(f"job {args.job}")
    choose_platform("cpu" if several else args.device)
    if not several:
        take_gpu_share(find_budget(args.device), math.inf)
    from train.sweep import run

    def make(point: Point) -> Recipe:
        return make_recipe(_parse(made, words, point))

    start = (lambda: run_jobs(words, gpus)) if several else None
    return run.run(from_flags(SweepOptions, args), space, make, args.job, start)


def _space(made: Parser, words: list[str]) -> Space:
    """Return the space that the flags name; UsageError for a setting of it that is also a flag."""
    finder = Parser(prog=made.prog, add_help=False)
    finder.add_argument("--space", action="extend", nargs="+")
    found, others = finder.parse_known_args(words)
    if not found.space or {"-h", "--help", "--version"} & {*others}:
        made.parse_args(words)  # prints the help, or what is wrong
    space = read_space(made, found.space)
    flags = {word.partition("=")[0].removeprefix("--") for word in others}
    if both := sorted(flags & space.keys()):
        raise UsageError(
            f"--{both[0]} is given and is also in --space.", fix="Leave one of them out."
        )
    return space


def _parse(made: Parser, words: list[str], point: Point) -> argparse.Namespace:
    """Parse the flags with those of a point."""
    actions = {name_of(action): action for action in made._actions}
    more = (words_of(actions[name], name, x, "--space") for name, x in point.items())
    return parse(made, [*words, *chain.from_iterable(more)])


def _check(args: argparse.Namespace) -> None:
    """Refuse what a sweep does not have, and say what is missing."""
    if args.dry_run or args.device not in DEVICES:
        raise UsageError(
            "--dry-run and a --device that is only planned for belong to train.lora.",
            "A sweep trains.",
            "Plan the largest trial: python -m train.lora --dry-run.",
        )
    if any((args.coordinator, args.num_processes, args.process_id)):
        raise UsageError(
            "A sweep runs in one process, not in several that share a run.",
            fix="Leave out --coordinator, --num-processes and --process-id.",
        )
    for name in ("optuna", "cmaes", "matplotlib.figure"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f"{name.partition('.')[0]} is not installed, and train.sweep needs it",
                str(error),
                pip_install("sweep"),
            ) from error


if __name__ == "__main__":
    interrupt.run(main)
