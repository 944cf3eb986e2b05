"""Tasks through the real lm-eval, on tasks of a local folder; and generation against the offline reference of a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.cli.main import run
from kvtuner_search.data.tasks import recall_prompts
from kvtuner_search.data.types import Sample
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.evaluation.generation import greedy
from kvtuner_search.evaluation.lm_eval_model import StoredLM
from kvtuner_search.evaluation.lm_eval_tasks import TaskOptions, _Items, _score, run_tasks
from kvtuner_search.evaluation.offline import open_profile
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.evaluation.statistics import paired_proportions
from kvtuner_search.evaluation.stored import Setting
from kvtuner_search.models.load import LoadedModel, ModelOptions, load_model
from kvtuner_search.models.runner import Runner
from kvtuner_search.progress import Reporter
from tests.serving.offline_packed import OfflinePacked

ROOT = Path(__file__).parents[3]
PROFILE = ROOT / "profiles" / "reference" / "reference-4.00bit.json"
QUIET = Reporter(quiet=True)
COARSE: Setting = (LayerSpec.parse("4-g64-asym/4-g64-asym"),) * 16
RAW: Setting = (LayerSpec(),) * 16

GSM = [
    ("Ann has 3 boxes with 4 pens each. How many pens has she?", "3 boxes of 4 pens are 3 * 4 = 12 pens.\n#### 12"),
    ("A bus has 20 seats and 13 riders. How many seats are free?", "20 - 13 = 7 seats are free.\n#### 7"),
    ("Bob reads 15 pages a day for 6 days. How many pages?", "15 * 6 = 90 pages.\n#### 90"),
    ("A cake is cut into 8 parts and 3 are eaten. How many are left?", "8 - 3 = 5 parts.\n#### 5"),
]
GSM_TASK = """
task: tiny_gsm
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/gsm_train.jsonl, test: {folder}/gsm_test.jsonl}}
output_type: generate_until
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], max_gen_toks: 12, do_sample: {sample}}}
num_fewshot: 1
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    regexes_to_ignore: [",", "(?s).*#### "]
filter_list:
  - name: strict-match
    filter:
      - {{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}
      - {{function: take_first}}
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
metadata: {{version: 1.0}}
"""
RECALL_TASKS = {
    "recall_generated": """
task: recall_generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/recall.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 10, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - name: code
    filter: [{{function: regex, regex_pattern: "([0-9]+)"}}, {{function: take_first}}]
metadata: {{version: 1.0}}
""",
    "recall_likelihood": """
task: recall_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/recall.jsonl}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
""",
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelOptions(dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks that reach for no network."""
    folder = tmp_path_factory.mktemp("tasks")

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("recall.jsonl", [{"prompt": p, "answer": a.strip()} for p, a in recall_prompts(5, 12, pairs=12)])
    rows = [{"question": q, "answer": a} for q, a in GSM]
    write("gsm_train.jsonl", rows[:2])
    write("gsm_test.jsonl", rows[2:])
    for name, text in RECALL_TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "tiny_gsm.yaml").write_text(GSM_TASK.format(folder=folder, sample="false"))
    sampled = GSM_TASK.format(folder=folder, sample="true").replace("tiny_gsm", "sampled_gsm")
    (folder / "sampled_gsm.yaml").write_text(sampled)
    return folder


def options(folder: Path, *names: str, limit: int | None = None, fewshot: int | None = None) -> TaskOptions:
    return TaskOptions(names, fewshot, limit, folder, batch_size=4)


def test_generation_is_that_of_the_servers_offline_reference() -> None:
    """Prompts of unequal length as one batch, against one at a time over the very rows that a server stores."""
    profile, centres = open_profile(PROFILE)
    runner = Runner(load_model(ModelOptions(dtype="bfloat16", device="cpu")))
    texts = [recall_prompts(seed, 1, pairs)[0][0] for seed, pairs in ((0, 4), (1, 9), (2, 6))]
    prompts = [runner.loaded.tokenizer(text)["input_ids"] for text in texts]
    assert len({len(prompt) for prompt in prompts}) == 3
    got = greedy(runner, tuple(profile.layer_specs()), centres, prompts, 8)
    reference = OfflinePacked(PROFILE, torch.bfloat16)
    for prompt, tokens in zip(prompts, got, strict=True):
        expected = reference.greedy(prompt, 8)
        sure = next(
            (i for i, margin in enumerate(expected.margins) if margin < 0.25), 8
        )  # logits; rounding may turn less
        assert sure >= 6  # the whole code at least
        assert tokens[:sure] == expected.tokens[:sure]


def test_a_batch_answers_as_each_prompt_alone_and_stops_on_its_own(loaded: LoadedModel) -> None:
    runner = Runner(loaded)
    prompts = [loaded.tokenizer(recall_prompts(s, 1, n)[0][0])["input_ids"] for s, n in ((3, 3), (4, 8))]
    assert greedy(runner, RAW, {}, prompts, 7) == [greedy(runner, RAW, {}, [p], 7)[0] for p in prompts]
    stopped = greedy(runner, RAW, {}, prompts, 7, lambda index, tokens: index == 0 and len(tokens) == 2)
    assert [len(tokens) for tokens in stopped] == [2, 7]
    generated = greedy(runner, COARSE, {}, prompts, 7)
    assert generated != greedy(runner, RAW, {}, prompts, 7)  # the answers come from what was stored


def test_likelihood_is_the_scorers(loaded: LoadedModel) -> None:
    runner = Runner(loaded)
    pairs = recall_prompts(6, 3, pairs=5)
    model = StoredLM(runner, COARSE, {}, batch_size=2)
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    samples = []
    for prompt, answer in pairs:
        head, whole = (tuple(loaded.tokenizer(text)["input_ids"]) for text in (prompt, prompt + answer))
        assert whole[: len(head)] == head
        samples.append(Sample("recall", whole, ((len(head), len(whole)),), is_task=True))
    scores = Scorer(runner, [samples]).score_all(COARSE, {})
    assert [value for value, _ in found] == pytest.approx([-value for value in scores.nll], rel=1e-4)
    assert [right for _, right in found] == scores.exact.tolist()


def test_flips_and_intervals_are_paired_with_the_16_bit_cache(loaded: LoadedModel, tasks: Path) -> None:
    found = run_tasks(
        loaded,
        [("coarse", COARSE, {}), ("raw", RAW, {})],
        options(tasks, "recall_generated", "recall_likelihood"),
        QUIET,
    )
    coarse, raw = ({(s.task, s.metric): s for s in scores} for scores in found)
    assert set(coarse) == {
        ("recall_generated", "exact_match,code"),
        ("recall_likelihood", "acc,none"),
        ("recall_likelihood", "perplexity,none"),
    }
    for key, score in raw.items():
        assert score.value == pytest.approx(score.baseline), key
        assert score.lost in (0, None)
    for key in (("recall_generated", "exact_match,code"), ("recall_likelihood", "acc,none")):
        score = coarse[key]
        assert score.samples == 12
        assert score.baseline > 0.9
        assert score.lost is not None
        assert score.gained is not None
        assert score.lost > 3
        assert score.value == pytest.approx(score.baseline + (score.gained - score.lost) / 12)
        interval = paired_proportions(score.lost, score.gained, 12)
        assert (score.ci_low, score.ci_high, score.method) == (interval.low, interval.high, "agresti-min")
        assert score.ci_high < 0
    perplexity = coarse["recall_likelihood", "perplexity,none"]
    assert perplexity.value > 1.5 * perplexity.baseline
    assert (perplexity.lost, perplexity.ci_low, perplexity.method) == (None, None, "none")


def test_few_shot_answers_that_are_generated_are_filtered_and_counted(loaded: LoadedModel, tasks: Path) -> None:
    one, two = (
        run_tasks(loaded, [("coarse", COARSE, {})], options(tasks, "tiny_gsm", fewshot=shots), QUIET)[0]
        for shots in (None, 2)
    )
    assert {score.metric for score in one} == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert [score.fewshot for score in one] == [1, 1]
    assert [score.fewshot for score in two] == [2, 2]
    assert one[0].digest != two[0].digest  # other prompts
    assert {score.samples for score in one} == {2}
    limited = run_tasks(loaded, [("raw", RAW, {})], options(tasks, "tiny_gsm", limit=1), QUIET)[0]
    assert {score.samples for score in limited} == {1}


def test_metrics_that_are_no_share_get_a_bootstrap_and_lower_may_be_better() -> None:
    base, ours = _Items(0.5, ["a", "b"], [0.25, 0.75]), _Items(0.75, ["a", "b"], [0.5, 1.0])
    score = _score(("task", "f1,none"), ours, base, version="1", fewshot=0, higher=True)
    assert (score.method, score.lost, score.ci_low, score.ci_high) == ("bootstrap", None, 0.25, 0.25)
    wrong, right = _Items(1.0, ["a"], [1]), _Items(0.0, ["a"], [0])
    score = _score(("task", "error,none"), wrong, right, version="1", fewshot=0, higher=False)
    assert (score.lost, score.gained) == (1, 0)
    corpus = _Items(31.4, ["a", "b"], [("x", "y"), ("x", "z")])
    assert _score(("task", "bleu,none"), corpus, corpus, version="1", fewshot=0, higher=True).method == "none"
    with pytest.raises(AssertionError, match="other prompts"):
        _score(("task", "acc,none"), base, ours._replace(prompts=["a", "c"]), version="1", fewshot=0, higher=True)


def test_what_cannot_be_measured_is_refused(loaded: LoadedModel, tasks: Path) -> None:
    with pytest.raises(DataError, match=r"only greedy decoding is measured.*do_sample"):
        run_tasks(loaded, [("raw", RAW, {})], options(tasks, "sampled_gsm"), QUIET)
    with pytest.raises(DataError, match=r"has no task 'no_such_task'.*--task-folder"):
        run_tasks(loaded, [("raw", RAW, {})], options(tasks, "no_such_task"), QUIET)
    with pytest.raises(DataError, match="does not exist"):
        run_tasks(loaded, [("raw", RAW, {})], options(tasks / "nowhere", "tiny_gsm"), QUIET)
    (tasks / "lost.yaml").write_text(
        RECALL_TASKS["recall_generated"].replace("recall_generated", "lost").format(folder="/no")
    )
    with pytest.raises(DataError, match=r"cannot run lost: .*--task-folder"):
        run_tasks(loaded, [("raw", RAW, {})], options(tasks, "lost"), QUIET)


BROKEN = {  # what is wrong -> the line that it takes the place of, and what is said
    "empty choice": ("doc_to_choice: [maybe, never]", 'doc_to_choice: ["", never]', "IndexError: string index out of range"),
    "unknown field": ('doc_to_text: "{{q}}"', 'doc_to_text: "{{q.a.b}}"', "UndefinedError"),
    "no such metric": ("metric: acc", "metric: no_such_metric", "KeyError"),
    "code that fails": ("doc_to_target: 0", "doc_to_target: !function own.fails", "ZeroDivisionError: integer"),
    "no such output": ("output_type: multiple_choice", "output_type: telepathy", "telepathy"),
    "no YAML": ("test_split: test", "test_split: [test", "has no task 'broken'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_task_is_named_in_one_line(
    fault: str, loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (
        f"task: NAME\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\noutput_type: multiple_choice\n"
        'test_split: test\ndoc_to_text: "{{q}}"\ndoc_to_choice: [maybe, never]\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n'
    )
    (tmp_path / "rows.jsonl").write_text('{"q": "what is 0"}\n{"q": "what is 1"}\n')
    (tmp_path / "own.py").write_text("def fails(doc):\n    return 1 // 0\n")
    line, wrong, said = BROKEN[fault]
    assert line in good
    (tmp_path / "sound.yaml").write_text(good.replace("NAME", "sound"))
    assert run_tasks(loaded, [("raw", RAW, {})], options(tmp_path, "sound"), QUIET)[0][0].samples == 2
    (tmp_path / "broken.yaml").write_text(good.replace("NAME", "broken").replace(line, wrong))
    with pytest.raises(DataError) as caught:
        run_tasks(loaded, [("raw", RAW, {})], options(tmp_path, "sound", "broken"), QUIET)
    message = str(caught.value)
    assert "broken" in message.split(": ", 1)[0] or "'broken'" in message
    assert said in message
    assert "\n" not in message


def test_memory_and_our_own_errors_are_no_tasks(
    loaded: LoadedModel, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    def fails(*_: object, **__: object) -> None:
        raise OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StoredLM, "loglikelihood", fails)
    with pytest.raises(OutOfMemoryError):
        run_tasks(loaded, [("raw", RAW, {})], options(tasks, "recall_likelihood"), QUIET)


def test_the_command_shows_both_tables(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["evaluate", "--uniform", "4-g64-asym/4-g64-asym", "--data", "list", "--samples", "2", "--quiet"]
    chosen = ["--tasks", "recall_generated", "--task-folder", str(tasks), "--limit", "4"]
    assert run([*common, *chosen, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert {m["metric"] for m in found["measures"]} == {"kl", "nll", "accuracy"}
    score = found["tasks"][0]
    assert (score["task"], score["samples"], score["fewshot"]) == ("recall_generated", 4, 0)
    assert run([*common, *chosen]) == 0
    shown = capsys.readouterr().out
    assert "recall_generated" in shown
    assert "lost" in shown


def test_options_of_tasks_need_a_task_and_tasks_need_lm_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "--uniform", "16/16", "--limit", "3"]) == 2
    assert "--tasks" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["evaluate", "--uniform", "16/16", "--tasks", "gsm8k"]) == UsageError.exit_code
    assert "pip install 'kvtuner-search[eval]'" in capsys.readouterr().err
