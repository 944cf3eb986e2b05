"""The house rules that code can check: layout, arrows of imports, light commands, and the scripts that the README names."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from kvtuner_search.cli.main import COMMANDS
from kvtuner_search.serving.engine import engines

ROOT = Path(__file__).parents[1]
PACKAGES = {"kvtuner_search": ROOT / "kvtuner_search", "kvtuner_kernels": ROOT / "kernels" / "kvtuner_kernels"}
# A part imports only parts of a lower rank: those of one rank are peers, and know nothing of each other. `base` are the modules
# beside the subpackages (errors, files).
RANK = {
    "kvtuner_kernels": 0,
    "base": 0,
    "profile": 1,
    "transforms": 2,
    "data": 2,
    "models": 2,
    "evaluation": 3,
    "serving": 3,
    "servers": 4,
    "serving.sglang": 5,
    "validate": 6,
    "bench": 6,
    "calibration": 6,
    "report": 7,
    "api": 7,
    "cli": 8,
    "__main__": 9,
}
HEAVY = ("torch", "transformers", "optuna", "datasets", "plotly", "triton")


def part_of(module: str) -> str:
    """The part that a module of this project belongs to: the longest name in RANK."""
    package, *rest = module.split(".")
    if package == "kvtuner_kernels":
        return package
    return next((part for part in (".".join(rest[:2]), *rest[:1]) if part in RANK), "base")


@cache
def imports() -> dict[str, set[str]]:
    """Module -> every module that it imports anywhere in its code, by full name."""
    found: dict[str, set[str]] = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            names = found.setdefault(module, set())
            tree = ast.parse(path.read_text())
            if module == "kvtuner_search":  # it names the Python API to type checkers, and imports it when it is used
                tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    names.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}:{node.lineno}: write the full name of the module"
                    names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_top_level_kernels_is_no_package() -> None:
    """transformers and SGLang probe for a library named `kernels`; an importable folder of that name breaks both."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").iterdir() if path.name != "__pycache__"] == ["kvtuner_kernels"]


def test_pytest_and_wheel_see_the_same_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert "kernels" in project["pytest"]["ini_options"]["pythonpath"]
    assert "--import-mode=importlib" in project["pytest"]["ini_options"]["addopts"]
    assert project["hatch"]["build"]["targets"]["wheel"]["packages"] == ["kvtuner_search", "kernels/kvtuner_kernels"]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def of_project(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in PACKAGES}


def test_imports_point_one_way() -> None:
    assert len(imports()) > 20
    parts = {part_of(module) for module in imports()}
    assert parts == set(RANK)
    wrong = [
        f"{module} ({part_of(module)}) -> {name} ({part_of(name)})"
        for module, names in imports().items()
        for name in of_project(names)
        if part_of(name) != part_of(module)
        and RANK[part_of(name)] >= RANK[part_of(module)]
        and not (part_of(module) == "base" and part_of(name) == "kvtuner_kernels")
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within folders too, and inside functions."""
    modules = set(imports())
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in of_project(names)} - {module}
        for module, names in imports().items()
    }
    TopologicalSorter({module: graph[module] for module in sorted(graph)}).prepare()  # raises CycleError


# What only SGLang's folder may know: its endpoints, metrics, programs, and the fields of its requests and answers.
SGLANGS_OWN = re.compile(
    r"/(generate|(get_)?server_info|flush_cache|get_load|health|metrics|v1/models)\b|\bsglang:|sglang\.(launch_server|bench_serving)"
    r"|\b(meta_info|finish_reason|sampling_params|ignore_eos|return_logprob|logprob_start_len|token_ids_logprob|num_reqs)\b"
    r"|\b(internal_states|max_total_num_tokens|mem_fraction_static|kv_cache_dtype|json_model_override_args)\b"
)


def test_sglangs_http_interface_is_known_in_its_folder_alone() -> None:
    """In texts and comments too: whoever adds an engine need not wonder whether they are meant."""
    folder = PACKAGES["kvtuner_search"]
    found = {
        f"{path.relative_to(folder)}: {match.group()}"
        for path in folder.rglob("*.py")
        if path.relative_to(folder).parts[:2] != ("serving", "sglang")
        for match in SGLANGS_OWN.finditer(path.read_text())
    }
    assert found == set()
    own = "".join(path.read_text() for path in (folder / "serving" / "sglang").glob("*.py"))
    assert len(set(SGLANGS_OWN.findall(own))) > 15


@pytest.mark.parametrize("name", engines())
def test_engines_are_reached_through_their_door_alone(name: str) -> None:
    """`serving.engine` and `servers.interface` find an engine by the name of its folder; nothing else knows what is in there."""
    engine = f"kvtuner_search.serving.{name}"
    assert f"serving.{name}" in RANK, "an engine is a part of its own: give it a row beside serving.sglang"
    readers = {module for module, names in imports().items() if any(f"{n}.".startswith(f"{engine}.") for n in names)}
    assert {module for module in readers if not f"{module}.".startswith(f"{engine}.")} == set()


def test_reports_are_made_by_commands_alone() -> None:
    readers = {part_of(module) for module, names in imports().items() if any(part_of(n) == "report" for n in names)}
    assert readers == {"report", "cli"}


LIGHT = ("kvtuner_kernels.layout", "kvtuner_kernels.places")  # of the kernels, what `check` and `diff` load


@pytest.mark.parametrize("module", [*LIGHT, "kvtuner_search.profile"])
def test_profile_and_layout_import_nothing_heavy_even_inside_functions(module: str) -> None:
    chosen = {name: found for name, found in imports().items() if f"{name}.".startswith(f"{module}.")}
    assert chosen
    for name, found in chosen.items():
        assert not [target for target in found if target.split(".")[0] in HEAVY], name
        kernels = {target for target in found if target.startswith("kvtuner_kernels")}
        assert all(target.startswith(tuple(f"{light}." for light in LIGHT)) for target in kernels), name


def test_kernels_know_nothing_of_the_search() -> None:
    for name, found in imports().items():
        if name.startswith("kvtuner_kernels"):
            assert not [
                target for target in found if target.startswith(("kvtuner_search", "transformers", "sglang"))
            ], name


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom kvtuner_search.cli.main import run\n"
        f"code = run({arguments!r})\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])\nsys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_the_package_itself_imports_nothing_and_its_profile_nothing_heavy() -> None:
    """`import kvtuner_search` reads one file; `Profile` and `LayerSpec` need neither torch nor what it brings."""
    code = (
        "import sys, kvtuner_search\n"
        "print(*[name for name in sys.modules if name.startswith('kvtuner')])\n"
        "assert set(kvtuner_search.__all__) <= set(dir(kvtuner_search)) and not hasattr(kvtuner_search, 'absent')\n"
        "from kvtuner_search import KVTunerError, LayerSpec, Profile, calibrate, evaluate\n"
        f"print('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["kvtuner_search", "heavy:"]


@pytest.mark.parametrize("script", ["scripts/test", "scripts/demo", ".ci/run"])
def test_scripts_run_and_stop_at_the_first_error(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_readme_names_the_two_commands_and_ci_runs_the_tests() -> None:
    named = set(re.findall(r"\bscripts/\w+", (ROOT / "README.md").read_text()))
    assert {"scripts/demo", "scripts/test"} <= named
    assert all((ROOT / script).is_file() for script in named)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('/../scripts/test"')


def test_environment_says_which_python_it_needs(tmp_path: Path) -> None:
    """With no usable interpreter the scripts end in one line, before anything is made."""
    for script in ("environment", "test"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / script).write_bytes((ROOT / "scripts" / script).read_bytes())
    environment = os.environ | {"KVTUNER_PYTHON": "no-such-python"}
    script = str(tmp_path / "scripts" / "test")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"scripts: none of no-such-python is Python 3\.11 to 3\.13 .+KVTUNER_PYTHON\n", done.stderr)
    assert not (tmp_path / ".venv").exists()
