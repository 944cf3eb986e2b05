"""What starts: a stand-in for SGLang, found and run as the real one, gets the arguments, the signals and the last word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.profile.canonical import load
from kvtuner_search.serving.sglang.plugin import ADAPTERS

ROOT = Path(__file__).resolve().parents[3]
PROFILE = ROOT / "profiles" / "reference" / "reference-4.00bit.json"
DEADLINE = 60  # seconds; only a test that fails takes as long

LAUNCHER = """
import ctypes, json, os, signal, subprocess, sys, time
if os.environ["STAND_IN"] == "report":
    names = ("KVTUNER_SERVING", "SGLANG_PP_LAYER_PARTITION", "SGLANG_USE_CPU_ENGINE")
    print(json.dumps([os.getpid(), sys.argv[1:], {name: os.environ.get(name) for name in names}]))
    print("a line of log", file=sys.stderr)
    sys.exit(int(os.environ["STAND_IN_CODE"]))
# As SGLang: a worker that asks the kernel to end with its parent, and an orderly end on SIGTERM.
ask = lambda: ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=ask)
if os.environ["STAND_IN"] == "orderly":
    signal.signal(signal.SIGTERM, lambda *_: (worker.kill(), worker.wait(), print("orderly end", flush=True), os._exit(3)))
print(os.getpid(), worker.pid, flush=True)
while True:
    time.sleep(1)
"""
Start = Callable[..., subprocess.Popen[str]]


def listen() -> None:
    """A background job of a shell ignores SIGINT, what nohup starts SIGHUP, and children inherit that; a terminal's do not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ``serve`` in a process of its own, in an environment where the stand-in is the installed SGLang."""
    site = tmp_path / "site"
    started: list[subprocess.Popen[str]] = []

    def call(
        *arguments: object,
        stand_in: str = "report",
        version: str = next(iter(ADAPTERS)),
        plugin: bool = True,
        **more: str,
    ) -> subprocess.Popen[str]:
        (site / "sglang").mkdir(parents=True, exist_ok=True)
        (site / "sglang" / "__init__.py").write_text("")
        (site / "sglang" / "launch_server.py").write_text(LAUNCHER)
        described = site / f"sglang-{version}.dist-info"
        described.mkdir(exist_ok=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
        own = site / "kvtuner_search-0.1.0.dist-info"
        own.mkdir(exist_ok=True)
        (own / "METADATA").write_text("Metadata-Version: 2.1\nName: kvtuner-search\nVersion: 0.1.0\n")
        target = "kvtuner_search.serving.sglang.plugin:register" if plugin else "another.package:register"
        (own / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nkvtuner = {target}\n")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("KVTUNER_", "SGLANG_"))
        }
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")]),
            "STAND_IN": stand_in, "STAND_IN_CODE": "0", "XDG_CACHE_HOME": str(tmp_path / "cache"), **more,
        }  # fmt: skip
        command = [sys.executable, "-m", "kvtuner_search", "serve", *map(str, arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, preexec_fn=listen, **pipes)
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


GIVEN = ["--profile", PROFILE, "--model-path", reference_model_path()]


def test_arguments_environment_logs_and_exit_code(start: Start) -> None:
    passed = [
        "--tp",
        "2",
        "--chunked-prefill-size",
        "-1",
        "--pp-size=2",
        "--lora-paths",
        "a",
        "b c",
        "--api-key",
        "s e",
    ]
    process = start(*GIVEN, *passed, STAND_IN_CODE="7")
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 7
    pid, arguments, environment = json.loads(out)
    assert pid == process.pid, "serve is the launcher, not its parent"
    assert arguments == ["--model-path", str(reference_model_path()), *passed, "--host", "127.0.0.1",
                         "--attention-backend", "triton", "--kvtuner-profile", str(PROFILE)]  # fmt: skip
    assert json.loads(environment["KVTUNER_SERVING"]) == {
        "profile": str(PROFILE), "digest": load(PROFILE).digest, "as_stored": False,
    }  # fmt: skip
    assert environment["SGLANG_PP_LAYER_PARTITION"] == "7,9"
    assert environment["SGLANG_USE_CPU_ENGINE"] is None
    assert err.endswith("a line of log\n"), "the log goes straight through, after the plan"
    assert "4.000 effective bits" in err
    assert "s e" not in err, "an API key is not repeated"


def test_the_plan_as_json_goes_before_the_server(start: Start) -> None:
    out, _ = start(*GIVEN, "--json").communicate(timeout=DEADLINE)
    *plan, report = out.splitlines()
    assert json.loads("\n".join(plan))["storage"]["bytes_per_token"] == 2048
    assert json.loads(report)[2]["SGLANG_PP_LAYER_PARTITION"] is None


def test_flags_are_written_as_a_profile(start: Start, tmp_path: Path) -> None:
    flags = ["--enable-kvtuner-quant", "--kvtuner-asym", "--model-path", reference_model_path()]
    out, _ = start(*flags, "--device", "cpu").communicate(timeout=DEADLINE)
    _, arguments, environment = json.loads(out)
    assert "--enable-kvtuner-quant" not in arguments
    path = Path(arguments[arguments.index("--kvtuner-profile") + 1])
    assert path.is_relative_to(tmp_path / "cache")
    assert load(path).digest == json.loads(environment["KVTUNER_SERVING"])["digest"]
    assert arguments[arguments.index("--attention-backend") + 1] == "torch_native"


@pytest.mark.parametrize(("more", "expected"), [({}, "1"), ({"SGLANG_USE_CPU_ENGINE": "0"}, "0")])
def test_on_the_cpu_the_variable_of_its_engine_is_set_unless_the_user_sets_it(
    start: Start, more: dict[str, str], expected: str
) -> None:
    out, err = start(*GIVEN, "--device=cpu", **more).communicate(timeout=DEADLINE)
    assert json.loads(out)[2]["SGLANG_USE_CPU_ENGINE"] == expected
    assert ("with SGLANG_USE_CPU_ENGINE=1 " in err) is not bool(more), "the plan says what is added"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_reach_sglang_and_nothing_is_left(start: Start, number: signal.Signals) -> None:
    process = start(*GIVEN, stand_in="wait")
    launcher, worker = ready(process)
    assert launcher == process.pid
    process.send_signal(number)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == -number, "the shell calls this 128 + N"
    assert_gone(worker)


def test_an_orderly_end_keeps_its_exit_code(start: Start) -> None:
    process = start(*GIVEN, stand_in="orderly")
    _, worker = ready(process)
    process.terminate()
    out, _ = process.communicate(timeout=DEADLINE)
    assert (out, process.returncode) == ("orderly end\n", 3)
    assert_gone(worker)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"version": "0.5.15"}, "SGLang 0.5.15 is not supported, only 0.5.14"),
        ({"plugin": False}, "SGLang would not find the plugin"),
        ({"SGLANG_PLUGINS": "other, more"}, "SGLANG_PLUGINS=other,more keeps the plugin out: add kvtuner"),
    ],
)
def test_an_sglang_that_would_not_be_ours_is_not_started(start: Start, how: dict[str, Any], message: str) -> None:
    process = start(*GIVEN, **how)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (5, "")
    assert message in err


def ready(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Wait for the stand-in's first line: (its pid, its worker's pid)."""
    assert process.stdout is not None
    launcher, worker = process.stdout.readline().split()
    return int(launcher), int(worker)


def assert_gone(pid: int) -> None:
    """The process ends; a zombie that nobody has reaped counts as ended."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")
