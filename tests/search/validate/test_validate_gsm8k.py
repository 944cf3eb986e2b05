"""GSM8K: prompts with and without a chat template, and which number of an answer counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.validate.gsm8k import is_right, parse
from kvtuner_search.validate.prompts import Prompts, TaskPrompt, build, cut_short, right


class Characters:
    """A tokenizer of one token a character, which puts a beginning-of-sequence token before a text."""

    bos_token_id = 1
    chat_template: str | None = "it has one"

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(character) for character in text]}

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}</>" for turn in turns) + "<assistant>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("train", 3), ("test", 4)):
        rows = [{"question": f"{name} {i}?", "answer": f"Think.\n#### 1,00{i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make(*tasks: str, count: int = 4, tokenizer: Any = None) -> Prompts:
    return build(
        tokenizer or Characters(), sources=["list"], samples=2, length=900, tasks=tasks, task_prompts=count, greedy_prompts=2, seed=0
    )  # fmt: skip


def text(prompt: TaskPrompt) -> str:
    return "".join(map(chr, prompt.tokens))


def test_training_questions_come_first(folder: Path) -> None:
    found = make(f"gsm8k:{folder}#shots=2#tokens=50").tasks
    assert len(found) == 4
    assert text(found[1]) == (
        "\x01Question: train 0?\nAnswer: Think.\n#### 1,000\n\nQuestion: train 1?\nAnswer: Think.\n#### 1,001\n\n"
        "Question: test 1?\nAnswer:"
    )
    assert (found[1].expected, found[1].max_new_tokens, found[1].stop) == ("1001", 50, ("\nQuestion:",))


def test_with_a_chat_template_they_are_turns_and_the_model_ends_its_own(folder: Path) -> None:
    found = make(f"gsm8k:{folder}#chat#shots=1").tasks
    assert text(found[2]) == "<user>train 0?</><assistant>Think.\n#### 1,000</><user>test 2?</><assistant>"
    assert found[2].stop == ()
    assert found[2].max_new_tokens == 400


def test_without_an_example_a_chat_model_is_told_how_to_end(folder: Path) -> None:
    assert text(make(f"gsm8k:{folder}#chat#shots=0").tasks[0]) == (
        "<user>test 0?\nThink step by step, then write #### and the number alone.</><assistant>"
    )


def test_items_are_the_tasks_own_number(folder: Path) -> None:
    prompts = make(f"gsm8k:{folder}#shots=0#items=3", "recall#pairs=2", count=7).tasks
    assert [prompt.task for prompt in prompts] == ["gsm8k#shots=0#items=3"] * 3 + ["recall#pairs=2"] * 7


def test_results_name_no_folder(folder: Path) -> None:
    prompts = make(f"gsm8k:{folder}#chat#shots=1")
    assert [data.name for data in prompts.data()] == ["list", "task gsm8k#chat#shots=1"]
    with pytest.raises(UsageError, match="named twice"):
        make(f"gsm8k:{folder}#shots=0", f"gsm8k:{folder}/../{folder.name}#shots=0")


def test_reading_is_part_of_what_was_asked(folder: Path) -> None:
    """A run that is resumed must judge answers as it did before."""
    assert make(f"gsm8k:{folder}#shots=1").digest != make(f"gsm8k:{folder}#shots=1#answer=last").digest


@pytest.mark.parametrize(
    ("option", "error", "reason"),
    [
        ("#shots=4", DataError, "train.jsonl: has fewer than 4 rows"),
        ("#items=5#shots=0", DataError, "test.jsonl: has fewer than 5 rows"),
        ("#shots=x", UsageError, "'shots=x' is unknown: use #shots=N, #items=N, #tokens=N, #chat"),
        ("#answer=first", UsageError, "'answer=first' is unknown"),
        ("#tokens=0", UsageError, "leaves no room for an answer"),
        ("#items=0", UsageError, "leaves no question"),
    ],
)
def test_what_cannot_be_asked(folder: Path, option: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        make(f"gsm8k:{folder}{option}")


def test_a_tokenizer_without_a_chat_template(folder: Path) -> None:
    tokenizer = Characters()
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template: leave #chat out"):
        make(f"gsm8k:{folder}#chat#shots=0", tokenizer=tokenizer)


def test_another_file_is_no_gsm8k(folder: Path) -> None:
    (folder / "test.jsonl").write_text('{"question": "?", "answer": "7"}\n')
    with pytest.raises(DataError, match="ends without ####"):
        make(f"gsm8k:{folder}#shots=0", count=1)


@pytest.mark.parametrize(
    ("answer", "marked", "last"),
    [
        (" 2 + 2 = 4.\n#### 1,234", True, True),
        (" so #### 1234\n\nQuestion: next\nAnswer: #### 7", True, True),
        (" so #### $1234.00", True, True),
        (" so #### 1234 and not 7", True, True),
        (" so 1234", False, True),
        (" The answer is \\boxed{1,234}.", False, True),
        (" so 1234, or 7", False, False),
        (" so #### 12345", False, False),
        (" so 1234\n#### 7", False, False),
        ("\nQuestion: next\nAnswer: #### 1234", False, False),
        ("", False, False),
    ],
)
def test_the_number_that_counts(answer: str, marked: bool, last: bool) -> None:
    assert is_right(answer, "1234", "marked") is marked
    assert is_right(answer, "1234", "last") is last
    assert right(TaskPrompt("gsm8k", (1,), "1234", 9, reading="last"), answer) is last


def test_options_are_read() -> None:
    name, task = parse("gsm8k:a/b#chat#answer=last#items=500", 100)
    assert (name, task.items, task.shots, task.chat, task.reading) == (
        "gsm8k#chat#answer=last#items=500",
        500,
        8,
        True,
        "last",
    )


def test_answers_that_were_cut_are_counted() -> None:
    prompts = [TaskPrompt("gsm8k", (1,), "7", 3, reading="marked")] * 3 + [TaskPrompt("recall", (1,), "7", 1)]
    assert cut_short("stock", prompts, [(1, 2, 3), (1, 2), (4, 5, 6), (1,)]) == [
        "2 of 3 answers of the stock server to gsm8k were cut off at 3 tokens"
    ]


@pytest.mark.parametrize(
    ("options", "reading"),
    [
        ("#chat#shots=0", "last"),
        ("#shots=0#chat", "last"),
        ("#chat#shots=0#answer=marked", "marked"),
        ("#chat", "marked"),
        ("#shots=0", "marked"),
    ],
)
def test_a_chat_model_without_an_example_ends_in_its_own_way(options: str, reading: str) -> None:
    """Qwen2.5-Coder-0.5B-Instruct, told to write ####, did so in 7 or 8 of 500 answers."""
    assert parse(f"gsm8k:a{options}", 1)[1].reading == reading
