"""The record of a calibration: what was written before is read, anything doubtful is refused in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.calibration.options import CalibrationOptions
from kvtuner_search.calibration.record import CalibrationRecord, ModelRecord, OptionsRecord, dumps, read
from kvtuner_search.errors import DataError
from kvtuner_search.models.load import ModelOptions
from tests.search.report import calibration_record as made


@pytest.mark.parametrize("name", made.variants())
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    record = made.typed(made.variants()[name])
    path = tmp_path / "record.json"
    path.write_text(dumps(record))
    assert read(path) == record
    assert dumps(read(path)) == dumps(record)


def test_the_file_has_the_form_of_the_first_records() -> None:
    content = made.banded()
    written = json.loads(dumps(made.typed(content)))
    assert written.keys() == content.keys()
    for part in (
        "sensitivity",
        "trials",
        "random_trials",
        "proxy_front",
        "hypervolume",
        "seconds",
        "environment",
        "data",
    ):
        assert written[part] == content[part], part
    assert "worth" not in json.loads(dumps(made.typed(made.record())))["sensitivity"][0]


def test_the_options_are_those_of_a_run() -> None:
    for typed, options in ((OptionsRecord, CalibrationOptions), (ModelRecord, ModelOptions)):
        assert list(typed.model_fields) == [field.name for field in dataclasses.fields(options)]


def _later(content: dict[str, Any]) -> None:
    content["record_version"] = 2


def _unknown(content: dict[str, Any]) -> None:
    content["targets"][0]["chosen"]["new"] = None


def _spec(content: dict[str, Any]) -> None:
    content["trials"][0]["layers"][0] = "3-g64/4"


def _layers(content: dict[str, Any]) -> None:
    content["sensitivity"].pop()


def _short(content: dict[str, Any]) -> None:
    content["random_trials"][0]["layers"].pop()


def _nameless(content: dict[str, Any]) -> None:
    del content["record_version"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_later, "has version 2 of the record's schema, this kvtuner-search reads up to 1: install"),
        (_unknown, "targets.0.chosen.new: Extra inputs are not permitted"),
        (_spec, "'3-g64' is not a tensor spec"),
        (_layers, "sensitivity of 3 layers, the model has 4"),
        (_short, "trial 0 has 3 layers, the model has 4"),
        (_nameless, "has no record_version: it is not a calibration record"),
    ],
)
def test_what_is_doubtful_is_refused_in_one_line(damage: Any, said: str, tmp_path: Path) -> None:
    content = json.loads(json.dumps(made.record()))  # the factory's settings share lists
    damage(content)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        read(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"record_version": 1, "record_version": 1}', '{"loss": NaN}'])
def test_no_record_at_all(content: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(DataError):
        read(path)
    with pytest.raises(DataError):
        read(tmp_path / "nothing.json")


def test_a_figure_is_a_number() -> None:
    content = made.record()
    content["targets"][0]["chosen"]["loss"] = float("nan")
    with pytest.raises(ValueError, match="loss"):
        CalibrationRecord.model_validate(content)
