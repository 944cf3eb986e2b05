"""A tiny tokenizer, and data files for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kvtuner_search.data import Dataset, load_dataset_for

QUESTIONS: list[object] = [{"q": f"what is {word}", "a": f"it is {word}"} for word in "abcdefghijkl"]


class Words:
    """A tiny tokenizer: a token is a run of letters with the space before it, or one other character."""

    bos_token_id: int | None = None

    def __init__(self) -> None:
        self.texts: list[str] = []  # by token id
        self.calls: list[int] = []  # characters of each call

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert verbose is False
        self.calls.append(len(text))
        bos = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": bos + [self.id(piece) for piece in re.findall(r" ?[a-z]+|(?s:.)", text)]}

    def id(self, piece: str) -> int:
        if piece not in self.texts:
            self.texts.append(piece)
        return self.texts.index(piece)

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(self.texts[i] for i in ids)


def load(*sources: str, tokenizer: Any = None, **options: int) -> Dataset:
    numbers = {"seed": 0, "search": 3, "selection": 2, "test": 2, "length": 512} | options
    return load_dataset_for(sources, tokenizer or Words(), **numbers)


def write(folder: Path, rows: list[object], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
