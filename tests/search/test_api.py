"""The Python API: its examples run as they stand, in its docstrings and in docs/api.md, and bad arguments get one line."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import kvtuner_search
from kvtuner_kernels.layout import BITS
from kvtuner_search import KVTunerError, LayerSpec, Profile, calibrate, evaluate
from kvtuner_search.calibration.options import CalibrationOptions
from kvtuner_search.calibration.samplers import SAMPLERS
from kvtuner_search.cli.calibrate import command as calibrate_command
from kvtuner_search.cli.evaluate import command as evaluate_command

ROOT = Path(__file__).parents[2]
QWEN = ROOT / "profiles" / "qwen2.5-7b" / "qwen2.5-7b-kvtuner4-0.json"
WITH_EXAMPLES = [
    ".".join(path.relative_to(folder).with_suffix("").parts)
    for folder in (ROOT, ROOT / "kernels")
    for path in sorted(folder.glob("kvtuner_*/**/*.py"))
    if ">>> " in path.read_text()
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has the released profiles and may be written to."""
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings(module: str, checkout: Path) -> None:
    found = doctest.testmod(import_module(module))
    assert found.attempted
    assert not found.failed


def test_examples_in_the_document(checkout: Path) -> None:
    found = doctest.testfile(str(ROOT / "docs" / "api.md"), module_relative=False)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize(
    "name", [name for name in kvtuner_search.__all__ if name not in ("__version__", "KVTunerError")]
)
def test_each_public_name_has_an_example_and_a_place_in_the_document(name: str) -> None:
    assert ">>> " in inspect.getdoc(getattr(kvtuner_search, name))  # type: ignore[operator]
    assert f"`{name}" in (ROOT / "docs" / "api.md").read_text()


def test_defaults_are_those_of_the_commands() -> None:
    """Where a function and its command have the same option, it means the same when it is left out."""
    renamed = {"pipeline_stages": "stages", "data": "sources"}
    for function, command in ((calibrate, calibrate_command), (evaluate, evaluate_command)):
        options = command.make_context(command.name, []).params
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in ("profile", "output", "target_bits", "data", "quiet"):
                assert options[renamed.get(name, name)] == parameter.default, (function.__name__, name)
    ours, theirs = inspect.signature(calibrate).parameters, CalibrationOptions()
    for name in ("bits", "group_sizes", "symmetric", "bands", "trials", "sampler", "grouping", "samples", "length"):
        assert ours[name].default == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_bits": 17}, "target_bits=17 is not a budget: give effective bits from 1 to 16"),
        ({"target_bits": 4, "max_loss": 0.1}, "max_loss and target_bits exclude each other"),
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"trials": 0}, "trials=0 cannot be used: give a whole number of at least 1"),
        ({"samples": 2.5}, "samples=2.5 cannot be used"),
        ({"length": 7}, "length=7 cannot be used: give a whole number of at least 8"),
        ({"sampler": "absent"}, f"sampler='absent' cannot be used: choose from {', '.join(SAMPLERS)}"),
        ({"bits": [4, 17]}, f"bits=17 cannot be used: choose from {', '.join(map(str, BITS))}"),
        ({"bits": []}, f"bits='nothing' cannot be used: choose from {', '.join(map(str, BITS))}"),
        ({"target_bits": "4"}, "target_bits='4' is not a budget"),
        ({"max_loss": -1.0}, "--max-loss -1.0 is not positive"),
        ({"group_sizes": [16]}, "group_sizes=16 cannot be used: choose from 0, 32, 64, 128"),
        ({"grouping": "maybe"}, "grouping='maybe' cannot be used: choose from auto, on, off"),
        ({"dtype": "int8"}, "dtype='int8' cannot be used: choose from auto, bfloat16, float16, float32"),
        ({"data": "list"}, r"data='list' is one text: give a list of sources, e.g. \['list'\]"),
        ({"model": "absent/folder/"}, "absent/folder"),
    ],
    ids=str,
)
def test_bad_arguments_get_one_line(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(KVTunerError, match=message) as caught:
        calibrate(**{"model": "reference", "output": tmp_path / "out", "data": ["list"]} | arguments)
    assert "\n" not in str(caught.value)


def test_a_profile_keeps_its_content_and_its_file() -> None:
    """The same as what commands read, by content; and it can be measured, compared and refused as they do."""
    from kvtuner_search.profile.canonical import dumps, load

    profile = Profile.load(QWEN)
    assert dumps(profile) == dumps(load(QWEN)) == QWEN.read_text()
    assert profile.path == QWEN
    with pytest.raises(KVTunerError, match="reference"):
        evaluate(profile, "reference", data=["list"], samples=1, length=192)
    with pytest.raises(KVTunerError, match=r"was not read from a file: read it with Profile\.load"):
        evaluate(Profile.model_validate(profile.model_dump()))
    with pytest.raises(KVTunerError, match=r"was not read from a file: read it with Profile\.load"):
        evaluate(load(QWEN))  # type: ignore[arg-type]


def test_specs_that_nothing_fits_are_refused() -> None:
    for text, message in (("4-g64-asym-c/4-g64-asym", "is centred"), ("4-g32-asym/4-g128-asym", "head_dim=64")):
        with pytest.raises(KVTunerError, match=message):
            evaluate(LayerSpec.parse(text), "reference", data=["list"], samples=1, length=192)
