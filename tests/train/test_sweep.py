"""`python -m train.sweep` on a tiny model: searches, folds, pruning, a study that was killed."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import sqlalchemy.exc

from glm2_jax.cli import interrupt
from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.errors import InputError, UsageError
from glm2_jax.processes.supervise import Worker
from infer.engine.params import SamplingParams
from tests.support.checkpoints import save, tiny_config
from tests.support.engine_toy import compilations
from tests.support.paths import ROOT
from tests.support.training_data import alpaca, open_files, role_messages, write_rows
from train import lora
from train.programs import Programs
from train.sweep import __main__ as sweep
from train.sweep import jobs
from train.sweep import study as study_module
from train.sweep.folds import split_fold
from train.sweep.options import SweepOptions
from train.sweep.space import Choices, Range, edges, grid_point, grid_size, read_space
from train.sweep.study import Study

SPACE = ["--space", "lr=1e-3..1e-1:log", "alpha=4,8", "seed=0..9"]  # one program for all points


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = [alpaca(f"{i} 号茶叫什么", f"它叫青山{i}号。") for i in range(8)]
    return str(write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows))


@pytest.fixture(scope="module")
def flags(data, tmp_path_factory) -> list[str]:
    """The flags of every sweep."""
    model = tmp_path_factory.mktemp("model")
    save(model, config=tiny_config(num_layers=1))
    return ["--model", str(model), "--data", data, "--max-length", "64", "--batch-size", "2",
            "--grad-accum", "1", "--rank", "2", "--steps", "3", "--val-split", "0.25",
            "--compile-cache", "off", "--device", "cpu", "--no-grad-checkpoint"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def programs():
    """All sweeps of this file compile as one."""
    with pytest.MonkeyPatch.context() as patch:
        shared = Programs()
        patch.setattr("train.sweep.run.Programs", lambda: shared)
        yield


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A study that nothing stopped, its report, and what the trials after the first compiled."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    assert sweep.main([*flags, *SPACE, "--trials", "1", "--output", str(folder)]) == 0
    more = ["--trials", "4", "--output", str(folder), "--resume", "auto"]
    with pytest.MonkeyPatch.context() as patch, compilations() as found:
        counts = []
        end = Study.end
        patch.setattr(Study, "end", lambda *args: (counts.append(len(found)), end(*args))[1])
        assert sweep.main([*flags, *SPACE, *more]) == 0
    return folder, json.loads((folder / "report.json").read_text()), counts


def trials_of(folder: Path) -> list[tuple]:
    """Number, state, settings and losses of every trial of a study."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / study_module.FILE}")
    found = optuna.load_study(study_name="sweep", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    return [(x.number, x.state, x.params, x.intermediate_values, x.value) for x in found]


def test_trials_share_their_programs_and_the_best_is_named(whole, flags, tmp_path, capsys):
    folder, report, counts = whole
    assert len(counts) == 3 and counts[0] == counts[-1]  # other lr, alpha and seed: nothing new
    assert report["metric"] == "val_loss" and len(report["trials"]) == 4
    values = [x["value"] for x in report["trials"] if x["state"] == "complete"]
    assert values == sorted(values)
    assert all((folder / name).stat().st_size > 1000 for name in ("history.png", "parallel.png"))
    command = shlex.split(report["command"])
    assert command[:3] == ["python", "-m", "train.lora"]
    assert lora.main([*command[3:-1], str(tmp_path / "best")]) == 0
    assert "8 sequences, 3 steps" in capsys.readouterr().err  # all rows
    lr = json.loads((tmp_path / "best" / "run.json").read_text())["--lr"]
    assert lr == report["trials"][0]["settings"]["lr"]


def test_killed_anywhere_it_ends_as_if_never_killed(whole, flags, tmp_path):
    """Inside the second trial, after its first evaluation, and between others' results and the
    record of them."""
    folder = tmp_path / "a"
    argv = [*flags, *SPACE, "--trials", "4", "--output", str(folder), "--resume", "auto"]
    command = [sys.executable, "-m", "train.sweep", *argv]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("trial 1") for line in process.stderr)
        assert any("validation after step 1" in line for line in process.stderr)
        process.send_signal(signal.SIGKILL)
    assert [state.name for _, state, *_ in trials_of(folder)] == ["COMPLETE", "RUNNING"]

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    for name in ("next", "end", "report"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Study, name, kill)
            if name == "next":  # after a trial is there, before it has all its settings
                patch.undo()
                patch.setattr(study_module, "_suggest", kill)
            with pytest.raises(Killed):
                sweep.main(argv)
    assert sweep.main(argv) == 0
    assert trials_of(folder) == trials_of(whole[0])


def test_jobs_share_a_study(flags, tmp_path, capfd):
    """Two processes, each on what would be a GPU of its own, try every point once."""
    argv = [*flags, *SPACE, "--trials", "4", "--jobs", "2", "--output", str(tmp_path / "a")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "find_gpus", lambda jobs, device: ["0", "1"])
        assert sweep.main(argv) == 0
        out, err = capfd.readouterr()
        assert "train the best on all rows" in out
        done = [line for line in err.splitlines() if "val_loss" in line]
        assert sorted(re.sub(r"^job [01]: trial (\d).*", r"\1", x) for x in done) == [*"0123"]
        assert [state.name for _, state, *_ in trials_of(tmp_path / "a")] == ["COMPLETE"] * 4


def test_a_job_that_is_killed_is_named(monkeypatch, capsys):
    def killed(command, over, **more):
        assert command[-1] == f"--job={more['environment']['CUDA_VISIBLE_DEVICES']}"
        kill = "exit 0" if command[-1] == "--job=0" else "kill -9 $$"
        return Worker(["sh", "-c", kill], over, **more)

    monkeypatch.setattr(jobs, "Worker", killed)
    handlers = {signum: signal.getsignal(signum) for signum in interrupt.ending_signals()}
    try:
        assert jobs.run_jobs([], ["0", "1"]) == EXIT_DEVICE
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert "job 1 was terminated by SIGKILL; --resume auto continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "device", "found"),
    [(None, "auto", ["0", "1"]), ("2,,0", "gpu", ["2", "0"]), ("2", "gpu", None),
     (None, "cpu", None)],
)  # fmt: skip
def test_each_job_has_a_gpu_of_its_own(visible, device, found, monkeypatch):
    monkeypatch.setattr(jobs, "find_nvidia", lambda: SimpleNamespace(gpus=["a GPU"] * 3))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if found is None:
        with pytest.raises(UsageError, match="--jobs 2 needs 2 GPUs"):
            jobs.find_gpus(2, device)
    else:
        assert jobs.find_gpus(2, device) == found


def test_what_is_refused(whole, flags, data, tmp_path, capsys):
    folder = str(whole[0])
    for words, error, said in (
        ("--space", SystemExit, "expected at least one argument"),
        ("--space lr=1e-3 --trials 0", SystemExit, "at least 1"),
        ("--space lr=x", SystemExit, "argument --lr"),
        ("--space learn=1,2", UsageError, "learn is not a setting of train.lora"),
        ("--space jobs=1,2", UsageError, "jobs is not a setting of train.lora"),
        ("--space lr=1e-3..1e-1:log:0", SystemExit, "got '1e-3..1e-1:log:0'"),
        ("--space seed=0..99999999999999999999", SystemExit, "must be at most 9223372036854775807"),
        ("--space output=a,b", UsageError, "output cannot be searched"),
        ("--space lr=2..1", UsageError, "must have LOW < HIGH"),
        ("--space lr=0..1:log", UsageError, "must have 0 < LOW"),
        ("--space alpha=1.5..x", SystemExit, "argument --alpha"),
        ("--space alpha=", UsageError, "alpha cannot be ''"),
        ("--space target=attn,foo", UsageError, "matches nothing"),
        ("--space schedule=1..2", UsageError, "is not a number"),
        ("--space lr=1 lr=2", UsageError, "given twice"),
        ("--space rank=2,4", UsageError, "--rank is given and is also in --space"),
        ("--space lr=1..2 --search grid", UsageError, "lr=1..2:5"),
        ("--space lr=1..2 --search cmaes", UsageError, "two or more ranges, got 1"),
        ("--space lr=1..2 --val-split 0 --folds 9", UsageError, "--folds 9 of 8 rows"),
        ("--space lr=1..2 --folds 2", UsageError, "--folds excludes"),
        (f"--space data={data},x", UsageError, "--data is given"),
        ("--space lr=1..2 --plot a.png", UsageError, "--plot belongs to one run"),
        ("--space lr=1..2 --jobs 2", UsageError, "--jobs 2 needs 2 GPUs"),
        (f"--space lr=1..2 --output {folder} --resume auto", UsageError, "space was"),
        (f"{shlex.join(SPACE)} --output {folder}", UsageError, "holds a study already"),
    ):
        with pytest.raises(error, match=None if error is SystemExit else said) as found:
            sweep.main([*flags, "--output", str(tmp_path / "a"), *shlex.split(words)])
        assert said in (capsys.readouterr().err if error is SystemExit else str(found.value))
        assert not (tmp_path / "a" / "study.db").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cmaes", None)
        with pytest.raises(
            UsageError, match=r"cmaes is not(.|\n)*pip install cmaes matplotlib optuna"
        ):
            sweep.main([*flags, *SPACE, "--output", str(tmp_path / "a")])
    empty = tmp_path / "empty.yml"
    empty.write_text("{}")
    with pytest.raises(UsageError, match="--space is empty"):
        sweep.main([*flags, "--space", str(empty)])
    (tmp_path / "study.db").write_text("no database")
    with pytest.raises(InputError, match="cannot be used as a study"):
        sweep.main([*flags, *SPACE, "--output", str(tmp_path), "--resume", "auto"])


def test_answers_of_every_fold_are_scored(flags, tmp_path, capsys):
    at = flags.index("--val-split")
    argv = [*flags[:at], *flags[at + 2 :], "--output", str(tmp_path / "a")]
    more = ["--metric", "accuracy", "--folds", "2", "--trials", "2", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.sweep.metrics._GREEDY", SamplingParams(max_new_tokens=4))
        assert sweep.main([*argv, *more, "--space", "alpha=4,8", "--search", "grid"]) == 0
    for trial in json.loads(capsys.readouterr().out)["trials"]:
        assert trial["values"] == [0.0, 0.0] and trial["standard_error"] == 0  # of 4 tokens
        assert trial["state"] == "complete" and trial["val_loss"] > 0


def test_a_metric_that_the_rows_lack(flags, tmp_path):
    """Their last answer is not to be learned, so nothing says what it should be."""
    texts = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")]
    row = role_messages(*texts)
    row["messages"][-1]["loss"] = False
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    at = flags.index("--val-split")
    argv = [*flags[:at], *flags[at + 2 :], "--val-data", str(rows), *SPACE]
    with pytest.raises(UsageError, match=r"accuracy needs questions .*rows.jsonl has none"):
        sweep.main([*argv, "--metric", "accuracy", "--output", str(tmp_path / "a")])


def test_a_space(tmp_path):
    file = tmp_path / "space.yml"
    file.write_text("rank: [4, 8]\nwarmup: 0..0.5\nlr: 1e-4..1e-2:log:3\nrslora: 'true,false'\n")
    space = read_space(sweep.parser(), [str(file), "steps=10..30", "mix-data=../a,../b"])
    assert space == {
        "rank": Choices(("4", "8")), "warmup": Range(0, 0.5, False, False),
        "lr": Choices(("0.0001", "0.001", "0.01")), "rslora": Choices(("true", "false")),
        "steps": Range(10, 30, False, True), "mix-data": Choices(("../a", "../b")),
    }  # fmt: skip
    assert {point["steps"] for point in edges(space)} == {"10", "30"}
    grid = {name: axis for name, axis in space.items() if isinstance(axis, Choices)}
    points = {tuple(grid_point(grid, n).values()) for n in range(grid_size(grid))}
    assert len(points) == 2 * 3 * 2 * 2


def test_folds_are_disjoint_and_have_a_share_of_every_file(tmp_path):
    rows = [[alpaca(f"{name}{i}", "A") for i in range(n)] for name, n in (("a", 7), ("b", 5))]
    files = [write_rows(tmp_path / str(n), some) for n, some in enumerate(rows)]
    general = write_rows(tmp_path / "general", [alpaca("G", "A")])
    dataset = open_files([*files, files[0]], mix=(general, 0.5))  # one is given twice
    seen = []
    for fold in range(3):
        learned, held = split_fold(dataset, fold, 3, 1)
        assert len(learned) + len(held) == len(dataset)
        names = [held.source(i).rsplit(":")[-2] for i in held.first_of_rows()]
        assert names.count(str(files[0])) in (2, 3) and names.count(str(files[1])) in (1, 2)
        assert not set(held.row_ids()) & set(learned.row_ids())
        seen += sorted(set(held.row_ids().tolist()))
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize(("search", "trials"), [("grid", 6), ("tpe", 12), ("cmaes", 6)])
def test_a_study_that_is_opened_again_tries_the_same_points(search, trials, tmp_path):
    space = {"x": Range(0, 1, False, False), "y": Range(1, 100, True, True)}
    if search == "grid":
        space = {"x": space["x"].some(3), "y": space["y"].some(2)}
    options = SweepOptions(space=[], search=search, trials=None if search == "grid" else trials)

    def points(folder: Path, at_once: int) -> list[dict]:
        """Run so many trials before the study is opened again, and leave one that was begun."""
        folder.mkdir()
        while True:
            with Study(folder, space, options, {}, seed=3, resume="auto") as study:
                for _ in range(at_once):
                    if (trial := study.next()) is None:
                        return [x.params for x in study.trials]
                    x, y = (float(trial.params[name]) for name in space)
                    study.end(trial, (x - 0.3) ** 2 + np.log(y / 10) ** 2)
                study.next()

    found = points(tmp_path / "a", 99)
    assert len(found) == len({tuple(x.values()) for x in found}) == trials
    assert found == points(tmp_path / "b", 4)


def test_a_study_that_cannot_be_written_is_an_error_of_the_disk(tmp_path):
    options, space = SweepOptions(space=[]), {"x": Range(0, 1, False, False)}
    with (
        pytest.raises(InputError, match="disk is full(.|\n)*--resume auto"),
        Study(tmp_path, space, options, {}, seed=0, resume="none"),
    ):
        cause = sqlalchemy.exc.OperationalError("x", {}, Exception("disk is full"))
        raise optuna.exceptions.StorageInternalError("invalid data") from cause


def test_hopeless_trials_are_pruned_and_the_good_ones_are_not(tmp_path):
    space = {"x": Range(0, 1, False, False)}
    for metric in ("val_loss", "accuracy"):
        (tmp_path / metric).mkdir()
        options = SweepOptions(space=[], search="random", trials=7, metric=metric)
        with Study(tmp_path / metric, space, options, {}, seed=0, resume="none") as study:
            losses = {}
            while (trial := study.next()) is not None:
                loss = losses[trial.number] = trial.params["x"]
                try:
                    for step in range(1, 9):
                        study.report(trial, loss + 1 / step, step)
                    study.end(trial, 1 - loss if options.maximize else loss)
                except optuna.TrialPruned:
                    study.end(trial)
            done = [x.number for x in study.trials if x.value is not None and x.last_step == 8]
            assert min(losses, key=losses.__getitem__) in done and len(done) < 8
