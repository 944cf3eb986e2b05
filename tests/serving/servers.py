"""Real SGLang servers on loopback, as processes of their own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
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

from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.servers.process import free_port

START = 480  # seconds that a server may take to come up on a busy machine
COMMON = (
    "--device", "cpu", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--host", "127.0.0.1",
    "--mem-fraction-static", "0.1", "--random-seed", "0",  # other programs may take memory while a server starts
)  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """The tests' own environment with what SGLang needs on the CPU, and nothing of an outer server."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "KVTUNER_"))}
    return inherited | {
        "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        # SGLang opens NCCL wherever it finds the library, as beside a CUDA build of torch, and then fails on a CPU.
        "SGLANG_NCCL_SO_PATH": "none",
    } | more  # fmt: skip


def command(*arguments: str, model: Path | None = None, port: int = 30000) -> list[str]:
    model = model or reference_model_path()
    return [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), *COMMON, *arguments,
    ]  # fmt: skip


def heed_interrupts() -> None:
    """As in the foreground: a background job of a shell ignores SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Server:
    """One launcher for each node, all on this machine; node 0 answers."""

    folder: Path  # for logs
    arguments: Sequence[str]
    nodes: int = 1
    variables: dict[str, str] = field(default_factory=dict)
    per_node: Sequence[Sequence[str]] = ()  # further arguments of each node
    model: Path | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ports = [free_port() for _ in range(self.nodes)]
        address = f"127.0.0.1:{free_port()}"
        self.logs = [self.folder / f"node{node}.log" for node in range(self.nodes)]
        self.launchers = []
        for node in range(self.nodes):
            rank = ("--nnodes", str(self.nodes), "--node-rank", str(node), "--dist-init-addr", address)
            more = (*self.arguments, *(rank if self.nodes > 1 else ()), *(self.per_node[node] if self.per_node else ()))
            with self.logs[node].open("wb") as log:
                self.launchers.append(
                    subprocess.Popen(
                        command(*more, model=self.model, port=self.ports[node]),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment(**self.variables),
                        start_new_session=True,
                        preexec_fn=heed_interrupts,
                    )
                )

    def log(self, node: int = 0) -> str:
        return self.logs[node].read_text(errors="replace")

    def wait(self) -> Server:
        """Until node 0 has answered a request; fails with the log if a launcher ends before."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            for node, launcher in enumerate(self.launchers):
                if launcher.poll() is not None:
                    raise AssertionError(f"node {node} ended with {launcher.returncode}:\n{self.log(node)[-6000:]}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.get("/health_generate", timeout=30)
                return self
            time.sleep(0.3)
        raise AssertionError(f"the server did not come up in {START} s:\n{self.log()[-6000:]}")

    def exit_codes(self, timeout: float = START) -> list[int]:
        """Of all launchers, once they have ended."""
        deadline = time.monotonic() + timeout
        return [launcher.wait(max(0.1, deadline - time.monotonic())) for launcher in self.launchers]

    def get(self, path: str, timeout: float = 120) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}{path}", timeout=timeout) as answer:
            return bytes(answer.read())

    def post(self, path: str, content: Any, timeout: float = 300) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[0]}{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return bytes(answer.read())

    def info(self) -> dict[str, Any]:
        return dict(json.loads(self.get("/server_info")))

    def generate(self, prompts: Any, count: int, **more: Any) -> Any:
        """``count`` greedy tokens after one prompt of token ids, or after each of several at once."""
        sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        return json.loads(self.post("/generate", {"input_ids": prompts, "sampling_params": sampling, **more}))

    def processes(self) -> list[psutil.Process]:
        """The launchers and all that descends from them."""
        found = []
        for launcher in self.launchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(launcher.pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    def schedulers(self) -> list[psutil.Process]:
        """The processes that hold a model."""
        return [process for process in self.processes() if "scheduler" in _title(process)]

    def kill(self) -> None:
        """End all at once."""
        left = self.processes()
        for launcher in self.launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for launcher in self.launchers:
            launcher.wait(30)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def still_alive(processes: Sequence[psutil.Process], timeout: float) -> list[str]:
    """The processes that have not ended after ``timeout`` seconds; a zombie has ended."""
    deadline = time.monotonic() + timeout
    while True:
        alive = [process for process in processes if _alive(process)]
        if not alive or time.monotonic() > deadline:
            return [f"{process.pid} {_title(process)}" for process in alive]
        time.sleep(0.2)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def running(folder: Path, *arguments: str, **named: Any) -> Iterator[Server]:
    """A server that answers, and is gone afterwards."""
    server = Server(folder, arguments, **named)
    try:
        yield server.wait()
    finally:
        server.kill()
