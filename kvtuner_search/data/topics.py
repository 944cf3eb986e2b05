"""The built-in natural-language text: the prose of Python's own language reference, which every install carries.

It differs a little between Python versions; the digest of the split says which text was used.
"""

from __future__ import annotations

import re

from kvtuner_search.errors import DataError

_MIN_WORDS = 8  # shorter blocks are headings, signatures and table rows
_MIN_LETTERS = 0.75  # share of letters and spaces; code, grammar and tables have fewer


def python_reference() -> str:
    """The prose paragraphs of ``pydoc_data.topics``, unwrapped, one a line, topics in alphabetical order.

    Raises:
        DataError: if this Python came without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "source 'text': this Python has no pydoc_data (a stripped install): name a text file of your own instead"
        ) from error
    seen: dict[str, None] = {}  # some topics repeat another's paragraphs; a dict keeps the order
    for _, topic in sorted(topics.items()):
        seen.update((paragraph, None) for paragraph in map(_prose, re.split(r"\n\s*\n", topic)) if paragraph)
    return "\n".join(seen)


def _prose(block: str) -> str:
    """The block as one line, or nothing if it is not prose."""
    text = " ".join(re.sub(r"(\w-)\n\s*", r"\1", block).split())  # a line may break after the hyphen of a compound
    words = len(text.split(" "))
    letters = sum(character.isalpha() or character == " " for character in text)
    if words < _MIN_WORDS or letters < _MIN_LETTERS * len(text) or text[-1] not in ".:?!)":
        return ""
    if text.startswith(">>>") or "::=" in text:
        return ""
    return text
