"""The composite action, the pre-commit hook and scripts/diff_profiles: the shell lines that they run are run here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from kvtuner_search.profile.canonical import canonical_json
from tests.search.profile_factory import digest, measure, profile, write

ROOT = Path(__file__).resolve().parents[3]
K8V8, K8V4 = "8-g64-asym/8-g64-asym", "8-g64-asym/4-g64-asym"
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
# What GitHub runs for `shell: bash` in a composite action.
BASH = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail"]


def shim(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def command_line(python_path: str = f"{ROOT}:{ROOT / 'kernels'}", *, flags: str = "") -> str:
    return f'PYTHONPATH={shlex.quote(python_path)} exec {shlex.quote(sys.executable)} {flags} -m kvtuner_search "$@"'


def step_environment(step: dict[str, Any], inputs: dict[str, str], action_path: str = "") -> dict[str, str]:
    """The step's ``env`` with expressions filled in as GitHub does; an expression anywhere else would be shell injection."""
    defaults = {name: field.get("default", "") for name, field in ACTION["inputs"].items()}
    values = defaults | inputs

    def fill(match: re.Match[str]) -> str:
        context, _, name = match[1].partition(".")
        return {"inputs": values, "github": {"action_path": action_path}}[context][name]

    assert "${{" not in step["run"]
    return {key: re.sub(r"\$\{\{ (\S+) \}\}", fill, value) for key, value in step["env"].items()}


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


# pre-commit


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
