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
from infer.doctor.checkup import Model, command
from infer.doctor.report import Report, as_json, render
from infer.doctor.run import open_model
from infer.engine.load import demo_folder
from tests.support.paths import ROOT

GB = 10**9
CPU = JaxProbe((Device("cpu", "cpu"),))
PACKAGES = {"glm2-jax": "0.2.0", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
CUDA12 = {"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
CUDA13 = {"jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}
A100 = Gpu("NVIDIA A100-SXM4-40GB", 42 * GB, 41 * GB)

changed = dataclasses.replace
LAPTOP = Machine(
    packages=PACKAGES,
    jax=CPU,
    memory=Memory(16 * GB, 10 * GB),
    disks=(Disk("current folder", ".", 100 * GB), Disk("downloads", "~/hub", 100 * GB)),
    cache=Cache("/home/me/.cache/glm2-jax/programs", exists=True, programs=3, size=10**6),
)
WORKSTATION = changed(
    LAPTOP,
    nvidia=Nvidia(on_bus=1, nodes=1, driver="550.54.15", gpus=(A100,)),
    memory=Memory(64 * GB, 60 * GB),
)
TPU = changed(LAPTOP, tpus=4)
LIBTPU = changed(TPU, packages=PACKAGES | {"libtpu": "0.0.52"})


def with_memory(free: int, machine: Machine = LAPTOP) -> Machine:
    return changed(machine, memory=Memory(64 * GB, free * GB))


def with_gpu(gpu: Gpu = A100, *, share: float = 0.75) -> Machine:
    """A workstation whose jax uses its GPU."""
    capability = "8.0" if gpu.name == A100.name else "7.5"
    device = Device("gpu", gpu.name, int(gpu.total * share), capability)
    nvidia = changed(WORKSTATION.nvidia, gpus=(gpu,))
    jax = JaxProbe((device,))
    return changed(WORKSTATION, packages=PACKAGES | CUDA12, jax=jax, nvidia=nvidia)


def hidden(**variables: str) -> Machine:
    """A workstation whose GPU should work, with environment variables."""
    return changed(WORKSTATION, packages=PACKAGES | CUDA12, variables=variables)


def with_driver(version: str, packages: dict[str, str]) -> Machine:
    nvidia = changed(WORKSTATION.nvidia, driver=version)
    return changed(WORKSTATION, nvidia=nvidia, packages=PACKAGES | packages)


def with_disk(free: int | None) -> Machine:
    return changed(LAPTOP, disks=(Disk("downloads", "~/hub", free),))


def without_jax(error: str, **changes) -> Machine:
    broken = JaxProbe(error=error)
    return changed(LAPTOP, jax=broken, jax_on_cpu=broken, **changes)


def texts(report: Report, *marks: str) -> str:
    found = [f for findings in report.sections.values() for f in findings]
    return "\n".join(f"{f.text} {f.fix}" for f in found if not marks or f.mark in marks)


def best(report: Report) -> str:
    """The form that is recommended."""
    assert report.best is not None
    return report.best.precision.name


def check(machine: Machine, model: Model | None = None) -> Report:
    """Examines and renders; what holds of every report is asserted here."""
    report = Report(machine, model or Model())
    for finding in (f for findings in report.sections.values() for f in findings):
        assert finding.mark in ("ok", "note", "problem")
        assert finding.fix or finding.mark != "problem", finding
    for columns in (40, 100):
        for line in render(report, columns).splitlines():
            whole = " do this: " in line or line == f"  {report.command}"
            # what is longer is one word, such as a path
            assert len(line) <= columns or whole or " " not in line.strip(), line
    json.dumps(as_json(report))
    return report


# What fits


def test_a_laptop_is_offered_the_demo_model():
    report = check(with_memory(4))
    assert report.problems == 0 and report.exit_code == 0 and report.best is None
    assert report.command == "python -m infer.generate --prompt 你好"
    shown = render(report, 100)
    for _, form in report.forms:
        size = human_size(form.total)
        assert f"{form.precision.name:<9} {size:>8}  too large" in shown
    assert "No dtype or quantization of a 6B model fits here" in shown
    unknown = check(changed(LAPTOP, memory=Memory()))
    assert unknown.best is None and "try it" in render(unknown, 100)


T4 = Gpu("Tesla T4", 16 * GB, 16 * GB)
SHARE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}  # the user's share is left as it is


@pytest.mark.parametrize(
    ("machine", "flags"),
    [
        (with_memory(6), "--dtype bfloat16 --quantize int4"),
        (with_memory(26), "--dtype bfloat16"),
        (with_memory(28), "--dtype float32"),
        (with_gpu(), "--dtype bfloat16"),
        (changed(LIBTPU, jax=JaxProbe((Device("tpu", "v5e", 16 * GB),) * 4)), "--dtype bfloat16"),
        (with_gpu(T4), "--dtype float16"),
        (with_gpu(changed(T4, free=10 * GB)), "--dtype float16 --quantize int8"),
        (changed(with_gpu(T4, share=0.5), variables=SHARE), "--dtype float16 --quantize int4"),
    ],
)
def test_memory_decides_the_form(machine, flags):
    report = check(machine)
    assert report.problems == 0
    assert report.command == f"python -m infer.generate --model FOLDER {flags} --prompt 你好"


def test_a_model_of_its_own():
    model = open_model(ModelChoice(str(demo_folder())))
    report = check(with_memory(2), model)
    form = report.best
    assert form is not None and form.precision.name == "float32"
    assert form.weights == 4 * model.config.num_params
    assert "--model 'my model' " in command(changed(model, folder="my model"), LAPTOP, form)


def test_a_folder_that_is_stored_quantized_stays_so():
    report = check(with_memory(60), Model(folder="int4-folder", scheme="int4-row"))
    assert best(report) == "int4" and "--dtype bfloat16 --prompt" in report.command
    forms = {tuple(form["precision"].values()): form["flags"] for form in as_json(report)["forms"]}
    assert forms["bfloat16", None] == "--dtype bfloat16 --quantize none"
    assert set(forms) == {("bfloat16", "int4-row"), ("bfloat16", None), ("float32", None)}


# What is wrong


def without_gpu_nodes(**nvidia) -> Machine:
    return changed(WORKSTATION, nvidia=Nvidia(on_bus=1, **nvidia))


OLD_PLUGIN = CUDA12 | {"jax-cuda12-plugin": "0.9.0"}
LIMITED = Memory(64 * GB, 60 * GB, 4 * GB, 3 * GB)
READ_ONLY = Cache("/root/cache", exists=True, writable=False)
FINDINGS = [
    (WORKSTATION, "problem", "python -m pip install 'jax[cuda12]'"),
    (with_driver("470.223.02", CUDA12), "problem", "470.223.02 is too old: CUDA 12 needs 525"),
    (with_driver("550.54.15", CUDA13), "problem", "too old for the installed CUDA 13"),
    (with_driver("550.54.15", CUDA13), "problem", "uninstall -y jax-cuda13-plugin"),
    (with_driver("550.54.15", OLD_PLUGIN), "problem", "jax-cuda12-pjrt==0.10.2"),
    (hidden(JAX_PLATFORMS="cpu"), "problem", "hides the GPU from jax. unset JAX_PLATFORMS"),
    (hidden(CUDA_VISIBLE_DEVICES=""), "problem", "hides the GPU from jax. unset CUDA_VISIBLE"),
    (hidden(), "problem", "see jax's own message"),
    (without_gpu_nodes(), "problem", "driver is not loaded"),
    (changed(without_gpu_nodes(), container=True), "problem", "docker run --gpus all"),
    (changed(LAPTOP, memory=LIMITED), "note", "limited to 4.0 GB, 3.0 GB of it left"),
    (with_gpu(changed(A100, free=36 * GB)), "note", "Other programs use 6.0 GB of GPU 0"),
    (with_gpu(), "ok", "jax uses it"),
    (changed(LAPTOP, cache=READ_ONLY), "problem", 'GLM2_JAX_COMPILE_CACHE="$(mktemp -d)"'),
    (changed(LAPTOP, cache=Cache("off")), "note", "not cached"),
    (with_disk(5 * GB), "note", "a 6B checkpoint has 12.5 GB"),
    (with_disk(None), "note", "free space unknown"),
    (TPU, "problem", "pip install 'jax[tpu]'"),
    (LIBTPU, "problem", "another program uses it"),
    (changed(LIBTPU, variables={"JAX_PLATFORMS": "cpu"}), "problem", "hides the TPU"),
]


@pytest.mark.parametrize(("machine", "mark", "words"), FINDINGS)
def test_findings(machine, mark, words):
    report = check(machine)
    assert words in texts(report, mark), texts(report)
    assert report.exit_code == 0 and bool(report.problems) >= (mark == "problem")


def test_jax_that_does_not_work():
    error = "Unknown flag in XLA_FLAGS: --nonsense=1 (at: find devices)"
    said = texts(check(without_jax(error, variables={"XLA_FLAGS": "x"})), "problem")
    assert "unset XLA_FLAGS" in said and "fresh" not in said
    report = check(without_jax("crashed with signal 4 (at: import jax)"))
    assert report.exit_code == 5 and report.command == "" and report.forms == ()
    said = texts(report, "problem")
    assert "signal 4" in said and "python -m venv fresh" in said
    assert "Nothing can be computed" in render(report, 100)


def test_jax_that_works_on_the_processor_only():
    hung = JaxProbe(error="no answer within 180 seconds (at: find devices)", said=("CUDA_ERROR",))
    machine = changed(hidden(), jax=hung, jax_on_cpu=CPU)
    report = check(machine)
    assert report.exit_code == 0 and "--device cpu" in report.command
    assert "CUDA_ERROR" in texts(report) and "export JAX_PLATFORMS=cpu" in texts(report)
    assert "unset JAX_PLATFORMS" in texts(
        check(changed(machine, variables={"JAX_PLATFORMS": "tpu"}))
    )
    small = check(with_memory(3, machine))
    assert small.command == "python -m infer.generate --device cpu --prompt 你好"


# This machine


def doctor(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom infer.doctor.__main__ import main\nfrom glm2_jax.cli import interrupt\n"
        "def run(args):\n    code = main(args)\n"
        "    assert not {'jax', 'jaxlib'} & set(sys.modules)\n    return code\n"
        "interrupt.run(run)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        encoding="utf-8",
    )


def test_this_machine_in_forty_columns_with_a_wrong_variable():
    done = doctor(COLUMNS="40", JAX_PLATFORMS="rocm")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Software" and "\x1b" not in done.stdout
    assert "do this: unset JAX_PLATFORMS" in done.stdout and "JAX_PLATFORMS=rocm" in done.stdout
    assert "AssertionError" not in done.stdout
    long = [line for line in lines if len(line) > 40]
    long = [line for line in long if " " in line.strip()]  # else a word, which stays whole
    assert all("python -m" in line or "do this" in line or "/" in line for line in long), long
    assert str(Path.home()) not in done.stdout or len(str(Path.home())) < 2


def damaged_jax(folder: Path) -> None:
    (folder / "jax").mkdir()
    (folder / "jax" / "__init__.py").write_text("raise ImportError('this jax is damaged')")


def test_a_jax_that_cannot_be_imported(tmp_path):
    damaged_jax(tmp_path)
    done = doctor(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 5 and "this jax is damaged" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stdout + done.stderr and "Nothing can be computed" in done.stdout


def test_a_file_of_the_users_is_not_taken_for_jax(tmp_path, monkeypatch):
    damaged_jax(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = probe_jax(code="import jax; print('[]')")
    assert found.works, found.error


def test_the_json_of_a_model(monkeypatch, capsys):
    monkeypatch.setattr("infer.doctor.run.probe", lambda: LAPTOP)
    assert main(["--json", "--model", str(demo_folder())]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["jax"]["devices"][0]["platform"] == "cpu"
    assert found["model"]["parameters"] == 2337600 and found["exit_code"] == 0
    assert found["best"] == "float32" and "--dtype" in found["command"]
    monkeypatch.setattr("infer.doctor.run.probe", lambda: changed(LAPTOP, jax=JaxProbe(error="no")))
    assert main(["--json"]) == 5
    assert json.loads(capsys.readouterr().out)["problems"] == 1
    with pytest.raises(CheckpointError):
        main(["--model", "no/such/folder"])
