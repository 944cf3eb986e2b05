"""What a source's name means: a generated task, rows with answers, or running text.

==============================  ==========================================================================
``recall`` ``arithmetic``       generated tasks; ``recall#pairs=40#questions=2`` sets the number of codes (20) and of questions
``list``                        (4 in calibration, 1 in evaluation)
``text``                        the prose of Python's own language reference
``gsm8k`` ``wikitext``          hub datasets, with the prompts below
``hub:NAME[:CONFIG][:SPLIT]``   any hub dataset or local folder that ``datasets`` reads; SPLIT is train if not given
``PATH.txt`` ``PATH.md``        plain text
``PATH.jsonl``                  one JSON object a line
==============================  ==========================================================================

Rows (of the hub and of jsonl files) take options after ``#``: ``#field=NAME`` uses one field (``text`` if not given);
``#template=TEXT`` fills ``{field}`` places and must come last, with ``\\n`` and ``\\t`` for newline and tab; ``#answer=NAME``
before it scores only that field's tokens, a row a sample; ``#exact=NAME`` does so too and says that the answers are short
enough for exact match to mean something. Without an answer the rows are joined by blank lines and cut like plain text.
"""

from __future__ import annotations

import io
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

from kvtuner_search.data.tasks import DEFAULT_PAIRS, TASKS, Document, recall
from kvtuner_search.data.topics import python_reference
from kvtuner_search.errors import DataError, UsageError

DEFAULT_SOURCES: Final = ("recall", "arithmetic", "list", "text")
HUB: Final = {
    "gsm8k": r"hub:openai/gsm8k:main:train#answer=answer#template=Question: {question}\nAnswer: {answer}",
    "wikitext": "hub:Salesforce/wikitext:wikitext-2-raw-v1:train#field=text",
}
_ROW_OPTIONS: Final = frozenset({"field", "answer", "exact", "template"})


@dataclass(frozen=True)
class Task:
    """A task that is generated without end."""

    name: str
    make: Callable[[Random], Document]


@dataclass(frozen=True)
class Rows:
    """Documents with answers; each is one sample."""

    name: str
    read: Callable[[], Iterator[Document]]


@dataclass(frozen=True)
class Text:
    """Running text, to be cut into windows."""

    name: str
    read: Callable[[], Iterator[str]]  # pieces to be concatenated, each ending where a token may end


Source = Task | Rows | Text
Row = Mapping[str, object]


@dataclass(frozen=True)
class Template:
    """How a row becomes a document."""

    parts: tuple[tuple[str, str | None], ...]  # a literal, and the field that follows it
    answer: str | None  # the field that is scored
    exact: bool

    def document(self, row: Row, where: str) -> Document:
        """Fill the template in; ``where`` names the row in errors.

        Raises:
            DataError: if a field is missing, or is neither text nor a number.
        """
        text, answers = "", []
        for literal, field in self.parts:
            text += literal
            if field is None:
                continue
            if field not in row:
                raise DataError(f"{where} has no field {field!r}, only {', '.join(map(repr, row))}: name one of these")
            value = row[field]
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise DataError(
                    f"{where}: field {field!r} is {type(value).__name__}, not text: name a field that holds text"
                )
            if field == self.answer and str(value).strip():
                answers.append((len(text), len(text) + len(str(value))))
            text += str(value)
        return Document(text, tuple(answers), self.exact)


def parse_source(spec: str, questions: int = 1) -> Source:
    """The source that a name, path or ``hub:`` address stands for. Nothing is read yet.

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
                    raise UsageError(f"source {spec!r}: {name}={value!r} is no number: write e.g. recall#{name}=2")
            numbers = {
                "pairs": DEFAULT_PAIRS,
                "questions": questions,
                **{name: int(value) for name, value in options.items()},
            }
            make = partial(recall, pairs=numbers["pairs"], questions=numbers["questions"])
        return Task(spec, make)
    if location == "text":
        _allow(spec, options, set())
        return Text("text", lambda: iter([python_reference()]))
    if location in HUB:
        _allow(spec, options, set())
        return _rows(location, *_split(HUB[location]))
    path = Path(location)
    if path.suffix in (".txt", ".md"):
        _allow(spec, options, set())
        return Text(path.name, lambda: io.StringIO(_read(path)))
    if path.suffix == ".jsonl" or location.startswith("hub:"):
        _allow(spec, options, _ROW_OPTIONS)
        return _rows(_row_name(location), location, options)
    known = ", ".join((*TASKS, "text", *HUB))
    raise DataError(
        f"unknown source {spec!r}: use one of {known}, hub:NAME, or a file that ends in .txt, .md or .jsonl"
    )


def hub_rows(name: str, config: str | None, split: str) -> Iterable[Row]:
    """The rows of a dataset of the Hugging Face hub (or of a local folder), downloaded once and cached by ``datasets``.

    Raises:
        DataError: if it cannot be reached, or has no such configuration or split.
    """
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"hub dataset {name!r} (configuration {config or 'default'}, split {split}) cannot be loaded: {reason}:"
            " check the names and the network, or give a local .jsonl file"
        ) from error
    return rows


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
    """What results are kept under: the hub's name, or a file's or local folder's last part."""
    if not location.startswith("hub:"):
        return Path(location).name
    name, colon, rest = location.removeprefix("hub:").partition(":")
    return (Path(name).name if Path(name).is_dir() else name) + colon + rest


def _rows(name: str, location: str, options: dict[str, str]) -> Source:
    template = _template(location, options)

    def documents() -> Iterator[Document]:
        for number, row in _locate(location):
            yield template.document(row, f"{name}: row {number}")

    def texts() -> Iterator[str]:
        stripped = (document.text.strip() for document in documents())
        return (text + "\n\n" for text in stripped if text)

    return Text(name, texts) if template.answer is None else Rows(name, documents)


def _template(location: str, options: dict[str, str]) -> Template:
    if "template" in options and "field" in options:
        raise UsageError(f"source {location!r}: field and template exclude each other: keep one")
    if "answer" in options and "exact" in options:
        raise UsageError(f"source {location!r}: answer and exact exclude each other: keep one")
    answer = options.get("answer") or options.get("exact")
    if "template" not in options:
        if answer is not None:
            raise UsageError(f"source {location!r}: {answer!r} is scored but there is no prompt: add #template=...")
        return Template((("", options.get("field", "text")),), None, exact=False)
    parts = []
    try:
        for literal, field, spec, conversion in string.Formatter().parse(options["template"]):
            if field == "" or spec or conversion:
                raise ValueError("a place is more or less than a field's name")
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


def _locate(location: str) -> Iterator[tuple[int, Row]]:
    """The rows of a jsonl file or hub dataset, numbered from 1 (a file's rows by line)."""
    if not location.startswith("hub:"):
        return _jsonl(Path(location))
    name, *rest = location.removeprefix("hub:").split(":")
    if not name or len(rest) > 2:
        raise UsageError(f"source {location!r} is not hub:NAME[:CONFIG][:SPLIT]")
    config = rest[0] or None if rest else None
    return iter(enumerate(hub_rows(name, config, rest[1] if len(rest) == 2 else "train"), start=1))


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    # StringIO splits at newlines only; str.splitlines would also cut inside JSON strings (U+2028).
    for number, line in enumerate(io.StringIO(_read(path)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is no JSON ({error.msg}): write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is {type(row).__name__}, not an object: write one object a line")
        yield number, row


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}): convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}): check the path") from error
    if not text.strip():
        raise DataError(f"{path}: is empty: give a file with text")
    return text
