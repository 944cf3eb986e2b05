"""Capacity, short requests, time to the first token, and long requests end to end, against bf16 with each of its backends."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from serving_checks.load import Request, Traffic, random_prompt, send
from serving_checks.machine import Machine, Subject, effective_bits
from serving_checks.parts import Found, Measurement, Part, Task
from serving_checks.results import Record, at_least, at_most, check
from serving_checks.servers import Config, Server

from kvtuner_search.profile.canonical import load

CAPACITY, SHORT, FIRST_TOKEN, END_TO_END, STARTUP = 0.99, 0.97, 1.05, 1.2, 20.0


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, and counts."""

    short_in: int = 128
    short_out: int = 512
    concurrency: int = 64
    long_in: int = 16384
    long_out: int = 1024
    first_tokens: int = 7  # prompts whose first token is timed
    requests: int = 0  # long requests end to end; 0: as many as the packed cache holds


def configs(machine: Machine, subject: Subject, backends: Sequence[str]) -> tuple[list[Config], Config]:
    """The bf16 servers, and the one with the main profile."""
    stock = [
        Config(f"bf16-{name}", subject.model, (*subject.arguments, "--attention-backend", name)) for name in backends
    ]
    own = (*subject.arguments, "--attention-backend", machine.own_backend)
    return stock, Config(subject.main, subject.model, own, subject.profiles[subject.main])


class Speed:
    """Parts that measure servers of one subject."""

    def __init__(self, machine: Machine, subject: Subject, backends: Sequence[str], sizes: Sizes) -> None:
        self.sizes, self.subject = sizes, subject
        self.stock, self.packed = configs(machine, subject, backends)
        self.profile = load(subject.profiles[subject.main])

    def part(self, name: str) -> Part:
        """``capacity``, ``short``, ``ttft``, ``end-to-end`` or ``startup``."""
        take, conclude = {
            "capacity": (self._capacity, self._conclude_capacity),
            "short": (self._short, self._conclude_short),
            "ttft": (self._first_token, self._conclude_first_token),
            "end-to-end": (self._end_to_end, self._conclude_end_to_end),
            "startup": (lambda server, _: server.startup, self._conclude_startup),
        }[name]
        servers = self._again() if name == "startup" else [*self.stock, self.packed]
        return Part(name, [Task(config, Measurement(name, take)) for config in servers], conclude)

    def _again(self) -> list[Config]:
        """bf16 with the backend of the packed server, and the packed server, to be started once more with warm compile caches."""
        same = [config for config in self.stock if config.arguments == self.packed.arguments]
        return [replace(config, name=f"{config.name}-again") for config in (*same, self.packed)]

    def _figures(self, found: Found, name: str) -> tuple[dict[str, Any], Any]:
        """Of the bf16 servers by name, and of the packed one; what is missing has been reported."""
        stock = {c.name: found[c.name][name] for c in self.stock if name in found.get(c.name, {})}
        return stock, found.get(self.packed.name, {}).get(name)

    def _capacity(self, server: Server, _seconds: float) -> int:
        return int(server.info()["max_total_num_tokens"])

    def _conclude_capacity(self, found: Found) -> list[Record]:
        stock, packed = self._figures(found, "capacity")
        if not stock or packed is None:
            return []
        best, bits = max(stock.values()), effective_bits(self.profile)
        text = f"{packed:,} tokens against {best:,} ({packed / best:.3f}x)"
        return [
            Record("capacity", f"{self.packed.name} at {bits:.2f} effective bits", text),
            at_least("capacity", f"of bf16 x 16 / {bits:.2f}", packed / best / (16 / bits), CAPACITY, ""),
        ]

    def _requests(self, count: int, length: int, output: int, seed: str, stream: bool = False) -> list[Request]:
        draw = random.Random(seed)
        vocabulary = self.subject.vocabulary
        return [Request(random_prompt(draw, length, vocabulary), output, stream) for _ in range(count)]

    def _short(self, server: Server, seconds: float) -> dict[str, Any]:
        found = {}
        sizes = self.sizes
        send(server.url, self._requests(2, sizes.short_in, 8, "warm"), 2, seconds / 4)
        for concurrency, count in ((1, 2), (sizes.concurrency, 2 * sizes.concurrency)):
            server.flush()
            asked = self._requests(count, sizes.short_in, sizes.short_out, f"short {concurrency}")
            found[str(concurrency)] = _traffic(send(server.url, asked, concurrency, seconds / 2))
        return found

    def _conclude_short(self, found: Found) -> list[Record]:
        stock, packed = self._figures(found, "short")
        records = _errors("short", {**stock, self.packed.name: packed or {}})
        if not stock or not packed:
            return records
        for concurrency, mine in packed.items():
            best = max(figures[concurrency]["rate"] for figures in stock.values())
            what = f"{self.sizes.short_in} in, {self.sizes.short_out} out, {concurrency} at a time"
            records.append(Record("short", what, f"{mine['rate']:,.0f} tokens/s against {best:,.0f}"))
            if best:
                records.append(at_least("short", f"{what}: over bf16", mine["rate"] / best, SHORT))
        return records

    def _first_token(self, server: Server, seconds: float) -> dict[str, Any]:
        server.flush()
        asked = self._requests(self.sizes.first_tokens + 1, self.sizes.long_in, 2, "first", stream=True)
        traffic = send(server.url, asked, 1, seconds)
        times = [one.first for one in traffic.finished if one.first is not None][1:]  # the first one warms up
        return {"all": _traffic(traffic), "seconds": times, "median": statistics.median(times) if times else None}

    def _conclude_first_token(self, found: Found) -> list[Record]:
        stock, packed = self._figures(found, "ttft")
        records = _errors(
            "ttft", {name: {"1": one["all"]} for name, one in {**stock, self.packed.name: packed}.items() if one}
        )
        medians = [one["median"] for one in stock.values() if one["median"]]
        if not medians or not packed or not packed["median"]:
            return records
        best, mine = min(medians), packed["median"]
        what = f"{self.sizes.long_in} tokens, median of {len(packed['seconds'])}"
        records.append(Record("ttft", what, f"{mine * 1e3:.0f} ms against {best * 1e3:.0f} ms"))
        return [*records, at_most("ttft", f"{what}: over bf16", mine / best, FIRST_TOKEN)]

    def _end_to_end(self, server: Server, seconds: float) -> dict[str, Any]:
        sizes = self.sizes
        fit = server.info()["max_total_num_tokens"] // (sizes.long_in + sizes.long_out)
        count = sizes.requests or fit
        server.flush()
        asked = self._requests(count, sizes.long_in, sizes.long_out, "end to end")
        return {**_traffic(send(server.url, asked, fit, seconds)), "fit": fit}

    def _conclude_end_to_end(self, found: Found) -> list[Record]:
        stock, packed = self._figures(found, "end-to-end")
        records = _errors(
            "end-to-end", {name: {"all": one} for name, one in {**stock, self.packed.name: packed}.items() if one}
        )
        if not stock or not packed:
            return records
        for name, one in {**stock, self.packed.name: packed}.items():
            cut = f", {one['cut']} unfinished" if one["cut"] else ""
            text = f"{one['rate']:,.0f} tokens/s: {one['finished']} requests in {one['seconds']:.0f} s, {one['fit']} fit{cut}"
            records.append(Record("end-to-end", f"{name}, {self.sizes.long_in} in, {self.sizes.long_out} out", text))
        best = max(one["rate"] for one in stock.values())
        if best and packed["rate"]:
            records.append(at_least("end-to-end", "over bf16, as many as fit", packed["rate"] / best, END_TO_END))
        return records

    def _conclude_startup(self, found: Found) -> list[Record]:
        times = [found[c.name]["startup"] for c in self._again() if "startup" in found.get(c.name, {})]
        if len(times) != 2:
            return []
        same, packed = times
        text = f"{packed:.1f} s against {same:.1f} s"
        return [Record("startup", "start", text), at_most("startup", "more than bf16", packed - same, STARTUP, " s")]


def _traffic(traffic: Traffic) -> dict[str, Any]:
    return {
        "rate": traffic.rate, "returned": traffic.returned, "seconds": traffic.seconds,
        "finished": len(traffic.finished), "cut": sum(one.cut for one in traffic.outcomes),
        "errors": traffic.errors[:5], "failed": len(traffic.errors),
    }  # fmt: skip


def _errors(part: str, servers: dict[str, dict[str, Any]]) -> list[Record]:
    """A check for each server: no request failed."""
    records = []
    for name, loads in servers.items():
        count = sum(one["failed"] for one in loads.values())
        examples = [error for one in loads.values() for error in one["errors"]]
        text = f"{count} of {sum(one['failed'] + one['finished'] + one['cut'] for one in loads.values())}"
        records.append(check(part, f"{name}: failed requests", not count, " ".join([text, *examples[:1]]), "none"))
    return records
