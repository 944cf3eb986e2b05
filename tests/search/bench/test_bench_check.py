"""``bench check`` as a shell sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtuner_search.bench.record import Check, Shape
from kvtuner_search.cli.main import run
from tests.search.bench.ideal_server import cell, record, setup

ROOT = Path(__file__).resolve().parents[3]
CLAIMS = Path(__file__).parent / "adapter_report.json"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in ``tmp_path`` beside three records: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    asked = Shape(requests=8, concurrency=2, input_tokens=100, output_tokens=10)
    good = record([cell(setup(), asked, 2.0)], setup())
    Path("good.json").write_text(good.model_dump_json())
    Path("quick.json").write_text(record([cell(setup(), asked, 0.1)], setup()).model_dump_json())
    nowhere = good.environment.model_copy(update={"hardware": None})
    Path("nowhere.json").write_text(good.model_copy(update={"environment": nowhere}).model_dump_json())

    def command(*arguments: str) -> tuple[int, str, str]:
        code = run(["bench", "check", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_a_good_record_passes(check: Run) -> None:
    code, out, err = check("good.json")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "good.json: no figure is impossible",
        "  judged: 1 cells of Qwen2.5-7B on 1 x NVIDIA H200 (NVIDIA H200 Tensor Core GPU data sheet (rate with sparsity, halved))",
    ]


def test_figures_under_their_floor_fail_with_reasons(check: Run) -> None:
    code, out, err = check("quick.json")
    assert (code, err) == (1, "")
    assert out.startswith("quick.json: 5 figures are impossible\n")
    assert "this is 10 times faster" in " ".join(out.split())
    assert "  - tokens were counted as requested, not as returned\n" in out


def test_the_adapters_report_is_flagged(check: Run) -> None:
    code, out, err = check(str(CLAIMS))
    assert (code, err) == (1, "")
    assert "64 figures are impossible" in out
    assert (
        "judged: Qwen2.5-7B with TP=2 x PP=2 on 4 x NVIDIA GeForce RTX 4090 (NVIDIA Ada GPU Architecture white paper)"
        in out
    )
    for figure in ("231,321 tokens/s", "583.6 requests/s", "ttft mean 2.08, min 1.89"):
        assert figure in out
    assert out.count("is not the one named") == 1  # causes are said once, not for each of 64 figures
    assert "\nnot judged\n" in out


def test_json_has_every_violation_and_the_exit_code(check: Run) -> None:
    code, out, _ = check("--json", "good.json", str(CLAIMS))
    content = json.loads(out)
    assert code == content["exit_code"] == 1
    good, claimed = content["files"]
    assert (good["kind"], good["exit_code"], good["violations"], good["error"]) == ("record", 0, [], None)
    assert (claimed["kind"], claimed["exit_code"], len(claimed["violations"])) == ("report", 1, 64)
    assert set(claimed["violations"][0]) == {"rule", "where", "figure", "reason"}
    assert len(claimed["remarks"]) == 4


def test_what_a_run_found_itself_counts_too(check: Run) -> None:
    """A lie that only the requests show, e.g. a dropped connection, and a correctness check that failed."""
    content = json.loads(Path("good.json").read_text())
    lie = {"rule": "dropped", "where": "ttft", "figure": "3 requests", "reason": "the connection ended midway"}
    Path("lied.json").write_text(json.dumps(content | {"violations": [lie]}))
    code, out, _ = check("lied.json")
    assert code == 1
    assert "the connection ended midway" in out
    failed = [Check(name="likelihood", passed=False, detail="not finite").model_dump()]
    cells = [cell | {"speed": None} for cell in content["cells"]]
    Path("red.json").write_text(json.dumps(content | {"correctness": failed, "cells": cells}))
    code, out, _ = check("red.json")
    assert code == 1
    assert "not finite" in out


def test_unknown_hardware_does_not_pass_unseen(check: Run) -> None:
    code, out, _ = check("nowhere.json")
    assert code == 1
    assert "give it with --hardware" in " ".join(out.split())
    assert check("nowhere.json", "--hardware", "NVIDIA H200")[0] == 0
    code, out, _ = check("nowhere.json", "--hardware", "RTX 4090")
    assert code == 1
    assert "2 x" not in out
    assert "1 x NVIDIA GeForce RTX 4090" in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("{", "not valid JSON"),
        ("[]", "not a benchmark record"),
        ('{"format": "kvtuner-bench", "version": 99}', "version 99"),
        ('{"model": "m", "hardware": {}, "parallel": {}}', "hardware.gpus"),
        ('{"model": "x", "hardware": {"gpus": 1, "gpu": "RTX 4090"}, "parallel": {"tp": 1, "pp": 1}, "quantization": {"key_bits": 4, "value_bits": 4}}', "--model"),
    ],
)  # fmt: skip
def test_an_unreadable_file_is_one_line_and_the_others_are_judged(check: Run, content: str | None, said: str) -> None:
    if content is not None:
        Path("bad.json").write_text(content)
    code, out, err = check("bad.json", "quick.json", "good.json")
    assert code == 3
    assert len(err.splitlines()) == 1
    assert "bad.json" in err or "--model" in err
    assert said in err
    assert "quick.json: 5 figures are impossible" in out
    assert "good.json: no figure is impossible" in out


def test_a_model_can_be_named_for_a_report(check: Run) -> None:
    """The chips of four GPUs keep all 14 million weights of the reference model: then the adapter's times are no longer too short, but still flat."""
    content = json.loads(CLAIMS.read_text()) | {"model": "mine"}
    Path("mine.json").write_text(json.dumps(content))
    assert check("mine.json")[0] == 3
    code, out, _ = check("mine.json", "--json", "--model", str(ROOT / "kvtuner_search" / "models" / "reference"))
    [result] = json.loads(out)["files"]
    assert (code, result["judged"][:25]) == (1, "mine with TP=2 x PP=2 on ")
    rules = {violation["rule"] for violation in result["violations"]}
    assert "flat-latency" in rules
    assert "below-floor" not in rules


def test_hardware_that_cannot_be_used_is_a_usage_error(check: Run) -> None:
    code, out, err = check("good.json", "--hardware", "Accelerator X")
    assert (code, out) == (2, "")
    assert "add bandwidth and flops" in err


def test_judging_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom kvtuner_search.cli.main import run\n"
        f"code = run(['bench', 'check', {str(CLAIMS)!r}])\n"
        "heavy = [name for name in ('torch', 'transformers', 'optuna', 'datasets', 'plotly', 'numpy') if name in sys.modules]\n"
        "print('heavy:', *heavy)\nsys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_the_records_of_the_documentation_are_of_the_legacy_preset_and_possible(check: Run) -> None:
    files = sorted(map(str, (ROOT / "docs" / "records").glob("*.json")))
    assert len(files) == 2
    code, out, err = check(*files)
    assert (code, err) == (0, "")
    assert out.count("judged: 30 cells of qwen2.5-7b-shape on 1 x NVIDIA H200") == 2
