"""Environment variables, help, debug, completion and streams of the commands for profiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtuner_search.cli.main import COMMANDS, cli, run
from kvtuner_search.errors import ExitCode
from tests.search.profile_factory import measure, write

K8V8, K8V4 = "8-g64-asym/8-g64-asym", "8-g64-asym/4-g64-asym"
ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "old.json", K8V8), write(tmp_path / "new.json", K8V4, quality=[measure(value=0.02)])


def test_variables_set_options(command: Run, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNER_DIFF_FAIL_ON", "warning")
    assert command("diff", *files)[0] == 1
    assert command("diff", *files, "--fail-on", "error")[0] == 0, "the command line wins"
    monkeypatch.setenv("KVTUNER_DIFF_FAIL_ON", "")
    assert command("diff", *files)[0] == 0, "empty is unset"
    monkeypatch.setenv("KVTUNER_JSON", "1")
    for arguments in (["diff", *files], ["check", files[0]], ["show", files[0]]):
        assert json.loads(command(*arguments)[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("KVTUNER_DIFF_FAIL_ON", "sometimes"),
        ("KVTUNER_DIFF_MAX_BYTES_PER_TOKEN", "many"),
        ("KVTUNER_DIFF_MAX_LOSS_INCREASE", "nan"),
        ("KVTUNER_DIFF_MEMORY", "lots"),
        ("KVTUNER_DIFF_FORMAT", "xml"),
        ("KVTUNER_JSON", "perhaps"),
        ("KVTUNER_DEBUG", "perhaps"),
    ],
)
def test_unparsable_variables_are_refused(
    command: Run, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    code, out, _ = command("diff", *files)
    assert (code, out) == (2, "")


def test_a_variable_cannot_switch_the_gate_off(
    command: Run, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNER_DIFF_RULES", "1")
    assert command("diff", *files, "--fail-on", "warning")[0] == 1


@pytest.mark.parametrize("name", ["show", "check", "diff", "import", "export"])
def test_help_names_each_variable_and_the_exit_codes(command: Run, name: str) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    text = " ".join(out.split())
    assert "Exit codes: 0" in text
    loaded = cli.get_command(None, name)  # type: ignore[arg-type]
    assert loaded is not None
    for parameter in loaded.params:
        if getattr(parameter, "show_envvar", False):
            variable = parameter.envvar or f"KVTUNER_{name}_{parameter.name}".upper()
            assert str(variable) in text


def test_debug_shows_the_traceback(command: Run) -> None:
    with pytest.raises(Exception, match="does not exist"):
        run(["--debug", "show", "missing.json"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(command: Run, shell: str) -> None:
    code, out, _ = command("completion", shell)
    assert code == 0
    assert "_KVTUNER_SEARCH_COMPLETE" in out


def test_completion_works_without_importing_commands(tmp_path: Path) -> None:
    environment = os.environ | {
        "_KVTUNER_SEARCH_COMPLETE": "bash_complete",
        "COMP_WORDS": "kvtuner-search ",
        "COMP_CWORD": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    program = (
        "import sys, atexit; from kvtuner_search.cli.main import main;"
        "atexit.register(lambda: print(sorted(m for m in sys.modules if m.startswith('kvtuner_search.cli.')), file=sys.stderr));"
        "main([])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert [line.partition(",")[2] for line in result.stdout.splitlines()] == list(COMMANDS)
    assert result.stderr.strip() == "['kvtuner_search.cli.lazy', 'kvtuner_search.cli.main']"


def test_output_that_cannot_be_encoded_does_not_end_the_command(files: tuple[Path, Path]) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    arguments = [sys.executable, "-m", "kvtuner_search", "diff", *map(str, files)]
    result = subprocess.run(arguments, env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")


def test_the_documented_exit_codes_are_the_exit_codes() -> None:
    rows = [
        line.split("|")[1].strip()
        for line in (ROOT / "docs" / "cli.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    assert [int(cell) for cell in rows if cell.isdigit()] == [int(code) for code in ExitCode]
