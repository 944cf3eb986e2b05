"""From sources to splits: spans, disjointness, determinism, windows, and what is said of data that cannot be used."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from words import QUESTIONS, Words, load, write

from kvtuner_search.data import DEFAULT_SOURCES, default_sources, load_evaluation, recall_prompts
from kvtuner_search.data.tasks import SEARCH_QUESTIONS
from kvtuner_search.data.topics import python_reference
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.models.reference_model import reference_model_path

# First 16 hex digits of the splits of the three generated tasks, with the reference tokenizer and seed 0. Another value here
# means other calibration data for every profile.
PINNED = ["sha256:958caff5b5654683", "sha256:323493d62f3ced21", "sha256:c0017f82d3b1941a"]


def reference_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(reference_model_path())


def long_text(folder: Path, words: int) -> str:
    path = folder / "notes.txt"
    path.write_text("".join(f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)} " for i in range(words)))
    return str(path)


def test_default_sources_fill_every_split_and_score_what_they_should() -> None:
    words = Words()
    dataset = load(*DEFAULT_SOURCES, tokenizer=words, length=1024)
    for split, count in zip(dataset, (3, 2, 2), strict=True):
        assert {name: len(part.samples) for name, part in split.by_source().items()} == dict.fromkeys(
            DEFAULT_SOURCES, count
        )
    for sample in itertools.chain.from_iterable(split.samples for split in dataset):
        text = words.decode(sample.tokens)
        scored = [words.decode(sample.tokens[a:b]) for a, b in sample.scored]
        if sample.source == "recall":
            assert scored == re.findall(r"Answer:( \d{5})", text)
            assert len(scored) == SEARCH_QUESTIONS
        elif sample.source == "arithmetic":
            assert scored == re.findall(r"Answer:( \d+)", text)
        elif sample.source == "list":
            assert scored[0] == text.split("\n")[0].removeprefix("List:")
            assert len(scored) == 3
        else:
            assert sample.scored == ((1, 1024),)
        assert sample.is_task == (sample.source != "text")


def test_reference_tokenizer_gives_the_recorded_digest() -> None:
    tokenizer = reference_tokenizer()
    tasks = DEFAULT_SOURCES[:3]
    dataset = load(*tasks, tokenizer=tokenizer)
    assert [split.digest[:23] for split in dataset] == PINNED
    assert [split.digest[:23] for split in load(*tasks, tokenizer=tokenizer)] == PINNED
    assert not {split.digest[:23] for split in load(*tasks, tokenizer=tokenizer, seed=1)} & set(PINNED)


def test_reference_tokenizer_scores_exactly_the_answers() -> None:
    tokenizer = reference_tokenizer()
    split = load("recall", "arithmetic", tokenizer=tokenizer).search
    for sample in split.samples:
        answers = re.findall(r"Answer:( \d+)", tokenizer.decode(sample.tokens))
        assert [tokenizer.decode(sample.tokens[a:b]) for a, b in sample.scored] == answers


class Chatty(Words):
    """With a chat template, which begins with a token of its own, and a tokenizer that would put another before it."""

    chat_template: str | None = "it has one"

    def __init__(self, write: Callable[[str], str] = str) -> None:
        super().__init__()
        self.write = write
        self.bos_token_id = self.id("^")

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return "^" + "".join(f"<{turn['role']}>{self.write(turn['content'])}</>" for turn in turns)


def broken(text: str) -> str:
    raise ValueError("no\nuser here")


def test_a_conversation_is_in_the_models_own_format_and_what_the_assistant_says_is_scored() -> None:
    words = Chatty()
    for split in load("chat", tokenizer=words):
        for sample in split.samples:
            text = words.decode(sample.tokens)
            assert text.startswith("^<user>")
            assert text.count("^") == 1
            replies = re.findall("<assistant>(.*?)</>", text)
            assert [words.decode(sample.tokens[a:b]) for a, b in sample.scored] == replies
            assert len(replies) == 7
            assert not sample.is_task


def test_the_reference_tokenizers_conversation_is_scored_the_same() -> None:
    tokenizer = reference_tokenizer()
    [sample, *_] = load("chat", tokenizer=tokenizer).search.samples
    text = tokenizer.decode(sample.tokens)
    assert [tokenizer.decode(sample.tokens[a:b]) for a, b in sample.scored] == re.findall(
        r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", text
    )


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (Words(), "this tokenizer has no chat template: leave chat out"),
        (Chatty(broken), "the chat template refuses a plain conversation (no): leave chat out"),
        (Chatty(str.upper), "the chat template changes what was said: leave chat out"),
    ],
)
def test_conversations_that_a_template_does_not_take_are_refused_by_name_and_left_out_by_default(
    tokenizer: Words, reason: str
) -> None:
    with pytest.raises(UsageError, match=f"^source 'chat': {re.escape(reason)}$"):
        load("chat", tokenizer=tokenizer)
    assert default_sources(tokenizer, 512, chats=True) == DEFAULT_SOURCES


def test_the_default_has_conversations_for_models_that_were_trained_on_them() -> None:
    assert default_sources(Chatty(), 1024, chats=True) == (*DEFAULT_SOURCES, "chat")
    assert default_sources(Chatty(), 1024, chats=False) == DEFAULT_SOURCES
    assert default_sources(Chatty(), 64, chats=True) == DEFAULT_SOURCES, "they would not fit"


def test_same_seed_same_digest_and_more_search_data_leaves_the_test_split(tmp_path: Path) -> None:
    sources = ("recall", long_text(tmp_path, 440), write(tmp_path, QUESTIONS) + "#answer=a#template={q}? {a}")
    few = {"search": 0, "selection": 0, "test": 1}
    first, again = load(*sources, length=440, **few), load(*sources, length=440, **few)
    assert [split.digest for split in first] == [split.digest for split in again]
    assert first.test.digest != load(*sources, length=440, seed=1, **few).test.digest
    rows = sources[2]
    assert load(rows).test.digest == load(rows, search=5).test.digest


def test_recall_prompts_are_in_no_split() -> None:
    words = Words()
    texts = {words.decode(s.tokens) for split in load("recall", tokenizer=words, search=30) for s in split.samples}
    assert not texts & {prompt + answer for prompt, answer in recall_prompts(0, 30)}
    evaluation = load_evaluation(["recall"], words, seed=0, samples=30, length=512)
    assert [words.decode(s.tokens) for s in evaluation.samples] == ["".join(pair) for pair in recall_prompts(0, 30)]


def test_text_is_cut_into_windows_that_are_used_once(tmp_path: Path) -> None:
    words = Words()
    path = long_text(tmp_path, 70)
    dataset = load(path, tokenizer=words, length=10)
    windows = [words.decode(s.tokens) for split in dataset for s in split.samples]
    text = Path(path).read_text().rstrip()
    whole = words(text, add_special_tokens=False, verbose=False)["input_ids"]
    cuts = [words.decode(tuple(whole[at : at + 10])) for at in range(0, 70, 10)]
    assert sorted(windows) == sorted(cuts)
    assert windows != cuts  # shuffled
    ordered = load_evaluation([path], words, seed=0, samples=7, length=10)
    assert [words.decode(s.tokens) for s in ordered.samples] == cuts


def test_long_text_is_read_no_further_than_needed(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {chr(97 + i % 26)} {'x' * (i % 50)}\n" for i in range(120_000)))
    words = Words()
    load(str(path), tokenizer=words, length=64)
    assert 1 << 20 <= sum(words.calls) < path.stat().st_size / 2


def test_beginning_of_sequence_token_is_kept_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    words = Words()
    words.bos_token_id = 10**6
    sources = ("recall", long_text(tmp_path, 4000))
    dataset = load(*sources, tokenizer=words)
    assert all(s.tokens[0] == 10**6 for split in dataset for s in split.samples)
    recall, text = load_evaluation(sources, words, seed=0, samples=1, length=512).samples
    assert recall.tokens[0] == text.tokens[0] == 10**6
    assert (len(text.tokens), text.scored) == (512, ((1, 512),))
    ((start, end),) = recall.scored
    assert re.fullmatch(r" \d{5}", words.decode(recall.tokens[start:end]))


def test_rows_without_an_answer_are_joined_and_scored_whole(tmp_path: Path) -> None:
    words = Words()
    path = write(tmp_path, [{"text": "one two", "id": 1}, {"text": " "}, {"text": "three four\n"}])
    split = load_evaluation([path], words, seed=0, samples=1, length=6)
    assert words.decode(split.samples[0].tokens) == "one two\n\nthree four"
    template = load_evaluation([path + r"#template=\t{text}!"], words, seed=0, samples=1, length=3)
    assert words.decode(template.samples[0].tokens) == "one two!"


def test_template_scores_the_answer_field_only(tmp_path: Path) -> None:
    words = Words()
    path = write(tmp_path, [{"q": "why", "a": "so it is", "n": 4}])
    for option, is_task in (("answer", False), ("exact", True)):
        spec = path + rf"#{option}=a#template=Q{{n}}: {{q}} #{{{{x}}}}\nA: {{a}}."
        (sample,) = load_evaluation([spec], words, seed=0, samples=1, length=40).samples
        assert words.decode(sample.tokens) == "Q4: why #{x}\nA: so it is."
        assert [words.decode(sample.tokens[a:b]) for a, b in sample.scored] == [" so it is"]
        assert sample.is_task is is_task
        assert sample.source == "rows.jsonl"


def test_a_token_that_straddles_the_answer_belongs_to_it(tmp_path: Path) -> None:
    words = Words()
    path = write(tmp_path, [{"a": "mid"}])
    (sample,) = load_evaluation(
        [path + "#answer=a#template=go pre{a}post on"], words, seed=0, samples=1, length=9
    ).samples
    assert [words.decode(sample.tokens[a:b]) for a, b in sample.scored] == [" premidpost"]


def test_answers_without_a_prompt_are_scored_from_the_second_token(tmp_path: Path) -> None:
    words = Words()
    spec = write(tmp_path, [{"a": "one two", "b": "one"}])
    (sample,) = load_evaluation([spec + "#answer=a#template={a}{a}"], words, seed=0, samples=1, length=9).samples
    assert [words.decode(sample.tokens[a:b]) for a, b in sample.scored] == [" twoone", " two"]
    with pytest.raises(DataError, match="the answer in 'one' is the first token"):
        load_evaluation([spec + "#answer=b#template={b}"], words, seed=0, samples=1, length=9)


def test_rows_too_long_or_twice_or_unanswered_are_left_out(tmp_path: Path) -> None:
    rows = [*QUESTIONS[:5], *QUESTIONS[:5], {"q": "x " * 99, "a": "b"}, {"q": "no", "a": ""}]
    spec = write(tmp_path, list(rows)) + "#answer=a#template={q} {a}"
    with pytest.raises(DataError, match="6 distinct documents with answers, 5 of at most 30 tokens; needed are 7"):
        load(spec, length=30)
    dataset = load(spec, length=30, search=2, test=1)
    assert len({s.tokens for split in dataset for s in split.samples}) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "unknown source 'nothing': use one of recall"),
        ("data.csv", "unknown source 'data.csv'"),
        ("{tmp}/absent.txt", "cannot be read .No such file"),
        ("{tmp}/absent.jsonl", "cannot be read .No such file"),
        ("{tmp}/folder.txt", "is not a regular file"),
        ("{tmp}/empty.txt", "is empty"),
        ("{tmp}/latin1.txt", "byte 3 is not UTF-8"),
        ("{tmp}/latin1.jsonl", "byte 3 is not UTF-8"),
        ("{tmp}/broken.jsonl", "line 2 is not JSON"),
        ("{tmp}/list.jsonl", "line 1 is list, not an object"),
        ("{tmp}/good.jsonl#field=body", "good.jsonl: line 1 has no field 'body', only 'text', 'number', 'flag'"),
        ("{tmp}/good.jsonl#field=flag", "field 'flag' is bool, not text"),
        (
            "{tmp}/short.txt",
            "has 3 tokens, 0 distinct windows of 512; needed are 7 windows .3584 tokens.: give more data",
        ),
        ("recall#pairs=60", "takes up to [0-9]+ tokens a sample, but length is 512"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("just three words")
    for suffix in ("txt", "jsonl"):
        (tmp_path / f"latin1.{suffix}").write_bytes(b"caf\xe9 noir")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    write(tmp_path, [["text"]], "list.jsonl")
    write(tmp_path, [{"text": "a", "number": 1, "flag": True}], "good.jsonl")
    with pytest.raises(DataError, match=message) as raised:
        load(spec.replace("{tmp}", str(tmp_path)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "spec",
    [
        "recall#pairs=many",
        "recall#pairs=0",
        "recall#field=text",
        "text#field=text",
        "gsm8k#field=text",
        "a.txt#field=text",
        "a.jsonl#colour=red",
        "a.jsonl#field",
        "a.jsonl#field=",
        "a.jsonl#field=a#field=b",
        "a.jsonl#field=a#template={a}",
        "a.jsonl#answer=a",
        "a.jsonl#answer=b#template={a}",
        "a.jsonl#answer=a#exact=a#template={a}",
        "a.jsonl#template=no place",
        "a.jsonl#template={a",
        "a.jsonl#template={}",
        "a.jsonl#template={a:>3}",
        "a.jsonl#template={a!r}",
        "hub:",
        "hub:a:b:c:d",
    ],
)
def test_options_that_cannot_be_used(spec: str) -> None:
    with pytest.raises(UsageError, match=re.escape(spec.split("#")[0])) as raised:
        load(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length=1: use 2 or more"),
        ({"search": -1}, "search=-1"),
        ({"search": 0, "selection": 0, "test": 0}, "use 1 or more"),
    ],
)
def test_numbers_that_cannot_be_used(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("recall", **options)


def test_no_source_and_one_source_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data source"):
        load()
    path = long_text(tmp_path, 9)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").symlink_to(path)
    for other in (path, str(tmp_path / "b" / ".." / "notes.txt"), str(tmp_path / "b" / "notes.txt")):
        with pytest.raises(UsageError, match=r"two sources are named 'notes\.txt'"):
            load(path, other)
    with pytest.raises(UsageError, match="two sources are named 'recall'"):
        load("recall", "text", "recall")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = ("en/v1", "de/v1", "de/v2")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        word = folder.replace("/", "").replace("1", "a").replace("2", "b")
        rows = [{"text": " ".join(f"{word}{letter}{n}" for n in "xyz")} for letter in "abcdefgh"]
        write(tmp_path / folder, list(rows), "train.jsonl")
    monkeypatch.chdir(tmp_path)
    dataset = load("en/v1/train.jsonl", str(tmp_path / "de/v1/train.jsonl"), "text", length=4)
    assert list(dataset.search.by_source()) == ["en/v1/train.jsonl", "de/v1/train.jsonl", "text"]
    dataset = load("de/v1/train.jsonl", "de/v2/train.jsonl", length=4)
    assert list(dataset.test.by_source()) == ["v1/train.jsonl", "v2/train.jsonl"]
    assert len({part.digest for part in dataset.test.by_source().values()}) == 2
    # Alone a file keeps its short name, and so its shuffle.
    assert list(load("de/v1/train.jsonl", length=4).search.by_source()) == ["train.jsonl"]


def hub_folder(folder: Path, config: str, rows: list[object]) -> str:
    """A dataset as the hub keeps it: a card that names the configuration, and its files."""
    folder.mkdir()
    write(folder, rows, "train-00000.jsonl")
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: train-*.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    return str(folder)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.mark.usefixtures("hub_cache")
def test_gsm8k_and_wikitext_are_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    questions = [{"question": f"How many {w}s?", "answer": f"{w}\n#### 4"} for w in ("fox", "owl", "hare")]
    folders = {
        "openai/gsm8k": hub_folder(tmp_path / "gsm8k", "main", list(questions)),
        "Salesforce/wikitext": hub_folder(
            tmp_path / "wikitext", "wikitext-2-raw-v1", [{"text": ""}, {"text": " = Fox = \n"}, {"text": " A fox . \n"}]
        ),
    }
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **k: real(folders[name], *a, **k))
    words = Words()
    dataset = load("gsm8k", tokenizer=words, search=1, selection=1, test=1)
    texts = {words.decode(s.tokens) for split in dataset for s in split.samples}
    assert texts == {f"Question: {q['question']}\nAnswer: {q['answer']}" for q in questions}
    sample = dataset.search.samples[0]
    assert sample.source == "gsm8k"
    (answer,) = [words.decode(sample.tokens[a:b]) for a, b in sample.scored]
    assert answer[1:] in [q["answer"] for q in questions]
    split = load_evaluation(["wikitext"], words, seed=0, samples=1, length=14)
    assert words.decode(split.samples[0].tokens).startswith("= Fox =\n\nA fox .")


@pytest.mark.usefixtures("hub_cache")
def test_hub_address_names_configuration_and_split(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "mine", "small", [{"body": "one two three"}])
    words = Words()
    split = load_evaluation([f"hub:{folder}:small:train#field=body"], words, seed=0, samples=1, length=3)
    assert words.decode(split.samples[0].tokens) == "one two three"
    assert split.samples[0].source == "mine:small:train"  # a profile never holds a machine's paths
    for spec, reason in ((f"hub:{folder}:large", "large"), (f"hub:{folder}:small:test", "test")):
        with pytest.raises(DataError, match=f"cannot be loaded.*{reason}") as raised:
            load(spec + "#field=body")
        assert "\n" not in str(raised.value)


def test_hub_that_cannot_be_reached_is_one_line() -> None:
    code = (
        "from kvtuner_search.data import load_dataset_for\n"
        "from kvtuner_search.errors import DataError\n"
        "try:\n"
        "    load_dataset_for(['gsm8k'], None, seed=0, search=1, selection=0, test=0, length=9)\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"hub dataset 'openai/gsm8k' \(configuration main, split train\) cannot be loaded: .+\n", done.stdout
    )
    assert "check the names and the network" in done.stdout


def test_python_reference_is_prose() -> None:
    paragraphs = python_reference().split("\n")
    assert len(paragraphs) > 800
    assert len(set(paragraphs)) == len(paragraphs)
    assert not [p for p in paragraphs if "::=" in p or p.startswith((" ", ">>>", "***", "+--"))]
    assert all(len(p.split()) >= 8 for p in paragraphs)
