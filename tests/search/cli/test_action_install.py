"""What the composite action installs: by hash, isolated, complete, and nothing of the workspace."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tests.search.cli.action import BASH, K8V4, K8V8, ROOT, STEPS, command_line, shim, step_environment
from tests.search.profile_factory import write

LOCK = ROOT / "requirements" / "action.txt"


def pinned() -> dict[str, tuple[str, list[str]]]:
    """What the action installs: name -> (version, hashes)."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in re.sub(r"\\\n", " ", LOCK.read_text()).splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([0-9.]+)((?: +--hash=sha256:[0-9a-f]{64})+) *", line)
            assert match, line
            found[match[1]] = (match[2], re.findall(r"sha256:([0-9a-f]{64})", match[3]))
    return found


def installing(tmp_path: Path) -> list[list[str]]:
    """Run the step Install with an interpreter that only notes what it is asked for, where, and with which variables."""
    log = tmp_path / "log"
    fake = (
        f'{{ echo "in $PWD"; env | grep ^PYTHON | sort; printf "%s\\n" "$@"; echo; }} >> {shlex.quote(str(log))}\n'
        'case "$*" in *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;; esac'
    )
    shim(tmp_path / "bin" / "python3", fake)
    (tmp_path / "temp dir").mkdir()
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RUNNER_TEMP": str(tmp_path / "temp dir"),
        "PYTHONPATH": str(tmp_path),
        "PYTHONHOME": str(tmp_path),
        "PYTHONSTARTUP": "x",
        **step_environment(STEPS["Install"], {}, "/action path"),
    }
    script = tmp_path / "install.sh"
    script.write_text(STEPS["Install"]["run"])
    subprocess.run([*BASH, script], env=environment, check=True, capture_output=True, cwd=tmp_path)
    return [call.splitlines() for call in log.read_text().rstrip().split("\n\n")]


def test_installing_imports_nothing_from_the_workspace(tmp_path: Path) -> None:
    calls = installing(tmp_path)
    assert len(calls) == 3
    for folder, *call in calls:
        assert folder == f"in {tmp_path / 'temp dir'}", "not in the workspace, where `-m` would look first"
        assert call[:3] == ["PYTHONNOUSERSITE=1", "PYTHONSAFEPATH=1", "-I"]
    assert [call[4:6] for call in calls] == [["-m", "venv"], ["-m", "pip"], ["-m", "pip"]]


def test_each_file_that_is_fetched_has_a_hash_and_the_rest_is_built_from_the_action(tmp_path: Path) -> None:
    _, fetch, build = installing(tmp_path)
    assert {"--require-hashes", "--only-binary", "--no-deps"} <= set(fetch)
    assert fetch[fetch.index("-r") + 1] == "/action path/requirements/action.txt"
    assert not [word for word in fetch if "==" in word or ">=" in word]
    assert {"--no-index", "--no-build-isolation", "--no-deps"} <= set(build)
    assert build[-1] == "/action path"


def test_what_is_pinned_is_what_the_project_asks_for_and_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = {
        Requirement(text).name: Requirement(text)
        for text in [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    }
    found = pinned()
    roots = ["click", "pydantic", "rich", "hatchling"]
    assert set(roots) <= set(found)
    for name in set(found) & set(asked):
        assert asked[name].specifier.contains(found[name][0]), name
    assert closure(roots) <= set(found), "--no-deps installs nothing else"
    for name, (_, hashes) in found.items():
        assert len(hashes) == len(set(hashes)) >= 2, f"{name}: the wheel and the source at least"


def closure(requirements: list[str]) -> set[str]:
    """Distributions that installing these brings, as pip would resolve them here."""
    found: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        if requirement.name.lower() in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(requirement.name.lower().replace("_", "-"))
        todo += [Requirement(text) for text in importlib.metadata.requires(requirement.name) or []]
    return found


def test_what_the_action_installs_is_enough(tmp_path: Path) -> None:
    """Every form of diff works where only these distributions can be imported."""
    site = tmp_path / "site"
    site.mkdir()
    for name in pinned():
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if not top.startswith(".") and not (site / top).exists():
                (site / top).symlink_to(
                    Path(str(file.locate())).parents[len(file.parts) - 1] / top
                    if len(file.parts) > 1
                    else file.locate()
                )
    run = tmp_path / "kvtuner-search"
    shim(run, command_line(f"{site}:{ROOT}:{ROOT / 'kernels'}", flags="-S"))
    old, new = write(tmp_path / "old.json", K8V8), write(tmp_path / "new.json", K8V4)
    for style in ("text", "json", "markdown", "github", "junit"):
        result = subprocess.run([run, "diff", old, new, "--format", style], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
    probe = subprocess.run(
        [sys.executable, "-S", "-c", "import torch"], env={"PYTHONPATH": str(site)}, capture_output=True
    )
    assert probe.returncode != 0, "the folder really has nothing else"
