"""The requests for both servers: held-out sequences to score, task prompts to answer, and prompts to continue."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvtuner_search.data import Sample, Split, load_evaluation
from kvtuner_search.data.load import Encoder
from kvtuner_search.data.sources import Rows, Task, parse_source
from kvtuner_search.data.tasks import TASKS, Document, stream
from kvtuner_search.errors import UsageError
from kvtuner_search.profile.fields import DataInfo
from kvtuner_search.profile.schema import Profile
from kvtuner_search.validate import gsm8k

_SPARE: Final = 4  # tokens beyond the expected answer, in case it ends later


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt, the right answer, and the most tokens to generate."""

    task: str  # its name in results, without a folder
    tokens: tuple[int, ...]
    expected: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    reading: gsm8k.Reading | None = (
        None  # which number of an answer to GSM8K counts; None: the answer is the text's first word
    )


@dataclass(frozen=True)
class Prompts:
    """All prompts. The same arguments give the same prompts."""

    split: Split  # sequences for likelihood
    tasks: tuple[TaskPrompt, ...]
    greedy: tuple[tuple[int, ...], ...]

    @property
    def digest(self) -> str:
        """sha256 over all prompts: a resumed run must have the same."""
        state = hashlib.sha256(self.split.digest.encode())
        for prompt in self.tasks:
            state.update(repr(prompt).encode())
        state.update(repr(self.greedy).encode())
        return f"sha256:{state.hexdigest()}"

    def data(self) -> list[DataInfo]:
        """The data listed in the block: each source, and each task (its name as given)."""
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
    parts = [_task(task, tokenizer, task_prompts, seed) for task in tasks]
    names = [part[0].task for part in parts]
    if len(set(names)) != len(names):
        raise UsageError("a task is named twice: results are kept by name, so remove one")
    answers = [prompt for part in parts for prompt in part]
    return Prompts(split, tuple(answers), tuple(_beginnings(split, greedy_prompts)))


def right(prompt: TaskPrompt, text: str) -> bool:
    """Whether a generated text is the expected answer.

    GSM8K: the number that counts is the expected one. Elsewhere: the text starts with the answer, and neither a letter nor a digit
    follows.
    """
    if prompt.reading is not None:
        return gsm8k.is_right(text, prompt.expected, prompt.reading)
    text, expected = text.strip(), prompt.expected.strip()
    return text.startswith(expected) and not text[len(expected) : len(expected) + 1].isalnum()


def cut_short(server: str, prompts: Sequence[TaskPrompt], answers: Sequence[Sequence[int]]) -> list[str]:
    """Notes on a server's answers that reached the limit on tokens; with a larger ``#tokens`` more of them may be right."""
    found = []
    rows = zip(prompts, answers, strict=True)
    for (name, most), group in itertools.groupby(rows, key=lambda row: (row[0].task, row[0].max_new_tokens)):
        part = [len(answer) == most for prompt, answer in group if prompt.reading is not None]
        if any(part):
            found.append(
                f"{sum(part)} of {len(part)} answers of the {server} server to {name} were cut off at {most} tokens"
            )
    return found


def notes_on_data(profile: Profile, split: Split) -> list[str]:
    """Sources of running text that the profile was also calibrated on: their windows may not be held out."""
    searched = {data.name for data in profile.provenance.data if data.split != "test"}
    texts = {sample.source for sample in split.samples if not sample.is_task}
    return [
        f"the profile was calibrated on {name} too, so its windows may not be held out"
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
    if spec.startswith(gsm8k.PREFIX):
        name, task = gsm8k.parse(spec, count)
        return [
            TaskPrompt(name, tokens, expected, task.tokens, task.stop, task.reading)
            for tokens, expected in task.prompts(tokenizer)
        ]
    source = parse_source(spec)
    documents: list[Document]
    if isinstance(source, Task):
        rng = stream(source.name, "evaluation", seed)
        made = (source.make(rng) for _ in range(count))
        documents = [each for each in made if isinstance(each, Document)]
    elif isinstance(source, Rows):
        documents = [row for row in itertools.islice(source.read(), count) if row.answers and row.exact]
    else:
        documents = []
    if not documents:
        raise UsageError(
            f"task {spec!r} has no short answer: name {', '.join(TASKS)}, {gsm8k.PREFIX}FOLDER or rows#exact=FIELD"
        )
    encoder = Encoder(tokenizer, 2**31)
    found = []
    for document in documents:
        start, end = document.answers[-1]
        prompt, answer = document.text[:start].rstrip(" "), document.text[start:end]
        tokens = (*encoder.start, *encoder.ids(prompt))
        found.append(TaskPrompt(source.name, tokens, answer, len(encoder.ids(f" {answer}")) + _SPARE))
    return found
