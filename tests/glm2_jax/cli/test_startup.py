"""What is compiled before the first token: counted, reported, and not done again later."""

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from glm2_jax.errors import DeviceError
from glm2_jax.runtime.compile_cache import VARIABLE, Lookup
from infer.engine.params import SamplingParams
from infer.engine.programs import Made, Programs
from infer.engine.session import Session
from tests.support.engine_toy import toy_engine
from tests.support.paths import ROOT

GREEDY = SamplingParams(temperature=0, max_new_tokens=3)

# Runs a tool and then prints, as the last line on stderr, what JAX did for its programs.
COUNTING = """
import collections, importlib, json, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
status = importlib.import_module("infer.generate.__main__").main(sys.argv[1:-1])
names = "compile_requests_use_cache", "cache_hits", "cache_misses"
print(json.dumps([status, *(counts[name] for name in names)]), file=sys.stderr)
unused = set(sys.argv.pop().split(",")) & set(sys.modules)
assert not unused, unused
"""
# Packages of training, downloads, other formats and the server: an answer does not wait for them.
UNUSED = (
    "optax,orbax,orbax.checkpoint,tensorstore,torch,transformers,peft,huggingface_hub,"
    "modelscope_hub,fastapi,uvicorn,llguidance,tokenizers,pyarrow,gguf,matplotlib,train"
)


def test_a_second_start_of_the_demo_compiles_nothing(tmp_path):
    def start():
        """Give the exit code and counts, other lines, and the answer."""
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, "--greedy", "--max-new-tokens", "3", "--stats",
             "--device", "cpu", "--compile-cache", str(tmp_path), UNUSED],
            cwd=ROOT, input="你好\n", capture_output=True, text=True, timeout=300,
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"}, check=True,
        )  # fmt: skip
        *lines, counts = done.stderr.splitlines()
        return json.loads(counts), lines, done.stdout

    (status, wanted, found, compiled), lines, answer = start()
    assert status == found == 0 and wanted == compiled >= 3
    messages = [line for line in lines if line.startswith("compiling")]
    assert messages == [line.removeprefix("compile: ") for line in PROGRAMS]
    assert any(line.startswith("compile ") and line.endswith("3 programs") for line in lines)
    counts, lines, same = start()
    assert counts == [0, wanted, wanted, 0] and same == answer
    assert not any(line.startswith("compiling") for line in lines)
    assert any(line.endswith("3 programs, 3 of them kept from before") for line in lines)


# Loads the demo, answers, and prints what JAX did for its programs.
FROM_PYTHON = """
import collections, json
import infer, jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
engine = infer.load(device="cpu")
answer = engine.generate(["你好"], temperature=0, max_new_tokens=3)[0].text
print(json.dumps([answer, counts["cache_hits"], counts["cache_misses"]]))
"""


def test_a_second_process_that_loads_from_python_compiles_nothing(tmp_path):
    def load():
        """Give the answer, and how many programs were found and compiled."""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", FROM_PYTHON],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true", VARIABLE: str(tmp_path)},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    answer, found, compiled = load()
    assert found == 0 and compiled >= len(PROGRAMS)
    assert load() == [answer, compiled, 0]


@pytest.fixture
def messages():
    return []


def engine_that_reports(messages, **kwargs):
    return toy_engine(on_event=lambda kind, text: messages.append(f"{kind}: {text}"), **kwargs)


def lines(*programs):
    """The lines about programs that are compiled before a call."""
    count = len(programs)
    return [f"compile: compiling {name} ({n}/{count})" for n, name in enumerate(programs, 1)]


PROGRAMS = lines("prefill 64", "pick 1", "decode 64")  # of a first answer


def test_what_a_call_begins_with_is_compiled_first_and_counted(messages, monkeypatch):
    engine = engine_that_reports(messages, prefill_chunk=64)
    ran = []
    run = engine.programs.call

    def watched(name, *args, **kwargs):
        ran.append((name, len(messages)))
        return run(name, *args, **kwargs)

    monkeypatch.setattr(engine.programs, "call", watched)
    call = engine.run([[5] * 140], GREEDY)  # two parts of 64, and the rest
    list(call)
    assert messages == lines("read 64", "extend 64", "pick 1", "decode 256")
    assert [name for name, _ in ran][:5] == ["read", "read", "extend", "pick", "decode"]
    assert all(count == 4 for _, count in ran)  # nothing ran before all was there
    assert (call.stats.programs, call.stats.programs_kept) == (4, 0)

    engine.complete([[5] * 20] * 2, GREEDY)
    assert messages[4:] == lines("prefill 2 x 32", "pick 2 x 1", "decode 2 x 64")
    *_, last = engine.run([[6] * 139], GREEDY)
    assert len(messages) == 7 and last.completion.stats.programs == 0


def test_an_answer_of_one_token_needs_no_program_for_steps(messages):
    list(engine_that_reports(messages).run([[5]], SamplingParams(temperature=0, max_new_tokens=1)))
    assert messages == lines("prefill 64", "pick 1")


def test_a_session_counts_what_a_reply_begins_with(messages, monkeypatch):
    monkeypatch.setattr("infer.engine.call.ROOM", 8)
    session = Session(engine_that_reports(messages))
    list(session.run([5] * 20, GREEDY))
    assert messages == lines("extend 64", "pick 1", "decode 64")
    list(session.run([*session.ids, *[7] * 40], GREEDY))
    assert messages[3:] == lines("grow 64", "extend 64", "decode 128")


def test_compiling_that_fails_can_be_tried_again(messages, monkeypatch):
    engine = engine_that_reports(messages)
    make, count = Programs._compile, []

    def failing(self, *args):
        count.append(1)
        if len(count) == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return make(self, *args)

    monkeypatch.setattr(Programs, "_compile", failing)
    with pytest.raises(DeviceError, match="out of device memory"):
        list(engine.run([[5]], GREEDY))
    list(engine.run([[5]], GREEDY))
    assert messages == [PROGRAMS[0], *lines("pick 1", "decode 64")]


def test_a_thread_that_compiles_leaves_the_calls_of_others_alone():
    programs, ones = Programs("cpu"), np.ones(3)

    def double(x):
        return x * 2

    def begin(call):
        assert isinstance(call("double", 3, double, ones), jax.ShapeDtypeStruct)
        with ThreadPoolExecutor(1) as pool:
            doubled = pool.submit(programs.call, "double", 3, double, ones).result()
        assert doubled.tolist() == [2, 2, 2]

    programs.call("double", 3, double, ones)
    programs.ahead("begin", begin, Made())
    assert programs.compiled == 1


def test_lookups_leave_the_log_as_it_was(caplog):
    log = logging.getLogger("jax._src.compiler")
    before, missed = (log.level, list(log.filters)), []
    with Lookup(lambda: missed.append(1)) as lookup:
        log.debug("Persistent compilation cache hit for 'f' with key 'k'")
        log.error("something else")
    assert lookup.found and [record.message for record in caplog.records] == ["something else"]
    missed.clear()
    with Lookup(lambda: missed.append(1)) as lookup:  # no cache
        assert missed == [1]
    assert missed == [1] and not lookup.found
    assert (log.level, list(log.filters)) == before
