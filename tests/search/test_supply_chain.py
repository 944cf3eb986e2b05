"""What scripts install is locked: every package, by version and hash, for Python 3.11 to 3.13, and nothing around the locks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "requirements"
LOCKS = ("build", "docs", "environment", "serving", "torch", "torch-cpu", "torch-cuda", "tools")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")


def entries(lock: str) -> list[str]:
    """A lock's packages with their hashes."""
    text = "".join(line for line in (FOLDER / f"{lock}.txt").read_text().splitlines(True) if not line.startswith("#"))
    return [part.strip() for part in re.split(r"\n(?=\S)", text)]


def pinned(lock: str, python: str = "3.11") -> dict[str, Version]:
    """What a lock installs on Linux."""
    found = {}
    for entry in entries(lock):
        requirement = Requirement(re.split(r" \\|\n", entry)[0])
        system = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": "linux",
            "platform_machine": "x86_64",
        }
        if requirement.marker is None or requirement.marker.evaluate(system):
            [only] = requirement.specifier
            assert only.operator == "=="
            found[canonicalize_name(requirement.name)] = Version(only.version)
    return found


def wanted(texts: list[str], python: str) -> list[Requirement]:
    environment = {"python_version": python, "platform_system": "Linux", "platform_machine": "x86_64"}
    found = [Requirement(text.split(" #")[0]) for text in texts if text.strip() and text[0] not in "#-"]
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_a_version_and_hashes_and_no_address(lock: str) -> None:
    found = entries(lock)
    assert found
    for entry in found:
        assert re.fullmatch(r"[a-z0-9-]+==[^\s;\\]+( ; [^\\\n]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry[
            :80
        ]
    assert not re.search(r"https?:|file:|--(extra-)?index-url|find-links", (FOLDER / f"{lock}.txt").read_text())


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_hold_what_the_project_asks_for(python: str) -> None:
    extras = PROJECT["optional-dependencies"]
    ours = [*PROJECT["dependencies"], *extras["dev"], *extras["eval"], *extras["report"]]
    for lock, asked in (
        ("environment", ours),
        ("docs", extras["docs"]),
        ("serving", (FOLDER / "serving.in").read_text().splitlines()),
        ("build", (FOLDER / "build.in").read_text().splitlines()),
        ("torch", (FOLDER / "torch.in").read_text().splitlines()),
    ):
        found = pinned(lock, python) | pinned("torch", python)
        for one in wanted(asked, python):
            assert found[canonicalize_name(one.name)] in one.specifier, f"{lock}: {one}: run scripts/lock"
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert pinned("build", python).items() <= pinned("environment", python).items()


def test_this_environment_is_the_locks() -> None:
    """torch may be another build (KVTUNER_TORCH), and what belongs to it."""
    apart = {"torch", *pinned("torch-cuda")}
    wrong = {
        name: (metadata.version(name), str(version))
        for name, version in pinned("environment", f"{sys.version_info.major}.{sys.version_info.minor}").items()
        if name not in apart and Version(metadata.version(name)) != version
    }
    assert not wrong, "run scripts/test, which installs the locks"


@pytest.mark.parametrize("script", ["environment", "serving_environment", "locked"])
def test_scripts_install_nothing_but_the_locks(script: str) -> None:
    text = (ROOT / "scripts" / script).read_text()
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)]).returncode == 0
    if script != "locked":
        assert not re.search(r"\bpip\b", re.sub(r"#.*", "", text))
        assert re.search(r"\n  install_locked .+ \|\| return\n", text)
        assert all(
            f'"{name}"' in text for name in ("build", "torch", "torch-cpu", "torch-cuda")
        )  # a change of any installs anew
        return
    installs = [line.strip() for line in text.splitlines() if re.search(r'^ +(if ! )?"\$\{(pip|locked)\[@\]\}"', line)]
    assert "--no-deps --no-build-isolation --require-hashes" in text
    installs = [line.removeprefix("if ! ") for line in installs]
    assert [line for line in installs if not line.startswith('"${locked[@]}" -r ')] == [
        '"${pip[@]}" "$3" >&2 || return',  # KVTUNER_TORCH
        '"${pip[@]}" --no-deps --no-build-isolation -e "$ROOT" >&2',
    ]


def test_the_site_is_built_with_the_lock_alone() -> None:
    installs = re.findall(r"pip install .+", (ROOT / "scripts" / "docs").read_text())
    assert installs == ['pip install -qq --disable-pip-version-check --no-deps --require-hashes -r "$lock"']


def test_a_failed_installation_leaves_no_stamp(tmp_path: Path) -> None:
    """The first pip that fails ends it, whether or not the shell stops at errors."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >>"$0.log"\ncase "$*" in *environment.txt*) exit 7;; esac\n')
    python.chmod(0o755)
    code = f'ROOT={ROOT}; source {ROOT}/scripts/locked; install_locked {python} environment; echo "rc $?"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stdout == "rc 7\n"
    calls = (tmp_path / "python.log").read_text().splitlines()
    assert len(calls) == 2
    assert all("--require-hashes" in call for call in calls)


@pytest.mark.parametrize(("has_cpu_build", "installed"), [(True, ["torch-cpu"]), (False, ["torch-cpu", "torch"])])
def test_a_cpu_build_is_taken_where_there_is_one(tmp_path: Path, has_cpu_build: bool, installed: list[str]) -> None:
    """pip would take PyPI's, for CUDA: its index states the hashes, as a folder of wheels does not."""
    python = tmp_path / "python"
    refuse = "" if has_cpu_build else "*torch-cpu.txt*) exit 1;; "
    python.write_text(f'#!/bin/sh\necho "$@" >>"$0.log"\ncase "$*" in {refuse}-c*) exit 1;; esac\n')
    python.chmod(0o755)
    code = f"ROOT={ROOT}; source {ROOT}/scripts/locked; install_locked {python} environment"
    subprocess.run(["bash", "-c", code], check=True)
    calls = (tmp_path / "python.log").read_text()
    assert re.findall(r"-r \S+/(torch[a-z-]*)\.txt", calls) == installed
    hashes = {lock: set(re.findall(r"sha256:(\w+)", entries(lock)[0])) for lock in ("torch", "torch-cpu")}
    assert hashes["torch-cpu"] < hashes["torch"]


@pytest.mark.parametrize("environment", ["environment", "serving"])
def test_the_bill_of_materials_names_every_locked_package(environment: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "sbom"), environment]
    first, again = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == again
    bill = json.loads(first)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    named = {part["name"]: part for part in bill["components"]}
    names = {re.split("==", entry)[0] for lock in (environment, "torch", "torch-cuda") for entry in entries(lock)}
    assert set(named) == names
    for entry in entries(environment):
        hashes = {
            one["content"]
            for reference in named[entry.split("==")[0]]["externalReferences"]
            for one in reference["hashes"]
        }
        assert hashes == set(re.findall(r"sha256:(\w+)", entry))


def test_a_security_policy_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert "docs/security.md" in text
    assert "not in a public issue" in text
