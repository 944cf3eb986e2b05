"""What a server and its device say of themselves during a run: free slots, device memory, Prometheus metrics."""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from kvtuner_search.bench.record import Reading, Scrape
from kvtuner_search.serving.validate.facts import Facts

INTERVAL: Final = 5.0  # seconds between two readings; each holds up the server's event loop for some milliseconds
GENERATED: Final = "sglang:generation_tokens_total"
METRICS: Final = (
    "sglang:token_usage",
    "sglang:num_used_tokens",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "sglang:num_retracted_reqs",
    "sglang:gen_throughput",
    "sglang:cache_hit_rate",
    "sglang:spec_accept_length",
    "sglang:prompt_tokens_total",
    GENERATED,
    "sglang:cached_tokens_total",
    "sglang:num_requests_total",
    "sglang:num_aborted_requests_total",
)
_LABELS: Final = ("dp_rank", "pp_rank", "tp_rank")  # the others name folders, or are the same for all
_SETTLE: Final = 10.0  # seconds that a server may take to become idle
_PAUSE: Final = 0.1  # seconds between two looks


class Watch:
    """Reads one server.

    Args:
        url: of the server.
        facts: its own account.
        local: it runs on this machine, so that its device can be looked at.
        first_device: index of its first GPU, as ``nvidia-smi`` counts, or its UUID.
    """

    def __init__(self, url: str, facts: Facts, *, local: bool, first_device: str) -> None:
        self.facts, self._local, self._device = facts, local, first_device
        self._http = httpx2.Client(base_url=url, timeout=30.0, trust_env=False)
        self._series: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def reading(self) -> Reading:
        """Free slots and device memory. The server has nothing to do, and its prefix cache was flushed."""
        return Reading(free_tokens=self._free_tokens(), device_bytes=self._device_bytes())

    def _free_tokens(self) -> int | None:
        """Slots that no request holds once the server is idle; None where it does not tell."""
        deadline = time.monotonic() + _SETTLE
        while True:
            loads = self._loads()
            if not loads:
                return None
            if all(load["num_reqs"] == 0 for load in loads) or time.monotonic() > deadline:
                # A request that has not been given slots yet counts as pending, not as used.
                used: int = sum(load["num_tokens"] - load["num_pending_tokens"] for load in loads)
                return max(0, self.facts.tokens * len(loads) - used)
            time.sleep(_PAUSE)

    def _loads(self) -> list[dict[str, Any]]:
        """``/get_load`` of every data-parallel rank; empty where the server has none."""
        wanted = ("num_reqs", "num_tokens", "num_pending_tokens")
        with suppress(httpx2.HTTPError, ValueError):
            response = self._http.get("/get_load")
            loads = response.json() if response.status_code == 200 else []
            if isinstance(loads, list) and all(
                isinstance(load, dict) and all(type(load.get(name)) is int for name in wanted) for load in loads
            ):
                return loads
        return []

    def _device_bytes(self) -> int | None:
        if not self._local or self.facts.device != "cuda":
            return None
        query = ["nvidia-smi", f"--id={self._device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            return int(done.stdout.strip()) * 2**20
        return None

    def scrape(self) -> dict[str, float]:
        """One reading of METRICS by series, which is also kept; empty for a server without ``--enable-metrics``."""
        try:
            response = self._http.get("/metrics")
            found = parse_metrics(response.text.splitlines()) if response.status_code == 200 else {}
        except (httpx2.HTTPError, ValueError):
            return {}  # no metrics, or none in Prometheus' format
        with self._lock:
            for name, value in found.items():
                self._series.setdefault(name, []).append(value)
        return found

    def generated(self) -> float | None:
        """Tokens that the server has generated since it started, by its own counter."""
        values = [value for name, value in self.scrape().items() if name.partition("{")[0] == GENERATED]
        return sum(values) if values else None

    @contextmanager
    def scraping(self) -> Iterator[None]:
        """Read the metrics at the beginning and every INTERVAL seconds within the block, and at its end."""
        stopped = threading.Event()

        def work() -> None:
            while not stopped.wait(INTERVAL):
                self.scrape()

        self.scrape()
        thread = threading.Thread(target=work, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            self.scrape()

    def scrapes(self) -> list[Scrape]:
        """All readings, a series each."""
        with self._lock:
            return [
                Scrape(name=name, samples=len(values), minimum=min(values), maximum=max(values), last=values[-1])
                for name, values in sorted(self._series.items())
            ]


def parse_metrics(lines: Iterable[str]) -> dict[str, float]:
    """METRICS in Prometheus' text format, by series with the labels of ranks; series that differ in other labels are added up.

    Histograms are most of what SGLang exposes, so other lines are dropped before they are parsed.
    """
    kept = [line for line in lines if line.partition("{")[0].partition(" ")[0] in METRICS]
    found: dict[str, float] = {}
    for family in text_string_to_metric_families("\n".join([*kept, ""])):
        for sample in family.samples:
            labels = ",".join(f'{name}="{sample.labels[name]}"' for name in _LABELS if name in sample.labels)
            name = sample.name + (f"{{{labels}}}" if labels else "")
            if math.isfinite(sample.value):
                found[name] = found.get(name, 0.0) + sample.value
    return found


def merge(earlier: Iterable[Scrape], later: Iterable[Scrape]) -> list[Scrape]:
    """The series of a run that was resumed."""
    found = {scrape.name: scrape for scrape in earlier}
    for scrape in later:
        before = found.get(scrape.name)
        found[scrape.name] = (
            scrape
            if before is None
            else Scrape(
                name=scrape.name,
                samples=before.samples + scrape.samples,
                minimum=min(before.minimum, scrape.minimum),
                maximum=max(before.maximum, scrape.maximum),
                last=scrape.last,
            )
        )
    return [found[name] for name in sorted(found)]
