"""A server that answers ``/generate`` as SGLang 0.5.14 streams, or lies about it. Nothing is computed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

LIES = (
    "honest", "incremental", "racing", "404", "redirect", "json", "html", "noise", "empty", "no-tokens", "drops", "drops-before", "ends", "stalls", "trickles",
    "claims-more", "claims-less", "too-few", "too-many", "stops", "aborts", "errors", "other-id", "cut-prompt", "cached", "canned", "one-piece", "changes",
    "strings",
)  # fmt: skip


def answer_to(prompt: list[int], count: int) -> list[int]:
    """Tokens that depend on the prompt; each comes twice in a row, so that cumulative and incremental ids cannot be told apart by looks alone."""
    return [(sum(prompt) + len(prompt) + step // 2 * 7) % 1000 + 10 for step in range(count)]


class LyingServer:
    """Serves from a thread.

    Args:
        lie: one of LIES.
        pause: seconds before the first token and between tokens.
    """

    def __init__(self, lie: str = "honest", pause: float = 0.0) -> None:
        assert lie in LIES
        self.lie, self.pause = lie, pause
        self.asked: list[dict[str, Any]] = []  # bodies, in the order in which they came
        self.flying = self.most = 0  # requests in flight
        self.spans: list[tuple[str, int]] = []  # ("begin" or "end", number of the request), in order
        self.connections = 0

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split("\r\n", 1)[0])
                body = json.loads(await reader.readexactly(length))
                number = len(self.asked)
                self.asked.append(body)
                self.spans.append(("begin", number))
                self.flying += 1
                self.most = max(self.most, self.flying)
                try:
                    keep = await self._answer(body, writer)
                finally:
                    self.flying -= 1
                    self.spans.append(("end", number))
                if not keep:
                    break
        writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        lie = self.lie
        plain = {
            "404": ("404 Not Found", '{"detail":"Not Found"}'),
            "redirect": ("307 Temporary Redirect", ""),
            "json": ("200 OK", json.dumps({"text": "", "output_ids": [1], "meta_info": {}}, indent=1)),
            "html": ("200 OK", "<html>welcome</html>"),
            "empty": ("200 OK", ""),
        }
        if lie in plain:
            status, text = plain[lie]
            writer.write(f"HTTP/1.1 {status}\r\nlocation: /other\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
            await writer.drain()
            return True
        if lie == "drops-before":
            return False
        if lie == "noise":
            writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
            return False
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in self._events(body):
            if self.pause:
                await asyncio.sleep(self.pause)
            line = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
            writer.write(b"%x\r\n%b\r\n" % (len(line), line))
            await writer.drain()
            if lie in ("drops", "stalls", "ends", "trickles") and event["meta_info"]["completion_tokens"] >= 2:
                if lie == "stalls":
                    await asyncio.sleep(3600)
                while lie == "trickles":
                    writer.write(b"3\r\n:\r\n\r\n")  # a comment keeps the connection alive, and says nothing
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if lie == "drops":
                    return False
                break
        done = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done))
        await writer.drain()
        return True

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        lie, prompt, asked = self.lie, body["input_ids"], body["sampling_params"]["max_new_tokens"]
        tokens = answer_to([1] if lie == "canned" else prompt, asked)
        came = {
            "too-few": tokens[: asked // 2],
            "no-tokens": [],
            "too-many": [*tokens, 9],
            "claims-more": tokens[:-1],
        }.get(lie, tokens)
        reason: dict[str, Any] = {
            "stops": {"type": "stop", "matched": 0},
            "aborts": {"type": "abort", "message": "out of memory"},
        }.get(lie, {"type": "length", "length": asked})
        if lie == "errors":
            yield {"error": {"message": "the prompt is too long", "code": 400}}
            return
        counts = [max(1, len(came))] if lie in ("no-tokens", "one-piece") else range(1, len(came) + 1)
        for count in counts:
            last = count >= len(came)
            ids: list[Any] = came[count - 1 : count] if lie == "incremental" else came[:count]
            claimed = count
            if lie == "racing" and not last:
                ids = came[: count + 1]  # the list grew after the count was taken
            if last and lie in ("claims-more", "no-tokens"):
                claimed = asked
            if last and lie == "claims-less":
                claimed = count - 1
            if lie == "changes" and count == 3:
                ids = [token + 1 for token in ids]
            if lie == "strings":
                ids = [str(token) for token in ids]
            yield {
                "text": " word" * count,
                "output_ids": ids,
                "meta_info": {
                    "id": "of-another" if lie == "other-id" else body["rid"],
                    "finish_reason": reason if last else None,
                    "prompt_tokens": len(prompt) // 2 if lie == "cut-prompt" else len(prompt),
                    "completion_tokens": claimed,
                    "cached_tokens": len(prompt) - 1 if lie == "cached" else 0,
                },
            }


@contextmanager
def lying(lie: str = "honest", pause: float = 0.0) -> Iterator[tuple[str, LyingServer]]:
    """URL and server; it ends with the block."""
    server = LyingServer(lie, pause)
    loop = asyncio.new_event_loop()
    listening: list[asyncio.Server] = []
    ready = threading.Event()

    def work() -> None:
        asyncio.set_event_loop(loop)
        listening.append(loop.run_until_complete(asyncio.start_server(server._connection, "127.0.0.1", 0)))
        ready.set()
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{listening[0].sockets[0].getsockname()[1]}", server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
