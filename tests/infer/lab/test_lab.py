"""`python -m infer.lab`: what is measured of ideas, what they cost, and files that are none."""

import dataclasses
import json
import re
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest

from convert.loading.checkpoint import Checkpoint
from glm2_jax import PRESETS
from glm2_jax.errors import InputError
from glm2_jax.ideas import Idea, Reads
from glm2_jax.model import unstack_layers
from infer.bench.programs import Shape, work
from infer.engine import steps
from infer.engine.engine import Engine
from infer.lab import run
from infer.lab.__main__ import main, parser
from infer.lab.cost import kept_bytes, step_bytes, usual_reads
from infer.lab.files import blamed, read_ideas
from infer.lab.report import Report, Result, draw, show
from infer.lab.sample import Sample
from infer.memory.precision import Precision, vector_bytes
from infer.memory.shares import abstract_params
from tests.support import engine_toy
from tests.support.commands import exit_code
from tests.support.paths import ROOT
from tests.support.toy import toy_params

LAB = ROOT / "examples" / "lab"
TOY = dataclasses.replace(engine_toy.TOY, seq_length=64)  # one size of the cache for everything
PARAMS = unstack_layers(toy_params(TOY))


def toy_lab_engine(*args: Any, **kwargs: Any) -> Engine:
    """An engine whose second layer alone often says what both say."""
    first, second = PARAMS["layers"]
    first = {**first, "o": first["o"] * 0.02, "down": first["down"] * 0.02}
    params = {**PARAMS, "layers": [first, second]}
    made = engine_toy.toy_engine(params)
    summary = cast(Any, SimpleNamespace(dtype="float32", quantization=None))
    return Engine(Checkpoint(TOY, params, made.tokenizer, made.template, "toy", summary))


def most_likely(logits, keys, counts, rows, allowed=None):
    """In place of `sample`, which compiles long and is looked at elsewhere."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def test_the_report_of_an_idea_that_drafts(monkeypatch, tmp_path, capsys, request):
    request.addfinalizer(jax.clear_caches)  # other tests must not get traces with another sampler
    monkeypatch.setattr(run, "open_engine", toy_lab_engine)
    monkeypatch.setattr(steps, "sample", most_likely)
    monkeypatch.setattr(steps, "token_logprobs", lambda *_: None)
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text(json.dumps({"prompt": "hello you", "response": "ok"}), encoding="utf-8")
    flags = "--context 20 --steps 2 --repeat 1 --batch-size 1 --json --max-new-tokens 20"
    files = [str(LAB / "self_speculative.py"), "--prompts", str(prompts)]
    assert main([*files, "--set", "skip=1", "--set", "drafts=2", *flags.split()]) == 0
    report = json.loads(capsys.readouterr().out)
    model, idea = report["ideas"]
    assert (model["idea"], idea["idea"]) == ("full model", "self_speculative")
    assert idea["options"] == {"skip": 1, "drafts": 2}
    # Drafts change no logit and no answer, and some of them were accepted.
    assert idea["same_answers"] and idea["kl_divergence"] == 0 and idea["top1_agreement"] == 1
    assert model["perplexity"] == idea["perplexity"] > 1
    assert model["tokens_per_step"] == 1 < idea["tokens_per_step"] < 3
    shape = Shape(batch=1, context=20, steps=2)
    assert model["read_bytes"] == work(TOY, Precision("float32"), shape, "cpu")[0]
    assert idea["read_bytes"] * idea["tokens_per_step"] > model["read_bytes"]
    assert model["cache_bytes"] == model["allocated_bytes"] == idea["cache_bytes"]
    assert model["moved_bytes"] > model["read_bytes"] / 2


def test_the_table_and_the_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    reads = Reads(4, 1, 9, 9, 9)
    found = Result("full model", 2.0, 0.0, 1.0, {}, reads, 4e6, None, 1e5, 10, seconds=[0.5, 0.25])
    drafting = dataclasses.replace(
        found, name="drafting", perplexity=3.0, told={"share": 0.25}, options={"skip": 2},
        reads=reads._replace(tokens=2), moved_bytes=8e6, same_answers=False,
    )  # fmt: skip
    report = Report({"model": "toy", "device": "none"}, 512, [found, drafting])
    show(report, as_json=False)
    out = " ".join(capsys.readouterr().out.split())
    assert "full model 2 0 100.00 % 4 1 4.0 MB ? 100.0 kB" in out
    assert "drafting 3 0 100.00 % 8 2 2.0 MB 4.0 MB 100.0 kB" in out
    assert "drafting: skip 2, share 0.25, greedy answers the same: no" in out
    draw(report, str(tmp_path / "lab.svg"))
    assert "drafting" in (tmp_path / "lab.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "quantize"), [("chatglm2-6b", "int4"), ("chatglm-6b", None)])
def test_the_usual_bytes_are_those_of_the_benchmark(name, quantize):
    config, precision = PRESETS[name], Precision("bfloat16", quantize)
    params = jax.eval_shape(unstack_layers, abstract_params(config, precision))
    shape = Shape(batch=1, context=100, steps=4)
    reads, vector = usual_reads(config, shape), vector_bytes(config.head_dim, 2)

    def bytes_of(**changes: float) -> float:
        return step_bytes(config, params, vector, reads._replace(**changes))

    usual = bytes_of()
    assert usual == pytest.approx(work(config, precision, shape, "gpu")[0], rel=1e-12)
    per_key = config.num_layers * config.num_kv_heads
    assert usual - bytes_of(keys=reads.keys - 1) == per_key * vector
    assert bytes_of(notes=1) - usual == per_key * 4
    half = bytes_of(layers=reads.layers / 2, heads=0)
    assert half < bytes_of(layers=reads.layers / 2, projections=1, heads=0) < usual / 2
    noting = dataclasses.replace(config, idea=Idea(notes=("score",), attention=print))
    assert kept_bytes(noting, vector, reads) - kept_bytes(config, vector, reads) == per_key * 400


FILES = {
    "def idea(*, share=0.5:\n": ("not Python", 3),
    "x = 1\n": ("has no function `idea`", 3),
    "idea = 3\n": ("has no function `idea`", 3),
    "import glm2_jax\n\n1 / 0\n": ("idea.py:3: ZeroDivisionError: division by zero", 3),
    "import sys\nsys.exit(0)\n": ("idea.py:2: SystemExit: 0", 3),
    "def idea(*, share):\n    pass\n": ("idea.py:1: idea cannot be called", 3),
    "def idea(one, two):\n    pass\n": ("idea.py:1: idea cannot be called", 3),
    "def idea(*, share=1):\n    return None\n": ("--set share=x: not a value of type int", 2),
    "def idea(*, shard=1):\n    return None\n": ("--set share=x: no idea has this option", 2),
    "\0": ("not Python", 3),
}


@pytest.mark.parametrize("text", FILES)
def test_files_that_are_no_ideas_end_before_the_model_is_opened(text, tmp_path, capsys):
    words, code = FILES[text]
    path = tmp_path / "idea.py"
    path.write_text(text, encoding="utf-8")
    assert exit_code(main, path, "--set", "share=x") == code
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err
    assert exit_code(main, tmp_path / "none.py") == 3
    assert exit_code(main, path, "--set", "share") == 2


def test_options_come_from_the_keyword_arguments(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("def idea(*, a=1, b=0.5, c=False, d='x'): ...\n")
    two.write_text("def idea(sample, *, a=2): ...\n")
    given = [("a", "3"), ("two.a", "4"), ("b", "1"), ("c", "true"), ("d", "1")]
    first, second = read_ideas([str(one), str(two)], given)
    assert first.options == {"a": 3, "b": 1.0, "c": True, "d": "1"}
    assert second.options == {"a": 4} and second.measures and not first.measures


def test_options_of_one_file_have_its_stem_whatever_that_is(tmp_path):
    paths = [tmp_path / f"{stem}.py" for stem in ("丢层", "2-b c.d", "other")]
    for path in paths:
        path.write_text("def idea(*, a=1, 层=0, t=''): ...\n", encoding="utf-8")
    names = [str(path) for path in paths]
    flags = "丢层.a=2", "2-b c.d.a=3", "丢层.层=4", "other.t=x.y=z"
    given = parser().parse_args([*names, *(w for f in flags for w in ("--set", f))]).set
    found = [file.options for file in read_ideas(names, given)]
    assert found == [
        {"a": 2, "层": 4, "t": ""},
        {"a": 3, "层": 0, "t": ""},
        {"a": 1, "层": 0, "t": "x.y=z"},
    ]


def test_files_that_a_table_cannot_tell_apart_are_refused(tmp_path, capsys):
    (tmp_path / "v2").mkdir()
    one, two = tmp_path / "one.py", tmp_path / "v2" / "one.py"
    for path in (one, two):
        path.write_text("def idea(): ...\n")
    assert exit_code(main, one, two) == 2
    assert f"{one} and {two} have one name, one" in capsys.readouterr().err
    assert exit_code(main, one, tmp_path / "v2" / ".." / "one.py") == 2
    assert exit_code(main, one, one) == 2
    assert capsys.readouterr().err.count("is named twice") == 2


FAILING = """from glm2_jax.ideas import Idea
import jax.numpy as jnp

def idea(sample, *, how="{how}"):
    def attention(usual, seen):
        if how == "raises":
            return jnp.zeros(3) @ seen.q[0, 0, 0]
        if how == "cuts":
            return usual(seen)[:, :, :1]
        return usual(seen)

    if how == "exits":
        raise SystemExit
    if how == "early":
        return sample.tokens.no
    if how == "notes":
        return Idea(notes=("a",))
    return Idea(attention=attention) if how != "none" else 7
"""


@pytest.mark.parametrize(
    ("how", "line", "words"),
    [
        ("raises", 7, "TypeError"),
        ("cuts", 5, "Expected float32 [1, 4, 4, 8], got float32 [1, 4, 1, 8]"),
        ("exits", 13, "SystemExit"),
        ("early", 15, "AttributeError"),
        ("none", 4, "returned 7"),
        ("notes", 17, "needs `attention`, got notes=('a',) alone"),
    ],
)
def test_the_line_of_an_idea_that_fails_is_named(how, line, words, tmp_path):
    path = tmp_path / "idea.py"
    path.write_text(FAILING.format(how=how), encoding="utf-8")
    (file,) = read_ideas([str(path)], [])
    sample = Sample(TOY, PARAMS, jnp.ones((1, 4), jnp.int32))
    with pytest.raises(InputError) as error, blamed(file.path):
        sample.measure(file.idea(sample))
    assert error.value.what.startswith(f"{path}:{line}: ")
    assert words in str(error.value)
    if how == "raises":  # also in a run of the command: an error of another place names the file
        with pytest.raises(InputError, match="outside of the file"), blamed(file.path):
            raise KeyError


def test_the_page_shows_every_idea_and_commands_that_exist():
    page = (ROOT / "docs/learn/lab.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m infer\.lab (.*)$", page, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        for name in parser().parse_args(command.replace("*", "layer_skip").split()).ideas:
            assert not name.startswith("examples/") or (ROOT / name).exists()
    table = page[page.index("## What eight") : page.index("## Write one")]
    rows = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert sorted(set(rows)) == sorted(path.stem for path in LAB.glob("*.py"))
    hooks = page[page.index("| hook |") :]
    names = [field.name for field in dataclasses.fields(Idea)] + list(Reads._fields[:-1])
    assert [name for name in names if f"`{name}" not in hooks] == []


@pytest.mark.parametrize("name", ["lab.md", "lab.zh.md"])
def test_the_idea_on_the_page_is_the_one_it_says(name, tmp_path):
    page = (ROOT / "docs/learn" / name).read_text(encoding="utf-8")
    text = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[0]
    path = tmp_path / "first_layers.py"
    path.write_text(text, encoding="utf-8")
    sample = Sample(dataclasses.replace(TOY, num_layers=4), PARAMS, None)
    (file,) = read_ideas([str(path)], [("drop", "1")])
    idea = file.idea(sample)
    ran: list[int] = []
    layers: Any = SimpleNamespace(count=4, run=lambda carry, layer: ran.append(layer) or carry)
    assert idea.blocks is not None and idea.reads is not None
    idea.blocks(layers, (1, 2, 3))
    assert ran == [0, 1, 2]
    assert idea.reads(Reads(4, 1, 9, 9, 8), {}) == Reads(3, 1, 9, 9, 6)
    for drop in "4", "-1", "99":
        (file,) = read_ideas([str(path)], [("drop", drop)])
        with pytest.raises(InputError, match=rf"py:9: ValueError: drop is 0 to 3, got {drop}"):
            file.idea(sample)
