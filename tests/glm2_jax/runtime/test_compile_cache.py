"""The persistent compilation cache of the tools."""

import os
import subprocess
import sys

import jax
import pytest
from jax._src.lru_cache import LRUCache

from glm2_jax.runtime import compile_cache
from glm2_jax.runtime.compile_cache import enable_compile_cache, enable_unless_set, user_cache


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, cache, expected in (
        (None, str(tmp_path / "xdg"), "xdg/glm2-jax/programs"),
        (None, "relative", ".cache/glm2-jax/programs"),
        (None, None, ".cache/glm2-jax/programs"),
        ("~/mine", None, "mine"),
        ("off", None, None),
    ):
        for name, setting in ((compile_cache.VARIABLE, value), ("XDG_CACHE_HOME", cache)):
            monkeypatch.delenv(name, raising=False)
            if setting is not None:
                monkeypatch.setenv(name, setting)
        assert user_cache() == (expected and tmp_path / expected)


def test_an_unusable_folder_is_only_a_warning(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in (compile_cache.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compile_cache.Path, "home", no_home)
    (tmp_path / "file").write_text("")
    warnings = []
    for folder in (None, tmp_path / "file" / "cache", "~nosuchuser", "a\0b"):
        enable_compile_cache(folder, warn=warnings.append)
    assert len(warnings) == 4 and "home" in warnings[0]
    assert all("no compilation cache" in line for line in warnings)


def test_a_guest_leaves_the_settings_of_jax_as_they_are(monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(compile_cache, "enable_compile_cache", lambda x, warn: chosen.append(x))
    config = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
    before = [getattr(jax.config, name) for name in config]
    try:
        for folder, on, taken in (
            (None, True, [None, "off", "mine"]),
            (None, False, ["off", "mine"]),
            (str(tmp_path), True, ["off", "mine"]),
        ):
            for name, value in zip(config, (folder, on), strict=True):
                jax.config.update(name, value)
            chosen.clear()
            for choice in (None, "off", "mine"):
                enable_unless_set(choice)
            assert chosen == taken
    finally:
        for name, value in zip(config, before, strict=True):
            jax.config.update(name, value)


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "notes.txt").write_bytes(b"x" * 1000)  # not ours
    compile_cache.trim(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["middle-cache", "new-cache", "notes.txt"]


SCRIPT = """
import os, sys
from pathlib import Path
from glm2_jax.runtime.compile_cache import enable_compile_cache
enable_compile_cache(sys.argv[1], warn=print)
import jax

def run():
    jax.clear_caches()
    print(jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(5)).tolist()[0])
    return {path: path.stat().st_mtime_ns for path in Path(sys.argv[1]).glob("*-cache")}

kept = run()
assert kept and run() == kept
for path in kept:
    os.truncate(path, 100)
print("damaged")
run()
run()
"""


def test_programs_are_kept_and_a_damaged_one_is_replaced(tmp_path):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path / "a" / "b")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    *first, warning, third, fourth = result.stdout.splitlines()
    assert first == ["4.0", "4.0", "damaged"] and [third, fourth] == ["4.0", "4.0"]
    assert "it is compiled again" in warning


@pytest.mark.parametrize("kind", ["exchanged", "empty", "without its sum", "link", "pipe"])
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
        "without its sum": lambda: one.write_bytes(other[32:]),
        "link": lambda: one.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(one),
    }[kind]()
    assert cache.get("one") is None and cache.get("two") == b"program two"
    assert len(warnings) == 1 and warnings[0].endswith(f"it is compiled again ({tmp_path})")
    cache.put("one", b"program one")
    assert cache.get("one") == b"program one" and len(warnings) == 1
