"""A server that answers ``/generate`` as SGLang 0.5.14 streams, or lies about it. Nothing is computed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.search.servers.fake_base import FakeBase, HandlerBase, in_threads

LIES = (
    "honest", "incremental", "racing", "404", "redirect", "json", "html", "noise", "empty", "no-tokens", "drops", "drops-before", "ends", "stalls", "trickles",
    "claims-more", "claims-less", "too-few", "too-many", "stops", "aborts", "errors", "other-id", "cut-prompt", "cached", "canned", "one-piece", "changes",
    "strings",
)  # fmt: skip


def answer_to(prompt: list[int], count: int) -> list[int]:
    """Tokens that depend on the prompt; each comes twice in a row, so that cumulative and incremental ids cannot be told apart by looks alone."""
    return [(sum(prompt) + len(prompt) + step // 2 * 7) % 1000 + 10 for step in range(count)]


class LyingServer(FakeBase):
    """Serves until it is shut down.

    Args:
        lie: one of LIES.
        pause: seconds before the first token and between tokens.
    """

    def __init__(self, lie: str = "honest", pause: float = 0.0) -> None:
        assert lie in LIES
        super().__init__(Handler)
        self.lie, self.pause = lie, pause
        self.asked: list[dict[str, Any]] = []  # bodies, in the order in which they came
        self.flying = self.most = 0  # requests in flight
        self.spans: list[tuple[str, int]] = []  # ("begin" or "end", number of the request), in order
        self.connections = 0

    def begin(self, body: dict[str, Any]) -> int:
        """Note a request; its number."""
        with self.lock:
            self.asked.append(body)
            self.flying += 1
            self.most = max(self.most, self.flying)
            self.spans.append(("begin", len(self.asked) - 1))
            return len(self.asked) - 1

    def end(self, number: int) -> None:
        """Note that it is over. This comes before the last byte, after which a client may send the next."""
        with self.lock:
            self.flying -= 1
            self.spans.append(("end", number))


class Handler(HandlerBase):
    server: LyingServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def generate(self, body: dict[str, Any]) -> None:
        number = self.server.begin(body)
        try:
            last = self._answer(body)
        except OSError:  # the client has heard enough
            self.close_connection, last = True, b""
        self.server.end(number)
        with suppress(OSError):
            self.wfile.write(last)

    def _answer(self, body: dict[str, Any]) -> bytes:
        """Answer, or lie, but for the last bytes, which are returned."""
        lie, server = self.server.lie, self.server
        plain = {
            "404": ("404 Not Found", '{"detail":"Not Found"}'),
            "redirect": ("307 Temporary Redirect", ""),
            "json": ("200 OK", json.dumps({"text": "", "output_ids": [1], "meta_info": {}}, indent=1)),
            "html": ("200 OK", "<html>welcome</html>"),
            "empty": ("200 OK", ""),
        }
        if lie in plain:
            status, text = plain[lie]
            return f"HTTP/1.1 {status}\r\nlocation: /other\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode()
        if lie in ("drops-before", "noise"):
            self.close_connection = True
            return b"" if lie == "drops-before" else b"SSH-2.0-OpenSSH\r\n\r\n"
        self.begin_stream()
        for event in self._events(body):
            time.sleep(server.pause)
            self.chunk(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
            if lie in ("drops", "stalls", "ends", "trickles") and event["meta_info"]["completion_tokens"] >= 2:
                if lie == "stalls":
                    server.stopped.wait()
                while lie == "trickles" and not server.stopped.wait(0.01):
                    self.chunk(b":\r\n")  # a comment keeps the connection alive, and says nothing
                if lie == "drops":
                    self.close_connection = True
                    return b""
                break
        self.chunk(b"data: [DONE]\n\n")
        return b"0\r\n\r\n"

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        lie, prompt, asked = self.server.lie, body["input_ids"], body["sampling_params"]["max_new_tokens"]
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
    with in_threads() as serve:
        server = serve(LyingServer(lie, pause))
        yield server.url, server
