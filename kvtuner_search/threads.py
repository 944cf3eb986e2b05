"""How many threads torch computes with, and how they wait for each other. To be called before torch is imported.

By default a thread that is done spins until the last one is. If another program takes a core from that one, all others spin for nothing, at every
operation: on two busy cores a pass of the reference model took three times as long as with threads that sleep (docs/log.md).
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Final

WAITING: Final = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}  # OpenMP's, GNU's and Intel's
COUNT: Final = "OMP_NUM_THREADS"
LEAST: Final = 2  # with a core each or not, two that sleep while they wait were quicker than one
SAMPLE: Final = 0.1  # seconds in which other programs are watched


def limit_threads() -> None:
    """Make torch's threads sleep while they wait, and use only as many as cores are free. Variables already set in the environment are kept."""
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)
    if COUNT not in os.environ:
        os.environ[COUNT] = str(threads_for(allowed_cores(), busy_cores(SAMPLE)))


def threads_for(cores: int, busy: float) -> int:
    """Number of threads for ``cores``, of which other programs keep ``busy`` busy: 8 cores and 2.5 busy ones give 5."""
    return max(1, min(cores, max(LEAST, math.floor(cores - busy))))


def allowed_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: by its affinity, and by a container's quota (``max 100000``, or ``200000 100000`` for two)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
        return max(1, min(cores, math.ceil(int(most) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no limit, or another system
        return cores


def busy_cores(seconds: float, stat: Path = Path("/proc/stat")) -> float:
    """Average number of busy cores over ``seconds`` in which this process sleeps; 0 if the system does not say."""
    before = _busy_seconds(stat)
    begin = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - begin
    return max(0.0, _busy_seconds(stat) - before) / passed if passed else 0.0


def _busy_seconds(stat: Path) -> float:
    """Seconds that the cores this process may use have been busy since the machine started."""
    try:
        lines = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")]
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        # user, nice, system, idle, waiting for disks, and more that is busy; the last two are part of the first
        ticks = sum(sum(map(int, numbers[:3] + numbers[5:8])) for name, *numbers in lines if name in mine)
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return 0.0
