"""GSM8K by generation: ``gsm8k:FOLDER`` with options after ``#``, from the train.jsonl and test.jsonl of openai/grade-school-math.

========================  ==================================================================================================
``#shots=N``              training questions with their answers before each question (8)
``#items=N``              test questions, the first ones (``--task-prompts``)
``#tokens=N``             most tokens of an answer (400)
``#chat``                 through the tokenizer's chat template: shots are turns of user and assistant
``#answer=marked|last``   the number after the first ``####`` (marked), or if there is none the last number of the answer; last is the default
                          of a chat without examples, which models end in their own way, otherwise marked
========================  ==================================================================================================
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from kvtuner_search.data.load import Encoder
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.files import refuse_unusual

PREFIX: Final = "gsm8k:"
MARKED: Final = re.compile(r"#### *\$?(-?[0-9][0-9,]*(?:\.[0-9]+)?)")
_NUMBER: Final = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
_NEXT: Final = "\nQuestion:"  # how a model that continues writes the next question
_ASK: Final = "\nThink step by step, then write #### and the number alone."  # for a chat model without examples
_USE: Final = "use #shots=N, #items=N, #tokens=N, #chat and #answer=marked or #answer=last"

Reading = Literal["marked", "last"]  # which number of an answer counts


@dataclass(frozen=True)
class Gsm8k:
    """The settings of a task."""

    folder: Path
    items: int
    shots: int = 8
    tokens: int = 400
    chat: bool = False
    reading: Reading = "marked"

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer; a chat model ends its turn itself."""
        return () if self.chat else (_NEXT,)

    def prompts(self, tokenizer: Any) -> list[tuple[tuple[int, ...], str]]:
        """Token ids of each prompt, and the right number.

        Raises:
            DataError: if the files cannot be read or are too short.
            UsageError: if there is no chat template.
        """
        shots, rows = (
            _rows(self.folder / f"{name}.jsonl", n) for name, n in (("train", self.shots), ("test", self.items))
        )
        encoder = Encoder(tokenizer, 2**31)
        found = []
        for row in rows:
            final = MARKED.search(row["answer"])
            if final is None:
                raise DataError(f"{self.folder}/test.jsonl: an answer ends without #### and a number: is it GSM8K?")
            text, start = (_chat(tokenizer, shots, row), []) if self.chat else (_plain(shots, row), encoder.start)
            found.append(((*start, *encoder.ids(text)), _number(final[1])))
        return found


def parse(spec: str, items: int) -> tuple[str, Gsm8k]:
    """A task's name without its folder, and its settings; ``items`` questions if the spec does not say.

    Raises:
        UsageError: for an unknown option or value.
    """
    location, *given = spec.removeprefix(PREFIX).split("#")
    values: dict[str, Any] = {}
    for option in given:
        name, equals, value = option.partition("=")
        if option == "chat":
            values["chat"] = True
        elif name in ("shots", "items", "tokens") and value.isdecimal():
            if name != "shots" and not int(value):
                raise UsageError(
                    f"task {spec!r}: {option} leaves no {'question' if name == 'items' else 'room for an answer'}: use 1 or more"
                )
            values[name] = int(value)
        elif name == "answer" and equals and value in ("marked", "last"):
            values["reading"] = value
        else:
            raise UsageError(f"task {spec!r}: option {option!r} is unknown: {_USE}")
    if values.get("chat") and values.get("shots") == 0:
        values.setdefault("reading", "last")  # without an example, chat models end in their own way
    return "#".join(("gsm8k", *given)), Gsm8k(Path(location), **{"items": items, **values})


def is_right(text: str, expected: str, reading: Reading) -> bool:
    """Whether the number that counts is the expected one. Commas and text after a further question are ignored."""
    text = text.split(_NEXT)[0]
    marked = MARKED.search(text)
    if marked is not None:
        return _number(marked[1]) == expected
    numbers = _NUMBER.findall(text) if reading == "last" else []
    return bool(numbers) and _number(numbers[-1]) == expected


def _number(text: str) -> str:
    """Without commas, and without a fraction of zeros."""
    whole, _, fraction = text.replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    return f"{whole}.{fraction}" if fraction else whole


def _plain(shots: list[dict[str, str]], row: dict[str, str]) -> str:
    before = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
    return f"{before}Question: {row['question']}\nAnswer:"


def _chat(tokenizer: Any, shots: list[dict[str, str]], row: dict[str, str]) -> str:
    turns = []
    for shot in shots:
        turns += [{"role": "user", "content": shot["question"]}, {"role": "assistant", "content": shot["answer"]}]
    turns.append({"role": "user", "content": row["question"] + ("" if shots else _ASK)})
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("this model's tokenizer has no chat template: leave #chat out")
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _rows(path: Path, count: int) -> list[dict[str, str]]:
    refuse_unusual(path)
    try:
        with path.open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in itertools.islice(stream, count)]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}): give a folder with GSM8K's train.jsonl and test.jsonl"
        ) from error
    if not all(isinstance(row, dict) and {"question", "answer"} <= row.keys() for row in rows) or len(rows) < count:
        raise DataError(f"{path}: has fewer than {count} rows with question and answer: use fewer")
    return rows
