"""The flags of `python -m train.sweep` that `train.lora` does not have. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from glm2_jax.cli.arguments import positive, whole
from glm2_jax.cli.parser import flag

SEARCHES = ("grid", "random", "tpe", "cmaes")
VAL_LOSS, ACCURACY = "val_loss", "accuracy"
METRICS = (VAL_LOSS, "bleu-4", "rouge-l", ACCURACY)
PRUNERS = ("halving", "none")
TRIALS = 20
VAL_SPLIT = 0.1  # where nothing says what to validate on


@dataclass(frozen=True)
class SweepOptions:
    """What is searched, and how."""

    space: Sequence[str] = flag(
        "settings of train.lora to search: NAME=A,B,C are values, NAME=LOW..HIGH a range, "
        "LOW..HIGH:log one on a logarithmic scale, LOW..HIGH:log:5 five values of it; or a YAML "
        "file of lines such as `lr: 1e-5..1e-3:log` and `rank: [4, 8]`",
        action="extend", nargs="+", required=True, metavar="NAME=VALUES|FILE.yml",
    )  # fmt: skip
    search: str = flag(
        "grid = every combination of values, in random order; random; tpe = Bayesian "
        "(tree-structured Parzen estimator); cmaes = evolution of two or more ranges",
        choices=SEARCHES, default="tpe",
    )  # fmt: skip
    trials: int | None = flag(
        f"trials of the study, with those that are there already (default: {TRIALS}; grid: all)",
        type=positive, metavar="N",
    )  # fmt: skip
    metric: str = flag(
        "what is compared, on the validation rows: their loss, or of greedy answers the mean "
        "BLEU-4, the mean ROUGE-L, or the share that is right word for word",
        choices=METRICS, default=VAL_LOSS,
    )  # fmt: skip
    folds: int | None = flag(
        "cross-validation: split the rows into K parts, stratified by file, train K times without "
        f"one of them, and compare the mean (default: one run, --val-split {VAL_SPLIT})",
        type=partial(whole, least=2), metavar="K",
    )  # fmt: skip
    prune: str = flag(
        "stop trials whose validation loss is hopeless: halving = successive halving after 1/9 and "
        "3/9 of a run, of which the better third goes on",
        choices=PRUNERS, default="halving",
    )  # fmt: skip
    jobs: int = flag(
        "trials at once, each on a GPU of its own", type=positive, default=1, metavar="N"
    )
    json: bool = flag("print one JSON object instead of a table", action="store_true")

    @property
    def maximize(self) -> bool:
        """Whether a higher figure is better."""
        return self.metric != VAL_LOSS
