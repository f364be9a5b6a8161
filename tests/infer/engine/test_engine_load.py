"""Opening a checkpoint for answering, devices, and the persistent compilation cache."""

import os
import subprocess
import sys

import jax
import pytest

import infer
from convert import save_checkpoint
from glm2_jax import Tokenizer
from glm2_jax.errors import CheckpointError, DeviceError, UsageError
from glm2_jax.runtime import compile_cache, devices
from glm2_jax.runtime.compile_cache import default_folder, enable_compile_cache
from infer.engine import load
from tests.support.engine_toy import TOY, toy_engine, toy_params
from tests.support.sp_model import sp_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "toy"
    save_checkpoint(path, TOY, toy_params(), Tokenizer.from_bytes(sp_model()), source="test")
    return path


def test_load_gives_an_engine_that_answers(folder):
    engine = infer.load(folder, dtype="float32", device="cpu", max_length=64)
    assert (engine.max_length, engine.template) == (64, "chatglm2")
    assert engine.load_s > 0
    sampling = {"temperature": 0, "max_new_tokens": 5}
    assert engine.generate([[5, 6, 7]], **sampling) == toy_engine(max_length=64).generate(
        [[5, 6, 7]], **sampling
    )


def test_without_a_path_the_bundled_folder_is_opened(folder, monkeypatch):
    assert load.demo_folder().parent.name == "infer"
    monkeypatch.setattr(load, "demo_folder", lambda: folder)
    assert infer.load().config == TOY


def test_load_refuses_what_it_cannot_do(tmp_path, folder):
    with pytest.raises(CheckpointError):
        infer.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"npu(.|\n)*auto"):
        infer.load(folder, device="npu")
    with pytest.raises(UsageError, match="max_length"):
        infer.load(folder, max_length=0)
    with pytest.raises(UsageError, match="quantize"):
        infer.load(folder, quantize="int3")


def test_a_device_that_is_not_there_is_a_device_error():
    with pytest.raises(DeviceError, match="'tpu'"):
        devices.find_device("tpu")
    cpu = jax.devices("cpu")[0]
    assert devices.find_device("cpu") == devices.find_device(cpu) == cpu


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there(platforms):
    code = "from infer.engine.load import find_device; find_device('auto')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    assert "DeviceError: no device 'auto' was found" in result.stderr
    assert f"JAX_PLATFORMS={platforms} restricts the choice" in result.stderr


def test_memory_that_does_not_suffice_while_loading(folder, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(load, "load_checkpoint", full)
    with pytest.raises(DeviceError, match="loading"):
        infer.load(folder)


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(compile_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "glm2-jax" / "programs"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_folder() == tmp_path / ".cache" / "glm2-jax" / "programs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == tmp_path / ".cache" / "glm2-jax" / "programs"
    monkeypatch.setenv(compile_cache.VARIABLE, "~/mine")
    assert default_folder() == tmp_path / "mine"
    monkeypatch.setenv(compile_cache.VARIABLE, "off")
    assert enable_compile_cache() is None


def test_an_unusable_folder_is_only_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    warnings = []
    assert enable_compile_cache(tmp_path / "file" / "cache", warn=warnings.append) is None
    assert len(warnings) == 1 and "no compilation cache" in warnings[0]
    assert enable_compile_cache(tmp_path / "file") is None


def test_without_a_home_folder_there_is_a_warning(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in (compile_cache.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compile_cache.Path, "home", no_home)
    warnings = []
    for folder in (None, "~nosuchuser", "a\0b"):
        assert enable_compile_cache(folder, warn=warnings.append) is None
    assert len(warnings) == 3 and "home" in warnings[0]


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "notes.txt").write_bytes(b"x" * 1000)  # not ours
    compile_cache.trim(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["middle-cache", "new-cache", "notes.txt"]
    compile_cache.trim(tmp_path, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


SCRIPT = """
import sys
from glm2_jax.runtime.compile_cache import enable_compile_cache
enable_compile_cache(sys.argv[1], warn=print)
import jax
jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(5)).block_until_ready()
"""


def test_programs_are_kept_and_found_again(tmp_path):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PLATFORMS": "cpu"}

    def entries():
        command = [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path / "a" / "b")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a" / "b").iterdir()}

    first = entries()
    assert first and entries() == first


def test_a_damaged_program_is_replaced(tmp_path):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PLATFORMS": "cpu"}
    lines = []
    for _ in range(3):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        lines.append(result.stdout.splitlines())
        if len(lines) == 1:
            for path in tmp_path.glob("*-cache"):
                os.truncate(path, 100)
    assert len(lines[1]) == 1 and "it is compiled again" in lines[1][0]
    assert lines[0] == lines[2] == []


SAME_SHAPES = """
import sys
from glm2_jax.runtime.compile_cache import enable_compile_cache
enable_compile_cache(sys.argv[1], warn=print)
import jax
def first(x): return x * 3 + 1
def second(x): return x * 5 + 2
print([f(jax.numpy.ones(5)).tolist()[0] for f in (jax.jit(first), jax.jit(second))])
"""


def exchange(folder, kind):
    one, two = (next(folder.glob(f"jit_{name}-*-cache")) for name in ("first", "second"))
    if kind == "exchanged":
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)
        return
    one.unlink()
    {
        "empty": one.touch,
        "bytes": lambda: one.write_bytes(os.urandom(1000)),
        "without its sum": lambda: one.write_bytes(two.read_bytes()[32:]),
        "link": lambda: one.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(one),
    }[kind]()


@pytest.mark.parametrize("kind", ["exchanged", "empty", "bytes", "without its sum", "link", "pipe"])
def test_what_has_the_name_of_a_program_and_is_another(kind, tmp_path):
    """Of the same shapes: nothing but the numbers would show it."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PLATFORMS": "cpu"}
    lines = []
    for number in range(3):
        command = [sys.executable, "-c", SAME_SHAPES, str(tmp_path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        lines.append(result.stdout.splitlines())
        if number == 0:
            exchange(tmp_path, kind)
    assert [told[-1] for told in lines] == ["[4.0, 7.0]"] * 3
    assert [len(told) for told in lines] == [1, 2, 1]
    assert lines[1][0].endswith(f"earlier version; it is compiled again ({tmp_path})")


def test_flags_can_be_checked_without_loading_the_engine():
    code = (
        "import sys, infer.engine.params, glm2_jax.runtime.compile_cache; "
        "glm2_jax.runtime.compile_cache.enable_compile_cache('off'); infer.SamplingParams(); "
        "print([name for name in sys.modules if name.startswith('infer.')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "['infer.engine', 'infer.engine.params']", result.stderr
