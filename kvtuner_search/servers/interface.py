"""How a server of an engine is asked: the one door to an engine's HTTP interface, as ``serving.engine`` is to its start.

No endpoint, field, metric or program of an engine is named outside the engine's folder (``tests/test_house.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from kvtuner_search.serving.engine import chosen

if TYPE_CHECKING:  # whoever only wants the name of a metric loads no HTTP library
    from kvtuner_search.servers.client import Answer, Client, Request
    from kvtuner_search.servers.stream import StreamReader


class Interface(Protocol):
    """What the module ``kvtuner_search.serving.<engine>.interface`` offers."""

    @property
    def STREAM(self) -> str:
        """Path that takes the body of :meth:`stream_body` and answers with an event stream, e.g. /v1/stream."""

    @property
    def METRICS(self) -> Sequence[str]:
        """Names of the metrics that a record keeps; the next two are among them."""

    @property
    def GENERATED(self) -> str:
        """Metric that counts the tokens generated since the server started."""

    @property
    def TOKEN_USAGE(self) -> str:
        """Metric that says what fraction of the cache's slots is in use."""

    def client(self, url: str, timeout: float, key: str | None = None, vocabulary: int | None = None) -> Client:
        """A client of one server.

        Args:
            url: ``http://host:port``.
            timeout: seconds for a whole answer. Answers are not streamed, so it bounds a request.
            key: sent as bearer token.
            vocabulary: ids of the model's embedding; None: not known.

        Raises:
            ServerError: if it is not a URL.
        """

    def read_answer(self, request: Request, content: Any, vocabulary: int | None = None) -> Answer:
        """Check the JSON of an answer, fresh or kept. This is the only check: later code trusts what passes.

        Raises:
            ServerError: says what is missing, impossible, or does not fit the request.
        """

    def resolve_dtype(self, stated: str, config_dtype: str) -> str:
        """The dtype that a server computes in, e.g. bfloat16, from the one that it was given and that of config.json."""

    def stream_body(self, identifier: str, prompt: Sequence[int], asked: int) -> dict[str, Any]:
        """A request of exactly ``asked`` tokens, greedy and streamed, whose events name ``identifier``."""

    def stream_reader(self) -> StreamReader:
        """A reader for the events of one answer."""

    def own_client(
        self,
        python: str,
        url: str,
        tokenizer: str,
        prompts: Sequence[Sequence[int]],
        *,
        output_tokens: int,
        concurrency: int,
        timeout: float,
        key: str | None = None,
    ) -> dict[str, float]:
        """Send requests through the load generator that the engine brings along.

        Args:
            python: interpreter of an environment that has the engine.
            url: of the server.
            tokenizer: folder or hub id.
            prompts: token ids, one list a request.
            output_tokens: of each answer.
            concurrency: most requests in flight.
            timeout: seconds for the whole run.
            key: sent as bearer token.

        Returns:
            its figures by our names (``bench.cross_check.FIGURES``); those that it does not have are left out.

        Raises:
            UsageError: if there is no such client, or it cannot be run.
            DataError: if it failed, or did not get all answers.
        """


def interface(name: str | None = None) -> Interface:
    """The interface of an engine, by the name of its folder; None: of the engine that is used.

    Raises:
        UsageError: if there is no such engine.

    Example:
        >>> interface().TOKEN_USAGE in interface().METRICS
        True
    """
    return _interface(chosen(name))


@cache
def _interface(name: str) -> Interface:
    return cast(Interface, import_module(f"kvtuner_search.serving.{name}.interface"))
