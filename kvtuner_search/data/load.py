"""From sources to token ids in three disjoint splits.

Each split of a generated task has its own random generator. Rows and windows of text are shuffled by the seed and
dealt out, each at most once: to the test split first, so that more search data leaves the test split as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Final

from kvtuner_search.data.sources import DEFAULT_SOURCES, Rows, Source, Task, Text, distinct, parse_source
from kvtuner_search.data.tasks import SEARCH_QUESTIONS, Conversation, Document, chat, stream
from kvtuner_search.data.types import SPLITS, Dataset, Sample, Split, SplitName
from kvtuner_search.errors import DataError, UsageError, first_line

# transformers' call: tokenizer(text, add_special_tokens=..., verbose=...)["input_ids"] -> list of ids
Tokenizer = Callable[..., Any]

_BLOCK_CHARACTERS: Final = 1 << 20  # long texts are tokenized in blocks, so that reading can stop early
_SPARE: Final = 0.8  # of the length that one conversation may take, as others are longer
_POOL: Final = 4  # windows are drawn from the first 4 times as many tokens as are needed


def load_dataset_for(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seed: int,
    search: int,
    selection: int,
    test: int,
    length: int,
    say: Callable[[str], None] = lambda _: None,
) -> Dataset:
    """Load, tokenize and split.

    Args:
        sources: names, paths or hub addresses (see :mod:`kvtuner_search.data.sources`).
        tokenizer: called like a tokenizer of transformers. A beginning-of-sequence token is put before each sample if the
            tokenizer does so by default.
        seed: fixes generated tasks and the choice of rows and windows.
        search, selection, test: samples of each source in each split.
        length: most tokens of a sample; text is cut into windows of exactly this many.
        say: called with messages about rows that were left out.

    Raises:
        UsageError: for numbers or options that cannot be used.
        DataError: if a source is unknown, unreadable, too short, or has one sequence in two splits.
    """
    counts: dict[SplitName, int] = {"search": search, "selection": selection, "test": test}
    if min(counts.values()) < 0 or not any(counts.values()):
        raise UsageError(f"samples a split are search={search}, selection={selection}, test={test}: use 1 or more")
    encoder = Encoder(tokenizer, length)
    samples: dict[SplitName, list[Sample]] = {name: [] for name in SPLITS}
    for source in _parse(sources, SEARCH_QUESTIONS):
        if isinstance(source, Task):
            drawn = {
                name: _generate(source, encoder, stream_name=name, seed=seed, count=count)
                for name, count in counts.items()
            }
        else:
            drawn = _deal(source, encoder, seed, counts)
            _tell(source, say)
        for name in SPLITS:
            samples[name] += drawn[name]
    return Dataset(*(Split(name, tuple(samples[name])) for name in SPLITS))


def load_evaluation(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seed: int,
    samples: int,
    length: int,
    say: Callable[[str], None] = lambda _: None,
) -> Split:
    """``samples`` samples of each source to evaluate on, as a test split.

    Tasks come from generators that :func:`load_dataset_for` never uses; rows and windows of text are the first ones, in
    order. The caller has to know whether a search used the same file. ``say`` reports rows that were left out.

    Raises:
        UsageError, DataError: as :func:`load_dataset_for`.
    """
    if samples < 1:
        raise UsageError(f"samples={samples}: use 1 or more")
    encoder = Encoder(tokenizer, length)
    found: list[Sample] = []
    for source in _parse(sources):
        if isinstance(source, Task):
            found += _generate(source, encoder, stream_name="evaluation", seed=seed, count=samples)
        else:
            found += _draw(source, encoder, samples, None)
            _tell(source, say)
    return Split("test", tuple(found))


@dataclass(frozen=True)
class Encoder:
    """Turns texts into samples of at most ``length`` tokens."""

    tokenizer: Tokenizer
    length: int

    def __post_init__(self) -> None:
        if self.length < len(self.start) + 2:
            raise UsageError(f"length={self.length}: use {len(self.start) + 2} or more tokens")

    @cached_property
    def start(self) -> list[int]:
        """The beginning-of-sequence token that the tokenizer itself puts before a text; empty if it puts none."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return [bos] if bos is not None and bos in self.ids("", add_special_tokens=True) else []

    def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``. ``verbose=False``: long texts are cut here, so the tokenizer need not warn of them."""
        found = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [int(i) for i in found]

    def window(self, source: str, ids: Sequence[int]) -> Sample:
        """A sample of running text: every position but the first is scored."""
        tokens = (*self.start, *ids)
        return Sample(source, tokens, ((1, len(tokens)),), is_task=False)

    def document(self, source: str, document: Document) -> Sample:
        """A sample in which the answers are scored.

        An answer starts with the space before it, and at the first token in which the text up to it and the whole text
        differ: where a token straddles the boundary, it belongs to the answer.

        Raises:
            DataError: if no answer has a token that can be predicted.
        """
        return self._scored(source, document, self.start)

    def conversation(self, source: str, talk: Conversation) -> Sample:
        """A sample of a conversation in the tokenizer's chat template, whose own text begins a sequence. The assistant's answers are scored.

        Raises:
            UsageError: if there is no template, or it does not take a conversation of user and assistant as it is.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(f"source {source!r}: this tokenizer has no chat template: leave {source} out")
        pairs = [
            ({"role": "user", "content": said}, {"role": "assistant", "content": reply}) for said, reply in talk.turns
        ]
        try:
            text = str(self.tokenizer.apply_chat_template(list(itertools.chain(*pairs)), tokenize=False))  # type: ignore[attr-defined]
        except Exception as error:  # a template is a program of the model's own
            raise UsageError(
                f"source {source!r}: the chat template refuses a plain conversation ({first_line(error)}): leave {source} out"
            ) from error
        answers, at = [], 0
        for said, reply in talk.turns:
            asked = text.find(said, at)
            start = text.find(reply, asked + len(said))
            if asked < 0 or start < 0:
                raise UsageError(f"source {source!r}: the chat template changes what was said: leave {source} out")
            at = start + len(reply)
            answers.append((start, at))
        return self._scored(source, Document(text, tuple(answers)), [])

    def _scored(self, source: str, document: Document, begin: list[int]) -> Sample:
        """The sample of a document after the ids that begin a sequence."""
        body = self.ids(document.text)
        shift = len(begin)
        spans: list[tuple[int, int]] = []
        for first, last in document.answers:
            start = shift + _common(self.ids(document.text[:first].rstrip(" ")), body)
            head = self.ids(document.text[:last])
            same = _common(head, body)
            end = shift + min(same if same == len(head) else same + 1, len(body))
            start = max(start, spans[-1][1] if spans else 1)  # position 0 is never predicted, no token is scored twice
            if start < end:
                spans.append((start, end))
        if not spans:
            raise DataError(
                f"source {source!r}: the answer in {document.text[:40]!r} is the first token, so nothing predicts it:"
                " put a prompt before it"
            )
        return Sample(source, (*begin, *body), tuple(spans), is_task=document.exact)


def default_sources(tokenizer: Tokenizer, length: int, *, chats: bool) -> tuple[str, ...]:
    """What calibration reads if no source is named: DEFAULT_SOURCES, and conversations if the model was trained on them.

    Args:
        length: most tokens of a sample; conversations that are longer are left out.
        chats: False for a model that has a chat template, but was not trained on conversations.

    Example:
        >>> default_sources(lambda text, **_: {"input_ids": []}, 448, chats=True)
        ('recall', 'arithmetic', 'list', 'text')
    """
    try:
        fits = chats and len(Encoder(tokenizer, length).conversation("chat", chat(Random(0))).tokens) <= length * _SPARE
    except UsageError:
        fits = False
    return (*DEFAULT_SOURCES, "chat") if fits else DEFAULT_SOURCES


def _parse(sources: Sequence[str], questions: int = 1) -> list[Source]:
    if not sources:
        raise UsageError("no data source is named: name one or more, e.g. recall, text or a .txt file")
    return distinct([parse_source(spec, questions) for spec in sources])


def _tell(source: Rows | Text, say: Callable[[str], None]) -> None:
    if source.skipped.rows:
        say(f"source {source.name!r}: {_left_out(source)} left out")


def _left_out(source: Rows | Text) -> str:
    count = source.skipped.rows
    return f"{count} row{'s' if count > 1 else ''} of null ({'the first: ' if count > 1 else ''}{source.skipped.first})"


def _generate(task: Task, encoder: Encoder, *, stream_name: str, seed: int, count: int) -> list[Sample]:
    rng = stream(task.name, stream_name, seed)
    made = [task.make(rng) for _ in range(count)]
    samples = [
        encoder.conversation(task.name, each) if isinstance(each, Conversation) else encoder.document(task.name, each)
        for each in made
    ]
    longest = max((len(sample.tokens) for sample in samples), default=0)
    if longest > encoder.length:
        raise DataError(
            f"source {task.name!r} takes up to {longest} tokens a sample, but length is {encoder.length}: raise it"
        )
    return samples


def _deal(
    source: Rows | Text, encoder: Encoder, seed: int, counts: dict[SplitName, int]
) -> dict[SplitName, list[Sample]]:
    drawn = _draw(source, encoder, sum(counts.values()), stream(source.name, "shuffle", seed))
    deck = iter(drawn)
    return {name: list(itertools.islice(deck, counts[name])) for name in reversed(SPLITS)}


def _draw(source: Rows | Text, encoder: Encoder, needed: int, rng: Random | None) -> list[Sample]:
    """``needed`` distinct samples, shuffled by ``rng``, or the first ones in order without it.

    Raises:
        DataError: if there are fewer.
    """
    if isinstance(source, Rows):
        documents = list({document.text: document for document in source.read() if document.answers}.values())
        if rng is not None:
            rng.shuffle(documents)
        encoded = (encoder.document(source.name, document) for document in documents)
        fitting = _distinct(sample for sample in encoded if len(sample.tokens) <= encoder.length)
        drawn = list(itertools.islice(fitting, needed))
        have = f"{len(documents)} distinct documents with answers, {len(drawn)} of at most {encoder.length} tokens"
        need = f"{needed}"
    else:
        size = encoder.length - len(encoder.start)
        ids = _ids_until(source.read(), encoder, size * needed * (_POOL if rng else 1))
        cuts = (ids[at : at + size] for at in range(0, len(ids) - size + 1, size))
        drawn = list(_distinct(encoder.window(source.name, cut) for cut in cuts))
        if rng is not None:
            rng.shuffle(drawn)
        have = f"{len(ids)} tokens, {len(drawn)} distinct windows of {size}"
        need = f"{needed} windows ({needed * size} tokens)"
    if len(drawn) < needed:
        if source.skipped.rows:
            have += f", besides {_left_out(source)}"
        raise DataError(
            f"source {source.name!r} has {have}; needed are {need}:"
            " give more data, or lower the samples a split or their length"
        )
    return drawn[:needed]


def _ids_until(pieces: Iterable[str], encoder: Encoder, enough: int) -> list[int]:
    ids: list[int] = []
    block: list[str] = []
    characters = 0
    for piece in pieces:
        block.append(piece)
        characters += len(piece)
        if characters >= _BLOCK_CHARACTERS:
            ids += encoder.ids("".join(block))
            block, characters = [], 0
            if len(ids) >= enough:
                return ids[:enough]
    return (ids + encoder.ids("".join(block)))[:enough]


def _distinct(samples: Iterable[Sample]) -> Iterator[Sample]:
    seen: set[tuple[int, ...]] = set()
    for sample in samples:
        if sample.tokens not in seen:
            seen.add(sample.tokens)
            yield sample


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in same)
