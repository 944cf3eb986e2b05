"""The pre-commit hook, and scripts/diff_profiles: what they run is run here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtuner_search.profile.canonical import canonical_json
from tests.search.cli.action import K8V4, K8V8, ROOT, command_line, shim
from tests.search.profile_factory import measure, profile, write

HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}


@pytest.mark.parametrize(
    ("name", "checked"),
    [
        ("profiles/a.json", True),
        ("deploy/profiles/qwen/a.json", True),
        ("profiles/schema/v1.json", False),
        ("profiles/a.yaml", False),
        ("other/a.json", False),
    ],
)
def test_the_hook_takes_profiles(name: str, checked: bool) -> None:
    hook = HOOKS["kvtuner-profile-check"]
    assert hook["types"] == ["json"]
    assert (re.search(hook["files"], name) is not None) is checked


def test_the_hook_runs_check(tmp_path: Path) -> None:
    shim(tmp_path / "bin" / "kvtuner-search", command_line())
    good, bad = write(tmp_path / "good.json", K8V8), tmp_path / "bad.json"
    bad.write_text("{}")
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    entry = shlex.split(HOOKS["kvtuner-profile-check"]["entry"])

    def hook(*arguments: object) -> int:
        return subprocess.run(
            [*entry, *map(str, arguments)], env=environment, cwd=tmp_path, capture_output=True
        ).returncode

    assert hook(good) == 0
    assert hook(good, bad) == 3
    unproven = write(tmp_path / "unproven.json", K8V8, quality=[])
    assert hook(unproven) == 0
    assert hook("--strict", unproven) == 1, "what pre-commit's `args` give comes behind the entry"
    assert hook("--strict") == 2
    assert hook("--strict", "--", unproven) == 3


@pytest.mark.parametrize("name", ["--rewrite", "--help", "--json", "--model=profiles/x.json", "-h"])
def test_no_file_name_is_an_option_of_the_hook(tmp_path: Path, name: str) -> None:
    shim(tmp_path / "bin" / "kvtuner-search", command_line())
    entry = shlex.split(HOOKS["kvtuner-profile-check"]["entry"])
    assert entry[-1] == "--"
    file, environment = tmp_path / name, {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    file.parent.mkdir(exist_ok=True)
    for text, code in ((canonical_json(profile(K8V8).model_dump(mode="json")).replace("\n", " \n"), 0), ("{}", 3)):
        file.write_text(text)
        done = subprocess.run([*entry, name], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code
        assert file.read_text() == text
        assert ("sound" in done.stdout) is (code == 0)


def test_every_profile_of_this_repository_passes_the_hook() -> None:
    files = [path for path in (ROOT / "profiles").rglob("*.json") if "schema" not in path.parts]
    assert len(files) >= 10
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-m", "kvtuner_search", "check", *files], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# the project's own gate


@pytest.mark.parametrize(
    ("changed", "code"), [({}, 0), ({"quality": [measure(value=0.1)]}, 1), ({"model__id": "other"}, 0)]
)
def test_diff_profiles_compares_with_the_base(tmp_path: Path, changed: dict[str, Any], code: int) -> None:
    """A copy of the script in a repository of its own."""
    for name in ("kvtuner_search", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "diff_profiles").write_bytes((ROOT / "scripts" / "diff_profiles").read_bytes())
    (tmp_path / "profiles" / "small").mkdir(parents=True)
    path = write(tmp_path / "profiles" / "small" / "a.json", K8V8)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "profiles"], ["commit", "-qm", "x"]):
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)
    write(path, K8V8, **changed)
    write(tmp_path / "profiles" / "small" / "new.json", K8V4)
    result = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "diff_profiles", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert ("verdict" in result.stdout) is bool(changed)
    path.write_text("{")
    result = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "diff_profiles"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 3
