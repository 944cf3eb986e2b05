"""SGLang's HTTP interface as :class:`kvtuner_search.servers.interface.Interface` describes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtuner_search.serving.sglang.bench_serving import own_client
from kvtuner_search.serving.sglang.client import GENERATE as STREAM
from kvtuner_search.serving.sglang.client import Client as client
from kvtuner_search.serving.sglang.client import read_answer
from kvtuner_search.serving.sglang.info import resolve_dtype
from kvtuner_search.serving.sglang.metrics import GENERATED, METRICS, TOKEN_USAGE
from kvtuner_search.serving.sglang.stream import EventReader as stream_reader
from kvtuner_search.serving.sglang.stream import stream_body

if TYPE_CHECKING:
    from kvtuner_search.servers.interface import Interface
    from kvtuner_search.serving.sglang import interface

    _: Interface = interface  # this module is one

__all__ = [
    "GENERATED", "METRICS", "STREAM", "TOKEN_USAGE", "client", "own_client", "read_answer", "resolve_dtype", "stream_body", "stream_reader",
]  # fmt: skip
