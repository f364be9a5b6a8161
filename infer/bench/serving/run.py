"""What `python -m infer.bench --serve` does: servers, traffic, and the report of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from glm2_jax.cli import arguments, interrupt
from glm2_jax.cli.files import require_file_place
from glm2_jax.cli.main import EXIT_DEVICE
from glm2_jax.cli.messages import Progress, note
from glm2_jax.cli.tables import columns
from glm2_jax.errors import InputError
from glm2_jax.escape import json_line
from glm2_jax.runtime.machine import describe_software
from infer import startup
from infer.bench.host import describe_host, load_text
from infer.bench.options import BenchSettings
from infer.bench.serving import plot, servers
from infer.bench.serving.client import Outcome, Target
from infer.bench.serving.figures import figures
from infer.bench.serving.options import LLAMA, LoadSettings
from infer.bench.serving.report import Report, Result, as_json, render
from infer.bench.serving.servers import Server
from infer.bench.serving.traffic import Level, levels, plan, send

_SLOTS = 32  # where the traffic does not say how many users there are
_MARGIN = 8  # tokens that a server adds to a prompt, or keeps free
_WARM = 4  # tokens of an answer that is not measured; users of one where a rate is


def run(settings: BenchSettings, load: LoadSettings) -> int:
    """Measure what the flags name and print it; returns the exit code."""
    if settings.plot:
        arguments.check_plot(settings.plot)
        require_file_place(settings.plot)
    about = {
        "model": "", "host": describe_host(), "versions": describe_software(),
        "traffic": _describe(load), "load average": f"{load_text()} at the start",
        "command": settings.command,
    }  # fmt: skip
    report = Report(about, load.slo_ttft_ms / 1e3, load.slo_itl_ms / 1e3)
    printed = threading.Lock()

    def print_report() -> None:
        if printed.acquire(blocking=False):  # once
            text = json_line(as_json(report)) if settings.json else render(report, columns())
            print(text, flush=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(interrupt.always(print_report))
        found = _open(settings, load, report, stack)
        asyncio.run(_measure(found, load, report))
        about["load average"] += f", {load_text()} at the end"
        report.complete = True
    if settings.plot:
        plot.draw(report, settings.plot)
    answered = all(result.figures.output_tokens for result in report.results)
    return 0 if answered else EXIT_DEVICE


def _describe(load: LoadSettings) -> str:
    spread = f", spread {load.spread:g}" if load.spread else ""
    return (
        f"prompts of {load.prompt_tokens} tokens, answers of {load.new_tokens}{spread}, "
        f"temperature {load.temperature:g}, seed {load.seed}"
    )


def _open(
    settings: BenchSettings, load: LoadSettings, report: Report, stack: contextlib.ExitStack
) -> list[Server | Target]:
    """Start the servers, and return them; at the end of `stack` they end."""
    found: list[Server | Target] = []
    llama = servers.find_llama() if load.peer_server == LLAMA else ""
    folder = Path(tempfile.mkdtemp(prefix="glm2-bench-"))
    stack.enter_context(interrupt.always(lambda: shutil.rmtree(folder, ignore_errors=True)))

    def start(name: str, command: list[str], port: int) -> None:
        server = Server(name, command, port)
        stack.enter_context(interrupt.always(server.close))
        found.append(server)

    requests = [request for level in levels(load) for request in plan(load, level)]
    size = {
        "slots": load.slots or (_SLOTS if load.rate else max(load.users)),
        "max_length": max(len(r.prompt) + r.new_tokens for r in requests) + _MARGIN,
    }
    if load.url is not None:
        report.about["model"] = load.url
        found.append(Target("server", load.url, load.model_name or "", _key(load)))
    else:
        model, report.about["model"] = _model(settings, folder)
        port, more = servers.free_port(), load.server_args or ()
        command = servers.serve_command(settings, model, *more, port=port, **size)
        start("infer.serve", command, port)
    if llama:
        port, file = servers.free_port(), folder / "model.gguf"
        kind = servers.write_gguf(settings, model, file)
        report.about["peer"] = f"{servers.llama_version(llama)}, GGUF {kind}"
        start("llama-server", servers.llama_command(llama, file, port=port, **size), port)
    elif load.peer_server is not None:
        report.about["peer"] = load.peer_server
        found.append(Target("peer", load.peer_server))
    return found


def _key(load: LoadSettings) -> str:
    """Return the key of `--url`; InputError: its file cannot be read."""
    if load.api_key_file is None:
        return os.environ.get(servers.KEY_VARIABLE, "")
    try:
        return Path(load.api_key_file).read_text("utf-8").split("\n")[0].strip()
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"--api-key-file {load.api_key_file} cannot be read.", str(error)
        ) from error


def _model(settings: BenchSettings, folder: Path) -> tuple[Path | None, str]:
    """Return the checkpoint that is served, None = the demo model, and what it is called; random
    weights are written to `folder`."""
    if settings.random is not None:
        path = servers.random_folder(settings.random, folder)
        return path, f"{Path(settings.random).name}, random weights"
    startup.note_demo_model(settings.choice)
    choice = startup.find_choice(settings.choice)
    if choice.path is None:
        return None, "demo (bundled)"
    return Path(choice.path), Path(choice.path).name


async def _measure(found: list[Server | Target], load: LoadSettings, report: Report) -> None:
    targets = []
    for server in found:
        if isinstance(server, Server):
            note(f"starting {server.target.name} ...")
            targets.append((await server.ready(), server.cpu_seconds))
        else:
            targets.append((await servers.named(server, server.model or None), lambda: None))
    for level in levels(load):
        for target, cpu_seconds in targets:
            result = await _measure_level(target, cpu_seconds, level, load)
            report.results.append(result)
            note(f"{target.name}, {level.name}: {result.figures.tokens_per_s:.4g} tok/s")


async def _measure_level(
    target: Target, cpu_seconds: Callable[[], float | None], level: Level, load: LoadSettings
) -> Result:
    # As many users as will come, with other prompts, so that nothing is done for the first time.
    users = level.users or _WARM
    warm = dataclasses.replace(load, seed=load.seed + 1, requests=users, new_tokens=_WARM)
    crowd = Level(users=users)
    await send(target, crowd, plan(warm, crowd), timeout=load.timeout)

    requests, ended = plan(load, level), 0
    with Progress(f"{target.name}, {level.name}", len(requests)) as bar:

        def count(outcome: Outcome) -> None:
            nonlocal ended
            ended += 1
            bar(ended)

        ours, theirs = time.process_time(), cpu_seconds()
        outcomes = await send(target, level, requests, timeout=load.timeout, done=count)
        ours, later = time.process_time() - ours, cpu_seconds()
    used = None if theirs is None or later is None else later - theirs
    limits = {"ttft_limit": load.slo_ttft_ms / 1e3, "itl_limit": load.slo_itl_ms / 1e3}
    return Result(target.name, level, figures(outcomes, **limits), ours, used)
