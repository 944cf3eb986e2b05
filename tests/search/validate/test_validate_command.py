"""The whole command against fake servers: what it measures, writes and returns, and how it stops and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.cli.main import run
from kvtuner_search.profile.canonical import load, save, seal
from tests.search.servers.fake_base import CAPACITY
from tests.search.servers.fake_sglang import Fake

ROOT = Path(__file__).parents[3]
PROFILE = ROOT / "profiles" / "reference" / "reference-4.00bit.json"
SMALL = (
    "--data", "list", "--samples", "3", "--length", "160", "--task", "list", "--task-prompts", "30", "--greedy-prompts", "3", "--greedy-tokens",
    "6", "--no-offline", "--max-accuracy-drop", "none", "--quiet",
)  # fmt: skip
REQUESTS = 3 + 30 + 3 + 3
Start = Callable[..., Fake]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The profile with its transforms and without a validation, where it may be written to."""
    profile = load(PROFILE)
    assert profile.transforms is not None
    (tmp_path / profile.transforms.file).write_bytes(PROFILE.with_suffix(".safetensors").read_bytes())
    save(seal(profile.model_dump(mode="json", exclude={"digest", "validation"})), tmp_path / "p.json")
    return tmp_path / "p.json"


def validate(profile: Path, folder: Path, *arguments: str) -> int:
    return run(["validate", "--profile", str(profile), "--folder", str(folder), *SMALL, *arguments])


def block_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "validation.json").read_text())
    return content


def at(baseline: Fake, ours: Fake) -> tuple[str, ...]:
    return ("--baseline-url", baseline.url, "--url", ours.url)


def profile_server(fake: Start, **more: Any) -> Fake:
    return fake(profile=str(PROFILE), **{"as_stored": True, **more})


def test_two_servers_are_started_measured_and_written_into_the_profile(
    copied: Path, tmp_path: Path, server_python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load(copied)
    save(before, tmp_path / "before.json")
    assert validate(copied, tmp_path / "run", "--server-python", server_python, "--write", "--json") == 0
    block = json.loads(capsys.readouterr().out)
    assert block == block_of(tmp_path / "run")
    assert block["verdict"] == "pass"
    assert block["server"]["started"] is True
    assert block["versions"]["sglang"] == "0.5.14"
    assert block["semantics"] == {
        "method": "as-stored-extend", "tokens": 18, "difference": 0.0, "baseline_difference": 0.0,
    }  # fmt: skip
    (nll,) = block["likelihood"]
    assert nll["value"] - nll["baseline"] == pytest.approx(0.01)
    assert (nll["ci_low"], nll["ci_high"]) == pytest.approx((0.01, 0.01))
    assert block["greedy"]["identical"] == 3
    assert (block["capacity"]["tokens"], block["capacity"]["ratio"]) == (4 * CAPACITY, 4.0)
    assert block["capacity"]["predicted"] == 4.0
    assert str(tmp_path) not in json.dumps(block), "a profile names no machine's folders"

    after = load(copied)
    assert after.digest != before.digest
    assert after.validation is not None
    assert after.validation.profile_digest == before.digest
    assert run(["diff", str(tmp_path / "before.json"), str(copied)]) == 0
    assert run(["check", str(copied)]) == 0
    capsys.readouterr()
    assert run(["show", str(copied)]) == 0
    shown = capsys.readouterr().out
    assert "validation on a server: pass" in shown
    assert "200,000 tokens against 50,000: 4.0000x, predicted 4.0000x" in shown
    assert run(["show", str(copied), "--html", str(tmp_path / "page.html")]) == 0
    assert "<h2>Validation on a server: pass</h2>" in (tmp_path / "page.html").read_text()


def test_a_threshold_that_does_not_hold_is_exit_code_1(
    fake: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = at(fake(), profile_server(fake))
    assert validate(PROFILE, tmp_path / "run", *servers, "--max-nll-increase", "0.009") == 1
    out = capsys.readouterr().out
    assert "validation on a server: fail" in out
    assert "FAIL" in next(line for line in out.splitlines() if line.startswith("nll.list"))
    assert validate(PROFILE, tmp_path / "run", *servers, "--resume", "--max-nll-increase", "none") == 0
    assert "nll.list" not in capsys.readouterr().out


def test_both_servers_get_the_same_prompts_and_empty_caches(fake: Start, tmp_path: Path) -> None:
    baseline, ours = fake(), profile_server(fake)
    assert validate(PROFILE, tmp_path / "run", *at(baseline, ours), "--concurrency", "1") == 0
    assert len(baseline.asked) == len(ours.asked) == REQUESTS
    assert baseline.asked == ours.asked
    assert baseline.flushed == ours.flushed == 4


def test_quantized_weights_are_not_compared_with_offline(fake: Start, tmp_path: Path) -> None:
    servers = at(fake(quantization="awq"), profile_server(fake, quantization="awq"))
    assert validate(PROFILE, tmp_path / "run", *servers, "--offline") == 0
    block = block_of(tmp_path / "run")
    assert block["offline"] == []
    assert "not compared with the offline evaluation: the weights are quantized (awq)" in block["notes"]
    assert "the server calls its model model" in block["notes"]


def test_greedy_differences_are_counted(fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FLIP", "5")
    assert validate(PROFILE, tmp_path / "run", *at(fake(), profile_server(fake)), "--min-agreement", "0.99") == 1
    block = block_of(tmp_path / "run")
    assert block["greedy"]["identical"] == 0
    assert max(block["greedy"]["first_divergence"]) < 5
    assert [c["name"] for c in block["checks"] if not c["passed"]] == ["greedy"]


def test_a_server_without_as_stored_extend_is_scored_token_by_token(fake: Start, tmp_path: Path) -> None:
    ours = profile_server(fake, as_stored=False)
    assert validate(PROFILE, tmp_path / "run", *at(fake(), ours)) == 0
    block = block_of(tmp_path / "run")
    assert block["semantics"]["method"] == "token-by-token"
    assert block["likelihood"][0]["value"] - block["likelihood"][0]["baseline"] == pytest.approx(0.01)
    steps = [len(body["input_ids"]) for body in ours.asked if "token_ids_logprob" in body]
    longest = max(steps)
    assert set(range(1, longest + 1)) <= set(steps)
    assert all("logprob_start_len" not in body for body in ours.asked)
    assert "decode-semantics" not in [check["name"] for check in block["checks"]]


@pytest.mark.parametrize("info", [{"page_size": 64}, {"disable_radix_cache": True}])
def test_where_that_cannot_be_done_the_server_is_refused(
    fake: Start, tmp_path: Path, info: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = profile_server(fake, as_stored=False, **info)
    assert validate(PROFILE, tmp_path / "run", *at(fake(**info), ours)) == 2
    assert "start it with --kvtuner-as-stored" in capsys.readouterr().err
    assert ours.asked == []


def test_a_cache_that_loses_rows_is_no_sample(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvtuner_search.validate.measure._PAUSE", 0.0)
    ours = profile_server(fake, as_stored=False)
    ours.fault = {"cached_tokens": 0}
    assert validate(PROFILE, tmp_path / "run", *at(fake(), ours)) == 5
    assert "the prefix cache held 0 of 1 tokens" in capsys.readouterr().err


def test_servers_are_taken_for_what_they_say(fake: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock, ours = fake(), profile_server(fake)
    other = fake(profile=str(PROFILE.with_name("reference-3.25bit.json")), as_stored=True)
    for number, (baseline, profiled, code, reason) in enumerate(
        [
            (ours, ours, 4, "the baseline must be a stock server"),
            (stock, stock, 4, "serves no profile"),
            (stock, other, 4, "serves a profile with digest"),
            (fake(dtype="float16"), ours, 2, "the baseline server has dtype float16, the profile's auto"),
            (fake(version=5), ours, 5, "/server_info says version=5"),
        ]
    ):
        assert validate(PROFILE, tmp_path / str(number), *at(baseline, profiled)) == code
        assert reason in capsys.readouterr().err
    assert ours.asked == other.asked == [], "each is refused before it is asked anything"


def test_a_profile_of_another_model_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qwen = ROOT / "profiles" / "qwen2.5-7b" / "qwen2.5-7b-kv4.json"
    assert validate(qwen, tmp_path / "run", "--server-python", "no-such-python") == 4
    assert "belongs to another model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("python", "reason"), [("no-such-python", "cannot be run"), (sys.executable, "has no SGLang: install")]
)
def test_an_environment_without_sglang_is_a_usage_error(
    tmp_path: Path, python: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(PROFILE, tmp_path / "run", "--server-python", python) == 2
    assert reason in capsys.readouterr().err


def test_a_failure_ends_the_run_and_resuming_asks_only_for_the_rest(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvtuner_search.validate.measure._PAUSE", 0.0)
    baseline, ours = fake(), profile_server(fake)
    ours.fault = {"status": 404}
    assert validate(PROFILE, tmp_path / "run", *at(baseline, ours)) == 5
    error = capsys.readouterr().err
    assert "failed 3 times, at last" in error
    assert "answered 404" in error
    assert "--resume" in error
    assert len(baseline.asked) == REQUESTS
    assert not (tmp_path / "run" / "validation.json").exists()
    ours.fault = {}
    assert validate(PROFILE, tmp_path / "run", *at(baseline, ours)) == 2, "neither --resume nor --overwrite"
    assert validate(PROFILE, tmp_path / "run", *at(baseline, ours), "--resume") == 0
    assert len(baseline.asked) == REQUESTS
    assert any("requests to the profile's server failed" in note for note in block_of(tmp_path / "run")["notes"])


def test_answers_of_another_server_are_not_mixed(
    fake: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, ours = fake(), profile_server(fake)
    assert validate(PROFILE, tmp_path / "run", *at(baseline, ours)) == 0
    journal = tmp_path / "run" / "profile.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    ours.info["attention_backend"] = "other"
    assert validate(PROFILE, tmp_path / "run", *at(baseline, ours), "--resume") == 2
    assert "answers of a server with other attention_backend" in capsys.readouterr().err


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    folder = tmp_path / "private" / "gsm8k"
    folder.mkdir(parents=True)
    for name, count in (("train", 2), ("test", 520)):
        rows = [{"question": f"{name} {i}?", "answer": f"So.\n#### {i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def solve(tokenizer: Any, wrong: set[int]) -> Callable[[list[int]], list[int] | None]:
    """Answers to these questions, right but for some."""

    def reply(prompt: list[int]) -> list[int] | None:
        before, _, last = tokenizer.decode(prompt).rpartition("Question: test ")
        if not before:
            return None  # another task
        number = int(last.partition("?")[0])
        text = f" Easy.\n#### {number + (number in wrong)}"
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    return reply


def test_500_questions_of_gsm8k_are_paired_between_the_servers(fake: Start, tmp_path: Path, gsm8k: Path) -> None:
    from transformers import AutoTokenizer

    from kvtuner_search.models.reference_model import reference_model_path

    tokenizer = AutoTokenizer.from_pretrained(reference_model_path())
    baseline, ours = fake(), profile_server(fake)
    baseline.reply, ours.reply = solve(tokenizer, set(range(100))), solve(tokenizer, set(range(5, 115)))
    options = ("--task", f"gsm8k:{gsm8k}#items=500#shots=2#tokens=60", "--concurrency", "64")
    assert validate(PROFILE, tmp_path / "run", *at(baseline, ours), *options) == 0
    block = block_of(tmp_path / "run")
    task = next(task for task in block["tasks"] if task["data"].startswith("gsm8k"))
    assert task["data"] == "gsm8k#items=500#shots=2#tokens=60"
    assert (task["samples"], task["baseline"], task["value"], task["lost"], task["gained"]) == (500, 0.8, 0.78, 15, 5)
    assert task["ci_low"] == pytest.approx(-0.0383, abs=1e-3)
    assert task["ci_high"] == pytest.approx(-0.0016, abs=1e-3)
    assert "private" not in json.dumps(block), "a profile names no machine's folders"
    asked = [body["sampling_params"] for body in ours.asked if "\nQuestion:" in body["sampling_params"].get("stop", [])]
    assert asked == [{"temperature": 0, "max_new_tokens": 60, "stop": ["\nQuestion:"]}] * 500
    assert not any("were cut off at" in note for note in block["notes"])


def test_answers_that_were_cut_stand_in_the_notes(fake: Start, tmp_path: Path, gsm8k: Path) -> None:
    servers = at(fake(), profile_server(fake))
    task = f"gsm8k:{gsm8k}#items=4#shots=0#tokens=3"
    assert validate(PROFILE, tmp_path / "run", *servers, "--task", task, "--max-accuracy-drop", "none") == 0
    notes = block_of(tmp_path / "run")["notes"]
    for server in ("stock", "profile's"):
        assert (
            f"4 of 4 answers of the {server} server to gsm8k#items=4#shots=0#tokens=3 were cut off at 3 tokens" in notes
        )


def test_the_stock_servers_answers_serve_other_profiles_too(
    fake: Start, tmp_path: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, ours = fake(), profile_server(fake)
    assert validate(PROFILE, tmp_path / "first", *at(baseline, ours)) == 0
    other = fake(profile=str(copied), as_stored=True)
    borrowed = ("--baseline-from", str(tmp_path / "first"))
    assert validate(copied, tmp_path / "second", "--url", other.url, *borrowed, "--task-prompts", "29") == 2
    assert "first holds a run with other prompts: name one with the same options" in capsys.readouterr().err
    assert validate(copied, tmp_path / "second", "--url", other.url, *borrowed) == 0
    assert (len(baseline.asked), len(other.asked)) == (REQUESTS, REQUESTS)
    first, second = (block_of(tmp_path / name) for name in ("first", "second"))
    assert second["profile_digest"] == first["profile_digest"], "the same layers, without a validation"
    assert second["likelihood"] == first["likelihood"]
    assert "the stock server's answers are those of an earlier run with the same prompts and options" in second["notes"]
    assert validate(copied, tmp_path / "third", "--url", other.url, "--baseline-from", str(tmp_path)) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--max-path-difference", "-1", "neither a number from 0 on nor auto nor none"),
        ("--max-nll-increase", "auto", "neither a number from 0 on nor none"),
    ],
)
def test_thresholds_are_numbers_none_or_auto(
    tmp_path: Path, option: str, value: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(PROFILE, tmp_path / "run", option, value) == 2
    assert reason in capsys.readouterr().err


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ignore_interrupts() -> None:
    """What a shell does to what it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def heed_interrupts() -> None:
    """As in the foreground, wherever these tests run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("number", "before"),
    [(signal.SIGINT, heed_interrupts), (signal.SIGTERM, ignore_interrupts)],
    ids=["Ctrl-C", "kill of a background job"],
)
def test_a_stopped_run_leaves_no_server_and_goes_on(
    tmp_path: Path,
    server_python: str,
    number: signal.Signals,
    before: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, folder = tmp_path / "asked", tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "kvtuner_search",
        "validate",
        "--profile",
        str(PROFILE),
        "--folder",
        str(folder),
        *SMALL,
    ]
    command += ["--server-python", server_python, "--concurrency", "2"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "FAKE_LOG": str(log), "FAKE_SLOW": "0.2",
        "FAKE_PIDS": str(tmp_path / "pids"),
    }  # fmt: skip
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before
    ) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and len(log.read_text().splitlines()) > 6) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "interrupted" in error
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(map(running, pids))
    answered = len((folder / "baseline.jsonl").read_text().splitlines()) - 1
    assert 1 <= answered < REQUESTS
    log.unlink()
    monkeypatch.setenv("FAKE_LOG", str(log))
    assert validate(PROFILE, folder, "--server-python", server_python, "--resume") == 0
    assert len(log.read_text().splitlines()) == 2 * REQUESTS - answered
