"""Hard use of a real server: `python -m tests.infer.serve.hard --requests 20000`.

Many users ask at once, and each answer must be that of `Engine.complete` to the same prompt and
seed: a mixed-up row, a lost or a doubled token is seen at once. Meanwhile other clients vanish,
stall, send garbage, 10 MB, a million stop strings, NaN. At the end the server's memory, threads and
descriptors must be what they were. Not in the suite: it takes from a minute to an hour.
"""

import asyncio
import json
import random
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import infer
from glm2_jax.cli import interrupt
from glm2_jax.cli.arguments import path_argument, positive
from glm2_jax.cli.main import EXIT_TERMINATED
from glm2_jax.cli.parser import Parser, add_flags, flag, from_flags
from infer.bench.serving import servers
from infer.bench.serving.client import Exchange, Target, get
from infer.bench.serving.servers import Server
from infer.engine.engine import Engine
from infer.engine.params import SamplingParams
from tests.infer.serve.attacks import ATTACKS

MAX_LENGTH, LONGEST = 256, 60  # tokens: of a slot, of a prompt or an answer
ROUNDS = 10
GROWTH = 0.05  # of the memory after the first rounds: more would be a leak
SETTLE = 60  # seconds until all slots must be free


@dataclass(frozen=True)
class Settings:
    """The flags."""

    model: str | None = flag("checkpoint folder (default: the demo)", type=path_argument)
    requests: int = flag("requests in all", type=positive, default=2000)
    users: int = flag("users at once", type=positive, default=64)
    slots: int = flag("slots of the server", type=positive, default=16)
    canaries: int = flag("different prompts", type=positive, default=128)


@dataclass(frozen=True)
class Canary:
    """A request and the only right answer to it."""

    body: dict[str, Any]
    text: str
    tokens: int
    finish: str


@dataclass
class Found:
    """What happened; `wrong` are lines for people."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    attacks: dict[str, int] = field(default_factory=dict)


def make_canaries(engine: Engine, number: int) -> list[Canary]:
    """Return different prompts, with what the engine answers to each alone."""
    draw, tokenizer = random.Random(0), engine.tokenizer
    canaries = []
    for seed in range(number):
        ids = [draw.randrange(300, 1300) for _ in range(draw.randrange(2, LONGEST))]
        body: dict[str, Any] = {
            "prompt": tokenizer.prefix_ids + ids,
            "max_tokens": draw.randrange(1, LONGEST),
            "seed": seed,
            "temperature": draw.choice((0.0, 0.7, 1.0, 1.5)),
            "ignore_eos": draw.random() < 0.7,
        }
        more = {"top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2, "frequency_penalty": 0.5}
        body |= {name: value for name, value in more.items() if draw.random() < 0.3}
        params = {name: value for name, value in body.items() if name not in ("prompt",)}
        params["max_new_tokens"] = params.pop("max_tokens")
        # What a request leaves out is off, as for clients of OpenAI.
        sampling = SamplingParams(**{"top_k": 0, "top_p": 1.0} | params)
        (answer,) = engine.complete([body["prompt"]], sampling)
        canaries.append(Canary(body, answer.text, len(answer.output_ids), answer.finish_reason))
    return canaries


async def ask(target: Target, canary: Canary, stream: bool) -> tuple[str, int, str]:
    """Return the text, the number of tokens and the finish reason."""
    body = canary.body | {"model": target.model, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    async with Exchange(target, "POST", "/v1/completions", data) as (status, lines):
        got = [line async for line in lines]
    if status != 200:
        return f"HTTP {status}: {b''.join(got)[:200]!r}", 0, ""
    data = [line[6:] for line in got if line.startswith(b"data: {")] if stream else [b"".join(got)]
    if stream and b"data: [DONE]" not in got:
        return "no [DONE]", 0, ""
    events = [json.loads(part) for part in data]
    choices = [choice for event in events for choice in event["choices"]]
    (reason,) = (choice["finish_reason"] for choice in choices if choice["finish_reason"])
    return (
        "".join(choice["text"] for choice in choices),
        events[-1]["usage"]["completion_tokens"],
        reason,
    )


async def round_of(target: Target, canaries: list[Canary], count: int, users: int, found: Found):
    """Let users ask so many times, while each attacker repeats what it does."""
    waiting = iter(range(count))

    async def user(number: int) -> None:
        draw = random.Random(number)
        for at in waiting:
            canary = draw.choice(canaries)
            got = await ask(target, canary, stream=at % 2 == 0)
            expected = canary.text, canary.tokens, canary.finish
            if got == expected:
                found.right += 1
            else:
                found.wrong.append(f"seed {canary.body['seed']}: got {got}, expected {expected}")

    async def attacker(name: str) -> None:
        while not over:
            if problem := await ATTACKS[name](target, canaries[0].body):
                found.wrong.append(f"{name}: {problem}")
            found.attacks[name] = found.attacks.get(name, 0) + 1
            await asyncio.sleep(0.2)

    over = False
    attackers = [asyncio.create_task(attacker(name)) for name in ATTACKS]
    users_ended = await asyncio.gather(*map(user, range(users)), return_exceptions=True)
    over = True
    ended = [*users_ended, *await asyncio.gather(*attackers, return_exceptions=True)]
    found.wrong += [repr(error) for error in ended if error is not None]


async def settle(target: Target, found: Found) -> None:
    """Wait until nothing runs or waits."""
    until = time.monotonic() + SETTLE
    while time.monotonic() < until:
        _, body = await get(target, "/metrics")
        numbers = re.findall(rb"^vllm:num_requests_\w+\{.*\} ([\d.]+)", body, re.MULTILINE)
        if len(numbers) == 2 and not any(map(float, numbers)):
            return
        await asyncio.sleep(0.1)
    found.wrong.append(f"slots are not free {SETTLE} s after the last request")


def held(pid: int) -> tuple[float, int, int]:
    """Return MB of memory, threads and descriptors of a process (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (
        int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("RssAnon", "Threads")
    )
    return memory / 1e3, threads, len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def run(settings: Settings, server: Server, canaries: list[Canary], found: Found) -> None:
    """Use the server hard, round by round; what it holds must not grow after the third."""
    target = await server.ready()
    samples = []
    for number in range(ROUNDS):
        count = settings.requests // ROUNDS
        start = time.monotonic()
        await round_of(target, canaries, count, settings.users, found)
        await settle(target, found)
        await asyncio.sleep(1)  # connections of attackers close
        samples.append(held(server.process.pid))
        memory, threads, files = samples[-1]
        print(
            f"round {number + 1}: {count / (time.monotonic() - start):.1f} requests/s, "
            f"{found.right} right, {len(found.wrong)} wrong; {memory:.1f} MB, {threads} threads, "
            f"{files} descriptors",
            flush=True,
        )
    early, last = samples[ROUNDS // 3], samples[-1]
    if last[0] > early[0] * (1 + GROWTH) or last[1] > early[1] or last[2] > early[2]:
        found.wrong.append(f"it holds more and more: {samples}")


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m tests.infer.serve.hard")
    add_flags(parser, "flags", Settings)
    settings = from_flags(Settings, parser.parse_args(argv))
    engine = infer.load(settings.model, dtype="float32", max_length=MAX_LENGTH)
    canaries = make_canaries(engine, settings.canaries)
    print(f"{len(canaries)} canaries", flush=True)
    port = servers.free_port()
    model = [] if settings.model is None else ["--model", settings.model]
    command = [
        sys.executable, "-m", "infer.serve", *model, "--dtype", "float32", "--slots",
        str(settings.slots), "--max-length", str(MAX_LENGTH), "--port", str(port),
    ]  # fmt: skip
    server, found = Server("infer.serve", command, port), Found()
    with interrupt.always(server.process.kill):
        asyncio.run(run(settings, server, canaries, found))
        server.process.terminate()
        code = server.process.wait(60)
    if code != EXIT_TERMINATED:
        found.wrong.append(f"SIGTERM: exit code {code}")
    server.output.seek(0)
    log = server.output.read().decode(errors="replace")
    found.wrong += [f"log: {part[:2000]}" for part in re.findall(r"(?s)Traceback.*?\n\S.*?\n", log)]
    print(f"{found.right} answers right; attacks {found.attacks}")
    for line in found.wrong[:20]:
        print(f"WRONG {line[:500]}")
    return bool(found.wrong)


if __name__ == "__main__":
    interrupt.run(main)
