"""Real SGLang servers of one GPU machine: one configuration at a time, started once for all that need it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from serving_checks import plugin

from kvtuner_search.servers.process import free_port

STOP = 20.0  # seconds between SIGTERM and SIGKILL


class ServerFailed(Exception):
    """A server did not come up, or ended."""


@dataclass(frozen=True)
class Config:
    """How a server is started."""

    name: str
    model: str
    arguments: tuple[str, ...] = ()
    profile: Path | None = None  # None: SGLang as it is
    tp: int = 1
    pp: int = 1
    nodes: int = 1  # all on this machine
    gpus: tuple[int, ...] = ()  # of each rank, stage by stage; none: SGLang's choice
    variables: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp


class Server:
    """A running server: one launcher for each node; the first node answers."""

    def __init__(self, config: Config, common: Sequence[str], variables: dict[str, str], logs: Path) -> None:
        self.config, self.began = config, time.monotonic()
        self.startup = 0.0  # seconds, once it answers
        self.url = f"http://127.0.0.1:{free_port()}"
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.logs = [
            logs / f"{config.name}-{os.getpid()}-{time.monotonic_ns()}-node{n}.log" for n in range(config.nodes)
        ]
        address = f"127.0.0.1:{free_port()}"
        logs.mkdir(parents=True, exist_ok=True)
        for node in range(config.nodes):
            command = [
                sys.executable, "-m", "sglang.launch_server", "--model-path", config.model, *common, *config.arguments,
                "--host", "127.0.0.1", "--port", self.url.rpartition(":")[2] if node == 0 else str(free_port()),
                "--tp-size", str(config.tp), "--pp-size", str(config.pp),
            ]  # fmt: skip
            if config.profile is not None:
                command += ["--kvtuner-profile", str(config.profile)]
            each = config.ranks // config.nodes
            gpus = ",".join(map(str, config.gpus[node * each : (node + 1) * each]))
            more = config.variables | ({plugin.GPUS: gpus} if gpus else {})
            if config.nodes > 1:
                command += ["--nnodes", str(config.nodes), "--node-rank", str(node), "--dist-init-addr", address]
            with self.logs[node].open("wb") as log:
                log.write((" ".join(command) + "\n").encode())
                log.flush()
                self.launchers.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables | more,
                        start_new_session=True,
                    )
                )  # fmt: skip

    def wait(self, timeout: float) -> Server:
        """Until the server has answered a request."""
        while True:
            self.check_alive()
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.get("/health_generate", timeout=30)
                self.startup = time.monotonic() - self.began
                return self
            if time.monotonic() - self.began > timeout:
                raise ServerFailed(f"{self.config.name} was not ready after {timeout:g} s: {self.last_words()}")
            time.sleep(0.2)

    def check_alive(self) -> None:
        """Raise ServerFailed if a launcher has ended."""
        for node, launcher in enumerate(self.launchers):
            if launcher.poll() is not None:
                raise ServerFailed(
                    f"{self.config.name}, node {node}, ended with {launcher.returncode}: {self.last_words(node)}"
                )

    def last_words(self, node: int = 0) -> str:
        """The end of a log."""
        return "\n".join(["", *self.log(node).splitlines()[-25:], f"(whole log: {self.logs[node]})"])

    def log(self, node: int = 0) -> str:
        return self.logs[node].read_text(errors="replace")

    def get(self, path: str, timeout: float = 120) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            return bytes(answer.read())

    def post(self, path: str, content: Any = None, timeout: float = 600) -> bytes:
        body, kind = json.dumps(content or {}).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body, kind), timeout=timeout) as answer:
            return bytes(answer.read())

    def info(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/server_info")))

    def flush(self) -> None:
        """Empty the prefix cache; a server that is still busy is waited for."""
        self.post("/flush_cache?timeout=60")

    def generate(self, prompts: Any, count: int, **more: Any) -> Any:
        """``count`` greedy tokens after one prompt of token ids, or after each of several at once; ``more`` is sent along."""
        sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        return json.loads(self.post("/generate", {"input_ids": prompts, "sampling_params": sampling, **more}))

    def metric(self, name: str) -> float:
        """The sum of a metric over all ranks (``--enable-metrics``)."""
        rows = re.findall(rf"^sglang:{name}(?:\{{.*\}})? (\S+)", self.get("/metrics").decode(), re.MULTILINE)
        if not rows:
            raise ServerFailed(f"{self.config.name} has no metric {name}")
        return sum(map(float, rows))

    def stop(self) -> None:
        """End all processes: SIGTERM for the launchers, which end their children, then SIGKILL for what is left."""
        left = []
        for launcher in self.launchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                left += psutil.Process(launcher.pid).children(recursive=True)
            launcher.terminate()
        for launcher in self.launchers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(STOP)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=STOP)


@contextlib.contextmanager
def running(
    config: Config, common: Sequence[str], variables: dict[str, str], logs: Path, timeout: float
) -> Iterator[Server]:
    """A server that answers, and is gone afterwards."""
    server = Server(config, common, variables, logs)
    try:
        yield server.wait(timeout)
    finally:
        server.stop()
