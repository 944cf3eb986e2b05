"""``scripts/fuzz_profiles``: a few hundred of its inputs, that they are what they should be, and that it notices what it looks for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import click
import pytest

from kvtuner_search.errors import ProfileError
from kvtuner_search.profile.canonical import loads

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "fuzz_profiles"
COUNT = 300


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("fuzz_profiles", str(SCRIPT))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def folder(script: ModuleType, tmp_path: Path) -> Iterator[Path]:
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(tmp_path)
    script.prepare(tmp_path)
    yield tmp_path
    os.chdir(before)
    os.environ.update(environment)


def test_hundreds_of_inputs_do_no_harm(script: ModuleType, folder: Path) -> None:
    codes, wrong = script.fuzz(range(COUNT))
    assert wrong == []
    assert sum(codes.values()) == 3 * COUNT
    assert codes[0] + codes[1] > COUNT / 2, "many are accepted, so what shows them is tried"
    assert codes[3] > COUNT, "and many are refused"
    assert set(codes) <= {0, 1, 2, 3, 4}


def test_an_input_depends_on_seed_and_number_alone(script: ModuleType) -> None:
    first = [script.make(number, 0) for number in range(30)]
    assert [script.make(number, 0) for number in reversed(range(30))] == first[::-1]
    assert [script.make(number, 1) for number in range(30)] != first
    assert len(set(first)) > 25


def test_accepted_inputs_hold_what_steers(script: ModuleType) -> None:
    found = 0
    for number in range(60):
        data = script.make(number, 0)
        try:
            loads(data, "x")
        except ProfileError:
            continue
        text = "\n".join(str(value) for value in texts(json.loads(data)))
        found += script.STEERING.search(text) is not None
    assert found > 10


def texts(value: object) -> Iterator[object]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield item
        yield from texts(item)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (lambda: click.echo("x ##[error]"), ""),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: 7, "exit code 7"),
        (lambda: 3, "no reason"),
    ],
)
def test_it_notices(script: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, body: object, said: str) -> None:
    def run(arguments: list[str]) -> int:
        click.echo("stderr", err=True)
        return body() or 0  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(script, "run", run)
    _, wrong = script.fuzz(range(1))
    assert len(wrong) == 3
    assert all(said in reason or "steering text" in reason for _, _, reason in wrong)


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[m",
        "a\n::error::x",
        "a\r ::error::x",
        "::error::x",
        "x##[y]",
        "##vso[y]",
        "\u202e",
        "\x9b",
        "\u2028",
        "\x85",
    ],
)
def test_what_steers(script: ModuleType, text: str) -> None:
    assert script.STEERING.search(text)
    own = "::error file=a%2Cb.json,title=kvtuner-search layer-bits-lowered::layers 0-3"
    assert not script.STEERING.search(script.ANNOTATION.sub("", own) + "\n")
    assert script.STEERING.search(script.ANNOTATION.sub("", own + "\n") + text)
