"""What a source's name means: a generated task, rows with answers, or running text.

==============================  ==========================================================================
``recall`` ``arithmetic``       generated tasks; ``recall#pairs=40#questions=2`` sets the number of codes (20) and of questions
``list``                        (4 in calibration, 1 in evaluation)
``chat``                        conversations in the model's chat template, with codes to remember and sums
``text``                        the prose of Python's own language reference
``gsm8k`` ``wikitext``          hub datasets, with the prompts below
``hub:NAME[:CONFIG][:SPLIT]``   any hub dataset or local folder that ``datasets`` reads; SPLIT is train if not given
``PATH.txt`` ``PATH.md``        plain text
``PATH.jsonl`` ``PATH.parquet`` rows: one JSON object a line, or parquet
==============================  ==========================================================================

Suffixes may be in capitals. Rows take options after ``#``: ``#field=NAME`` uses one field (the default is ``text``, or else the chat in
``messages`` or ``conversations``, whose turns are joined by blank lines);
``#template=TEXT`` fills ``{field}`` places and must come last, with ``\\n`` and ``\\t`` for newline and tab; ``#answer=NAME``
before it scores only that field's tokens, a row a sample; ``#exact=NAME`` does the same and says that the answers are short
enough for exact match to mean something. Without an answer the rows are joined by blank lines and cut like plain text.
"""

from __future__ import annotations

import io
import itertools
import os
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from kvtuner_search.data.rows import CHATS, READERS, Row, Skipped, check_characters, locate, read_text, text_of
from kvtuner_search.data.tasks import DEFAULT_PAIRS, TASKS, Conversation, Document, chat, recall
from kvtuner_search.data.topics import python_reference
from kvtuner_search.errors import DataError, UsageError

DEFAULT_SOURCES: Final = ("recall", "arithmetic", "list", "text")
HUB: Final = {
    "gsm8k": r"hub:openai/gsm8k:main:train#answer=answer#template=Question: {question}\nAnswer: {answer}",
    "wikitext": "hub:Salesforce/wikitext:wikitext-2-raw-v1:train#field=text",
}
PLAIN: Final = (".txt", ".md")  # suffixes of plain text
_ROW_OPTIONS: Final = frozenset({"field", "answer", "exact", "template"})


@dataclass(frozen=True)
class Task:
    """A task that is generated without end."""

    name: str
    make: Callable[[Random], Document | Conversation]


@dataclass(frozen=True)
class Rows:
    """Documents with answers; each is one sample."""

    name: str
    read: Callable[[], Iterator[Document]]
    skipped: Skipped = field(default_factory=Skipped)  # of what was read so far
    path: Path | None = None  # if it is a file or a local folder


@dataclass(frozen=True)
class Text:
    """Running text, to be cut into windows."""

    name: str
    read: Callable[[], Iterator[str]]  # pieces to be concatenated, each ending where a token may end
    skipped: Skipped = field(default_factory=Skipped)  # rows, of what was read so far
    path: Path | None = None  # if it is a file or a local folder


Source = Task | Rows | Text


@dataclass(frozen=True)
class Template:
    """How a row becomes a document."""

    parts: tuple[tuple[str, str | None], ...]  # a literal, and the field that follows it
    answer: str | None  # the field that is scored
    exact: bool
    default: bool = False  # no field was named

    def fields(self) -> set[str]:
        """The fields that the template uses, or may use."""
        named = {field for _, field in self.parts if field is not None}
        return named | set(CHATS) if self.default else named

    def document(self, row: Row | None, where: str) -> Document | None:
        """Fill the template in; ``where`` names the row in errors. None if the row, or a field that is used, is null.

        Raises:
            DataError: if a field is missing, or holds neither text, a number nor a chat.
        """
        if row is None:
            return None
        text, answers = "", []
        for literal, name in self.parts:
            text += literal
            if name is None:
                continue
            if self.default and name not in row:
                name = next((chat for chat in CHATS if chat in row), name)
            value = text_of(row, name, where)
            if value is None:
                return None
            if name == self.answer and value.strip():
                answers.append((len(text), len(text) + len(value)))
            text += value
        return Document(text, tuple(answers), self.exact)


def parse_source(spec: str, questions: int = 1) -> Source:
    """The source named by a name, path or ``hub:`` address. Nothing is read yet.

    ``questions`` is the number of questions of a recall document that does not set its own.

    Raises:
        UsageError: if the options after ``#`` cannot be used.
        DataError: if there is no such source.
    """
    location, options = _split(spec)
    if location in TASKS:
        _allow(spec, options, {"pairs", "questions"} if location == "recall" else set())
        make = TASKS[location]
        if location == "recall":
            for name, value in options.items():
                if not value.isdecimal():
                    raise UsageError(f"source {spec!r}: {name}={value!r} is not a number: write e.g. recall#{name}=2")
            numbers = {
                "pairs": DEFAULT_PAIRS,
                "questions": questions,
                **{name: int(value) for name, value in options.items()},
            }
            make = partial(recall, pairs=numbers["pairs"], questions=numbers["questions"])
        return Task(spec, make)
    if location == "chat":
        _allow(spec, options, set())
        return Task("chat", chat)
    if location == "text":
        _allow(spec, options, set())
        return Text("text", lambda: iter([python_reference()]))
    if location in HUB:
        _allow(spec, options, set())
        return _rows(location, *_split(HUB[location]))
    path = Path(location)
    suffix = path.suffix.lower()
    if suffix in PLAIN:
        _allow(spec, options, set())
        return Text(_shown(path.name), lambda: io.StringIO(read_text(path)), path=path)
    if suffix in READERS or location.startswith("hub:"):
        _allow(spec, options, _ROW_OPTIONS)
        folder = Path(location.removeprefix("hub:").partition(":")[0])
        here = path if not location.startswith("hub:") else folder if folder.is_dir() else None
        return _rows(_row_name(location), location, options, here)
    known = ", ".join((*TASKS, "text", *HUB))
    *ends, last = (*PLAIN, *READERS)
    raise DataError(
        f"unknown source {spec!r}: use one of {known}, hub:NAME, or a file that ends in {', '.join(ends)} or {last}"
    )


def distinct(sources: Sequence[Source]) -> list[Source]:
    """The sources; files and folders with the same name are renamed to as much of their paths as distinguishes them.

    Raises:
        UsageError: if two sources are the same, or still have the same name.
    """
    found = list(sources)
    names = [source.name for source in found]
    for name in {name for name in names if names.count(name) > 1}:
        alike = [index for index, other in enumerate(names) if other == name]
        paths = [source.path for index in alike if isinstance(source := found[index], Rows | Text)]
        files = [path for path in paths if path is not None]
        if len({path.resolve() for path in files}) < len(alike):
            raise UsageError(f"two sources are named {name!r}: results are kept by name, so drop or rename one of them")
        parts = [(path.parent.resolve() / path.name).parts for path in files]
        length = next(n for n in itertools.count(2) if len({part[-n:] for part in parts}) == len(parts))
        for index, part in zip(alike, parts, strict=True):
            rest = name.removeprefix(_shown(part[-1]))  # configuration and split of a folder
            found[index] = replace(found[index], name=_shown(str(Path(*part[-length:]))) + rest)
    return found


def _split(spec: str) -> tuple[str, dict[str, str]]:
    """The location and its options; a template runs to the end, so it may contain ``#``."""
    head, has_template, template = spec.partition("#template=")
    location, *pairs = head.split("#")
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not value or key in options:
            raise UsageError(
                f"source {spec!r}: option {pair!r} is not NAME=VALUE, or is given twice: write e.g. #field=text"
            )
        options[key] = value
    if has_template:
        options["template"] = template.replace("\\n", "\n").replace("\\t", "\t")
    return location, options


def _allow(spec: str, options: dict[str, str], allowed: set[str] | frozenset[str]) -> None:
    for option in options:
        if option not in allowed:
            remedy = f"use {', '.join(sorted(allowed))}" if allowed else "it takes none"
            raise UsageError(f"source {spec!r} has no option {option!r}: {remedy}")


def _row_name(location: str) -> str:
    """The name that results are kept under: the hub's name, or the last part of a file's or local folder's path."""
    if not location.startswith("hub:"):
        return _shown(Path(location).name)
    name, colon, rest = location.removeprefix("hub:").partition(":")
    return (_shown(Path(name).name) if Path(name).is_dir() else name) + colon + rest


def _shown(path: str) -> str:
    """A path as records hold it: UTF-8, even if the file's name is not."""
    return os.fsencode(path).decode(errors="replace")


def _rows(name: str, location: str, options: dict[str, str], path: Path | None = None) -> Source:
    template, skipped = _template(location, options), Skipped()

    def documents() -> Iterator[Document]:
        skipped.rows, skipped.first = 0, ""
        for where, row in locate(location, template.fields()):
            document = template.document(row, where)
            if document is None:
                skipped.add(where)
            else:
                yield document

    def texts() -> Iterator[str]:
        stripped = (document.text.strip() for document in documents())
        return (text + "\n\n" for text in stripped if text)

    if template.answer is None:
        return Text(name, texts, skipped, path)
    return Rows(name, documents, skipped, path)


def _template(location: str, options: dict[str, str]) -> Template:
    if "template" in options and "field" in options:
        raise UsageError(f"source {location!r}: field and template exclude each other: keep one")
    if "answer" in options and "exact" in options:
        raise UsageError(f"source {location!r}: answer and exact exclude each other: keep one")
    answer = options.get("answer") or options.get("exact")
    if "template" not in options:
        if answer is not None:
            raise UsageError(f"source {location!r}: {answer!r} is scored but there is no prompt: add #template=...")
        return Template((("", options.get("field", "text")),), None, exact=False, default="field" not in options)
    check_characters(options["template"], f"source {location!r}: the template")
    parts = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(options["template"]):
            if field == "" or spec or conversion:
                raise ValueError("a place must be a field's name and nothing else")
            parts.append((literal, field))
    except ValueError as error:
        raise UsageError(
            f"source {location!r}: template {options['template']!r} cannot be used ({error}):"
            " write fields as {name}, and braces as {{ and }}"
        ) from error
    fields = {field for _, field in parts}
    if fields <= {None} or (answer is not None and answer not in fields):
        raise UsageError(
            f"source {location!r}: template {options['template']!r} has no place for {answer or 'any field'!r}"
        )
    return Template(tuple(parts), answer, exact="exact" in options)
