"""What is asked, and when an answer is right."""

from __future__ import annotations

from typing import Any

import pytest

from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.validate.prompts import Prompts, TaskPrompt, build, notes_on_data, right
from tests.search.profile_factory import profile


class Characters:
    """A tokenizer of one token a character."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


def make(**changes: Any) -> Prompts:
    arguments: dict[str, Any] = {
        "sources": ["recall#pairs=2", "text"], "samples": 3, "length": 200, "tasks": ["recall#pairs=2"], "task_prompts": 5,
        "greedy_prompts": 5, "seed": 0,
    }  # fmt: skip
    return build(Characters(), **arguments | changes)


def text(tokens: tuple[int, ...]) -> str:
    return "".join(map(chr, tokens))


def test_the_same_arguments_ask_the_same() -> None:
    assert make() == make()
    assert make().digest == make().digest
    assert make().digest != make(seed=1).digest
    assert make().digest != make(greedy_prompts=4).digest
    assert make().digest != make(task_prompts=4).digest


def test_a_task_prompt_ends_before_the_answer_and_its_space() -> None:
    prompt = make().tasks[0]
    assert text(prompt.tokens).endswith("\nAnswer:")
    assert prompt.expected.isdigit()
    assert f" {prompt.expected}." in text(prompt.tokens)
    assert prompt.max_new_tokens == len(f" {prompt.expected}") + 4


def test_continuations_take_turns_among_the_sources() -> None:
    prompts = make()
    assert len(prompts.greedy) == 5
    assert [text(tokens).endswith("Answer:") for tokens in prompts.greedy] == [True, False, True, False, True]
    assert len(prompts.greedy[1]) == 100  # half of a window


def test_the_record_names_sources_and_tasks() -> None:
    assert [(d.name, d.samples) for d in make().data()] == [
        ("recall#pairs=2", 3),
        ("text", 3),
        ("task recall#pairs=2", 5),
    ]


@pytest.mark.parametrize("task", ["text", "no-such-task"])
def test_a_task_needs_a_short_answer(task: str) -> None:
    with pytest.raises((UsageError, DataError), match=task):
        make(tasks=[task])


def test_a_task_is_named_once() -> None:
    with pytest.raises(UsageError, match="named twice"):
        make(tasks=["recall", "recall"])


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (" 12345\nQuestion", True),
        ("12345", True),
        (" 12345.", True),
        (" 123456", False),
        (" 12344", False),
        ("", False),
    ],
)
def test_an_answer_is_right_as_a_whole_word(answer: str, good: bool) -> None:
    assert right(TaskPrompt("recall", (1,), "12345", 9), answer) is good


def test_text_that_was_searched_on_is_noted() -> None:
    data = [{"name": "text", "split": "search", "samples": 1, "tokens": 9, "digest": "sha256:" + "0" * 64}]
    prompts = make()
    assert notes_on_data(profile(provenance__data=data), prompts.split) == [
        "the profile was calibrated on text too, so its windows may not be held out"
    ]
    assert notes_on_data(profile(), prompts.split) == []
