"""Commands of these tests run in a git repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.cli.git.repository import K8V8, Run, commit, git
from tests.search.profile_factory import write


@pytest.fixture
def command(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in a repository whose first commit has ``profiles/a.json``: (exit code, stdout, stderr)."""
    folder = tmp_path / "repository"
    (folder / "profiles").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    write(Path("profiles/a.json"), K8V8)
    git("init", "-q")
    commit()
    return command
