"""`python -m infer.selftest`: sound models pass, damaged ones fail in the right line."""

import dataclasses
import json
import shutil
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import infer
from convert.random import official_config, write_random
from glm2_jax import PRESETS, CheckpointError, DeviceError, Tokenizer, last_logits
from infer import known_ids
from infer.engine import load
from infer.engine.engine import Engine
from infer.engine.load import demo_folder
from infer.engine.programs import Programs
from infer.selftest import checks, known
from infer.selftest.__main__ import main
from infer.selftest.checks import Check
from infer.selftest.run import model_name, scrubbed
from tests.support.checkpoints import TINY, tiny_config, write_official
from tests.support.family_folders import FAMILIES, random_folder
from tests.support.shared_data import shared_file, shared_path
from tests.support.sp_model import sp_model

LINES = 35  # a report must stay fit to paste
FIGURES = "load_s compile_s prefill_tokens prefill_rate decode_tokens decode_rate".split()

PROGRAMS: dict[Hashable, Any] = {}


@pytest.fixture(autouse=True)
def share_programs(monkeypatch):
    """Models of one configuration share what was compiled: it depends on shapes alone."""

    def make(checkpoint, **kwargs):
        key = (checkpoint.config, checkpoint.summary.dtype, type(checkpoint.params["layers"]))
        engine = Engine(checkpoint, programs=PROGRAMS.get(key), **kwargs)
        PROGRAMS[key] = engine.programs
        return engine

    monkeypatch.setattr(load, "Engine", make)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A random checkpoint, of which nothing is known."""
    return write_official(tmp_path_factory.mktemp("models") / "toy", TINY)


def report(capsys, *args: str, code: int = 0) -> str:
    """Runs the command in this process; its report, checked for what every report must hold."""
    assert main([*args, "--compile-cache", "off"]) == code
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= LINES and text.startswith("glm2-jax selftest\nmodel ")
    return text


def lines(text: str, status: str) -> list[str]:
    """The names of the checks with a status."""
    found = [line for line in text.splitlines() if line.startswith(f"{status} ")]
    return [line.removeprefix(status).strip().split("  ")[0] for line in found]


def test_the_demo_passes(capsys):
    text = report(capsys)
    names = ["files", "parameters", "shapes", "finite", "prompt ids", "cache"]
    assert lines(text, "pass") == names + ["first token", "answer"] * 3
    assert "result       12 passed, 0 failed, 0 skipped" in text
    assert "rope         plain; template chatglm2" in text  # in the words of convert.inspect
    assert "2,337,600" in text and "jax " in text and "decode " in text and "peak memory" in text


def spoil(folder: Path, kind: str) -> None:
    """Damages a folder in our own format."""
    if kind == "another tokenizer":  # the piece for it becomes another
        path = folder / "tokenizer.model"
        path.write_bytes(path.read_bytes().replace("你好".encode(), "我好".encode(), 1))
        return
    path = folder / "model.safetensors"
    tensors = {key: np.array(value) for key, value in load_file(path).items()}
    if kind == "nan":
        tensors["layers.1.down"] *= np.nan
    else:
        tensors["embed"] = tensors["embed"][::-1].copy()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("kind", "fails", "passes", "says"),
    [
        ("nan", "files opens", "", "layers.1.down"),
        (
            "swapped rows",
            "files first token answer",
            "parameters shapes finite prompt ids cache",
            "expected 652 for 你好",
        ),
        (
            "another tokenizer",
            "files prompt ids first token answer",
            "parameters shapes finite cache",
            "tokenizer.model is not the demo one, or it is damaged",
        ),
    ],
)
def test_a_damaged_file(capsys, tmp_path, kind, fails, passes, says):
    folder = Path(shutil.copytree(demo_folder(), tmp_path / "copy"))
    spoil(folder, kind)
    text = report(capsys, "--model", str(folder), code=4)
    assert " ".join(dict.fromkeys(lines(text, "FAIL"))) == fails
    assert " ".join(dict.fromkeys(lines(text, "pass"))).startswith(passes)
    changed = "tokenizer.model differs: its sha256", "model.safetensors has"
    assert says in text and any(words in text for words in changed)
    assert str(tmp_path) not in text


def test_of_a_random_model_nothing_is_known(capsys, toy, tmp_path, monkeypatch):
    text = report(capsys, "--model", str(toy))
    assert lines(text, "pass") == ["parameters", "shapes", "finite", "cache"]
    assert lines(text, "skipped") == ["files", "prompt ids", "first token", "answer"]
    assert text.count("not known") == 3 and "model        toy\n" in text
    assert str(toy.parent) not in text
    raw = official_config(str(demo_folder() / "config.json"))
    write_random(tmp_path / "random", raw, demo_folder())  # as large as a known one
    text = report(capsys, "--model", str(tmp_path / "random"))
    assert lines(text, "skipped") == ["files", "first token", "answer"]
    assert "prompt ids" in lines(text, "pass")
    monkeypatch.setattr(checks, "known_answers", lambda *args: (known.CHATGLM2_6B,))
    text = report(capsys, "--model", str(toy), code=4)
    assert lines(text, "FAIL") == ["first token", "answer"]
    assert "expected 36474 for 你好" in text and "ChatGLM2-6B" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_of_later_families_only_what_was_checked_passes(capsys, tmp_path, monkeypatch, family):
    figures = dict.fromkeys(FIGURES, 1.0)
    monkeypatch.setattr(checks, "measure", lambda engine: figures)
    text = report(capsys, "--model", str(random_folder(family, tmp_path)))
    assert lines(text, "pass") == ["parameters", "shapes", "finite", "cache"]
    assert lines(text, "skipped") == ["files", "prompt ids", "first token", "answer"]
    assert f"architecture {family}, " in text and text.count("not known") == 3
    assert ("rope         none: learned positions" in text) == (family == "glm")


def test_toys_that_pose_as_a_published_checkpoint(capsys, tmp_path):
    raw = {"_name_or_path": "THUDM/chatglm2-6b"}
    folder = write_official(tmp_path / "posing", TINY, raw=raw)
    text = report(capsys, "--model", str(folder), code=4)
    assert lines(text, "FAIL") == ["parameters"]
    assert f"got {TINY.num_params:,}, expected 6,243,584,000" in text
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 28}))
    text = report(capsys, "--model", str(folder), code=4)
    assert lines(text, "FAIL") == ["opens"] and "do not fit the configuration" in text


def test_damage_in_memory(toy, monkeypatch):
    engine = infer.load(toy, layers="stacked")
    params = engine.checkpoint.params
    layers = params["layers"] | {"q": params["layers"]["q"].at[1, 0, 0, 0].set(np.inf)}
    checkpoint = dataclasses.replace(engine.checkpoint, params=params | {"layers": layers})
    engine.checkpoint = checkpoint
    monkeypatch.setattr(checks, "known_answers", lambda *args: (known.Answer("hi", 3, ("x",)),))
    found = {check.name: check for check in checks.run_checks(engine)}
    assert found["finite"].status == "FAIL" and found["finite"].got == "in layers.q layer 1"
    assert found["cache"].status == "FAIL" and found["parameters"].status == "pass"
    assert found["first token"].status == "FAIL" and "NaN or Inf" in found["first token"].got

    embed = params["embed"][:-1]
    engine.checkpoint = dataclasses.replace(checkpoint, params=params | {"embed": embed})
    (shapes,), (count,) = checks._shapes(engine), checks._parameters(engine, None)
    assert shapes.status == count.status == "FAIL" and shapes.got == "embed (639, 32)"


def test_a_cache_that_is_wrong(toy, monkeypatch):
    def forgets(config, params, tokens, last, cache=None):
        return last_logits(config, params, tokens, last)[0], None

    engine = infer.load(toy)
    engine.executor.programs = Programs("cpu")
    monkeypatch.setattr(checks, "last_logits", forgets)
    assert [check.status for check in checks._cache(engine)] == ["FAIL"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_looking_for_nan_and_infinity_needs_no_memory(dtype):
    for bad in (np.nan, np.inf, -np.inf):
        array = jnp.full((3, 8, 34), -2, dtype).at[1, 7, 33].set(bad)
        assert checks._finite_rows(array).tolist() == [True, False, True]
    large = jax.ShapeDtypeStruct((2, 256, 4096), jnp.dtype(dtype))
    memory = checks._finite_rows.lower(large).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 10_000


def test_out_of_memory_is_reported_with_its_own_exit_code(capsys, toy, monkeypatch):
    def full(*args, **kwargs):
        raise DeviceError("out of device memory: loading", "RESOURCE_EXHAUSTED", "Take less.")

    monkeypatch.setattr(load, "open_choice", full)
    text = report(capsys, "--model", str(toy), code=5)
    assert lines(text, "FAIL") == ["opens"] and "RESOURCE_EXHAUSTED Take less." in text


def test_known_prompts_against_the_published_tokenizer():
    data = shared_file("tokenizer/tokenizer.model")
    assert data is not None
    for family, templates in (("chatglm2", ["chatglm2"]), ("chatglm3", ["chatglm2", "chatglm3"])):
        tokenizer = Tokenizer.from_bytes(data, family)
        assert known_ids.known_tokens(PRESETS[f"{family}-6b"], tokenizer) is known_ids.PUBLISHED
        for template in (*templates, "raw"):
            ids = known_ids.PUBLISHED.prompts[template, known_ids.HELLO]
            assert checks.build_prompt(tokenizer, template, known_ids.HELLO) == ids
    assert len(known_ids.PUBLISHED.prompts["chatglm2", known_ids.HELLO]) == 17


def test_the_known_prompt_of_glm():
    file = shared_path("glm-family/tokenizers/cog-pretrain.model")
    tokenizer = Tokenizer.from_file(file, "glm")
    found = known_ids.known_tokens(PRESETS["glm-large-chinese"], tokenizer)
    assert found is not None
    [((template, text), ids)] = found.prompts.items()
    assert checks.build_prompt(tokenizer, template, text) == ids


def test_which_models_are_known():
    tokenizer = Tokenizer.from_bytes(sp_model())
    published = PRESETS["chatglm2-6b"]
    assert known.known_answers(published, tokenizer, "float16") == ()  # another tokenizer
    assert known_ids.known_tokens(tiny_config(), tokenizer) is None
    tokenizer.num_pieces = known_ids.PUBLISHED_PIECES
    assert [a.first for a in known.known_answers(published, tokenizer, "float16")] == [36474]
    assert known.known_answers(published, tokenizer, "int4") == ()
    for name in ("chatglm2-6b-32k", "chatglm3-6b", "codegeex2-6b"):
        assert known.known_answers(PRESETS[name], tokenizer, "float16") == ()
    assert known_ids.known_tokens(PRESETS["codegeex2-6b"], tokenizer) is known_ids.CODEGEEX2
    assert known.claimed_preset("THUDM/chatglm3-6b-32k") == "chatglm3-6b-32k"
    assert known.claimed_preset("glm-4-9b-chat-1m") == "glm-4-9b-chat-1m"
    assert known.claimed_preset("me/chatglm2-toy") is known.claimed_preset(None) is None
    # Punctuation and width do not matter.
    text = "你好👋!我是人工智能助手 ChatGLM2-6B,很高兴见到你,欢迎问我任何问题。"
    assert known.same_text(text, known.CHATGLM2_6B.texts[0])
    assert not known.same_text(text.replace("很", "不"), known.CHATGLM2_6B.texts[0])


def test_json_and_no_private_words(capsys, toy, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="directory not found"):
        main(["--model", str(tmp_path / "none"), "--compile-cache", "off"])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("HOME", str(toy.parent))
    assert main(["--model", str(toy), "--json", "--compile-cache", "off"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["model"] == "toy" and found["skipped"] == 4 and found["fail"] == 0
    assert found["figures"]["decode_tokens"] > 0 and len(found["fingerprint"]) == 64
    assert str(toy.parent) not in out and out.count("\n") == 1


def test_paths_are_shortened(tmp_path, monkeypatch):
    assert model_name(f"{demo_folder()}/") == "demo"
    folder = tmp_path / "me" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for spelling in (str(folder), "me/model", "./me/model/", "."):
        given = f"{Path(spelling)}/a.bin and {folder}/b and {tmp_path}/me/other, inference"
        check = Check("opens", "FAIL", note=given)
        note = scrubbed(check, spelling)["note"]
        assert str(tmp_path) not in note and note.endswith("/b and ~/other, inference"), note
