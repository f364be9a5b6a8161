"""`python -m infer.bench --serve`: the traffic, what its client measures, and the report."""

import asyncio
import dataclasses
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from glm2_jax.cli.parser import Parser, add_flags, from_flags
from glm2_jax.errors import DeviceError, InputError, UsageError
from glm2_jax.text.tokenizer import Tokenizer
from infer.bench import __main__ as bench
from infer.bench.serving import client, servers
from infer.bench.serving import run as serving
from infer.bench.serving.client import Outcome, Request, Target
from infer.bench.serving.figures import Times, figures, quiet_gaps
from infer.bench.serving.options import LoadSettings
from infer.bench.serving.plot import draw
from infer.bench.serving.report import Report, Result, render
from infer.bench.serving.traffic import Level, levels, plan, send
from infer.engine.load import demo_folder
from tests.infer.bench.dummy_server import DummyServer
from tests.support.paths import ROOT

LIMITS = {"ttft_limit": 1.0, "itl_limit": 0.2}


def load_of(*args: str) -> LoadSettings:
    parser = Parser(prog="bench")
    add_flags(parser, "load", LoadSettings)
    return from_flags(LoadSettings, parser.parse_args(["--serve", *args]))


@pytest.fixture
def dummy():
    """Starts dummy servers in a thread; returns the server and its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    started: list[DummyServer] = []

    def start(*args, **kwargs) -> tuple[DummyServer, str]:
        server = DummyServer(*args, **kwargs)
        started.append(server)
        return server, asyncio.run_coroutine_threadsafe(server.start(), loop).result()

    async def end() -> None:
        for server in started:
            server.stop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # the connections close

    yield start
    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


# The traffic


def test_a_seed_decides_the_traffic():
    load = load_of("--rate", "4,2", "--requests", "4000", "--spread", "0.5", "--new-tokens", "100")
    assert [level.rate for level in levels(load)] == [2, 4]
    level = Level(rate=4.0)
    requests = plan(load, level)
    assert plan(load, level) == requests != plan(dataclasses.replace(load, seed=1), level)
    arrivals = np.array([request.arrival for request in requests])
    gaps = np.diff(arrivals, prepend=0.0)
    # Poisson: gaps are exponential, so their deviation is their mean.
    assert (gaps > 0).all() and gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    lengths = np.array([request.new_tokens for request in requests])
    assert np.median(lengths) == pytest.approx(100, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(0.5, rel=0.05) and lengths.max() == 400
    assert min(min(request.prompt) for request in requests) >= 300


def test_a_closed_loop_has_as_many_requests_as_users_need():
    load = load_of("--users", "8,1")
    assert [level.name for level in levels(load)] == ["1 user", "8 users"]
    requests = plan(load, Level(users=8))
    assert len(requests) == 64 and {request.arrival for request in requests} == {None}
    sizes = {(len(request.prompt), request.new_tokens) for request in requests}
    assert sizes == {(128, 64)} and len({tuple(request.prompt) for request in requests}) == 64


def test_users_wait_for_their_answers_and_arrivals_do_not(dummy):
    requests = [Request([1], 3, seed, arrival=0.0) for seed in range(12)]
    for level, most in ((Level(users=3), 3), (Level(rate=1e6), 12)):
        server, url = dummy(crowd=most)
        outcomes = asyncio.run(send(Target("", url), level, requests, timeout=60))
        assert [outcome.error for outcome in outcomes] == [""] * 12
        assert server.most_running == most
        assert sorted(body["seed"] for body in server.requests) == list(range(12))


def test_a_late_request_has_waited_since_it_was_due(dummy):
    _, url = dummy()
    late = client.ask(Target("", url), Request([1], 1, 0), start=-1000.0, timeout=60)
    assert asyncio.run(late).start == -1000.0


# The client


@pytest.mark.parametrize(("newline", "chunked"), [("\n", True), ("\r\n", True), ("\n", False)])
def test_the_client_reads_every_form_of_a_stream(dummy, newline, chunked):
    server, url = dummy(delay=0.001, newline=newline, chunked=chunked)
    target = Target("server", url, "name", "secret")
    request = Request([5, 6], 7, seed=3, temperature=0.5)
    outcome = asyncio.run(client.ask(target, request, start=0.0, timeout=60))
    assert (outcome.error, outcome.tokens, len(outcome.times)) == ("", 7, 7)
    assert outcome.times == sorted(outcome.times) and outcome.times[-1] <= outcome.end
    (body,) = server.requests
    assert body["prompt"] == [5, 6] and body["ignore_eos"] and body["stream"]
    assert (body["model"], body["max_tokens"], body["seed"]) == ("name", 7, 3)
    assert server.keys == ["Bearer secret"] and "secret" not in repr(target)


def test_errors_are_counted_by_kind(dummy):
    faults = ["429", "drop", "garbage", "error", "stall", "429"]
    _, url = dummy(faults=dict(enumerate(faults)))
    requests = [Request([1], 5, seed) for seed in range(8)]
    outcomes = asyncio.run(send(Target("", url), Level(users=1), requests, timeout=1.0))
    found = figures(outcomes, **LIMITS)
    assert found.errors == {
        "HTTP 429": 2, "answer ended early": 1, "malformed answer": 1, "error in the stream": 1,
        "timed out": 1,
    }  # fmt: skip
    assert found.requests == 8 and found.output_tokens == 10 and found.good == 2
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = Target("", f"http://127.0.0.1:{closed.getsockname()[1]}")
        outcome = asyncio.run(client.ask(nowhere, requests[0], start=0.0, timeout=60))
        assert outcome.error.startswith("connection: ")


# The figures


def test_percentiles_and_rates():
    assert Times.of([]) is None
    assert Times.of(range(101)) == Times(50, 50, 90, 99)
    outcomes = [
        Outcome(start=10.0, times=[10.5, 10.6, 10.8], end=10.9, tokens=3),
        Outcome(start=10.0, times=[11.5, 11.6], end=11.7, tokens=2),  # its first token is too late
        Outcome(start=11.0, times=[11.1, 12.1], end=12.1, tokens=6),  # parts of several tokens
        Outcome(start=11.0, times=[11.1, 11.6, 12.1], end=12.5, tokens=3),  # too slow
        Outcome(start=11.0, end=15.0, tokens=0, error="timed out"),
    ]
    found = figures(outcomes, **LIMITS)
    assert (found.requests, found.output_tokens, found.seconds) == (5, 14, 5.0)
    assert found.tokens_per_s == 2.8 and found.requests_per_s == 0.8
    assert found.ttft is not None and found.inter_token is not None
    assert found.ttft.mean == pytest.approx((0.5 + 1.5 + 0.1 + 0.1) / 4)
    assert found.inter_token.p50 == pytest.approx(0.35)  # of 0.1, 0.1, 0.2, 0.5, 0.5, 1.0
    assert found.good == 2 and found.goodput == 0.4
    nothing = figures(outcomes[-1:], **LIMITS)
    assert nothing.ttft is nothing.jitter is None and nothing.goodput == 0


def test_quiet_gaps_are_those_without_a_wait():
    """Compared with the definition, for each gap and each wait."""
    random = np.random.default_rng(0)
    outcomes = []
    for number in range(60):
        start = float(random.uniform(0, 40))
        times = (start + np.cumsum(random.uniform(0.05, 0.5, 12))).tolist()
        outcomes.append(Outcome(start, times, times[-1], 12, "lost" if number % 7 == 0 else ""))
    expected = [
        end - begin
        for outcome in outcomes
        if not outcome.error
        for begin, end in pairwise(outcome.times)
        if not any(other.start < end and begin < other.times[0] for other in outcomes)
    ]
    found = list(quiet_gaps(outcomes))
    assert found == expected and 0 < len(found) < 53 * 11


# What is said


def results() -> list[Result]:
    answers = [Outcome(0.0, [0.1, 0.2, 0.3], 0.3, 3)] * 2
    lost = [Outcome(0.0, [], 0.3, 0, "HTTP 429")]
    one, two = Level(users=1), Level(users=2)
    return [
        Result("ours", one, figures(answers[:1], **LIMITS), 0.1, 0.3),
        Result("theirs", one, figures(answers[:1] + lost, **LIMITS), 0.1),
        Result("ours", two, figures(answers, **LIMITS), 0.21, 0.45),
    ]


def test_table_and_paragraphs():
    report = Report({"model": "some model"}, 1.0, 0.2, results())
    wide = render(report, 250)
    assert "ours    2 users         2       0     20" in wide
    assert "ours, 2 users: 2.00 x the tok/s of 1 user, inter-token p99 is 1.00 x" in wide
    assert "ours, 1 user: 1.00 x the tok/s of theirs" in wide
    assert "theirs, 1 user: failed: HTTP 429 (1)" in wide and "TTFT <= 1000 ms" in wide
    assert "ours, 2 users: the load generator itself took 70 % of a core" in wide
    assert "not measured: the rest" in wide
    narrow = render(report, 60)
    assert max(map(len, narrow.splitlines())) <= 60 and "goodput 100 %, cores 1.50" in narrow
    assert "model: some model" in render(Report(report.about, 1, 1), 60)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    path = tmp_path / "load.png"
    draw(Report({"model": "some model"}, 1.0, 0.2, results()), str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_running_server_and_its_peer(dummy, capsys, tmp_path, monkeypatch):
    server, url = dummy()
    _, other = dummy(delay=0.001)
    (tmp_path / "key").write_text("secret\n")
    code = bench.main(
        ["--serve", "--url", f"{url}/v1", "--peer-server", other, "--users", "1,2", "--requests",
         "3", "--prompt-tokens", "4", "--new-tokens", "5", "--api-key-file", str(tmp_path / "key"),
         "--json"]
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["complete"] and found["limits"] == {"ttft": 2.0, "inter_token": 0.2}
    order = [(result["server"], result["users"]) for result in found["results"]]
    assert order == [("server", 1), ("peer", 1), ("server", 2), ("peer", 2)]  # in turns
    for result in found["results"]:
        assert (result["requests"], result["errors"], result["rate"]) == (3, {}, None)
        assert result["output_tokens"] == 15 and result["goodput"] == 1.0
        assert result["output_tokens_per_s"] == 15 / result["seconds"]
        for name in ("ttft", "inter_token", "end_to_end"):
            assert set(result[name]) == {"mean", "p50", "p90", "p99"}
    assert set(server.keys) == {"Bearer secret"}
    measured = [body for body in server.requests if body["max_tokens"] == 5]
    assert len(measured) == 6 and {body["model"] for body in measured} == {"dummy"}
    lengths = {len(body["prompt"]) for body in server.requests}
    assert lengths == {4} and len(server.requests) == 9  # a user warms it up, then two


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--users", "4"], "--users needs --serve"),
        (["--serve", "--steps", "3"], "--steps has no effect with --serve"),
        (["--serve", "--url", "http://x", "--random", "chatglm2-6b"], "--random has no effect"),
        (["--serve", "--url", "http://x", "--peer-server", "llama"], "no effect with --url"),
        (["--serve", "--model-name", "x"], "--model-name needs --url"),
        (["--serve", "--quantize", "int8,none"], "--quantize must name one"),
        (["--serve", "--rate", "1", "--users", "2"], "--users and --rate exclude"),
    ],
)
def test_contradictions(args, message):
    with pytest.raises(UsageError, match=message):
        bench.main(args)
    for bad in (["--serve", "--url", "example.org"], ["--serve", "--rate", "0"]):
        with pytest.raises(SystemExit, match="2"):
            bench.main(bad)


# Servers that are started


def test_a_server_that_is_no_server(dummy):
    with socket.socket() as closed, pytest.raises(InputError, match="does not list its models"):
        closed.bind(("127.0.0.1", 0))
        bench.main(["--serve", "--url", f"http://127.0.0.1:{closed.getsockname()[1]}"])
    server = servers.Server("bad", [sys.executable, "-c", "exit('no memory\\x1b')"], 1)
    with pytest.raises(DeviceError, match=r"bad exited with code 1.\nno memory\\x1b"):
        asyncio.run(server.ready())
    server.close()
    server = servers.Server("busy", [sys.executable, "-c", "while True: pass"], 1)
    try:
        while server.cpu_seconds() == 0:
            time.sleep(0.01)
    finally:
        server.close()
    assert server.cpu_seconds() is None


def test_servers_are_started_and_measured_in_turns(capsys, monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    dummy = [sys.executable, "-m", "tests.infer.bench.dummy_server"]
    monkeypatch.setattr(
        servers, "serve_command",
        lambda settings, model, *, slots, max_length, port: [*dummy, "--port", str(port)],
    )  # fmt: skip
    llama = tmp_path / "llama-server"
    llama.write_text(f'#!/bin/sh\nexec {shlex.join(dummy)} "$@"\n')
    llama.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert bench.main(["--serve", "--peer-server", "llama", "--users", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["about"]["model"] == "demo (bundled)"
    assert found["about"]["peer"] == "llama-server, GGUF f16"
    assert [result["server"] for result in found["results"]] == ["infer.serve", "llama-server"]
    for result in found["results"]:
        assert result["output_tokens"] == 16 * 64 and result["server_cpu_s"] is not None


def test_llama_server_is_looked_for_first(monkeypatch):
    monkeypatch.setattr(servers.shutil, "which", lambda name: None)
    monkeypatch.setattr(serving, "Server", lambda *args: pytest.fail("starts"))
    with pytest.raises(UsageError, match="llama-server not found"):
        bench.main(["--serve", "--peer-server", "llama"])


def test_every_id_of_a_padded_vocabulary_has_a_text():
    data = (demo_folder() / "tokenizer.model").read_bytes()
    before = Tokenizer.from_bytes(data)
    after = Tokenizer.from_bytes(servers.padded(data, 3000))
    assert after.num_pieces == 3000 > before.num_pieces
    assert after.decode([2999, 2998]) == "000bb7 000bb6"
    assert after.encode("你好, world") == before.encode("你好, world")


def test_the_flags_of_the_server():
    options = pytest.importorskip("infer.serve.options")
    args, values = bench.options.parse(
        bench.parser(), ["--serve", "--device", "cpu", "--quantize", "int8"], "preset"
    )
    settings = from_flags(bench.options.BenchSettings, args, **values)
    size = {"slots": 3, "max_length": 99, "port": 1234}
    command = servers.serve_command(settings, demo_folder(), "--tokens-per-prefill", "64", **size)
    assert command[:4] == [sys.executable, "-P", "-m", "infer.serve"]
    found = vars(options.parser().parse_args(command[4:]))
    expected = size | {"device": "cpu", "quantize": "int8", "path": str(demo_folder())}
    assert expected | {"tokens_per_prefill": 64} == {
        name: found["model" if name == "path" else name]
        for name in (*expected, "tokens_per_prefill")
    }


def test_ctrl_c_leaves_no_process_and_no_file(tmp_path):
    code = (
        "import os, sys\nfrom glm2_jax.cli import interrupt\n"
        "from infer.bench.serving import servers\nfrom infer.bench.__main__ import main\n"
        "servers.serve_command = lambda settings, model, port, **more: [sys.executable, '-m', "
        "'tests.infer.bench.dummy_server', '--port', str(port), '--delay', '0.01']\n"
        "interrupt.run(main)"
    )
    command = [sys.executable, "-c", code, "--serve", "--requests", "2000", "--users", "1,2",
               "--new-tokens", "5", "--json"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stderr is not None
    while "1 user: " not in process.stderr.readline():  # its progress
        assert process.poll() is None
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 1 and any(tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "interrupted" in err
    assert json.loads(out)["complete"] is False and not any(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(children[0]), 0)
