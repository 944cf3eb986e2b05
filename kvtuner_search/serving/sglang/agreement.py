"""Before the first request, every rank of every node reports what it serves, and all reports must agree.

The ranks exchange reports through torch.distributed's key-value store, not in a collective: a rank without the plugin
reports nothing, and that must end in an error that names it, not in an endless wait.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Final

import torch.distributed

from kvtuner_search.errors import ServingError

TIMEOUT: Final = 60  # seconds; the ranks have just synchronized to agree on the number of tokens
_KEY: Final = "kvtuner"


@dataclass(frozen=True)
class RankReport:
    """What one rank serves."""

    rank: int  # in the world
    profile_digest: str
    layout_version: int
    as_stored: bool
    tool: str  # kvtuner-search and its version
    sglang: str  # SGLang's version
    layers: tuple[int, int]  # half-open range of global layers
    heads: tuple[int, int]  # half-open range of KV heads
    bytes_per_token: int  # of this rank's layers and heads
    tokens: int  # capacity
    pool_bytes: int  # what is allocated
    window_tokens: int | None = (
        None  # capacity of layers whose pool keeps a window only; None: all layers share one pool
    )
    window_bytes_per_token: int = 0  # of those layers; part of bytes_per_token

    def to_json(self) -> dict[str, Any]:
        """For the store, and for ``/server_info``."""
        return asdict(self)


def exchange(report: RankReport, world: int, store: Any = None, timeout: float = TIMEOUT) -> list[RankReport]:
    """The reports of all ranks, in their order.

    Args:
        report: this rank's own.
        world: number of ranks.
        store: a torch.distributed store that all ranks share; the default process group's if not given.
        timeout: seconds that the other ranks may take.

    Raises:
        ServingError: names the ranks that reported nothing.
    """
    if world == 1:
        return [report]
    store = store if store is not None else torch.distributed.distributed_c10d._get_default_store()
    store.set(f"{_KEY}/{report.rank}", json.dumps(report.to_json()))
    try:
        store.wait([f"{_KEY}/{rank}" for rank in range(world)], timedelta(seconds=timeout))
    except RuntimeError as error:
        silent = [rank for rank in range(world) if not store.check([f"{_KEY}/{rank}"])]
        raise ServingError(
            f"rank {', '.join(map(str, silent))} of {world} did not report what it serves within {timeout:g} s: install"
            " kvtuner-search in every node's environment, and start every node with the same profile"
        ) from error
    return [_parse(store.get(f"{_KEY}/{rank}")) for rank in range(world)]


def _parse(data: bytes) -> RankReport:
    fields = json.loads(data)
    return RankReport(**{**fields, "layers": tuple(fields["layers"]), "heads": tuple(fields["heads"])})


def check(reports: Sequence[RankReport], layers: int, kv_heads: int) -> None:
    """Compare what all ranks serve.

    Args:
        reports: one a rank.
        layers: layers of the model.
        kv_heads: KV heads of the model.

    Raises:
        ServingError: says which ranks differ in what.
    """
    first = reports[0]
    for field, remedy in (
        ("profile_digest", "put the same profile on every node"),
        ("layout_version", "install the same kvtuner-search on every node"),
        ("tool", "install the same kvtuner-search on every node"),
        ("sglang", "install the same SGLang on every node"),
        ("as_stored", "start every node with the same options"),
        ("tokens", "start every node with the same options"),
        ("window_tokens", "start every node with the same options"),
    ):
        for report in reports:
            mine, theirs = getattr(first, field), getattr(report, field)
            if mine != theirs:
                raise ServingError(
                    f"rank {first.rank} has {field}={_short(mine)}, rank {report.rank} has {_short(theirs)}: {remedy}"
                )
    bytes_by_part: dict[tuple[tuple[int, int], int], RankReport] = {}
    for report in reports:
        heads = report.heads[1] - report.heads[0]
        other = bytes_by_part.setdefault((report.layers, heads), report)
        if (other.bytes_per_token, other.pool_bytes) != (report.bytes_per_token, report.pool_bytes):
            raise ServingError(
                f"ranks {other.rank} and {report.rank} hold layers {report.layers[0]} to {report.layers[1] - 1} in"
                f" {other.pool_bytes} and {report.pool_bytes} bytes: their pools differ; start every node with the same options"
            )
    _check_cover(reports, layers, kv_heads)


def _check_cover(reports: Sequence[RankReport], layers: int, kv_heads: int) -> None:
    """Every head of every layer must be stored, each layer by only one pipeline stage."""
    stored: dict[int, set[int]] = {}
    owner: dict[int, tuple[int, int]] = {}
    for report in reports:
        for layer in range(*report.layers):
            if owner.setdefault(layer, report.layers) != report.layers:
                raise ServingError(
                    f"rank {report.rank} holds layers {report.layers[0]} to {report.layers[1] - 1}, another stage holds layer"
                    f" {layer} too: give every node the same SGLANG_PP_LAYER_PARTITION"
                )
            stored.setdefault(layer, set()).update(range(*report.heads))
    missing = [layer for layer in range(layers) if stored.get(layer) != set(range(kv_heads))]
    if missing or len(stored) != layers:
        raise ServingError(
            f"layer {missing[0] if missing else max(stored)} is not stored completely by the {len(reports)} ranks: give every node the"
            " same --tp-size, --pp-size and SGLANG_PP_LAYER_PARTITION"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:23] + "…"
