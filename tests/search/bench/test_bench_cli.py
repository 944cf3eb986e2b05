"""The ``bench`` group: its default command, help, options, output and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_server import Fake
from small_runs import PROFILE, Start

from kvtuner_search.bench import files, presets, steps
from kvtuner_search.bench.presets import CellPlan
from kvtuner_search.bench.record import Shape
from kvtuner_search.cli.bench import SUBCOMMANDS
from kvtuner_search.cli.main import run
from kvtuner_search.errors import UsageError

HEAVY = ("torch", "transformers", "optuna", "datasets", "plotly", "triton")


@pytest.fixture
def server(fake: Start) -> Fake:
    return fake()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset of two tiny cells."""
    shape = Shape(requests=4, concurrency=2, input_tokens=20, output_tokens=4)
    monkeypatch.setitem(presets.PRESETS, "quick", [CellPlan("throughput", shape), CellPlan("long", shape)])


def bench(*arguments: str) -> int:
    return run(["bench", *arguments])


def test_without_a_subcommand_it_runs(server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--url", server.url, "--profile", str(PROFILE), "--folder", str(tmp_path / "run"), "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((tmp_path / "run" / "record.json").read_text())
    assert "throughput 20 in 4 out x2" in shown.err, "progress goes to stderr"
    assert bench("run", "--url", server.url, "--folder", str(tmp_path / "again"), "--json", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_tables_are_printed_and_record_and_report_are_written(
    server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tmp_path / "out" / "record.json", tmp_path / "out" / "page.html"
    chosen = ("--output", str(paths[0]), "--report", str(paths[1]), "--section", "throughput", "--slo", "success=0.5")
    assert bench("--url", server.url, "--folder", str(tmp_path / "run"), "--quiet", *chosen) == 0
    out = capsys.readouterr().out
    assert "throughput" in out
    record = files.read(paths[0])
    assert [cell.section for cell in record.cells] == ["throughput"]
    assert record == files.read(tmp_path / "run" / "record.json")
    page = paths[1].read_text()
    assert page.lower().startswith("<!doctype html>")
    assert str(tmp_path) not in record.command


def test_an_objective_that_is_missed_and_a_floor_that_is_not_are_exit_code_1(server: Fake, tmp_path: Path) -> None:
    at = ("--url", server.url, "--quiet", "--json")
    assert bench(*at, "--folder", str(tmp_path / "a"), "--slo", "ttft_p99=0.001") == 1
    (gate,) = files.read(tmp_path / "a" / "record.json").gates
    assert (gate.name, gate.passed) == ("ttft_p99", False)
    assert bench(*at, "--folder", str(tmp_path / "b"), "--hardware", "slow,bandwidth=1e8,flops=1e12,on_chip=1") == 1
    record = files.read(tmp_path / "b" / "record.json")
    assert {violation.rule for violation in record.violations} == {"below-floor"}


def test_a_failed_check_is_exit_code_1_without_speed(server: Fake, tmp_path: Path) -> None:
    server.garbled = True
    assert bench("--url", server.url, "--folder", str(tmp_path / "run"), "--quiet", "--json") == 1
    assert files.read(tmp_path / "run" / "record.json").cells == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--preset", "huge"), 2, "there is no preset 'huge': choose from quick, legacy, full"),
        (("--preset", "seed"), 2, "the preset 'seed' is called 'legacy': give --preset legacy"),
        (("--section", "batch"), 2, "preset quick has no table batch"),
        (("--slo", "speed=1"), 2, "unknown"),
        (("--hardware", "toaster"), 2, "not in the table"),
        (("--resume", "--overwrite"), 2, "exclude each other"),
        (("--profile", "/nowhere.json"), 3, "nowhere.json"),
        (("--model-path", "/nowhere"), 3, "does not exist"),
        (("--", "--tp", "2"), 2, "options after -- are for a server that bench starts"),
        (("--section", "long", "--cross-check"), 2, "--cross-check needs a throughput cell"),
    ],
)
def test_bad_input_is_one_line_with_its_code(
    arguments: tuple[str, ...], code: int, said: str, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--url", server.url, "--folder", str(tmp_path / "run"), *arguments) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert server.streams == 0


def test_a_server_that_is_not_there_is_exit_code_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--url", "http://127.0.0.1:9", "--folder", str(tmp_path / "a"), "--quiet") == 5
    assert "is the server up?" in capsys.readouterr().err
    assert bench("--folder", str(tmp_path / "b"), "--quiet") == 2
    assert "give --url of a running server, or --model-path to start one" in capsys.readouterr().err


def test_options_come_from_the_environment(
    server: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVTUNER_BENCH_URL", server.url)
    monkeypatch.setenv("KVTUNER_BENCH_PRESET", "huge")
    assert bench("--folder", str(tmp_path / "run")) == 2
    assert "no preset 'huge'" in capsys.readouterr().err


def test_help_has_the_options_and_the_subcommands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom kvtuner_search.cli.main import run\nassert run(['bench', '--help']) == 0\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"
    for name in ("--url", "--preset", "KVTUNER_BENCH_PRESET", "[-- SGLANG OPTIONS]", *SUBCOMMANDS):
        assert name in done.stdout


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(name, "--help") == 0
    assert f"kvtuner-search bench {name}" in capsys.readouterr().out


def test_a_measurement_imports_no_torch(server: Fake, tmp_path: Path) -> None:
    """The load generator shares its machine with the server: it must start at once and stay small."""
    arguments = [
        "bench",
        "--profile",
        str(PROFILE),
        "--model-path",
        "reference",
        "--url",
        server.url,
        "--folder",
        str(tmp_path / "run"),
        "--section",
        "ttft",
        "--quiet",
        "--json",
    ]
    code = (
        f"import sys\nfrom kvtuner_search.cli.main import run\nassert run({arguments!r}) == 0\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["heavy:"], done.stderr


def test_presets_have_every_table_and_no_cell_twice() -> None:
    for name in ("legacy", "full"):
        chosen = steps.choose(name)
        assert {step.section for step in chosen} == {"ttft", "throughput", "long", "batch", "memory"}
        keys = [(step.section, tuple(step.shape.model_dump().values())) for step in chosen]
        assert len(set(keys)) == len(keys)
    with pytest.raises(UsageError):
        steps.choose("none")
