"""The generated tasks: formats of the model card, answers that are right, generators that do not meet."""

from __future__ import annotations

import re
from random import Random

import pytest

from kvtuner_search.data.tasks import NAMES, TASKS, arithmetic, chat, recall, recall_prompts, repeat_list, stream
from kvtuner_search.errors import UsageError


@pytest.mark.parametrize("pairs", [1, 3, 20, 40])
@pytest.mark.parametrize("seed", range(5))
def test_recall_answers_with_the_code_that_was_given(pairs: int, seed: int) -> None:
    document = recall(Random(seed), pairs)
    *lines, question, answer = document.text.split("\n")
    codes = dict(re.fullmatch(r"The code of the (\w+ \w+) is (\d{5})\.", line).groups() for line in lines)
    assert len(codes) == pairs  # distinct names
    asked = re.fullmatch(r"Question: What is the code of the (\w+ \w+)\?", question)[1]
    assert answer == f"Answer: {codes[asked]}"
    ((start, end),) = document.answers
    assert (document.text[start:end], end) == (codes[asked], len(document.text))


@pytest.mark.parametrize("seed", range(20))
def test_arithmetic_is_right(seed: int) -> None:
    document = arithmetic(Random(seed))
    lines = re.findall(r"^Question: What is (\d+) ([+-]) (\d+)\?\nAnswer: (\d+)$", document.text, re.MULTILINE)
    assert 4 <= len(lines) <= 16
    assert len(lines) * 2 == len(document.text.split("\n"))
    for x, sign, y, result in lines:
        assert max(int(x), int(y)) <= 999
        assert int(result) == (int(x) + int(y) if sign == "+" else int(x) - int(y)) >= 0
    assert [document.text[a:b] for a, b in document.answers] == [line[3] for line in lines]


@pytest.mark.parametrize("seed", range(20))
def test_list_is_repeated(seed: int) -> None:
    document = repeat_list(Random(seed))
    first, again, last = document.text.split("\n")
    words = first.removeprefix("List: ").split(", ")
    assert 8 <= len(set(words)) == len(words) <= 24
    assert again == "Again: " + ", ".join(words)
    assert last == f"Item number one is {words[0]} and the last one is {words[-1]}."
    assert [document.text[a:b] for a, b in document.answers] == [", ".join(words), words[0], words[-1]]


@pytest.mark.parametrize("seed", range(20))
def test_a_conversation_asks_for_what_was_said(seed: int) -> None:
    turns = chat(Random(seed)).turns
    assert len(turns) == 7
    told: dict[str, str] = {}
    for said, reply in turns:
        if match := re.fullmatch(r"Please note: the code of the (.*) is (\d{5})\.", said):
            told[match[1]] = match[2]
            assert reply == f"Noted: the code of the {match[1]} is {match[2]}."
        elif match := re.fullmatch(r"What is (\d+) \+ (\d+)\?", said):
            assert reply == f"{match[1]} + {match[2]} = {int(match[1]) + int(match[2])}"
        else:
            name = re.fullmatch(r"What is the code of the (.*)\?", said)[1]  # type: ignore[index]
            assert reply == f"The code of the {name} is {told[name]}."
    assert len(told) == 3


def test_a_name_is_a_word_and_an_animal() -> None:
    assert len(NAMES) == len(set(NAMES)) == 39 * 20


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_fixes_the_documents_and_a_purpose_changes_them(task: str) -> None:
    def texts(purpose: str, seed: int) -> list[str]:
        rng = stream(task, purpose, seed)
        return [TASKS[task](rng).text for _ in range(10)]

    purposes = ("search", "selection", "test", "evaluation")
    assert texts("search", 3) == texts("search", 3)
    assert len({text for purpose in purposes for seed in range(3) for text in texts(purpose, seed)}) == 120


def test_recall_prompts_end_before_the_space_of_the_answer() -> None:
    prompts = recall_prompts(seed=5, count=4, pairs=6)
    assert prompts == recall_prompts(seed=5, count=4, pairs=6) != recall_prompts(seed=6, count=4, pairs=6)
    for prompt, answer in prompts:
        assert prompt.endswith("?\nAnswer:")
        assert re.fullmatch(r" \d{5}", answer)
        assert prompt.count(f"is{answer}.") == 1
        assert prompt.count("The code of the") == 6


@pytest.mark.parametrize("pairs", [0, -1, len(NAMES) + 1])
def test_recall_needs_as_many_names_as_pairs(pairs: int) -> None:
    with pytest.raises(UsageError, match=f"pairs={pairs}"):
        recall(Random(0), pairs)
