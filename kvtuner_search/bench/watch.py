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
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from kvtuner_search.bench.record import Reading, Scrape
from kvtuner_search.servers.client import Client, Load
from kvtuner_search.servers.facts import Facts
from kvtuner_search.servers.interface import interface
from kvtuner_search.servers.transport import BadAnswerError, ServerError, cut
from kvtuner_search.serving.engine import engine

INTERVAL: Final = 5.0  # seconds between two readings; each holds up the server's event loop for some milliseconds
_LABELS: Final = ("dp_rank", "pp_rank", "tp_rank")  # the others name folders, or are the same for all
_SETTLE: Final = 10.0  # seconds that a server may take to become idle
_PAUSE: Final = 0.1  # seconds between two looks
_PATIENCE: Final = 30.0  # seconds for one reading
_METRICS: Final = 64 << 20  # bytes of metrics that are read; only the lines of those that a record has are kept
_LINES: Final = 16_384  # of these; SGLang has a dozen a rank
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
            if all(load.requests == 0 for load in loads) or time.monotonic() > deadline:
                return max(0, self.facts.tokens * len(loads) - sum(load.tokens for load in loads))
            time.sleep(_PAUSE)

    def _loads(self) -> list[Load]:
        async def ask() -> list[Load]:
            async with self._client() as client:
                return await client.loads()

        return asyncio.run(ask())

    def _client(self) -> Client:
        return interface().client(self._url, self._timeout, self._key)

    def _device_bytes(self) -> int | None:
        if not self._local or self.facts.device != "cuda":
            return None
        query = ["nvidia-smi", f"--id={self._device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            return int(done.stdout.strip()) * 2**20
        return None

    def scrape(self) -> dict[str, float]:
        """One reading of the metrics by series, which is also kept; empty for a server without any."""
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
        async with self._client() as client:
            await client.metrics(lines)
        return lines.all()

    def generated(self) -> float | None:
        """Tokens that the server has generated since it started, by its own counter."""
        values = [value for name, value in self.scrape().items() if name.partition("{")[0] == interface().GENERATED]
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
    """Keeps the lines of the engine's METRICS. Histograms are most of what SGLang exposes, so other lines are dropped as they come."""

    def __init__(self) -> None:
        self._names = tuple(name.encode() for name in interface().METRICS)
        self._kept: list[str] = []
        self._rest, self._came = b"", 0

    def take(self, data: bytes) -> None:
        self._came += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        self._keep(whole)
        if self._came > _METRICS or len(self._rest) > _LINE or len(self._kept) > _LINES:
            raise BadAnswerError(
                f"the metrics do not end after {self._came:,} bytes and {len(self._kept):,} known lines: that is more than any server's ranks need"
            )

    def all(self) -> list[str]:
        """To the end of the body, whose last line need not end."""
        self._keep([self._rest])
        return self._kept

    def _keep(self, lines: Iterable[bytes]) -> None:
        texts = (line.decode(errors="replace") for line in lines if line.startswith(self._names))
        self._kept += [text for text in texts if _is_wanted(text)]


def _is_wanted(line: str) -> bool:
    return line.partition("{")[0].partition(" ")[0] in interface().METRICS


def parse_metrics(lines: Iterable[str]) -> dict[str, float]:
    """The engine's METRICS in Prometheus' text format, by series with the labels of ranks; series that differ in other labels are added up.

    Raises:
        ValueError: if it is another format.
        ServerError: if a rank is not a number, or a figure is implausible.
    """
    found: dict[str, float] = {}
    for sample in _samples("\n".join([*filter(_is_wanted, lines), ""])):
        ranks = {name: sample.labels[name] for name in _LABELS if name in sample.labels}
        if not all(_RANK.fullmatch(rank) for rank in ranks.values()):
            raise BadAnswerError(
                f"the metrics have {sample.name} of the rank {cut(ranks)}: a rank is a number; is it {engine().TITLE}?"
            )
        labels = ",".join(f'{name}="{rank}"' for name, rank in ranks.items())
        name = sample.name + (f"{{{labels}}}" if labels else "")
        value = sample.value
        if isinstance(value, int):  # the parser leaves whole numbers as they are, and a float takes 309 digits of one
            value = max(-2 * _GREATEST, min(value, 2 * _GREATEST))
        if math.isfinite(value):
            found[name] = found.get(name, 0.0) + value
            if abs(found[name]) > _GREATEST:
                raise BadAnswerError(
                    f"the metrics say {name}={found[name]:g}: implausibly large; is it {engine().TITLE}?"
                )
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
