"""The persistent compilation cache of the tools."""

import os
import subprocess
import sys

import pytest
from jax._src.lru_cache import LRUCache

from glm2_jax.runtime import compile_cache
from glm2_jax.runtime.compile_cache import default_folder, enable_compile_cache


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
print(jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(5)).tolist()[0])
"""


def test_programs_are_kept_and_a_damaged_one_is_replaced(tmp_path):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PLATFORMS": "cpu"}
    folder = tmp_path / "a" / "b"

    def run():
        command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        return result.stdout.splitlines(), kept

    first = run()
    assert first[0] == ["4.0"] and first[1] and run() == first
    for path in folder.glob("*-cache"):
        os.truncate(path, 100)
    lines, _ = run()
    assert len(lines) == 2 and "it is compiled again" in lines[0] and lines[1] == "4.0"
    assert run()[0] == ["4.0"]


@pytest.mark.parametrize("kind", ["exchanged", "empty", "bytes", "without its sum", "link", "pipe"])
def test_what_has_the_name_of_a_program_and_is_another(kind, tmp_path):
    """Of the same shapes: nothing but the numbers would show it."""
    warnings = []
    cache = compile_cache._Checked(LRUCache(str(tmp_path), max_size=-1), warnings.append)
    cache.put("one", b"program one")
    cache.put("two", b"program two")
    one, two = (tmp_path / f"{name}-cache" for name in ("one", "two"))
    other = two.read_bytes()
    one.unlink()
    {
        "exchanged": lambda: one.write_bytes(other),
        "empty": one.touch,
        "bytes": lambda: one.write_bytes(os.urandom(1000)),
        "without its sum": lambda: one.write_bytes(other[32:]),
        "link": lambda: one.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(one),
    }[kind]()
    assert cache.get("one") is None and cache.get("two") == b"program two"
    assert len(warnings) == 1 and warnings[0].endswith(f"it is compiled again ({tmp_path})")
    cache.put("one", b"program one")
    assert cache.get("one") == b"program one" and len(warnings) == 1


def test_flags_can_be_checked_without_loading_the_engine():
    code = (
        "import sys, infer.engine.params, glm2_jax.runtime.compile_cache; "
        "glm2_jax.runtime.compile_cache.enable_compile_cache('off'); infer.SamplingParams(); "
        "print([name for name in sys.modules if name.startswith('infer.')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "['infer.engine', 'infer.engine.params']", result.stderr
