"""A server that answers every request with bytes of its own choice, at its own pace. Nothing is parsed but the request's end."""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

from tests.search.servers.fake_base import FakeBase, HandlerBase, in_threads

Send = Callable[[bytes], object]
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"


def body(content: bytes, *headers: str) -> bytes:
    return (
        HEAD
        + b"".join(f"{one}\r\n".encode() for one in headers)
        + b"Content-Length: %d\r\n\r\n" % len(content)
        + content
    )


def endless(send: Send, piece: bytes) -> None:
    send(HEAD + b"\r\n")
    while True:
        send(piece)


def drip(send: Send, head: bytes, piece: bytes, stopped: threading.Event) -> None:
    send(head)
    while not stopped.wait(0.05):
        send(piece)


@cache
def bomb(size: int) -> bytes:
    """Gzip of ``size`` spaces: what unpacks it in one go is done for."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = b" " * (1 << 20)
    return b"".join([*(packer.compress(piece) for _ in range(size >> 20)), packer.flush()])


def series(send: Send, line: Callable[[int], bytes]) -> None:
    send(HEAD + b"\r\n# TYPE sglang:num_running_reqs gauge\n")
    for start in range(0, 1_000_000, 1000):
        send(b"".join(line(number) for number in range(start, start + 1000)))


FAULTS: dict[str, Callable[[Send, threading.Event], object]] = {
    "silent": lambda send, stopped: stopped.wait(),
    "drip": lambda send, stopped: drip(send, HEAD + b"\r\n", b" ", stopped),
    "drip-head": lambda send, stopped: drip(send, HEAD, b"x: y\r\n", stopped),
    "drip-chunks": lambda send, stopped: drip(send, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", stopped),
    "endless": lambda send, stopped: endless(send, b" " * (1 << 20)),
    "endless-line": lambda send, stopped: endless(send, b"sglang:" + b"x" * (1 << 20)),
    "huge-json": lambda send, stopped: endless(send, b"[" + b"{}," * (1 << 18)),
    "bomb": lambda send, stopped: send(body(bomb(1 << 29), "Content-Encoding: gzip")),
    "small-gzip": lambda send, stopped: send(body(gzip.compress(b"{}"), "Content-Encoding: gzip")),
    "deep": lambda send, stopped: send(body(b"[" * 500_000)),
    "deep-objects": lambda send, stopped: send(body(b'{"a":' * 100_000)),
    "short": lambda send, stopped: send(HEAD + b"Content-Length: 1000\r\n\r\n{"),
    "negative": lambda send, stopped: send(HEAD + b"Content-Length: -1\r\n\r\n{}"),
    "noise": lambda send, stopped: send(b"SSH-2.0-OpenSSH\r\n\r\n"),
    "utf-16": lambda send, stopped: send(body("{}".encode("utf-16"), "Content-Type: application/json; charset=utf-16")),
    "switch": lambda send, stopped: send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    "redirect": lambda send, stopped: send(HEAD.replace(b"200 OK", b"307 No") + b"Location: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"),
    "series": lambda send, stopped: series(send, lambda n: b'sglang:num_running_reqs{tp_rank="%d"} 1\n' % n),
    "odd-ranks": lambda send, stopped: send(body(b'sglang:num_running_reqs{tp_rank="a"} 1\n')),
    "sum": lambda send, stopped: send(body(b"sglang:num_running_reqs 1e300\n")),
}  # fmt: skip


class Handler(HandlerBase):
    """Has the fault that its server's ``fault`` names."""

    def do_GET(self) -> None:
        self.misbehave(self.server.fault)

    do_POST = do_GET

    def misbehave(self, fault: str) -> None:
        """Answer a request in this way, and hang up."""
        self.close_connection = True
        with suppress(OSError):  # the client has heard enough
            self.read_body()
            FAULTS[fault](self.wfile.write, self.server.stopped)


@contextmanager
def misbehaving(fault: str) -> Iterator[str]:
    """The address; the server ends with the block."""
    if fault == "bomb":
        bomb(1 << 29)  # making it takes longer than a client waits
    with in_threads() as serve:
        server = FakeBase(Handler)
        server.fault = fault  # type: ignore[attr-defined]
        yield serve(server).url
