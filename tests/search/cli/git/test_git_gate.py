"""A new profile as a finding, and the settings of the base, which judge a pull request."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.profile.rules import RULES
from tests.search.cli.git.repository import K4V4, K8V4, K8V8, Run, commit, git, report
from tests.search.profile_factory import measure, profile, validation, write

# new profiles


def new_profile(**changes: Any) -> str:
    write(Path("profiles/new.json"), K4V4, **changes)
    return "profiles/new.json"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("HEAD:profiles/new.json", "profiles/new.json"),
        ("HEAD:./profiles/new.json", "./profiles/new.json"),
        ("HEAD~0:profiles/new.json", "profiles/../profiles/new.json"),
    ],
)
def test_a_new_profile_is_one_finding(command: Run, old: str, new: str) -> None:
    new_profile()
    found = report(command, old, new, "--memory", "1GiB")
    assert found["old"] is None
    assert (found["verdict"], found["exit_code"]) == ("pass", 0)
    assert [(f["rule"], f["severity"], f["where"]) for f in found["findings"]] == [
        ("profile-added", RULES["profile-added"].severity, "")
    ]
    assert found["new"]["bytes_per_token"] == 4 * 144
    assert [layer["old"] for layer in found["layers"]] == ["16/16"] * 4
    for style, text in (
        ("text", "none: compared with the 16-bit cache"),
        ("markdown", "profile-added"),
        ("github", "::warning file="),
        ("junit", "profile-added"),
    ):
        code, out, _ = command("diff", old, new, "--format", style)
        assert code == 0
        assert text in out


def test_a_new_profile_between_revisions_and_from_a_subfolder(command: Run) -> None:
    new_profile()
    commit()
    assert report(command, "HEAD~1:profiles/new.json", "HEAD:profiles/new.json")["old"] is None
    assert report(command, "HEAD:profiles/new.json", "HEAD:profiles/new.json")["old"] is not None
    os.chdir("profiles")
    for old, new in (("HEAD~1:profiles/new.json", "new.json"), ("HEAD~1:./new.json", "HEAD:profiles/new.json")):
        assert report(command, old, new)["old"] is None


def test_its_severity_is_its_own(command: Run) -> None:
    new = new_profile()
    arguments = ("diff", f"HEAD:{new}", new)
    assert command(*arguments, "--fail-on", "warning")[0] == 1
    table = "[tool.kvtuner-search.diff]\nseverity = {{ profile-added = {!r} }}\n"
    Path("pyproject.toml").write_text(table.format("error"))
    assert command(*arguments)[0] == 1
    Path("pyproject.toml").write_text(table.format("info"))
    assert command(*arguments, "--fail-on", "warning")[0] == 0


def test_another_path_or_a_missing_file_is_no_new_profile(command: Run) -> None:
    new = new_profile()
    for old, head in (
        ("HEAD:profiles/typo.json", new),
        (f"nowhere:{new}", new),
        ("profiles/typo.json", new),
        ("HEAD:profiles/gone.json", "profiles/gone.json"),
    ):
        code, out, _ = command("diff", old, head)
        assert (code, out) == (3, ""), old


def test_a_new_profile_is_held_to_the_budgets(command: Run) -> None:
    new = new_profile(quality=[measure(value=0.1), measure("nll", 5.05, 0.01, 5.0)])
    arguments = (f"HEAD:{new}", new)

    def rules(*options: object) -> set[str]:
        return {finding["rule"] for finding in report(command, *arguments, *options)["findings"]}

    assert rules() == {"profile-added"}
    assert rules("--max-bytes-per-token", 4 * 144) == {"profile-added"}
    assert rules("--max-bytes-per-token", 4 * 144 - 1) == {"profile-added", "bytes-over-budget"}
    assert rules("--max-loss-increase", 0.11) == {"profile-added"}
    assert rules("--max-loss-increase", 0.09) == {"profile-added", "loss-over-budget"}
    new_profile(quality=[])
    assert rules("--max-loss-increase", 0.09) == {"profile-added", "quality-unproven", "loss-budget-unproven"}
    stale = validation(profile(K8V8).digest)
    new_profile(validation=stale)
    assert rules() == {"profile-added", "validation-stale"}
    assert command("diff", *arguments)[0] == 1


# settings of the base


TABLE = "[tool.kvtuner-search.diff]\n"


def judged(command: Run, *options: object) -> dict[str, Any]:
    """K8V8 becomes K8V4, which is a warning, judged by ``main``."""
    write(Path("profiles/a.json"), K8V4)
    return report(command, "main:profiles/a.json", "profiles/a.json", "--config-from", "main", *options)


@pytest.fixture
def strict(command: Run) -> Run:
    """The base fails on warnings."""
    Path("pyproject.toml").write_text(TABLE + 'fail-on = "warning"\n')
    commit()
    git("checkout", "-qb", "pr")
    return command


def rules_of(found: dict[str, Any]) -> list[str]:
    return [finding["rule"] for finding in found["findings"]]


def test_the_base_judges_and_an_unchanged_table_is_no_finding(strict: Run) -> None:
    found = judged(strict)
    assert (found["exit_code"], found["fail_on"]) == (1, "warning")
    assert "gate-changed" not in rules_of(found)
    Path("pyproject.toml").write_text("# a comment\n[tool.ruff]\nline-length = 3\n" + TABLE + 'fail-on="warning"')
    assert "gate-changed" not in rules_of(judged(strict)), "what matters is the table"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TABLE + 'fail-on = "none"\n', "fail-on"),
        (TABLE + 'fail-on = "warning"\nignore = ["layer-bits-lowered"]\n', "ignore"),
        (
            TABLE + 'fail-on = "warning"\nseverity = { layer-bits-lowered = "info", gate-changed = "ignore" }\n',
            "severity",
        ),
        (TABLE + 'fail-on = "warning"\nmax-bytes-per-token = 10000000\n', "max-bytes-per-token"),
        ("", "fail-on"),
        (None, "fail-on"),
        (TABLE + "nonsense = 1\n", "no key 'nonsense'"),
        ("no toml", "not valid TOML"),
    ],
    ids=["gate", "ignore", "severity", "budget", "emptied", "deleted", "nonsense", "broken"],
)
def test_a_pull_request_cannot_loosen_its_gate_and_trying_is_a_finding(
    strict: Run, text: str | None, said: str
) -> None:
    if text is None:
        Path("pyproject.toml").unlink()
    else:
        Path("pyproject.toml").write_text(text)
    for committed in (False, True):
        if committed:
            commit()
        found = judged(strict)
        assert (found["exit_code"], found["fail_on"], found["ignored"]) == (1, "warning", 0)
        assert "layer-bits-lowered" in rules_of(found)
        change = next(finding for finding in found["findings"] if finding["rule"] == "gate-changed")
        assert said in change["message"]
        assert change["old"] == '{"fail-on": "warning"}'


def test_a_file_further_down_does_not_get_in_between(strict: Run) -> None:
    Path("profiles/pyproject.toml").write_text(TABLE + 'fail-on = "none"\n')
    os.chdir("profiles")
    write(Path("a.json"), K8V4)
    found = report(strict, "main:./a.json", "a.json", "--config-from", "main")
    assert found["exit_code"] == 1
    assert "gate-changed" in rules_of(found)


def test_the_nearest_file_of_the_base_counts(strict: Run) -> None:
    git("checkout", "-q", "main")
    Path("profiles/pyproject.toml").write_text(TABLE + 'fail-on = "none"\n')
    commit()
    git("checkout", "-q", "pr")
    git("merge", "-q", "main")
    os.chdir("profiles")
    write(Path("a.json"), K8V4)
    assert report(strict, "main:./a.json", "a.json", "--config-from", "main")["exit_code"] == 0


def test_options_win_over_the_base(strict: Run) -> None:
    assert judged(strict, "--fail-on", "none")["exit_code"] == 0
    assert judged(strict, "--max-bytes-per-token", 1)["exit_code"] == 1


def test_a_base_without_a_table_has_the_defaults(command: Run) -> None:
    git("checkout", "-qb", "pr")
    Path("pyproject.toml").write_text(TABLE + 'fail-on = "none"\nmax-bytes-per-token = 1\n')
    found = judged(command)
    assert (found["exit_code"], found["fail_on"]) == (0, "error")
    assert rules_of(found)[0] == "gate-changed"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--config-from", "nowhere"], 3, "no revision nowhere"),
        (["--config-from", "-x"], 2, "dash"),
        (["--config-from", "main", "--config", "x.toml"], 2, "two configurations"),
    ],
)
def test_a_base_that_cannot_be_read_ends_it(strict: Run, options: list[str], code: int, said: str) -> None:
    result = strict("diff", "main:profiles/a.json", "profiles/a.json", *options)
    assert (result[0], result[1]) == (code, "")
    assert said in result[2]


def test_a_table_of_the_base_that_means_nothing_ends_it(strict: Run) -> None:
    git("checkout", "-q", "main")
    Path("pyproject.toml").write_text(TABLE + "nonsense = 1\n")
    commit()
    code, _, err = strict("diff", "main:profiles/a.json", "profiles/a.json", "--config-from", "main")
    assert code == 2
    assert "main:pyproject.toml" in err


# a repository within the repository


def embedded(folder: str, bare: str = "true", **links: str) -> None:
    """A bare repository at ``folder`` in which ``main`` and ``origin/main`` have the profile K4V4 and no configuration."""
    git("init", "-q", "--bare", "../theirs.git")
    git("init", "-q", "../theirs")
    (Path("../theirs") / "profiles").mkdir()
    write(Path("../theirs/profiles/a.json"), K4V4)
    git("add", "-A", folder="../theirs")
    git("commit", "-qm", "x", folder="../theirs")
    git("push", "-q", "../theirs.git", "HEAD:refs/heads/main", "HEAD:refs/remotes/origin/main", folder="../theirs")
    shutil.copytree("../theirs.git", folder, dirs_exist_ok=True)
    git("config", "--file", f"{folder}/config", "core.bare", bare)
    for name, value in links.items():
        git("config", "--file", f"{folder}/config", f"core.{name}", value)


@pytest.mark.parametrize(("bare", "links"), [("true", {}), ("false", {"worktree": "."}), ("false", {"worktree": ".."})])
@pytest.mark.parametrize("below", ["", "objects"])
def test_a_repository_that_a_pull_request_commits_is_not_asked(
    command: Run, bare: str, links: dict[str, str], below: str
) -> None:
    """git takes a folder with HEAD, objects and refs for a repository; the pull request's would be its own base."""
    Path("pyproject.toml").write_text('[tool.kvtuner-search.diff]\nfail-on = "warning"\n')
    commit()
    git("update-ref", "refs/remotes/origin/main", "HEAD")
    embedded("profiles", bare, **links)
    write(Path("profiles/a.json"), K4V4)
    commit("pull request")
    os.chdir(Path("profiles") / below)
    asked = ["--config-from", "refs/remotes/origin/main"]
    for arguments in (
        ["diff", "origin/main:profiles/a.json", "a.json"],
        ["diff", *asked, "a.json", "a.json"],
        ["show", "origin/main:profiles/a.json"],
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (3, ""), arguments
        assert "for a repository of its own" in err
    os.chdir(".." if not below else "../..")
    code, out, _ = command("diff", *asked, "origin/main:profiles/a.json", "profiles/a.json")
    assert code == 1
    assert "layer-bits-lowered" in out


def test_a_bare_repository_that_is_nobody_elses_is_asked(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror that happens to lie in a working tree, one outside of any, the repository's own folder, and one that is named."""
    embedded("mirror")
    Path(".git/info/exclude").write_text("mirror\n")
    for folder in ("mirror", "../theirs.git"):
        os.chdir(folder)
        assert command("show", "main:profiles/a.json")[0] == 0
        os.chdir("../repository" if folder.startswith("..") else "..")
    os.chdir(".git")
    assert command("show", "HEAD:profiles/a.json")[0] == 0
    os.chdir("..")
    git("add", "-Af", "mirror")
    os.chdir("mirror")
    monkeypatch.setenv("GIT_DIR", ".")
    assert command("show", "main:profiles/a.json")[0] == 0


def test_a_file_that_is_called_head_makes_no_repository(command: Run) -> None:
    Path("profiles/HEAD").write_text("ref: refs/heads/main\n")
    commit()
    os.chdir("profiles")
    assert command("show", "HEAD:profiles/a.json")[0] == 0


def test_what_git_itself_refuses_is_what_is_said(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("profiles/HEAD").write_text("ref: refs/heads/main\n")
    commit()
    os.chdir("profiles")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    code, out, err = command("show", "HEAD:profiles/a.json")
    assert (code, out) == (3, "")
    assert "of its own" not in err
    assert "safe.directory" in err


def test_a_current_folder_that_is_deleted_is_one_line(command: Run, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        for arguments in (
            ["show", "HEAD:a.json"],
            ["export", "HEAD:a.json", "--to", "kvtuner"],
            ["diff", "HEAD:a.json", "b.json"],
        ):
            code, out, err = command(*arguments)
            assert (code, out, err.count("\n")) == (3, "", 1), arguments
    finally:
        os.chdir(tmp_path)
