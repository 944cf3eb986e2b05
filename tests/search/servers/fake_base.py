"""What every stand-in for ``python -m sglang.launch_server`` has: SGLang's HTTP surface and its account of itself. Nothing is computed.

The load of a benchmark wants truthful streams and counts (tests/search/bench/fake_server.py), or lies about them (lying_server.py); a validation
wants answers whose distance from a stock server's is known (fake_sglang.py); every client wants servers that send what no server sends
(misbehaving.py). Each adds its answers to this.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
CAPACITY = 50_000  # tokens of a stock server


class FakeBase(ThreadingHTTPServer):
    """Serves until it is shut down.

    Args:
        handler: answers requests.
        port: 0 is any that is free.
        profile: file of the profile that the cache is stored by; None is a stock server.
        as_stored: whether a prompt's own keys and values are read as stored.
        info: what ``/server_info`` says besides, or instead.
    """

    daemon_threads = True
    request_queue_size = 512  # a client may open all its connections at once

    def __init__(
        self,
        handler: type[HandlerBase],
        port: int = 0,
        profile: str | None = None,
        as_stored: bool = False,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.lock = threading.Lock()
        self.stopped = threading.Event()  # what waits for ever waits for this
        self.flushed = 0
        content = json.loads(Path(profile).read_text()) if profile else {}
        storage = content.get("storage", {"bytes_per_token": 1, "bytes_per_token_16bit": 1})
        capacity = int(CAPACITY * storage["bytes_per_token_16bit"] / storage["bytes_per_token"])
        self.info: dict[str, Any] = {
            "version": "0.5.14", "model_path": "model", "dtype": "auto", "quantization": None, "attention_backend": "triton",
            "device": "cpu", "tp_size": 1, "pp_size": 1, "page_size": 1, "disable_radix_cache": False, "mem_fraction_static": 0.5,
            "max_total_tokens": None, "max_total_num_tokens": capacity, "internal_states": [{"memory_usage": {"kvcache": 1.0}}],
        }  # fmt: skip
        if profile:
            self.info["kvtuner"] = {
                "profile_digest": content["digest"],
                "as_stored": as_stored,
                "tool": "kvtuner-search 0",
            }
        self.bytes_per_token: int = storage["bytes_per_token"]
        self.info |= info or {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def shutdown(self) -> None:
        self.stopped.set()
        super().shutdown()

    def forget(self) -> None:
        """Empty the prefix cache."""
        raise NotImplementedError


class HandlerBase(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def reply(self, status: int, content: Any) -> None:
        """Bytes as they are, anything else as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin_stream(self) -> None:
        """The head of an answer that is streamed."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        """A piece of it; an empty one is its end."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def drop(self) -> None:
        """Hang up."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, b"")
        elif self.path == "/server_info":
            self.reply(200, self.server.info)
        else:
            self.reply(404, b"Not Found")

    def do_POST(self) -> None:
        body = self.read_body()
        if self.path.startswith("/flush_cache"):
            self.server.forget()
            self.server.flushed += 1
            self.reply(200, b"Cache flushed.")
        elif self.path == "/generate":
            self.generate(json.loads(body))
        else:
            self.reply(404, b"Not Found")

    def generate(self, body: dict[str, Any]) -> None:
        """Answer one request."""
        raise NotImplementedError


@contextmanager
def in_threads() -> Iterator[Any]:
    """Yields a function that serves a server from a thread and returns it; all end with the block."""
    servers: list[ThreadingHTTPServer] = []

    def start(server: ThreadingHTTPServer) -> ThreadingHTTPServer:
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def interpreter(site: Path, launcher: str) -> str:
    """A Python, made in ``site``, whose ``-m sglang.launch_server`` is the launcher's ``main``, and whose SGLang says it is 0.5.14."""
    (site / "sglang").mkdir()
    (site / "sglang" / "__init__.py").write_text("")
    (site / "sglang" / "launch_server.py").write_text(f"from {launcher} import main\n\nmain()\n")
    metadata = site / "sglang-0.5.14.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.14\n")
    python = site / "python"
    path = os.pathsep.join(map(str, (site, ROOT)))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)
