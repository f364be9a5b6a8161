"""A server of /v1/completions that streams tokens as it is told, and fails as it is told.

As a program it listens on --port: `python -m tests.infer.bench.dummy_server --port N`.
"""

import argparse
import asyncio
import contextlib
import json
from collections.abc import Mapping


class DummyServer:
    """Answers completions; `requests` are the bodies that came.

    Args:
        delay: seconds before each token.
        faults: number of a request, from 0 -> "429", "drop" (after two tokens), "garbage", "error"
            (an error object in the stream), "stall".
        newline: the end of a line of the stream.
        chunked: whether the body comes in chunks; otherwise the connection's end ends it.
        crowd: the first answers wait until so many requests are there.
    """

    def __init__(
        self,
        delay: float = 0.0,
        faults: Mapping[int, str] | None = None,
        newline: str = "\n",
        chunked: bool = True,
        crowd: int = 1,
    ):
        self.delay, self.faults, self.newline = delay, dict(faults or {}), newline
        self.chunked = chunked
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.running = self.most_running = 0
        self._crowd, self._crowded = crowd, asyncio.Event()

    async def start(self, port: int = 0) -> str:
        """Listen; returns the address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._server.close()

    async def _serve(self, reader, writer) -> None:
        with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
            method, path, _ = (await reader.readline()).decode().split()
            headers = {}
            while line := (await reader.readline()).decode().strip():
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.keys.append(headers.get("authorization", ""))
            if method == "GET":
                models = {"data": [{"id": "dummy"}]} if path == "/v1/models" else {}
                self._head(writer, "200 OK", "application/json", chunked=False)
                writer.write(json.dumps(models).encode())
            else:
                self.running += 1
                self.most_running = max(self.most_running, self.running)
                if self.running >= self._crowd:
                    self._crowded.set()
                await self._crowded.wait()
                await self._complete(json.loads(body), writer)
                self.running -= 1
            await writer.drain()

    def _head(self, writer, status: str, kind: str, chunked: bool) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close"]
        lines += ["Transfer-Encoding: chunked"] if chunked else []
        writer.write("\r\n".join([*lines, "", ""]).encode())

    async def _complete(self, body: dict, writer) -> None:
        fault = self.faults.get(len(self.requests), "")
        self.requests.append(body)
        if fault == "429":
            self._head(writer, "429 Too Many Requests", "application/json", chunked=False)
            writer.write(b'{"error": {}}')
            return
        self._head(writer, "200 OK", "text/event-stream", self.chunked)
        events = [{"choices": [{"text": f" {i}", "finish_reason": None}]} for i in
                  range(body["max_tokens"])]  # fmt: skip
        for number, event in enumerate(events):
            await asyncio.sleep(self.delay)
            if number == 2 and fault == "drop":
                return
            if number == 2 and fault == "stall":
                await asyncio.sleep(30)
            if number == 2 and fault == "error":
                event = {"error": {"message": "NaN"}}
            self._send(writer, "{" if fault == "garbage" else json.dumps(event))
            await writer.drain()
        usage = {"completion_tokens": len(events)}
        self._send(writer, '{"choices": [{"text": "", "finish_reason": "length"}]}')
        self._send(writer, json.dumps({"choices": [], "usage": usage}))
        self._send(writer, "[DONE]")
        if self.chunked:
            writer.write(b"0\r\n\r\n")

    def _send(self, writer, data: str) -> None:
        event = f"data: {data}{self.newline * 2}".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(event), event) if self.chunked else event)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    args, _ = parser.parse_known_args()  # llama-server has more
    await DummyServer(args.delay).start(args.port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
