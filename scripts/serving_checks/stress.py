"""Thousands of mixed requests on a pool that is too small for them, and how far greedy answers depend on who else is served."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
from serving_checks.greedy import CONTEXT
from serving_checks.load import Outcome, Request, random_prompt, send
from serving_checks.machine import Machine, gpu_memory_used
from serving_checks.parts import Found, Measurement, Part, Task
from serving_checks.results import Record, check
from serving_checks.servers import Config, Server

CONCURRENCY = 64
WARM = 0.2  # of all requests run before the memory is first looked at
DRIFT = 256  # MiB: CUDA contexts and workspaces settle in steps of this order, a leak of slots or tensors goes on
PREFIXES = 8
BURSTS = 2000  # requests from one burst to the next


@dataclass(frozen=True)
class Sizes:
    """What is sent."""

    requests: int = 10000
    longest: int = 16384
    output: int = 256
    pool: int = 40960  # tokens
    sample: int = 100  # requests whose answers are compared
    chunks: bool = False  # prompts are prefilled in chunks
    mix: int = 1000  # requests under which the servers that are not deterministic answer the sample


def mixed_requests(sizes: Sizes, vocabulary: int, seed: int = 0) -> list[Request]:
    """Lengths from 1 to ``longest``, every size as likely as any other in magnitude; a third start with one of a few prefixes.

    One in twenty is aborted after a few tokens. Bursts of equal requests, whose prompts fit the pool together and whose answers do
    not, force retractions: among the others, prompts that end free slots faster than answers take them.
    """
    draw = random.Random(seed)
    prefixes = [
        random_prompt(draw, draw.randrange(16, max(17, sizes.longest // 8)), vocabulary) for _ in range(PREFIXES)
    ]
    found = []
    for _ in range(sizes.requests):
        length = round(math.exp(draw.uniform(0, math.log(sizes.longest))))
        prefix = draw.choice(prefixes) if draw.random() < 1 / 3 else ()
        prompt = (*prefix[:length], *random_prompt(draw, max(0, length - len(prefix)), vocabulary))
        output = round(math.exp(draw.uniform(0, math.log(sizes.output))))
        request = Request(prompt, output)
        if draw.random() < 0.05:
            request = replace(
                request, stream=True, output=sizes.output, abort_after=draw.randrange(1, sizes.output // 2)
            )
        found.append(request)
    count = min(2 * CONCURRENCY, sizes.requests // 3)
    together = max(1, min(CONCURRENCY, count))
    length = min(max(1, sizes.pool // together - sizes.output // 2), sizes.longest)
    for start in range(sizes.requests // 2, sizes.requests - count, BURSTS):
        found[start : start + count] = [
            Request(random_prompt(draw, length, vocabulary), sizes.output) for _ in range(count)
        ]
    return found


def sampled(requests: Sequence[Request], count: int) -> list[int]:
    """The requests whose answers are compared, evenly spread over all that are not aborted."""
    whole = [index for index, request in enumerate(requests) if request.abort_after is None]
    return whole[:: max(1, len(whole) // count)][:count]


def agreement(one: Sequence[Outcome], other: Sequence[Outcome]) -> dict[str, Any]:
    """How many pairs of finished answers are equal, and the share of tokens before the first difference."""
    pairs = [(a.tokens, b.tokens) for a, b in zip(one, other, strict=True) if a.tokens and b.tokens]
    common = sum(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in pairs)
    return {
        "compared": len(pairs), "equal": sum(a == b for a, b in pairs),
        "tokens": common / sum(len(a) for a, _ in pairs) if pairs else 0.0,
    }  # fmt: skip


class Stress:
    """The parts ``stress``, ``stress-stock`` and ``agreement``."""

    def __init__(self, machine: Machine, sizes: Sizes) -> None:
        self.machine, self.sizes = machine, sizes
        backend = machine.own_backend
        base = (
            *machine.small(), "--attention-backend", backend,
            "--dtype", "float32" if machine.device == "cpu" else "float16", "--max-total-tokens", str(sizes.pool),
            "--json-model-override-args", f'{{"max_position_embeddings": {CONTEXT}}}', "--enable-metrics",
            "--schedule-conservativeness", "0.1", "--enable-cache-report", "--max-running-requests", str(CONCURRENCY),
            # SGLang goes on with a chunked prompt without a look at what decode has taken meanwhile: on a pool as small as this
            # a stock server ends so in "Out of memory", which --stress-chunks shows.
            *(() if sizes.chunks else ("--chunked-prefill-size", "-1")),
        )  # fmt: skip
        # On the CPU SGLang has no deterministic mode for the torch backend, which is deterministic where a batch is read in order.
        exact = () if machine.device == "cpu" else ("--enable-deterministic-inference",)
        model, profile = machine.reference(), machine.mixed_profile()
        self.exact = Config("reference-mixed-deterministic", model, (*base, *exact), profile)
        self.packed = Config("reference-mixed-small", model, base, profile)
        self.stock = Config("reference-stock-small", model, base)
        self.stock_exact = Config("reference-stock-deterministic", model, (*base, *exact))

    def part_stress(self, name: str) -> Part:
        """All requests, in deterministic mode: ``stress`` with the profile, ``stress-stock`` on a stock server."""
        config = self.exact if name == "stress" else self.stock_exact
        return Part(name, [Task(config, Measurement(name, self._stress))], partial(self._conclude, config, name))

    def part_agreement(self) -> Part:
        """How many answers are the same alone and among others, without deterministic mode: with the profile and without."""
        task = Measurement("agreement", self._agreement)
        return Part("agreement", [Task(self.packed, task), Task(self.stock, task)], self._conclude_agreement)

    def _alone(self, server: Server, requests: Sequence[Request], seconds: float) -> list[Outcome]:
        """The requests again, one at a time, none with a prefix that another left."""
        outcomes: list[Outcome] = []
        deadline = time.monotonic() + seconds
        for request in requests:
            server.flush()
            outcomes += send(server.url, [request], 1, max(0.1, deadline - time.monotonic())).outcomes
        return outcomes

    def _stress(self, server: Server, seconds: float) -> dict[str, Any]:
        requests = mixed_requests(self.sizes, 8000)
        deadline = time.monotonic() + seconds
        cut = max(1, round(WARM * len(requests)))
        server.flush()
        first = send(server.url, requests[:cut], CONCURRENCY, 0.7 * seconds)
        before, _ = self._memory(server)
        rest = send(server.url, requests[cut:], CONCURRENCY, max(1.0, 0.8 * (deadline - time.monotonic())))
        after, where = self._memory(server)
        outcomes = [*first.outcomes, *rest.outcomes]
        used = self._used(server)
        chosen = [i for i in sampled(requests, self.sizes.sample) if outcomes[i].tokens]
        alone = self._alone(server, [requests[i] for i in chosen], max(5.0, deadline - time.monotonic()))
        errors = [one.error for one in outcomes if one.error]
        return {
            "requests": len(requests), "finished": len(first.finished) + len(rest.finished),
            "aborted": sum(one.aborted for one in outcomes), "cut": sum(one.cut for one in outcomes),
            "failed": len(errors), "errors": errors[:5], "seconds": first.seconds + rest.seconds,
            "tokens_in": sum(len(r.prompt) for r, o in zip(requests, outcomes, strict=True) if not o.cut),
            "tokens_out": first.returned + rest.returned, "cached": sum(one.cached for one in outcomes),
            "retracted": retractions(server.log()), "used_after_flush": used, "memory_mib": [before, after], "memory_of": where,
            "agreement": agreement([outcomes[i] for i in chosen], alone),
        }  # fmt: skip

    def _memory(self, server: Server) -> tuple[int, str]:
        """MiB in use, and what was looked at."""
        self._used(server)
        processes = psutil.Process(server.launchers[0].pid).children(recursive=True)
        if self.machine.device == "cuda":
            return gpu_memory_used({process.pid for process in processes})
        return int(sum(process.memory_info().rss for process in processes)) >> 20, "the server's memory"

    def _used(self, server: Server) -> int:
        """Slots in use once all requests have ended and the prefix cache is empty; waits for aborted ones to end."""
        deadline = time.monotonic() + 30
        while True:
            server.flush()
            server.generate([5], 1)  # the metric is written by batches
            server.flush()
            used = round(server.metric("num_used_tokens"))
            if used == 0 or time.monotonic() > deadline:
                return used
            time.sleep(0.5)

    def _conclude(self, config: Config, part: str, found: Found) -> list[Record]:
        one = found.get(config.name, {}).get(part)
        if one is None:
            return []
        same, (before, after) = one["agreement"], one["memory_mib"]
        text = f"{one['finished']} finished, {one['aborted']} aborted of {one['requests']} in {one['seconds']:.0f} s"
        return [
            Record(part, "requests", f"{text}; {one['tokens_in']:,} tokens in, {one['cached']:,} cached, {one['tokens_out']:,} out"),
            check(part, "failed requests", not one["failed"], " ".join([str(one["failed"]), *one["errors"][:1]]), "none"),
            check(part, "unfinished when time was up", not one["cut"], str(one["cut"]), "none"),
            check(part, "retractions", one["retracted"] > 0, str(one["retracted"]), "some"),
            check(part, "slots in use after a flush", one["used_after_flush"] == 0, str(one["used_after_flush"]), "0"),
            check(part, f"{one['memory_of']}: grown since a fifth of the requests", after - before <= DRIFT, f"{after - before} MiB (of {before})", f"{DRIFT} MiB or less"),
            check(part, "same answers alone, in deterministic mode", same["equal"] == same["compared"] > 0, f"{same['equal']} of {same['compared']}", "all"),
        ]  # fmt: skip

    def _agreement(self, server: Server, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        requests = mixed_requests(replace(self.sizes, requests=min(self.sizes.mix, self.sizes.requests)), 8000)
        server.flush()
        mixed = send(server.url, requests, CONCURRENCY, 0.6 * seconds)
        chosen = [i for i in sampled(requests, self.sizes.sample) if mixed.outcomes[i].tokens]
        alone = self._alone(server, [requests[i] for i in chosen], max(5.0, deadline - time.monotonic()))
        return {
            **agreement([mixed.outcomes[i] for i in chosen], alone),
            "errors": mixed.errors[:5],
            "failed": len(mixed.errors),
        }

    def _conclude_agreement(self, found: Found) -> list[Record]:
        records = []
        for config in (self.packed, self.stock):
            one = found.get(config.name, {}).get("agreement")
            if one is not None:
                text = f"{one['equal']} of {one['compared']} answers, {one['tokens']:.3f} of tokens before a difference"
                records.append(Record("agreement", f"{config.name}: alone and among others", text))
                records.append(
                    check(
                        "agreement",
                        f"{config.name}: failed requests",
                        not one["failed"],
                        " ".join([str(one["failed"]), *one["errors"][:1]]),
                        "none",
                    )
                )
        return records


def retractions(log: str) -> int:
    """Requests that were retracted, by the scheduler's log."""
    counts = re.findall(r"Retract requests.*?#retracted_reqs: (\d+)", log)
    return sum(map(int, counts))
