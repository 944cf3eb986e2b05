"""Servers that ``validate`` starts: one at a time, in a process group of their own, always stopped at the end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from kvtuner_search.files import refuse_unusual
from kvtuner_search.profile.text import printable
from kvtuner_search.secrets import mask, mask_arguments
from kvtuner_search.servers.interface import interface
from kvtuner_search.servers.transport import ServerError
from kvtuner_search.serving.configuration import ENVIRONMENT
from kvtuner_search.serving.engine import engine

STOP_SECONDS: Final = 20.0  # between SIGTERM and SIGKILL
PORTS: Final = range(20000, 32000)
_POLL: Final = 0.5  # seconds
_LOG_TAIL: Final = 64 * 1024  # bytes of a log that are searched for the reason of a failure
_LINE: Final = 64 * 1024  # bytes of a log line that are masked together
_LOOK: Final = 30.0  # seconds that one look may take
_DRAIN: Final = 5.0  # seconds to read an ended server's remaining output
_KEYS: Final = ("KVTUNER_API_KEY",)  # variables of this program that a server does not need


class Server:
    """A running server that this process started."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path, logging: threading.Thread) -> None:
        self.process, self.url, self.log, self._logging = process, url, log, logging

    def check_alive(self) -> None:
        """Raise ServerError, with the reason from the log, if the server has ended."""
        code = self.process.poll()
        if code is not None:
            self._logging.join(_DRAIN)
            raise ServerError(f"the server ended with {code}: {failure_line(self.log)} (whole log: {self.log})")

    async def wait_until_ready(self, timeout: float) -> None:
        """Ask until it can take requests.

        Raises:
            ServerError: if the server ends, or takes longer than ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        async with interface().client(self.url, _LOOK) as client:
            while True:
                self.check_alive()
                if await client.ready(_LOOK):
                    return
                if time.monotonic() > deadline:
                    raise ServerError(f"the server was not ready after {timeout:g} s: see {self.log}")
                await asyncio.sleep(_POLL)


@contextmanager
def started_server(python: str, arguments: Sequence[str], log: Path) -> Iterator[Server]:
    """Start the engine's server with these arguments at a free port of the loopback interface; it is stopped at the end of the block.

    Args:
        python: interpreter of the environment that has the engine.
        arguments: of the server.
        log: file for its output, which may begin with all its arguments; passwords and keys are masked before they reach the disk.
    """
    port = free_port()
    command = engine().command(python, arguments, port)
    tied = [sys.executable, "-m", "kvtuner_search.servers.tied", str(os.getpid()), *command]
    # Only the flags decide what is served.
    environment = {name: value for name, value in os.environ.items() if name not in (ENVIRONMENT, *_KEYS)}
    environment |= engine().variables(arguments)
    log.parent.mkdir(parents=True, exist_ok=True)
    refuse_unusual(log)
    log.write_text(" ".join(mask_arguments(command)) + "\n", encoding="utf-8", errors="surrogateescape")
    process = subprocess.Popen(
        tied,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    logging = threading.Thread(target=_copy_masked, args=(process.stdout, log), name="log", daemon=True)
    logging.start()
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log, logging)
    finally:
        stop(process)
        logging.join(_DRAIN)


def _copy_masked(output: IO[bytes], log: Path) -> None:
    """Append what a server writes to its log, line by line, without passwords and keys. A full disk does not block the server."""
    with output, log.open("ab", buffering=0) as stream:
        while line := output.readline(_LINE):
            masked = mask(line.decode(errors="surrogateescape")).encode(errors="surrogateescape")
            with suppress(OSError):
                stream.write(masked)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: SIGTERM for the launcher, which ends its children, then SIGKILL for the rest.

    A second Ctrl-C only skips the waiting. The children get no SIGTERM: the launcher would treat their end as a crash.
    """
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too, which share the group
        process.wait()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on.

    It is below the system's ephemeral ports, and leaves room for a second port 10,000 above it, which SGLang uses. A client that
    waits for a server on an ephemeral port can be given that very port for its own end: then it is connected with itself, reads its
    own request as the answer, and keeps the server from the port.

    Raises:
        ServerError: if none of a hundred is free.
    """
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError(f"no port of {PORTS.start} to {PORTS.stop - 1} is free: end a program that listens there")


def failure_line(log: Path) -> str:
    """The line of a log that most likely says why the server ended: the last that looks like an error, else the last."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _LOG_TAIL))
            lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no log"
    errors = [line for line in lines if "rror" in line and not line.startswith(("File ", "Traceback"))]
    return printable((errors or lines or ["it printed nothing"])[-1])[:300]
