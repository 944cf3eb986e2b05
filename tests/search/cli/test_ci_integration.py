"""The composite action: its step Compare is run as GitHub runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.search.cli.action import ACTION, BASH, K8V4, K8V8, ROOT, STEPS, command_line, shim, step_environment
from tests.search.profile_factory import digest, measure, write


def outputs(file: Path) -> dict[str, str]:
    """GITHUB_OUTPUT as the runner parses it."""
    result, lines = {}, iter(file.read_text().splitlines())
    for line in lines:
        if "<<" in line and "=" not in line.partition("<<")[0]:
            name, _, delimiter = line.partition("<<")
            body = []
            for inner in lines:
                if inner == delimiter:
                    break
                body.append(inner)
            result[name] = "\n".join(body)
        else:
            name, _, value = line.partition("=")
            result[name] = value
    return result


class Runner:
    """A folder set up as on GitHub."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temp = folder, folder / "runner temp"
        self.temp.mkdir()
        shim(self.temp / "kvtuner-search" / "bin" / "kvtuner-search", command_line())
        shim(self.temp / "kvtuner-search" / "bin" / "python", f'exec {shlex.quote(sys.executable)} "$@"')

    def compare(self, base_ref: str = "", **inputs: str) -> tuple[int, str, dict[str, str], str]:
        """Run the step Compare: (exit code, stdout, outputs, step summary); ``base_ref`` is where a pull request goes to."""
        files = {"GITHUB_OUTPUT": self.folder / "output", "GITHUB_STEP_SUMMARY": self.folder / "summary"}
        for file in files.values():
            file.write_text("")
        environment = {
            "PATH": os.environ["PATH"],
            "RUNNER_TEMP": str(self.temp),
            "GITHUB_BASE_REF": base_ref,
            "PYTHONPATH": str(self.folder),
            **{name: str(file) for name, file in files.items()},
            **step_environment(STEPS["Compare"], {name.replace("_", "-"): value for name, value in inputs.items()}),
        }
        script = self.folder / "step.sh"
        script.write_text(STEPS["Compare"]["run"])
        result = subprocess.run([*BASH, script], env=environment, capture_output=True, text=True, cwd=self.folder)
        return (
            result.returncode,
            result.stdout,
            outputs(files["GITHUB_OUTPUT"]),
            files["GITHUB_STEP_SUMMARY"].read_text(),
        )


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    write(tmp_path / "old.json", K8V8)
    write(tmp_path / "new.json", K8V4)
    write(tmp_path / "worse.json", K8V4, quality=[measure(value=0.1)])
    write(tmp_path / "other.json", K8V8, model__config_digest=digest("other"))
    return Runner(tmp_path)


def test_the_action_passes(runner: Runner) -> None:
    code, out, result, summary = runner.compare(base="old.json", head="new.json", memory="1GiB")
    assert (code, result["verdict"]) == (0, "pass")
    assert "::warning file=new.json,title=kvtuner-search layer-bits-lowered::" in out
    assert summary.startswith("### ✅ KV-cache profile: pass")
    report = json.loads(result["json"])
    assert report["new"]["capacity_tokens"] == 2**30 // 832
    assert json.loads(Path(result["json-file"]).read_text()) == report


@pytest.mark.parametrize(
    ("inputs", "code", "verdict"),
    [
        ({"head": "worse.json"}, 1, "fail"),
        ({"head": "worse.json", "fail_on": "none"}, 0, "pass"),
        ({"head": "new.json", "fail_on": "warning"}, 1, "fail"),
        ({"head": "new.json", "max_bytes_per_token": "831"}, 1, "fail"),
        ({"head": "new.json", "max_bytes_per_token": "832"}, 0, "pass"),
        ({"head": "worse.json", "fail_on": "none", "max_loss_increase": "0.01"}, 0, "pass"),
        ({"head": "other.json"}, 4, "not-comparable"),
        ({"head": "missing.json"}, 3, "error"),
        ({"head": "new.json", "fail_on": "sometimes"}, 2, "error"),
        ({"head": "--rules"}, 3, "error"),
        ({"head": "$(touch injected); `touch injected`"}, 3, "error"),
    ],
)
def test_the_action_ends_as_the_gate_says(runner: Runner, inputs: dict[str, str], code: int, verdict: str) -> None:
    actual, _, result, _ = runner.compare(base="old.json", **inputs)
    assert (actual, result["verdict"]) == (code, verdict)
    assert (result["json"] == "") is (verdict == "error")
    assert not (runner.folder / "injected").exists()


MODULES = (
    "json",
    "secrets",
    "click",
    "kvtuner_search",
    "sitecustomize",
    "usercustomize",
    "rich",
    "pydantic",
    "encodings",
)


def test_comparing_imports_nothing_from_the_workspace(runner: Runner) -> None:
    """Whatever a pull request calls its files: the interpreter is a real one, without the help of the shim's own path."""
    site = runner.temp / "site"
    site.mkdir()
    for name in ("kvtuner_search", "kernels/kvtuner_kernels"):
        (site / Path(name).name).symlink_to(ROOT / name)
    body = f"import sys; sys.path.append({str(site)!r}); from kvtuner_search.cli.main import main; main()"
    script = runner.temp / "kvtuner-search" / "bin" / "kvtuner-search"
    script.write_text(f"#!{sys.executable}\n{body}\n")
    for name in MODULES:
        (runner.folder / f"{name}.py").write_text(f"open('imported-{name}', 'w')\n")
        (runner.folder / "kvtuner-search").mkdir(exist_ok=True)
    code, out, result, _ = runner.compare(base="old.json", head="new.json")
    assert (code, result["verdict"]) == (0, "pass"), out
    assert not list(runner.folder.rglob("imported-*"))


def test_comparing_asks_no_version_manager_of_the_workspace(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shims of pyenv, asdf and mise read .python-version, .tool-versions or mise.toml of the current folder, and mise runs what that says."""
    for name in ("python", "python3", "pip"):
        shim(
            runner.folder.parent / "shims" / name,
            f"touch asked-{name}; echo 'version 9 is not installed' >&2; exit 127",
        )
    monkeypatch.setenv("PATH", f"{runner.folder.parent / 'shims'}{os.pathsep}{os.environ['PATH']}")
    code, out, result, _ = runner.compare(base="old.json", head="new.json")
    assert (code, result["verdict"], bool(result["json"])) == (0, "pass", True), out
    assert not list(runner.folder.glob("asked-*"))


class Repository:
    """A pull request in a repository whose branch main fails on warnings: K8V8 becomes K8V4, which is one."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.folder = runner, runner.folder
        self.configure('fail-on = "warning"')
        write(self.folder / "m.json", K8V8)
        self.git("init", "-q")
        self.git("add", "m.json", "pyproject.toml")
        self.git("commit", "-qm", "base")
        self.git("update-ref", "refs/remotes/origin/main", "HEAD")
        write(self.folder / "m.json", K8V4)

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=self.folder, check=True, capture_output=True)

    def configure(self, line: str) -> None:
        (self.folder / "pyproject.toml").write_text(f"[tool.kvtuner-search.diff]\n{line}\n")


@pytest.fixture
def repository(runner: Runner) -> Repository:
    return Repository(runner)


@pytest.mark.parametrize(
    ("base", "base_ref"),
    [
        ("origin/main:m.json", "main"),
        ("origin/main:m.json", ""),
        ("old.json", "main"),
        ("./old.json", "main"),
        ("HEAD:m.json", "main"),
    ],
)
def test_a_pull_request_cannot_switch_its_gate_off(repository: Repository, base: str, base_ref: str) -> None:
    repository.configure('fail-on = "none"\nignore = ["layer-bits-lowered", "gate-changed"]')
    repository.git("commit", "-qam", "loosen")
    repository.git("update-ref", "refs/heads/pr", "HEAD")
    if base.startswith("HEAD"):
        write(repository.folder / "m.json", "4-g64-asym/4-g64-asym")
    code, out, result, _ = repository.runner.compare(base_ref, base=base, head="m.json")
    assert (code, result["verdict"]) == (1, "fail")
    assert "kvtuner-search gate-changed::" in out
    assert json.loads(result["json"])["fail_on"] == "warning"
    code, _, result, _ = repository.runner.compare(base_ref, base=base, head="m.json", fail_on="none")
    assert (code, result["verdict"]) == (0, "pass"), "inputs win over the base"


def test_a_pull_request_cannot_put_a_file_in_the_place_of_the_base(repository: Repository) -> None:
    (repository.folder / "origin").mkdir()
    write(repository.folder / "origin" / "main:m.json", K8V4)
    code, _, result, _ = repository.runner.compare("main", base="origin/main:m.json", head="m.json")
    assert code == 1
    assert json.loads(result["json"])["old"]["bytes_per_token"] == 4 * 272


@pytest.mark.parametrize("fetched", [True, False])
@pytest.mark.parametrize("base", ["origin/main:m.json", "old.json"])
def test_a_tag_with_the_name_of_the_base_ends_it_or_does_nothing(
    repository: Repository, base: str, fetched: bool
) -> None:
    """Checking out with tags brings every tag that somebody pushed, and git takes a tag before a remote's branch."""
    repository.configure('fail-on = "none"')
    repository.git("commit", "-qam", "loosen")
    repository.git("tag", "origin/main", "HEAD")
    repository.git("update-ref", "refs/tags/refs/remotes/origin/main", "HEAD")
    if not fetched:
        repository.git("update-ref", "-d", "refs/remotes/origin/main")
    code, _, result, _ = repository.runner.compare("main", base=base, head="m.json")
    passed_on = fetched and base == "old.json"  # which names no revision, and the base branch is named in full
    assert (code, result["verdict"]) == ((1, "fail") if passed_on else (3, "error"))


def test_a_base_branch_that_was_not_fetched_ends_it(repository: Repository) -> None:
    for base in ("old.json", "origin/release:m.json"):
        code, _, result, _ = repository.runner.compare("release", base=base, head="m.json")
        assert (code, result["verdict"], result["json"]) == (3, "error", "")


def test_without_a_pull_request_the_workspace_configures(repository: Repository) -> None:
    repository.configure('fail-on = "none"')
    code, out, result, _ = repository.runner.compare("", base="old.json", head="new.json")
    assert (code, result["verdict"]) == (0, "pass")
    assert "gate-changed" not in out
    repository.configure('fail-on = "warning"')
    assert repository.runner.compare("", base="old.json", head="new.json")[0] == 1


def test_a_new_profile_passes_with_a_warning(repository: Repository) -> None:
    write(repository.folder / "added.json", K8V8)
    code, out, result, _ = repository.runner.compare("main", base="origin/main:added.json", head="added.json")
    assert "::warning file=added.json,title=kvtuner-search profile-added::" in out
    assert (code, result["verdict"]) == (1, "fail"), "the base fails on warnings"
    assert json.loads(result["json"])["old"] is None


def test_the_action_declares_what_it_sets() -> None:
    assert set(ACTION["outputs"]) == {"verdict", "json", "json-file"}
    for name, field in ACTION["outputs"].items():
        assert field["value"] == f"${{{{ steps.diff.outputs.{name} }}}}"
    assert set(ACTION["inputs"]) == {"base", "head", "fail-on", "max-bytes-per-token", "max-loss-increase", "memory"}


def test_every_interpreter_of_the_action_is_isolated() -> None:
    text = "\n".join(step["run"] for step in STEPS.values())
    calls = re.findall(r'(?:\bpython3|"\$python") +(\S+)', text)
    assert calls == ["-I"] * 4
    assert "python3" not in re.sub("#.*", "", STEPS["Compare"]["run"]), "it runs in the workspace"


def test_the_action_needs_no_token() -> None:
    """It reads inputs and where it lies; a token would be `github.token` or a secret. No other action is run."""
    contexts = set(re.findall(r"\$\{\{ *([a-z_]+\.[a-z_]+)", (ROOT / "action.yml").read_text()))
    assert {name for name in contexts if not name.startswith(("inputs.", "steps."))} == {"github.action_path"}
    assert not any("uses" in step for step in STEPS.values())
