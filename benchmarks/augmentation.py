"""Does augmentation raise the accuracy on wordings that were not trained on?

Trains the demo model on examples/facts.jsonl by the recipe demo, as it is and with the new rows of
`train.augment`: the same optimizer steps, rows a step and learning rate, once for each seed,
which also draws the new rows. Then it answers examples/facts_paraphrased.jsonl, greedily.
Those wordings were written by hand before the templates and the table of synonyms; none of them is
a question of a training file, which is checked.

    python -m benchmarks.augmentation --seeds 5

Prints a table on standard output, and every run as a line of JSON in --log, which a second call
continues. Run it in the folder of the checkout.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

from glm2_jax.cli.tables import table
from infer import load
from train import lora
from train.augment.__main__ import main as augment

FACTS, WANTED = Path("examples/facts.jsonl"), Path("examples/facts_paraphrased.jsonl")
RECIPE = "demo"
NONE = "none"
ARMS = (
    NONE, "template", "typo,homophone,width,script", "synonym,swap,delete",
    "typo,homophone,width,script,template,synonym,swap,delete",
)  # fmt: skip
PER_ROW, BATCH = 8, 10


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def one_run(methods: str, seed: int, steps: int) -> dict:
    """Train once; returns the shares of right answers."""
    with tempfile.TemporaryDirectory() as folder:
        data = FACTS
        if methods != NONE:
            data = Path(folder) / "augmented.jsonl"
            flags = ["--data", str(FACTS), "--methods", methods, "--per-row", str(PER_ROW)]
            with contextlib.redirect_stdout(io.StringIO()):
                augment([*flags, "--seed", str(seed), "--output", str(data)])
        wanted, learned = rows_of(WANTED), rows_of(FACTS)
        questions = [row["instruction"] for row in wanted]
        if found := {row["instruction"] for row in rows_of(data)} & set(questions):
            raise SystemExit(f"trained on what is asked: {found}")
        adapter = f"{folder}/adapter"
        flags = ["--data", str(data), "--config", RECIPE, "--steps", str(steps)]
        flags += ["--batch-size", str(BATCH)]
        if lora.main([*flags, "--seed", str(seed), "--output", adapter]):
            raise SystemExit("training failed")
        engine = load(adapter=adapter)
        questions += [row["instruction"] for row in learned]
        done = engine.generate(questions, temperature=0, max_new_tokens=64)
        texts, rows = [one.text.strip() for one in done], [*wanted, *learned]
    right = [text == row["output"] for text, row in zip(texts, rows, strict=True)]
    has = [
        any(x in text for x in row["expected_any"])
        for text, row in zip(texts, wanted, strict=False)
    ]
    count = len(wanted)
    return {
        "methods": methods, "seed": seed, "steps": steps,
        "exact": statistics.fmean(right[:count]), "contains": statistics.fmean(has),
        "trained": statistics.fmean(right[count:]),
        "answers": dict(zip(questions[:count], texts[:count], strict=True)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--arms", nargs="+", default=ARMS, help="methods of train.augment, or none")
    parser.add_argument("--log", type=Path, default=Path("augmentation.jsonl"))
    args = parser.parse_args()
    done = rows_of(args.log) if args.log.exists() else []
    known = {(run["methods"], run["seed"], run["steps"]) for run in done}
    for seed in range(args.seeds):
        for methods in args.arms:
            if (methods, seed, args.steps) not in known:
                done.append(one_run(methods, seed, args.steps))
                with args.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
    print("\n".join(summary([run for run in done if run["steps"] == args.steps], args.arms)))


def summary(runs: list[dict], arms: list[str]) -> list[str]:
    """Return a table of means and standard errors, in percent."""
    lines = [["methods", "seeds", "exact", "contains", "trained wordings"]]
    for methods in arms:
        of_arm = [run for run in runs if run["methods"] == methods]
        cells = []
        for name in ("exact", "contains", "trained"):
            values = [100 * run[name] for run in of_arm]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.1f} ± {error:.1f}")
        lines.append([methods, str(len(of_arm)), *cells])
    return table(lines, 1)


if __name__ == "__main__":
    main()
