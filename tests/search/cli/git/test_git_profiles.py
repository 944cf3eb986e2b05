"""``REF:path``: git whenever the revision exists; what partial, foreign, linked and pointed-at files get."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvtuner_search.profile import git as git_files
from tests.search.cli.git.repository import K4V4, K8V4, POINTER, Run, commit, git, report
from tests.search.profile_factory import write, write_fitted

# a name that is both


@pytest.mark.parametrize("ref", ["HEAD", "main", "refs/heads/main", "HEAD^{}", "HEAD^{tree}", "main@{0}"])
def test_a_revision_wins_over_a_file_that_a_pull_request_puts_there(command: Run, ref: str) -> None:
    name = f"{ref}:profiles/a.json"
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    write(Path(name), K4V4)
    write(Path("profiles/a.json"), K4V4)
    assert report(command, name, "profiles/a.json")["old"]["bytes_per_token"] == 4 * 272
    assert report(command, f"./{name}", "profiles/a.json")["old"]["bytes_per_token"] == 4 * 144
    assert report(command, Path(name).absolute(), "profiles/a.json")["old"]["bytes_per_token"] == 4 * 144
    assert json.loads(command("show", name, "--json")[1])["storage"]["bytes_per_token"] == 4 * 272


def test_a_commit_by_its_hash_wins_too(command: Run) -> None:
    ref = git("rev-parse", "HEAD")[:9]
    (Path(f"{ref}:profiles")).mkdir()
    write(Path(f"{ref}:profiles/a.json"), K4V4)
    assert report(command, f"{ref}:profiles/a.json", "profiles/a.json")["old"]["bytes_per_token"] == 4 * 272


def change_of_branch() -> str:
    """``origin/main`` has K8V8, HEAD and the working tree have K4V4; the hash of the former."""
    base = git("rev-parse", "HEAD")
    git("update-ref", "refs/remotes/origin/main", base)
    write(Path("profiles/a.json"), K4V4)
    commit("loosen")
    return base


@pytest.mark.parametrize("suffix", ["", "~0", "^{}", "^{commit}"])
@pytest.mark.parametrize("name", ["origin/main", "main", "the short hash"])
def test_a_tag_cannot_take_the_name_of_the_base(command: Run, name: str, suffix: str) -> None:
    base = change_of_branch()
    name = base[:12] if name == "the short hash" else name
    git("tag", name, "HEAD")
    code, _, err = command("diff", "--fail-on", "warning", f"{name}{suffix}:profiles/a.json", "profiles/a.json")
    assert code == 3
    assert f"'{name}' is the name of several revisions here" in err
    Path("pyproject.toml").write_text("")
    code, _, err = command("diff", "--config-from", f"{name}{suffix}", f"{base}:profiles/a.json", "profiles/a.json")
    assert (code, "several revisions" in err) == (3, True)


@pytest.mark.parametrize("name", ["refs/remotes/origin/main", "HEAD", "the whole hash"])
def test_a_name_in_full_is_not_taken_by_a_tag(command: Run, name: str) -> None:
    """Git warns of such a tag, and takes the one that is meant; where only the tag is left, there is no such revision."""
    base = change_of_branch()
    git("checkout", "-q", base)
    name = base if name == "the whole hash" else name
    git("update-ref", f"refs/tags/{name}", "main")
    write(Path("new.json"), K4V4)
    code, out, _ = command("diff", "--fail-on", "warning", f"{name}:profiles/a.json", "new.json")
    assert code == 1
    assert "layer-bits-lowered" in out
    if name.startswith("refs/"):
        git("update-ref", "-d", name)
        code, _, err = command("diff", f"{name}:profiles/a.json", "new.json")
        assert (code, f"there is no revision {name} here" in err) == (3, True)


def test_a_replacement_does_not_take_the_place_of_a_file(command: Run) -> None:
    base = change_of_branch()
    git("replace", f"{base}:profiles/a.json", "HEAD:profiles/a.json")
    code, out, _ = command("diff", "--fail-on", "warning", "origin/main:profiles/a.json", "profiles/a.json")
    assert (code, "layer-bits-lowered" in out) == (1, True)


def test_without_such_a_revision_a_file_may_have_a_colon(command: Run) -> None:
    write(Path("a:b.json"), K4V4)
    assert command("show", "a:b.json")[0] == 0
    write(Path("-x:b.json"), K4V4)
    assert command("show", "--", "-x:b.json")[0] == 0
    write(Path(":b.json"), K4V4)
    assert command("show", ":b.json")[0] == 0


def test_where_git_cannot_say_a_file_is_not_taken_instead(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("main:profiles").mkdir()
    write(Path("main:profiles/a.json"), K4V4)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    code, out, err = command("diff", "main:profiles/a.json", "profiles/a.json")
    assert (code, out) == (3, "")
    assert "dubious ownership" in err
    monkeypatch.setenv("PATH", "/nowhere")
    code, out, err = command("diff", "main:profiles/a.json", "profiles/a.json")
    assert (code, out) == (3, "")
    assert "is git installed?" in err


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a:b", ("a", "b")),
        ("HEAD^{/fix: it}:b:c", ("HEAD^{/fix: it}", "b:c")),
        ("main@{1 day ago}:./b", ("main@{1 day ago}", "./b")),
        ("a}:b", ("a}", "b")),
        ("a{:b", None),
        ("b.json", None),
    ],
)
def test_where_git_looks_for_the_colon(text: str, place: tuple[str, str] | None) -> None:
    found = git_files.parse(text)
    assert (None if found is None else (found.ref, found.path)) == place


def test_a_line_break_is_no_second_question_to_git(command: Run) -> None:
    code, _, err = command("show", "HEAD:x\nHEAD:profiles/a.json")
    assert code == 2
    assert "line break" in err


# what git says is wrong


def test_someone_elses_repository_is_named_with_the_remedy(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    code, _, err = command("diff", "HEAD:profiles/a.json", "profiles/a.json")
    assert code == 3
    assert len(err.splitlines()) == 1
    assert f"detected dubious ownership in repository at '{Path.cwd()}'" in err
    assert f"`git config --global --add safe.directory {Path.cwd()}`" in err


def test_the_reason_is_gits_fatal_line_and_no_advice(command: Run) -> None:
    Path(".git/HEAD").write_text("garbage\n")
    code, _, err = command("show", "HEAD:profiles/a.json")
    assert code == 3
    assert "not a git repository" in err or "there is no revision HEAD" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("kept", ["blob:none", "tree:0"])
def test_a_partial_clone_is_named_and_how_to_fill_it(command: Run, kept: str, tmp_path: Path) -> None:
    git("config", "uploadpack.allowFilter", "true")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    git("checkout", "-qb", "pr")
    write(Path("profiles/a.json"), K8V4)
    commit()
    clone = tmp_path / "clone"
    git("clone", "-q", f"--filter={kept}", "--branch", "pr", f"file://{Path.cwd()}", str(clone))
    os.chdir(clone)
    for new in ("profiles/a.json", "profiles/b.json", "HEAD:profiles/a.json"):
        code, out, err = command("diff", "origin/main:profiles/a.json", new)
        assert (code, out) == (3, ""), "in no case is it taken for a new profile"
        assert "not in this partial clone" in err
        assert "`git cat-file -e origin/main:profiles/a.json`" in err
    git("cat-file", "-e", "origin/main:profiles/a.json")
    assert report(command, "origin/main:profiles/a.json", "profiles/a.json")["old"]["bytes_per_token"] == 4 * 272


def test_a_revision_that_was_not_fetched_is_named(command: Run) -> None:
    code, _, err = command("diff", "origin/main:profiles/a.json", "profiles/a.json")
    assert code == 3
    assert "neither a file nor in git" in err
    assert "no revision origin/main" in err


# links and pointers


def test_links_inside_a_revision_are_followed_and_others_named(command: Run) -> None:
    Path("current").mkdir()
    Path("current/a.json").symlink_to("../profiles/a.json")
    Path("all").symlink_to("profiles")
    Path("gone.json").symlink_to("nowhere.json")
    Path("loop.json").symlink_to("loop.json")
    Path("out.json").symlink_to("/etc/hostname")
    commit()
    for name in ("HEAD:current/a.json", "HEAD:all/a.json", "HEAD:./current/a.json"):
        assert json.loads(command("show", name, "--json")[1])["storage"]["bytes_per_token"] == 4 * 272
    for name in ("HEAD:gone.json", "HEAD:loop.json", "HEAD:out.json"):
        code, _, err = command("show", name)
        assert code == 3
        assert "leads to no file of that revision" in err


def test_transforms_are_looked_for_where_the_link_leads(command: Run, tmp_path: Path) -> None:
    store, current = tmp_path / "v3", tmp_path / "current"
    store.mkdir()
    current.mkdir()
    path = write_fitted(store / "a.json", ["4-g64-asym-c/4-g64-asym"] * 4)
    (current / "profile.json").symlink_to("../v3/a.json")
    (tmp_path / "twice.json").symlink_to("current/profile.json")
    for link in (current / "profile.json", tmp_path / "twice.json"):
        assert command("check", link)[0] == 0
    path.with_suffix(".safetensors").rename(current / "a.safetensors")
    assert command("check", current / "profile.json")[0] == 0, "beside the link it was found before"
    (current / "a.safetensors").unlink()
    code, _, err = command("check", current / "profile.json")
    assert code == 3
    assert str(store / "a.safetensors") in err


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_a_pointer_of_git_lfs_is_named(command: Run, name: str) -> None:
    write_fitted(Path("a.json"), ["4-g64-asym-c/4-g64-asym"] * 4)
    Path(name).write_text(POINTER)
    commit()
    commands = [["check", "a.json"]]
    if name == "a.json":
        commands += [
            ["show", "a.json"],
            ["diff", "HEAD:a.json", "profiles/a.json"],
            ["export", "a.json", "--to", "vllm"],
        ]
    for arguments in commands:
        code, _, err = command(*arguments)
        assert code == 3
        assert "is a Git LFS pointer" in err
        assert "`git lfs pull`" in err


def test_a_link_that_was_checked_out_as_text_is_named(command: Run) -> None:
    Path("a.json").write_text("../v3/reference-4.00bit.json")
    code, _, err = command("check", "a.json")
    assert code == 3
    assert "core.symlinks" in err
    Path("a.json").write_text("nonsense")
    assert "not valid JSON" in command("check", "a.json")[2]


def test_a_pointer_in_a_revision_has_another_remedy_than_one_in_a_folder(command: Run) -> None:
    good = Path("profiles/a.json").read_bytes()
    Path("profiles/a.json").write_text(POINTER)
    commit()
    Path("profiles/a.json").write_bytes(good)
    code, _, err = command("diff", "HEAD:profiles/a.json", "profiles/a.json")
    assert code == 3
    assert "`git cat-file blob HEAD:profiles/a.json | git lfs smudge > old.json`" in err
