"""Readings of a server and its device during a run: free slots, device memory, Prometheus metrics."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kvtuner_search.bench.record import Reading, Scrape
from kvtuner_search.servers.facts import Facts
from kvtuner_search.servers.transport import BadAnswerError, ServerError, Transport, cut

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
_PATIENCE: Final = 30.0  # seconds for one reading
_LOADS: Final = 1 << 20  # bytes of /get_load; SGLang's has some 100 a rank
_METRICS: Final = 64 << 20  # bytes of /metrics that are read; only the lines of METRICS are kept
_LINES: Final = 16_384  # of METRICS; SGLang has a dozen a rank
_LINE: Final = 1 << 16  # bytes of a line
_RANK: Final = re.compile(r"[0-9]{1,6}")
_GREATEST: Final = 1e18  # largest plausible figure


class Watch:
    """Reads one server.

    Args:
        url: of the server.
        facts: its own account.
        local: it runs on this machine, so that its device can be read.
        first_device: index of its first GPU, as ``nvidia-smi`` counts, or its UUID.
        timeout: seconds that one reading may take; at most half a minute is waited.
        key: sent as bearer token.

    Attributes:
        fault: the error in the metrics, if any. Missing metrics, or a server too busy to answer, are not a fault.
    """

    def __init__(
        self,
        url: str,
        facts: Facts,
        *,
        local: bool,
        first_device: str,
        timeout: float = _PATIENCE,
        key: str | None = None,
    ) -> None:
        self.facts, self._local, self._device = facts, local, first_device
        self._url, self._timeout, self._key = url, min(timeout, _PATIENCE), key
        self.fault: BadAnswerError | None = None
        self._series: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def reading(self) -> Reading:
        """Free slots and device memory. The server has nothing to do, and its prefix cache was flushed."""
        return Reading(free_tokens=self._free_tokens(), device_bytes=self._device_bytes())

    def _free_tokens(self) -> int | None:
        """Slots that no request holds once the server is idle; None if it does not tell."""
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
        """``/get_load`` of every data-parallel rank; empty if the server has none."""
        wanted = ("num_reqs", "num_tokens", "num_pending_tokens")
        try:
            loads = asyncio.run(self._get_loads())
        except BadAnswerError:
            raise
        except ServerError:
            return []
        if not isinstance(loads, list) or not all(
            isinstance(load, dict) and all(type(load.get(name)) is int for name in wanted) for load in loads
        ):
            return []
        if not all(0 <= load[name] <= 2**31 for load in loads for name in wanted):
            raise BadAnswerError(
                f"{self._url}/get_load counts requests or tokens below 0 or above 2 billion: is it SGLang?"
            )
        return loads

    async def _get_loads(self) -> Any:
        async with Transport(self._url, self._timeout, self._key) as http:
            return await http.json("GET", "/get_load", limit=_LOADS)

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
            found = parse_metrics(asyncio.run(self._get_metrics()))
        except BadAnswerError as error:
            self.fault = self.fault or error
            return {}
        except (ServerError, ValueError):
            return {}  # no metrics, or none in Prometheus' format
        with self._lock:
            for name, value in found.items():
                self._series.setdefault(name, []).append(value)
        return found

    async def _get_metrics(self) -> list[str]:
        lines = _Lines()
        async with Transport(self._url, self._timeout, self._key) as http:
            await http.read("GET", "/metrics", lines)
        return lines.all()

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


class _Lines:
    """Keeps the lines of METRICS. Histograms are most of what SGLang exposes, so other lines are dropped as they come."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._rest, self._came = b"", 0

    def take(self, data: bytes) -> None:
        self._came += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        self._keep(whole)
        if self._came > _METRICS or len(self._rest) > _LINE or len(self._kept) > _LINES:
            raise BadAnswerError(
                f"{self._came:,} bytes came with {len(self._kept):,} lines of metrics that are read here, and more: more than any server's ranks need"
            )

    def all(self) -> list[str]:
        """To the end of the body, whose last line need not end."""
        self._keep([self._rest])
        return self._kept

    def _keep(self, lines: Iterable[bytes]) -> None:
        texts = (line.decode(errors="replace") for line in lines if line.startswith(b"sglang:"))
        self._kept += [text for text in texts if _is_wanted(text)]


def _is_wanted(line: str) -> bool:
    return line.partition("{")[0].partition(" ")[0] in METRICS


def parse_metrics(lines: Iterable[str]) -> dict[str, float]:
    """METRICS in Prometheus' text format, by series with the labels of ranks; series that differ in other labels are added up.

    Raises:
        ValueError: if it is another format.
        ServerError: if a rank is not a number, or a figure is implausible.
    """
    found: dict[str, float] = {}
    for sample in _samples("\n".join([*filter(_is_wanted, lines), ""])):
        ranks = {name: sample.labels[name] for name in _LABELS if name in sample.labels}
        if not all(_RANK.fullmatch(rank) for rank in ranks.values()):
            raise BadAnswerError(
                f"/metrics has {sample.name} of the rank {cut(ranks)}: a rank is a number; is it SGLang?"
            )
        labels = ",".join(f'{name}="{rank}"' for name, rank in ranks.items())
        name = sample.name + (f"{{{labels}}}" if labels else "")
        value = sample.value
        if isinstance(value, int):  # the parser leaves whole numbers as they are, and a float takes 309 digits of one
            value = max(-2 * _GREATEST, min(value, 2 * _GREATEST))
        if math.isfinite(value):
            found[name] = found.get(name, 0.0) + value
            if abs(found[name]) > _GREATEST:
                raise BadAnswerError(f"/metrics says {name}={found[name]:g}: implausibly large; is it SGLang?")
    return found


def _samples(text: str) -> Iterator[Sample]:
    """What Prometheus' own parser finds.

    Raises:
        ValueError: if it is another format.
    """
    try:
        for family in text_string_to_metric_families(text):
            yield from family.samples
    except OverflowError as error:  # of a time with hundreds of digits
        raise ValueError("a number is beyond the range of a double") from error


def merge(earlier: Iterable[Scrape], later: Iterable[Scrape]) -> list[Scrape]:
    """The series of a resumed run."""
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
