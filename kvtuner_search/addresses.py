"""A server's address and API key, checked before anything is sent."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from kvtuner_search.errors import UsageError
from kvtuner_search.secrets import MASK, remember

KEY_OPTION: Final = "--api-key, or KVTUNER_API_KEY"


def check_url(url: str, key: str | None = None) -> str:
    """A server's address without the slashes at its end.

    Raises:
        UsageError: if it is not such an address, or holds credentials beside an API key.
    """
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port, or of an IPv6 address
        fits = False
    if not fits or parts.query or parts.fragment or not url.isprintable() or " " in url:
        shown = re.sub(
            "[?#].*", lambda found: f"{found[0][0]}{MASK}", url, flags=re.DOTALL
        )  # a key, more often than not
        raise UsageError(f"{shown!r} is not a URL of a server: write http://host:port")
    if key is not None and "@" in parts.netloc:
        raise UsageError(
            f"{url} has credentials and there is an API key, which share one header: leave one of them out"
        )
    return url.rstrip("/")


def check_key(key: str | None) -> str | None:
    """An API key that can be sent; from here on it is masked wherever text leaves this program.

    Raises:
        UsageError: if no HTTP header can carry it. The message does not repeat it.
    """
    if key is None:
        return None
    remember(key)
    bad = next((index for index, one in enumerate(key) if not "!" <= one <= "~"), None)
    if bad is not None or not key:
        where = "it is empty" if not key else f"character {bad} is a space, a line end or not ASCII"
        raise UsageError(f"the API key cannot be sent, because {where}: give another with {KEY_OPTION}")
    return key


def authorization(key: str | None) -> dict[str, str]:
    """The header that carries a key, as SGLang and OpenAI's API expect it."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
