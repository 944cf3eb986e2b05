"""Torch's threads: as many as cores are free, asleep while they wait, and what the user said goes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtuner_search import threads

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("cores", "busy", "expected"), [(2, 0.0, 2), (2, 1.0, 2), (1, 3.0, 1), (8, 2.5, 5), (64, 60.0, 4), (64, 80.0, 2)]
)
def test_threads_follow_what_is_free(cores: int, busy: float, expected: int) -> None:
    assert threads.threads_for(cores, busy) == expected


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", None), ("100000 100000\n", 1), ("50000 100000", 1), ("x", None), (None, None)]
)
def test_a_containers_quota_counts(tmp_path: Path, text: str | None, cores: int | None) -> None:
    quota = tmp_path / "cpu.max"
    if text is not None:
        quota.write_text(text)
    assert threads.allowed_cores(quota) == (cores or len(os.sched_getaffinity(0)))


def test_what_others_keep_busy_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat, now = tmp_path / "stat", [0.0]
    first = min(os.sched_getaffinity(0))

    def write(busy: int) -> None:
        stat.write_text(
            f"cpu  9 9 9 9\ncpu{first} {busy} 5 5 1000 1000 0 0 0 0 0\ncpu99999 {busy * 9} 0 0 0 0 0 0 0 0 0\n"
        )

    def sleep(seconds: float) -> None:
        now[0] += seconds
        write(100 + os.sysconf("SC_CLK_TCK"))  # one second of one core

    write(100)
    monkeypatch.setattr("kvtuner_search.threads.time.sleep", sleep)
    monkeypatch.setattr("kvtuner_search.threads.time.monotonic", lambda: now[0])
    assert threads.busy_cores(2.0, stat) == pytest.approx(0.5)
    assert threads.busy_cores(2.0, tmp_path / "none") == 0.0


def run(code: str, **variables: str) -> list[str]:
    names = (*threads.WAITING, threads.COUNT)
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


SHOW = "import os\nfrom kvtuner_search import threads\nthreads.limit_threads()\nprint(*[os.environ.get(n) for n in (*threads.WAITING, threads.COUNT)])"


def test_the_environment_goes_first() -> None:
    assert run(SHOW, OMP_WAIT_POLICY="active", OMP_NUM_THREADS="7") == ["active", "None", "None", "7"]
    *waiting, count = run(SHOW)
    assert waiting == list(threads.WAITING.values())
    assert 1 <= int(count) <= threads.allowed_cores()


@pytest.mark.parametrize("command", ["calibrate", "sensitivity", "evaluate"])
def test_commands_that_compute_limit_threads_before_torch_is_imported(command: str) -> None:
    """Threads that are made later do not heed the environment."""
    code = (
        "import sys\nfrom kvtuner_search import threads\n"
        "threads.limit_threads = lambda: (print('torch' in sys.modules), sys.exit(0))\n"
        f"from kvtuner_search.cli.main import run\nrun([{command!r}])"
    )
    assert run(code) == ["False"]
