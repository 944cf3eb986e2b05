"""Adding is local: what can be added in one place is written down in one place, and everything else derives from it (docs/extending.md)."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtuner_kernels.layout import BITS, CODE_BITS
from kvtuner_search.calibration.samplers import DEFAULT as DEFAULT_SAMPLER
from kvtuner_search.calibration.samplers import SAMPLERS
from kvtuner_search.errors import UsageError
from kvtuner_search.profile.schema import SearchInfo
from kvtuner_search.servers.interface import Interface, interface
from kvtuner_search.serving.engine import DEFAULT, Engine, engine, engines
from kvtuner_search.serving.sglang.plugin import ADAPTERS
from kvtuner_search.serving.sglang.refusals import ALL, BY_VERSION

ROOT = Path(__file__).parents[1]
WIDTHS = {0, *BITS}
LAYOUT = "kernels/kvtuner_kernels/layout.py"


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every Python file of the packages and scripts, by its path from the root."""
    scripts = [path for path in (ROOT / "scripts").rglob("*") if path.is_file()]
    packages = [path for folder in ("kvtuner_search", "kernels") for path in (ROOT / folder).rglob("*.py")]
    for path in packages + [
        p for p in scripts if p.suffix == ".py" or p.read_bytes().startswith(b"#!/usr/bin/env python3")
    ]:
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def numbers(node: ast.AST) -> set[object]:
    """The numbers of a literal tuple, list, set, or of ``Literal[...]``; none if it has anything else."""
    elements = getattr(node, "elts", [])
    found = {each.value for each in elements if isinstance(each, ast.Constant) and type(each.value) is int}
    return found if len(found) == len(elements) else set()


def test_the_guide_names_files_that_exist() -> None:
    """And each kind has a section; a file that moved must be found in the guide."""
    text = (ROOT / "docs" / "extending.md").read_text()
    named = re.findall(
        r"`((?:kernels|kvtuner_search|tests|scripts|docs|profiles|requirements)/[^`\s]*|pyproject\.toml)`", text
    )
    assert len(set(named)) > 60
    missing = {path for path in named if "X_Y_Z" not in path and not (ROOT / path).exists()}
    assert not missing
    read = {*ROOT.glob("k*/**/*.py"), *(path for path in map(ROOT.joinpath, named) if path.is_file())}
    code = "\n".join(path.read_text() for path in read)
    names = re.findall(r"`((?:\w+\.)?[A-Za-z_]\w*)`", text)
    assert not {name for name in names if not re.search(rf"\b{name.rpartition('.')[2]}\b", code)}


def test_no_second_list_of_bit_widths() -> None:
    """A list such as (2, 4, 8, 16) or a pattern [248] anywhere but in the layout would have to be found when a width is added."""
    found = []
    for path, tree in sources():
        for node in ast.walk(tree):
            listed = numbers(node)
            pattern = isinstance(node, ast.Constant) and isinstance(node.value, str) and "[248]" in node.value
            counts = (
                1 in listed and path != LAYOUT
            )  # (1, 2, 4, 8) counts something, also where there are codes of 1 bit
            if pattern or (listed >= set(CODE_BITS) - {1} and listed <= WIDTHS and not counts):
                found.append(f"{path}: {ast.unparse(node)}")
    assert found == [f"{LAYOUT}: {BITS}"]


def test_samplers_are_named_in_their_table_alone() -> None:
    found = {
        path
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "nsga2"
    }
    assert found == {"kvtuner_search/calibration/samplers.py"}


def test_documents_name_the_samplers() -> None:
    _, table = (ROOT / "docs" / "calibration.md").read_text().split("| `--sampler` | what proposes |\n| --- | --- |\n")
    assert table.split("\n\n")[0].splitlines() == [
        f"| `{name}`{' (default)' * (name == DEFAULT_SAMPLER)} | {row.help} |" for name, row in SAMPLERS.items()
    ]
    [origin] = [
        line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| **origin** |")
    ]
    assert set(re.findall(r"`(\w+)`", origin)) >= set(SAMPLERS)
    described = SearchInfo.model_json_schema()["properties"]["sampler"]["description"]
    assert described.endswith(f"e.g. {DEFAULT_SAMPLER}.")


def test_each_adapter_is_found_by_its_file_and_says_the_same_version() -> None:
    folder = ROOT / "kvtuner_search" / "serving" / "sglang"
    assert sorted(ADAPTERS.values()) == sorted(path.stem for path in folder.glob("v[0-9]*.py"))
    for version, module in ADAPTERS.items():
        tree = ast.parse((folder / f"{module}.py").read_text())
        assert {"register_flags", "activate"} <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "version"]
        assert [ast.literal_eval(keyword.value) for keyword in keywords] == [version]


def test_each_version_says_what_it_refuses() -> None:
    assert list(BY_VERSION) == list(ADAPTERS)
    fields = [refusal.field for refusal in ALL]
    assert len(set(fields)) == len(fields), "a version whose refusal differs would need an option of its own"


def test_documents_and_locks_name_versions_with_an_adapter() -> None:
    named = set(re.findall(r"0\.5\.\d+", (ROOT / "docs" / "serving.md").read_text().split("\n## ")[0]))
    assert named == set(ADAPTERS)
    for file in ("pyproject.toml", "requirements/serving.in"):
        assert set(re.findall(r"sglang==([\d.]+)", (ROOT / file).read_text())) <= set(ADAPTERS), file


DOORS = [(Engine, engine), (Interface, interface)]


@pytest.mark.parametrize("which", engines())
@pytest.mark.parametrize(
    ("door", "find", "name"),
    [
        (door, find, name)
        for door, find in DOORS
        for name, _ in inspect.getmembers(door, inspect.isfunction)
        if not name.startswith("_")
    ],
)
def test_an_engine_offers_what_the_doors_promise(door: type, find: Callable[[str], Any], name: str, which: str) -> None:
    """The same arguments, by name and kind; mypy compares their types."""
    offered, promised = getattr(find(which), name), getattr(door, name)
    mine, theirs = inspect.signature(offered).parameters, inspect.signature(promised).parameters
    assert [(p.name, p.kind) for p in mine.values()] == [(p.name, p.kind) for p in theirs.values() if p.name != "self"]


@pytest.mark.parametrize("which", engines())
def test_an_engine_has_its_texts_and_options(which: str) -> None:
    found = engine(which)
    assert which == found.NAME, "a record's versions tell its engine by this name"
    assert found.TITLE
    assert found.INSTALL
    assert all(example for example, _ in found.EXAMPLES)
    assert {found.PROFILE, found.AS_STORED} <= {flag.name for flag in found.FLAGS}
    asked = interface(which)
    assert {asked.GENERATED, asked.TOKEN_USAGE} <= set(asked.METRICS)
    assert asked.STREAM.startswith("/")


def test_the_default_engine_is_one_and_an_unknown_one_is_refused_with_the_choice() -> None:
    assert DEFAULT in engines()
    with pytest.raises(UsageError, match=rf"^there is no engine 'absent': choose from {', '.join(engines())}$"):
        engine("absent")


def test_documents_name_the_bit_widths() -> None:
    *first, last = map(str, BITS)
    for document, text in (
        ("kernels.md", f"values of {', '.join(first)} and {last} bits"),
        ("serve.md", f"`--kvtuner-nbits-value` | {', '.join(first)} or {last} bits"),
        ("calibration.md", f"| bits | {', '.join(first)}; {last} is the model's own dtype"),
    ):
        assert text in (ROOT / "docs" / document).read_text(), document


# 3 bits, beside whatever widths there are.
FICTITIOUS = """
import importlib.util, json, sys
from pathlib import Path
from kvtuner_kernels.layout import BITS
widths = tuple(sorted((*BITS, 3)))
found = importlib.util.find_spec("kvtuner_kernels.layout")
source = Path(found.origin).read_text()
changed = source.replace(f"BITS: Final = {BITS}", f"BITS: Final = {widths}")
assert changed != source
layout = sys.modules[found.name] = importlib.util.module_from_spec(found)
exec(compile(changed, found.origin, "exec"), layout.__dict__)
sys.modules["kvtuner_kernels"].layout = layout

# How it is written, and what it costs.
spec = layout.LayerSpec.parse("3-g128-asym-c/3-g64-sym-x0.9")
assert layout.LayerSpec.parse(str(spec)) == spec and spec.bytes_per_token(2, 128) == 2 * (48 + 48 + 4 + 4)

# The profile and its schema.
from kvtuner_search.profile.canonical import json_schema
from kvtuner_search.profile.schema import TensorEntry
assert TensorEntry.of(spec.key).spec() == spec.key
assert json.loads(json_schema())["$defs"]["TensorEntry"]["properties"]["bits"]["enum"] == [0, *widths]

# Options and their help.
import click
from kvtuner_search.cli.calibrate import command
from kvtuner_search.serving.sglang.flags import FLAGS
bits = next(option for option in command.params if option.name == "bits")
assert bits.default == ",".join(map(str, widths)) and bits.process_value(click.Context(command), "3,4") == (3, 4)
assert [flag.choices for flag in FLAGS if "nbits" in flag.name] == [widths] * 2

# Reports: a colour and a place in the legends.
from kvtuner_search.report import page, profile_html
for html in (page.page("", [], []), profile_html._COLOURS):
    assert "--b3: color-mix(in oklab, var(--b2), var(--b4));" in html and ".b3 { fill: var(--b3);" in html

# Ablation and search.
from kvtuner_search.bench.ablate.variants import NARROW
assert 3 in NARROW
near = layout.UNIFORM_BITS.index((4, 4))
assert layout.UNIFORM_BITS[near : near + 5] == ((4, 4), (4, 3), (3, 3), (3, 2), (2, 2))
from kvtuner_search.calibration.candidates import StorageClass, clips, storage_classes
three = StorageClass.of(spec.value)
assert three in storage_classes((2, 3), (64,), 128) and StorageClass.parse(str(three)) == three and len(clips(3)) > 1
from kvtuner_search.calibration.options import CalibrationOptions
assert CalibrationOptions().bits == widths
"""


def test_a_width_is_added_in_the_layout_alone() -> None:
    """A layout with 3 bits beside the others: whatever names, lists, offers or draws bit-widths has it. Kernels are not asked."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", FICTITIOUS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
