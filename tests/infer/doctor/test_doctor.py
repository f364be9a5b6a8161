"""`python -m infer.doctor`: what it says about made-up machines, and about this one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm2_jax.cli.messages import human_size
from glm2_jax.cli.model_choice import ModelChoice
from glm2_jax.errors import CheckpointError
from glm2_jax.runtime.host_memory import Memory
from glm2_jax.runtime.machine import (
    Cache,
    Device,
    Disk,
    Gpu,
    JaxProbe,
    Machine,
    Nvidia,
    probe_jax,
)
from infer.doctor.__main__ import main
from infer.doctor.checkup import EXIT_DEVICE, NOTE, PROBLEM, Report, examine
from infer.doctor.forms import Model, command
from infer.doctor.report import as_json, render
from infer.doctor.run import open_model
from infer.engine.load import demo_folder
from tests.support.paths import ROOT

GB = 10**9
CPU = JaxProbe((Device("cpu", "cpu"),))
PACKAGES = {"glm2-jax": "0.2.0", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
CUDA12 = {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
CUDA13 = {"jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}
A100 = Gpu("NVIDIA A100-SXM4-40GB", 42 * GB, 41 * GB)

LAPTOP = Machine(
    packages=PACKAGES,
    avx=True,
    jax=CPU,
    memory=Memory(16 * GB, 10 * GB),
    disks=(Disk("current folder", ".", 100 * GB), Disk("downloads", "~/hub", 100 * GB)),
    cache=Cache("/home/me/.cache/glm2-jax/programs", exists=True, programs=3, size=10**6),
)
WORKSTATION = dataclasses.replace(
    LAPTOP,
    nvidia=Nvidia(on_bus=1, nodes=1, driver="550.54.15", gpus=(A100,)),
    memory=Memory(64 * GB, 60 * GB),
)


def changed(machine: Machine, **changes) -> Machine:
    return dataclasses.replace(machine, **changes)


def with_gpu(gpu: Gpu = A100, *, capability: str = "8.0", share: float = 0.75) -> Machine:
    """A workstation whose jax uses its GPU."""
    device = Device("gpu", gpu.name, int(gpu.total * share), capability)
    return changed(
        WORKSTATION,
        packages=PACKAGES | CUDA12,
        jax=JaxProbe((device,)),
        nvidia=dataclasses.replace(WORKSTATION.nvidia, gpus=(gpu,)),
    )


def texts(report: Report, mark: str | None = None) -> str:
    found = [f for findings in report.sections.values() for f in findings]
    return "\n".join(f"{f.text} {f.fix}" for f in found if mark in (None, f.mark))


def best(report: Report) -> str:
    """The form that is recommended."""
    assert report.best is not None and report.best.best is not None
    return report.best.best.precision.name


def check(machine: Machine, model: Model | None = None) -> Report:
    """Examines and renders; what holds of every report is asserted here."""
    model = model or Model()
    report = examine(machine, model)
    for finding in (f for findings in report.sections.values() for f in findings):
        assert finding.mark in ("ok", "note", "problem")
        assert finding.fix or finding.mark != PROBLEM, finding
    for columns in (40, 100):
        for line in render(model, report, columns).splitlines():
            whole = " do this: " in line or line == f"  {report.command}"
            # what is longer is one word, such as a path
            assert len(line) <= columns or whole or " " not in line.strip(), line
    json.dumps(as_json(machine, model, report))
    return report


def test_a_laptop_is_offered_the_demo_model():
    report = check(changed(LAPTOP, memory=Memory(8 * GB, 4 * GB)))
    assert report.problems == 0 and report.exit_code == 0 and report.best is None
    assert report.command == "python -m infer.generate --prompt 你好"
    shown = render(Model(), report, 100)
    for form in report.places[0].forms:
        size = human_size(form.total)
        assert f"{form.precision.name:<9} {size:>8}  too large" in shown
    assert "No dtype or quantization of a 6B model fits here" in shown


@pytest.mark.parametrize(
    ("free", "flags"),
    [
        (6, "--dtype bfloat16 --quantize int4"),
        (26, "--dtype bfloat16"),
        (28, "--dtype float32"),
    ],
)
def test_memory_decides_the_form_on_a_processor(free, flags):
    report = check(changed(LAPTOP, memory=Memory(32 * GB, free * GB)))
    assert report.command == f"python -m infer.generate --model FOLDER {flags} --prompt 你好"


def hidden(**variables: str) -> Machine:
    """A workstation whose GPU should work, with environment variables."""
    return changed(WORKSTATION, packages=PACKAGES | CUDA12, variables=variables)


def with_driver(version: str, packages: dict[str, str]) -> Machine:
    nvidia = dataclasses.replace(WORKSTATION.nvidia, driver=version)
    return changed(WORKSTATION, nvidia=nvidia, packages=PACKAGES | packages)


def without_jax(error: str, **changes) -> Machine:
    broken = JaxProbe(error=error)
    return changed(LAPTOP, jax=broken, jax_on_cpu=broken, **changes)


TPU = changed(LAPTOP, tpus=4)
LIBTPU = changed(TPU, packages=PACKAGES | {"libtpu": "0.0.52"})
CONTAINER = changed(WORKSTATION, container=True, nvidia=Nvidia(on_bus=1, driver="550.54.15"))


@pytest.mark.parametrize(
    ("machine", "mark", "words"),
    [
        (WORKSTATION, PROBLEM, ['python -m pip install "glm2-jax[cuda]"']),
        (with_driver("470.223.02", CUDA12), PROBLEM, ["470.223.02 is too old: CUDA 12 needs 525"]),
        (
            with_driver("550.54.15", CUDA13),
            PROBLEM,
            ["too old for the installed CUDA 13", "uninstall -y jax-cuda13-plugin"],
        ),
        (
            with_driver("550.54.15", CUDA12 | {"jax-cuda12-plugin": "0.9.0"}),
            PROBLEM,
            ["pip install jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2"],
        ),
        (hidden(JAX_PLATFORMS="cpu"), PROBLEM, ["hides the GPU", "unset JAX_PLATFORMS"]),
        (hidden(CUDA_VISIBLE_DEVICES=""), PROBLEM, ["hides the GPU", "unset CUDA_VISIBLE"]),
        (hidden(LD_LIBRARY_PATH="/usr/local/cuda/lib64"), PROBLEM, ["unset LD_LIBRARY_PATH"]),
        (hidden(), PROBLEM, ["see jax's own message"]),
        (changed(WORKSTATION, nvidia=Nvidia(on_bus=1)), PROBLEM, ["driver is not loaded"]),
        (CONTAINER, PROBLEM, ["docker run --gpus all"]),
        (
            changed(CONTAINER, memory=Memory(64 * GB, 60 * GB, 4 * GB, 3 * GB)),
            NOTE,
            ["limited to 4.0 GB, 3.0 GB of it left"],
        ),
        (
            changed(LAPTOP, cache=Cache("/root/cache", exists=True, writable=False)),
            PROBLEM,
            ["not writable", 'export GLM2_JAX_COMPILE_CACHE="$(mktemp -d)"'],
        ),
        (changed(LAPTOP, cache=Cache("off")), NOTE, ["not cached"]),
        (
            changed(LAPTOP, disks=(Disk("downloads", "~/hub", 5 * GB),)),
            NOTE,
            ["a 6B checkpoint has 12.5 GB"],
        ),
        (TPU, PROBLEM, ['pip install "glm2-jax[tpu]"']),
        (LIBTPU, PROBLEM, ["another program uses it"]),
        (changed(LIBTPU, variables={"JAX_PLATFORMS": "cpu"}), PROBLEM, ["hides the TPU"]),
    ],
)
def test_findings(machine, mark, words):
    report = check(machine)
    assert all(text in texts(report, mark) for text in words), texts(report)
    assert report.exit_code == 0 and bool(report.problems) >= (mark == PROBLEM)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("XLA_FLAGS", "Unknown flag in XLA_FLAGS: --nonsense=1 (at: find devices)"),
        ("JAX_ENABLE_X64", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
        ("JAX_LOG_LEVEL", 'Invalid value "x" for JAX flag jax_log_level'),
    ],
)
def test_variables_that_jax_cannot_use(name, error):
    said = texts(check(without_jax(error, variables={name: "x"})), PROBLEM)
    assert f"unset {name}" in said and "fresh" not in said


def test_a_gpu_that_jax_uses():
    report = check(with_gpu())
    assert report.problems == 0 and "jax uses it" in texts(report) and best(report) == "bfloat16"
    end = "--model FOLDER --dtype bfloat16 --prompt 你好"
    assert report.command == f"python -m infer.generate {end}"
    used = changed(LIBTPU, jax=JaxProbe((Device("tpu", "TPU v5 lite", 16 * GB),) * 4))
    report = check(used)
    assert report.problems == 0 and best(report) == "bfloat16"


def test_a_gpu_counts_with_what_our_commands_take_of_it():
    gpu = Gpu("Tesla T4", 16 * GB, 16 * GB)
    report = check(with_gpu(gpu, capability="7.5"))
    assert report.command.startswith("python -m infer.generate --model FOLDER --dtype float16 --p")
    taken = dataclasses.replace(gpu, free=10 * GB)
    report = check(with_gpu(taken, capability="7.5"))
    assert "--dtype float16 --quantize int8 --prompt" in report.command
    assert "Other programs use 6.0 GB of GPU 0" in texts(report, NOTE)
    chosen = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}  # is left as it is
    report = check(changed(with_gpu(gpu, share=0.5), variables=chosen))
    assert report.best is not None and report.best.budget.memory == 8 * GB
    assert best(report) == "int4"


def test_two_gpus_of_which_the_first_is_taken():
    one, taken = with_gpu(), dataclasses.replace(A100, free=5 * GB)
    nvidia = dataclasses.replace(one.nvidia, on_bus=2, nodes=2, gpus=(taken, A100))
    said = texts(check(changed(one, jax=JaxProbe(one.jax.devices * 2), nvidia=nvidia)), NOTE)
    assert "2 devices; this program uses the first" in said
    assert "export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1" in said


def test_jax_that_does_not_work():
    report = check(without_jax("crashed with signal 4 (at: import jax)", avx=False))
    assert report.exit_code == 5 and report.command == "" and report.places == ()
    said = texts(report, PROBLEM)
    assert "signal 4" in said and "python -m venv fresh" in said and "no AVX" in said
    assert "Nothing can be computed" in render(Model(), report, 100)


def test_jax_that_works_on_the_processor_only():
    hung = JaxProbe(error="no answer within 180 seconds (at: find devices)", said=("CUDA_ERROR",))
    machine = changed(hidden(), jax=hung, jax_on_cpu=CPU)
    report = check(machine)
    assert report.exit_code == 0 and "--device cpu" in report.command
    assert "CUDA_ERROR" in texts(report) and "export JAX_PLATFORMS=cpu" in texts(report)
    report = check(changed(machine, variables={"JAX_PLATFORMS": "tpu"}))
    assert "unset JAX_PLATFORMS" in texts(report)
    small = changed(machine, memory=Memory(4 * GB, 3 * GB))
    assert check(small).command == "python -m infer.generate --device cpu --prompt 你好"


def test_a_model_of_its_own():
    model = open_model(ModelChoice(str(demo_folder())))
    report = check(changed(LAPTOP, memory=Memory(4 * GB, 2 * GB)), model)
    form = report.best and report.best.best
    assert form is not None and form.precision.name == "float32"
    assert form.weights == 4 * model.config.num_params
    spaces = dataclasses.replace(model, folder="my model")
    assert "--model 'my model' " in command(spaces, LAPTOP, form)


def test_a_folder_that_is_stored_quantized_stays_so():
    model = Model(folder="int4-folder", scheme="int4-row")
    report = check(changed(LAPTOP, memory=Memory(64 * GB, 60 * GB)), model)
    assert (
        best(report) == "int4"
        and "--dtype bfloat16 --prompt" in report.command
        and "--quantize" not in report.command
    )
    forms = as_json(LAPTOP, model, report)["forms"]
    names = {(form["precision"]["dtype"], form["precision"]["quantize"]): form for form in forms}
    assert names["bfloat16", None]["flags"] == "--dtype bfloat16 --quantize none"
    assert set(names) == {("bfloat16", "int4-row"), ("bfloat16", None), ("float32", None)}


def test_unknown_memory_and_disks():
    machine = changed(LAPTOP, memory=Memory(), disks=(Disk("downloads", "~/hub", None),))
    report = check(machine)
    assert "free space unknown" in texts(report, NOTE) and report.best is None
    assert "try it" in render(Model(), report, 100)


def run(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infer.doctor", *args],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        encoding="utf-8",
    )


def test_this_machine_in_forty_columns():
    done = run(COLUMNS="40", JAX_PLATFORMS="cpu")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Software" and "\x1b" not in done.stdout
    long = [line for line in lines if len(line) > 40]
    long = [line for line in long if " " in line.strip()]  # else a word, which stays whole
    assert all("python -m" in line or "do this" in line or "/" in line for line in long), long
    assert str(Path.home()) not in done.stdout or len(str(Path.home())) < 2


def test_this_machine_as_json_without_importing_jax():
    code = (
        "import sys\nfrom infer.doctor.__main__ import main\ncode = main(sys.argv[1:])\n"
        "assert not {'jax', 'jaxlib'} & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--json", "--model", str(demo_folder())],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["jax"]["devices"][0]["platform"] == "cpu"
    assert found["model"]["parameters"] == 2337600 and found["exit_code"] == 0
    assert found["best"] == "float32" and "--dtype" in found["command"]


def damaged_jax(folder: Path) -> None:
    (folder / "jax").mkdir()
    (folder / "jax" / "__init__.py").write_text("raise ImportError('this jax is damaged')")


def test_a_jax_that_cannot_be_imported(tmp_path):
    damaged_jax(tmp_path)
    done = run(PYTHONPATH=str(tmp_path))
    assert done.returncode == 5 and "this jax is damaged" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr and "Nothing can be computed" in done.stdout


def test_a_file_of_the_users_is_not_taken_for_jax(tmp_path, monkeypatch):
    damaged_jax(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = probe_jax(code="import jax; print('[]')")
    assert found.works, found.error


def test_a_variable_of_this_machine():
    done = run(JAX_PLATFORMS="rocm")
    assert "do this: unset JAX_PLATFORMS" in done.stdout and "JAX_PLATFORMS=rocm" in done.stdout
    assert "AssertionError" not in done.stdout


def test_main_prints_what_was_probed(monkeypatch, capsys):
    small = changed(LAPTOP, memory=Memory(8 * GB, 4 * GB))
    monkeypatch.setattr("infer.doctor.run.probe", lambda: small)
    assert main([]) == 0
    assert "No dtype or quantization of a 6B model fits here" in capsys.readouterr().out
    monkeypatch.setattr("infer.doctor.run.probe", lambda: changed(LAPTOP, jax=JaxProbe(error="no")))
    assert main(["--json"]) == EXIT_DEVICE
    assert json.loads(capsys.readouterr().out)["problems"] == 1
    with pytest.raises(CheckpointError):
        main(["--model", "no/such/folder"])
