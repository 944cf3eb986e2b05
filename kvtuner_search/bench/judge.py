"""Impossible figures of a record: those beyond their physical floor, and those that contradict each other. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from kvtuner_search.bench.floors import Bounds, Setup, bounds, number
from kvtuner_search.bench.hardware import find
from kvtuner_search.bench.record import Cell, Hardware, Record, Speed, Violation

CLOCK_MARGIN: Final = 0.02  # of a figure: clocks, and the moment between a token's arrival and the reading of the clock
LATE: Final = 5.0  # ms by which the client usually sees a first token late: the others then look faster, with few tokens much faster
_ROUNDING: Final = 0.01  # between figures that were derived from the same counts

_USUAL: Final = ". Usual causes: "
NO_ANSWER: Final = "the requests went to a node that does not serve (ranks above 0 answer 404) or failed otherwise, and the status was not checked"
_CACHED: Final = "the prompts were in the prefix cache and its hits not counted"
_OTHER: Final = "the hardware, layout, model or dtype is not the one named"
CAUSES: Final[dict[str, tuple[str, ...]]] = {
    "ttft": (NO_ANSWER, "headers or an empty chunk were counted as a token", _CACHED, _OTHER),
    "per token": (
        "tokens came in bursts (a proxy or the client held back the first)",
        "tokens were counted as requested, not as returned",
        "speculative decoding that the record does not name",
        _OTHER,
    ),
    "latency": (NO_ANSWER, "the answers were shorter than requested", _CACHED, _OTHER),
    "requests/s": (NO_ANSWER, "failed requests were counted", _CACHED, _OTHER),
    "tokens/s": ("tokens were counted as requested, not as returned", NO_ANSWER, _CACHED, _OTHER),
}


def judge(record: Record, hardware: Hardware | None = None) -> list[Violation]:
    """Every impossible figure of the record.

    Least values are compared with the floors of a single request, rates with the greatest rate at the cell's concurrency. For the time per
    token the median is used: a first token that the client saw late makes the rest of its request look fast.

    Args:
        record: of any preset; its own floors are not trusted but computed again.
        hardware: in place of the record's own.
    """
    hardware = hardware or record.environment.hardware
    found = [] if hardware is None else [*_hardware(hardware), *_memory(record, hardware)]
    for cell in record.cells:
        found += _counts(cell)
        if cell.speed is None:
            continue
        found += _consistency(cell, cell.speed)
        if hardware is not None:
            setup = Setup.of(record.model, record.served, record.cache, hardware)
            found += _floors(cell, cell.speed, setup)
    return found


def below(where: str, what: str, value: float, least: float, why: str) -> Violation | None:
    """A violation if ``value`` ms is below ``least`` ms by more than the margin; ``what`` is one of CAUSES."""
    if value >= least * (1 - CLOCK_MARGIN):
        return None
    need = f"at least {number(least)} ms is needed ({why}); this is {_times(least, value)} faster"
    return Violation(rule="below-floor", where=where, figure=f"{what} {value:.4g} ms", reason=with_causes(need, what))


def above(where: str, what: str, value: float, most: float, why: str) -> Violation | None:
    """A violation if a rate exceeds the greatest by more than the margin; ``what`` is one of CAUSES."""
    if value <= most / (1 - CLOCK_MARGIN):
        return None
    need = f"at most {number(most)} {what} are possible ({why}); this is {_times(value, most)} as many"
    return Violation(rule="below-floor", where=where, figure=f"{value:,.6g} {what}", reason=with_causes(need, what))


def with_causes(text: str, what: str) -> str:
    """The text, and the usual causes of such a figure; :func:`split_causes` separates them again."""
    return f"{text}{_USUAL}{'; '.join(CAUSES[what])}"


def split_causes(reason: str) -> tuple[str, str]:
    """A violation's reason without its usual causes, and the causes; many violations share them."""
    text, _, causes = reason.partition(_USUAL)
    return text, causes


def _times(greater: float, less: float) -> str:
    return f"{number(greater / less)} times" if less else "infinitely"


def _floors(cell: Cell, speed: Speed, setup: Setup) -> list[Violation]:
    shape, where = cell.shape, cell.title
    b = bounds(setup, shape, cell.cached_tokens, cell.succeeded)
    later = shape.output_tokens - 1
    found = []
    if speed.ttft is not None:
        found.append(below(where, "ttft", speed.ttft.minimum, 1e3 * b.ttft, b.ttft_bound))
    if speed.per_token is not None and later:
        least = max(0.0, 1e3 * b.decode - LATE) / later
        found.append(below(where, "per token", speed.per_token.p50, least, b.step_bound))
    found.append(
        below(where, "latency", speed.latency.minimum, 1e3 * (b.ttft + b.decode), whole(b, shape.output_tokens))
    )
    found.append(above(where, "requests/s", speed.requests_per_second, 1 / b.request, b.request_bound))
    most = shape.output_tokens / b.request
    found.append(above(where, "tokens/s", speed.output_tokens_per_second, most, b.request_bound))
    return [violation for violation in found if violation is not None]


def whole(b: Bounds, tokens: int) -> str:
    """The limit on an answer of ``tokens`` tokens."""
    first = f"{number(1e3 * b.ttft)} ms for the first token: {b.ttft_bound}"
    later = tokens - 1
    return f"{first}; {number(1e3 * b.decode / later)} for each of {later} more: {b.step_bound}" if later else first


def _counts(cell: Cell) -> Iterator[Violation]:
    """Returned tokens against requested ones."""
    for what, asked, counted in (
        ("returned", cell.shape.output_tokens, cell.returned_tokens),
        ("prompt", cell.shape.input_tokens, cell.prompt_tokens),
    ):
        if counted != cell.succeeded * asked:
            yield Violation(
                rule="miscounted",
                where=cell.title,
                figure=f"{counted:,} {what} tokens",
                reason=f"{cell.succeeded:,} whole answers to requests of {asked:,} have {cell.succeeded * asked:,}: an answer that is short"
                " or cut is a failure, not a sample",
            )
    if cell.cached_tokens > cell.prompt_tokens:
        yield Violation(
            rule="miscounted",
            where=cell.title,
            figure=f"{cell.cached_tokens:,} cached tokens",
            reason=f"there were only {cell.prompt_tokens:,} prompt tokens",
        )


def _consistency(cell: Cell, speed: Speed) -> Iterator[Violation]:
    """Figures that follow from each other."""
    for what, rate, count in (
        ("requests/s", speed.requests_per_second, cell.succeeded),
        ("prompt tokens/s", speed.input_tokens_per_second, cell.prompt_tokens),
        ("tokens/s", speed.output_tokens_per_second, cell.returned_tokens),
    ):
        if abs(rate * speed.seconds - count) > _ROUNDING * count:
            yield Violation(
                rule="contradiction",
                where=cell.title,
                figure=f"{rate:,.6g} {what}",
                reason=f"{count:,} in {speed.seconds:.4g} s give {_per(count, speed.seconds)}: the rate was counted from something else",
            )
    running = speed.requests_per_second * speed.latency.mean / 1e3
    if running > cell.shape.concurrency * (1 + CLOCK_MARGIN):
        yield Violation(
            rule="littles-law",
            where=cell.title,
            figure=f"{speed.requests_per_second:,.4g} requests/s at {speed.latency.mean:.4g} ms on average",
            reason=f"by Little's law {running:.3g} requests were in flight, but at most {cell.shape.concurrency} were allowed: the rate or the"
            " latency is of other requests",
        )
    if speed.ttft is not None and (
        speed.ttft.mean > speed.latency.mean * (1 + _ROUNDING)
        or speed.ttft.minimum > speed.latency.minimum * (1 + _ROUNDING)
    ):
        yield Violation(
            rule="contradiction",
            where=cell.title,
            figure=f"ttft {speed.ttft.mean:.4g} ms on average, {speed.ttft.minimum:.4g} at least",
            reason=f"whole answers took {speed.latency.mean:.4g} ms on average, {speed.latency.minimum:.4g} at least: no first token comes after the last",
        )


def _per(count: float, seconds: float) -> str:
    return f"{count / seconds:,.6g}" if seconds else "no rate"


def _hardware(hardware: Hardware) -> Iterator[Violation]:
    """Figures of a device that exceed the table's: every floor would be too low."""
    row = find(hardware.name)
    if row is None:
        return
    for what, value, known, unit in (
        ("bandwidth", hardware.bandwidth, row.bandwidth, "bytes/s"),
        ("flops", hardware.flops, row.flops, "operations/s"),
    ):
        if value > known * (1 + CLOCK_MARGIN):
            yield Violation(
                rule="hardware",
                where=f"hardware {hardware.name}",
                figure=f"{what} {value:.4g} {unit}",
                reason=f"{row.source} has {known:.4g}: floors computed with more are too low; for rates with sparsity take half, for"
                " another device give its name",
            )


def _memory(record: Record, hardware: Hardware) -> Iterator[Violation]:
    """Weights and cache against the devices' memory."""
    if hardware.memory is None:
        return
    devices = max(hardware.count, record.served.tensor_parallel * record.served.pipeline_parallel)
    total, stored = devices * hardware.memory, record.served.token_capacity * record.cache.bytes_per_token
    # A server's own count is of one copy of the model.
    if stored + record.model.weight_bytes > total * (1 + _ROUNDING):
        yield Violation(
            rule="over-memory",
            where="token capacity",
            figure=f"{record.served.token_capacity:,} tokens of {record.cache.bytes_per_token:,} bytes",
            reason=f"with {record.model.weight_bytes / 1e9:.3g} GB of weights they take {(stored + record.model.weight_bytes) / 1e9:.4g} GB, and"
            f" {devices} x {hardware.name} have {total / 1e9:.4g}: the record names a wrong capacity, wrong bytes per token or the wrong hardware",
        )
    for cell in record.cells:
        most = max(cell.device_bytes or (0,))
        if most > hardware.memory * (1 + _ROUNDING):
            yield Violation(
                rule="over-memory",
                where=cell.title,
                figure=f"{most / 1e9:.4g} GB in use on the first device",
                reason=f"{hardware.name} has {hardware.memory / 1e9:.4g} GB: the record names the wrong hardware",
            )
