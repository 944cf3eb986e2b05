"""Generated tasks, in the formats that the embedded reference model was trained on (see its model card).

Each task is a function of a random generator, so a seed and a split's name fix every document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from kvtuner_search.errors import UsageError

_COLOURS: Final = """
amber azure birch cedar coral dune ember fern flint frost glade hazel iris jade lark lotus maple moss north oak opal pearl
pine quartz raven river rose sage slate snow south stone storm teal thorn violet west willow wren
"""
_ANIMALS: Final = "fox owl bear hare wolf crow swan deer mole lynx seal crab toad newt goat mule duck hawk ibis kite"
WORDS: Final = tuple(_COLOURS.split())
ANIMALS: Final = tuple(_ANIMALS.split())
NAMES: Final = tuple(f"{first} {second}" for first in WORDS for second in ANIMALS)
DEFAULT_PAIRS: Final = 20
SEARCH_QUESTIONS: Final = (
    4  # questions of a recall document in the calibration splits: four times the scored tokens for a fifth more text
)


@dataclass(frozen=True)
class Document:
    """A text, and the parts of it that are answers."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()  # half-open character spans, in order
    exact: bool = False  # whether the answers are short enough for exact match to be a meaningful accuracy


@dataclass(frozen=True)
class Conversation:
    """Pairs of what the user says and what the assistant answers, in order; the answers are scored, in the model's own chat format."""

    turns: tuple[tuple[str, str], ...]


class _Writer:
    """Collects a text and the places of its answers."""

    def __init__(self) -> None:
        self.text = ""
        self.answers: list[tuple[int, int]] = []

    def say(self, text: str) -> _Writer:
        self.text += text
        return self

    def answer(self, text: str) -> _Writer:
        self.answers.append((len(self.text), len(self.text) + len(text)))
        return self.say(text)

    def done(self) -> Document:
        return Document(self.text, tuple(self.answers), exact=True)


def stream(source: str, purpose: str, seed: int) -> Random:
    """The random generator of one source and purpose (a split's name, or ``evaluation``).

    Generators of different purposes are unrelated: Python seeds from a text through SHA-512.
    """
    return Random(f"kvtuner-search {source} {purpose} {seed}")


def recall(rng: Random, pairs: int = DEFAULT_PAIRS, questions: int = 1) -> Document:
    """``pairs`` lines that give a code to a name, then questions; the requested codes are the answers.

    Raises:
        UsageError: if ``pairs`` is not in 1 .. 780, the number of names, or ``questions`` not in 1 .. 6.
    """
    if not 1 <= pairs <= len(NAMES):
        raise UsageError(f"recall with pairs={pairs}: there are {len(NAMES)} names, so use 1 to {len(NAMES)}")
    if not 1 <= questions <= 6:
        raise UsageError(f"recall with questions={questions}: use 1 to 6")
    codes = {name: rng.randint(10000, 99999) for name in rng.sample(NAMES, pairs)}
    writer = _Writer().say("".join(f"The code of the {name} is {value}.\n" for name, value in codes.items()))
    for number in range(questions):
        asked = rng.choice(list(codes))
        writer.say(("\n" if number else "") + f"Question: What is the code of the {asked}?\nAnswer: ")
        writer.answer(str(codes[asked]))
    return writer.done()


def arithmetic(rng: Random) -> Document:
    """4 to 16 additions and subtractions of numbers up to 999; every result is an answer."""
    writer = _Writer()
    for line in range(rng.randint(4, 16)):
        x, y = rng.randint(0, 999), rng.randint(0, 999)
        sign = rng.choice("+-")
        if sign == "-":
            x, y = max(x, y), min(x, y)
        writer.say(("\n" if line else "") + f"Question: What is {x} {sign} {y}?\nAnswer: ")
        writer.answer(str(x + y if sign == "+" else x - y))
    return writer.done()


def repeat_list(rng: Random) -> Document:
    """8 to 24 different words and the same again, then the first and the last; all of the repetition is an answer."""
    words = rng.sample(WORDS + ANIMALS, rng.randint(8, 24))
    listed = ", ".join(words)
    writer = _Writer().say(f"List: {listed}\nAgain: ").answer(listed).say("\nItem number one is ").answer(words[0])
    return writer.say(" and the last one is ").answer(words[-1]).say(".").done()


def chat(rng: Random) -> Conversation:
    """7 turns: the user gives codes to 3 names, asks for 2 sums, and asks for 2 of the codes."""
    codes = {name: rng.randint(10000, 99999) for name in rng.sample(NAMES, 3)}
    told = [
        (f"Please note: the code of the {n} is {c}.", f"Noted: the code of the {n} is {c}.") for n, c in codes.items()
    ]
    sums = [(rng.randint(0, 999), rng.randint(0, 999)) for _ in range(2)]
    added = [(f"What is {x} + {y}?", f"{x} + {y} = {x + y}") for x, y in sums]
    early = [*told, *added]
    rng.shuffle(early)
    asked = [
        (f"What is the code of the {n}?", f"The code of the {n} is {codes[n]}.") for n in rng.sample(list(codes), 2)
    ]
    return Conversation((*early, *asked))


TASKS: Final[dict[str, Callable[[Random], Document]]] = {
    "recall": recall,
    "arithmetic": arithmetic,
    "list": repeat_list,
}


def recall_prompts(seed: int, count: int, pairs: int = DEFAULT_PAIRS) -> list[tuple[str, str]]:
    """``count`` pairs of prompt and answer for evaluation; the answer starts with its space.

    They come from a separate generator: no seed gives a prompt that the search, selection or test split of any
    seed was built from, short of a collision of 20 random codes.

    Raises:
        UsageError: if ``pairs`` is not in 1 .. 780.
    """
    rng = stream("recall", "evaluation", seed)
    documents = [recall(rng, pairs) for _ in range(count)]
    return [(d.text[: d.answers[0][0] - 1], d.text[d.answers[0][0] - 1 :]) for d in documents]
