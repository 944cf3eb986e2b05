"""What both servers are asked: held-out sequences to score, task prompts to answer, and prompts to continue."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvtuner_search.data import Sample, Split, load_evaluation
from kvtuner_search.data.load import Encoder
from kvtuner_search.data.sources import Rows, Task, parse_source
from kvtuner_search.data.tasks import Document, stream
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.profile.fields import DataInfo
from kvtuner_search.profile.schema import Profile

GSM8K: Final = "gsm8k:"
_GSM8K_OPTIONS: Final = {"shots": 8, "tokens": 400}
_GSM8K_FINAL: Final = re.compile(r"#### (-?[0-9][0-9,]*(?:\.[0-9]+)?)")
_GSM8K_END: Final = "\nQuestion:"  # where a model that goes on writes the next question
_SPARE: Final = 4  # tokens beyond the expected answer, in which it may still be completed


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt, the answer that is right, and how much may be generated."""

    task: str
    tokens: tuple[int, ...]
    expected: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """Everything that is asked. The same arguments give the same prompts."""

    split: Split  # sequences for likelihood
    tasks: tuple[TaskPrompt, ...]
    greedy: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        """sha256 over all prompts: a resumed run must ask the same."""
        state = hashlib.sha256(self.split.digest.encode())
        for prompt in self.tasks:
            state.update(
                repr((prompt.task, prompt.tokens, prompt.expected, prompt.max_new_tokens, prompt.stop)).encode()
            )
        state.update(repr(self.greedy).encode())
        return f"sha256:{state.hexdigest()}"

    def data(self) -> list[DataInfo]:
        """What stands in the block: each source, and each task (its name as given)."""
        found = [
            DataInfo(name=name, split="test", samples=len(part.samples), tokens=part.tokens, digest=part.digest)
            for name, part in self.split.by_source().items()
        ]
        for name, group in itertools.groupby(self.tasks, key=lambda prompt: prompt.task):
            prompts = list(group)
            text = "\n".join(repr((prompt.tokens, prompt.expected)) for prompt in prompts)
            found.append(
                DataInfo(
                    name=f"task {name}",
                    split="test",
                    samples=len(prompts),
                    tokens=sum(len(prompt.tokens) for prompt in prompts),
                    digest=f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
                )
            )
        return found


def build(
    tokenizer: Any,
    *,
    sources: Sequence[str],
    samples: int,
    length: int,
    tasks: Sequence[str],
    task_prompts: int,
    greedy_prompts: int,
    seed: int,
) -> Prompts:
    """Load, generate and tokenize everything.

    Raises:
        UsageError, DataError: as :func:`kvtuner_search.data.load_evaluation`, and for a task that cannot be answered by generation.
    """
    split = load_evaluation(sources, tokenizer, seed=seed, samples=samples, length=length)
    if len(set(tasks)) != len(tasks):
        raise UsageError("a task is named twice: results are kept by name, so drop one")
    answers = [prompt for task in tasks for prompt in _task(task, tokenizer, task_prompts, seed)]
    return Prompts(split, tuple(answers), tuple(_beginnings(split, greedy_prompts)))


def right(prompt: TaskPrompt, text: str) -> bool:
    """Whether a generated text is the expected answer.

    GSM8K: the number after the first ``####`` (commas do not count), before a next question. Elsewhere: the text starts with the
    answer, and neither a letter nor a digit follows.
    """
    if prompt.task.startswith(GSM8K):
        found = _GSM8K_FINAL.search(text.split(_GSM8K_END)[0])
        return found is not None and found[1].replace(",", "") == prompt.expected
    text, expected = text.strip(), prompt.expected.strip()
    return text.startswith(expected) and not text[len(expected) : len(expected) + 1].isalnum()


def notes_on_data(profile: Profile, split: Split) -> list[str]:
    """Sources of running text that the profile was also calibrated on: their windows may not be held out."""
    searched = {data.name for data in profile.provenance.data if data.split != "test"}
    texts = {sample.source for sample in split.samples if not sample.is_task}
    return [
        f"the profile was calibrated on {name} too, so its windows are not surely held out"
        for name in sorted(searched & texts)
    ]


def _beginnings(split: Split, count: int) -> list[tuple[int, ...]]:
    """Prompts to continue, one of each source in turn: a document up to its first answer, running text up to its middle."""

    def cut(sample: Sample) -> tuple[int, ...]:
        first = sample.scored[0][0]
        return sample.tokens[: first if first > 1 else max(1, len(sample.tokens) // 2)]

    sources = [[cut(sample) for sample in part.samples] for part in split.by_source().values()]
    turns = (prompt for turn in itertools.zip_longest(*sources) for prompt in turn if prompt is not None)
    return list(itertools.islice(turns, count))


def _task(spec: str, tokenizer: Any, count: int, seed: int) -> list[TaskPrompt]:
    if spec.startswith(GSM8K):
        return _gsm8k(spec, tokenizer, count)
    source = parse_source(spec)
    documents: list[Document]
    if isinstance(source, Task):
        rng = stream(source.name, "evaluation", seed)
        documents = [source.make(rng) for _ in range(count)]
    elif isinstance(source, Rows):
        documents = [row for row in itertools.islice(source.read(), count) if row.answers and row.exact]
    else:
        documents = []
    if not documents:
        raise UsageError(
            f"task {spec!r} has no short answer: name recall, arithmetic, list, {GSM8K}FOLDER or rows#exact=FIELD"
        )
    encoder = Encoder(tokenizer, 2**31)
    found = []
    for document in documents:
        start, end = document.answers[-1]
        prompt, answer = document.text[:start].rstrip(" "), document.text[start:end]
        tokens = (*encoder.start, *encoder.ids(prompt))
        found.append(TaskPrompt(spec, tokens, answer, len(encoder.ids(f" {answer}")) + _SPARE))
    return found


def _gsm8k(spec: str, tokenizer: Any, count: int) -> list[TaskPrompt]:
    """The first ``count`` test questions, each after the first ``shots`` questions of the training set with their answers."""
    location, *given = spec.removeprefix(GSM8K).split("#")
    options = dict(_GSM8K_OPTIONS)
    for option in given:
        name, _, value = option.partition("=")
        if name not in options or not value.isdecimal():
            raise UsageError(f"task {spec!r}: option {option!r} is unknown: use #shots=N and #tokens=N")
        options[name] = int(value)
    if options["tokens"] < 1:
        raise UsageError(f"task {spec!r}: tokens=0 leaves no room for an answer: use 1 or more")
    write: Callable[[dict[str, str]], str] = lambda row: f"Question: {row['question']}\nAnswer:"  # noqa: E731
    shots = _rows(Path(location) / "train.jsonl", options["shots"])
    before = "".join(f"{write(row)} {row['answer']}\n\n" for row in shots)
    encoder = Encoder(tokenizer, 2**31)
    found = []
    for row in _rows(Path(location) / "test.jsonl", count):
        final = _GSM8K_FINAL.search(row["answer"])
        if final is None:
            raise DataError(f"{location}/test.jsonl: an answer ends without #### and a number: is it GSM8K?")
        tokens = (*encoder.start, *encoder.ids(before + write(row)))
        found.append(TaskPrompt(spec, tokens, final[1].replace(",", ""), options["tokens"], (_GSM8K_END,)))
    return found


def _rows(path: Path, count: int) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in itertools.islice(stream, count)]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}): give a folder with GSM8K's train.jsonl and test.jsonl"
        ) from error
    if not all(isinstance(row, dict) and {"question", "answer"} <= row.keys() for row in rows) or len(rows) < count:
        raise DataError(f"{path}: has not {count} rows with question and answer: ask for fewer")
    return rows
