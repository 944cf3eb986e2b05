"""The record: what is mandatory, and which contradictions are refused, by the model and by the published JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from kvtuner_search.bench import files
from kvtuner_search.bench.record import Cache, Environment, Record, Summary
from tests.search.bench import record_factory as made

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "profiles/schema/bench-v1.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def content(**changes: Any) -> dict[str, Any]:
    return {**json.loads(files.dumps(made.record(small=True))), **changes}


def refused(body: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        Record.model_validate_json(json.dumps(body))
    return str(caught.value)


def test_a_record_comes_back_as_it_was() -> None:
    for record in (made.record(), made.record(made.KV4, tensor_parallel=2, nodes=2), made.record(correct=False)):
        assert Record.model_validate_json(files.dumps(record)) == record


@pytest.mark.parametrize(
    "field", ["created", "command", "preset", "environment", "model", "served", "cache", "correctness"]
)
def test_what_is_mandatory(field: str) -> None:
    body = content()
    del body[field]
    assert f"{field}\n  Field required" in refused(body)
    assert not VALIDATOR.is_valid(body)


def test_versions_of_server_and_tool_are_mandatory() -> None:
    with pytest.raises(ValidationError, match="no version of kvtuner-search"):
        Environment(hardware=None, client="a machine", versions={"sglang": "0.5.14"})


@pytest.mark.parametrize(("profile", "digest"), [("mine", None), ("16-bit", made.DIGEST)])
def test_a_profile_needs_its_digest(profile: str, digest: str | None) -> None:
    with pytest.raises(ValidationError, match="a profile needs its digest"):
        Cache(profile=profile, digest=digest, effective_bits=4.25, bytes_per_token=15232)


def test_speed_is_refused_beside_a_check_that_failed() -> None:
    good = made.record(small=True)
    body = content()
    body["correctness"][1]["passed"] = False
    assert "speed beside a correctness check that failed (profile)" in refused(body)
    red = made.record(small=True, correct=False)
    assert not red.correct
    assert not red.passed
    assert all(cell.speed is None for cell in red.cells)
    assert good.passed


def test_a_record_without_any_check_is_refused() -> None:
    assert "no correctness check" in refused(content(correctness=[]))


def test_failures_and_successes_add_up_to_the_requests() -> None:
    body = content()
    body["cells"][0]["succeeded"] -= 1
    assert "15 succeeded and {} failed of 16" in refused(body)
    cell = made.cell("throughput", 100, 64, 4, failed=3)
    assert (cell.succeeded, cell.failures, cell.success_rate) == (61, {"dropped": 3}, 61 / 64)


def test_speed_without_an_answer_is_refused() -> None:
    body = content()
    cell = body["cells"][0]
    cell["failures"], cell["succeeded"] = {"http-status": cell["shape"]["requests"]}, 0
    assert "speed without a request that succeeded" in refused(body)


def test_percentiles_are_of_one_sample() -> None:
    good = {"samples": 4, "mean": 2.0, "minimum": 1.0, "p50": 2.0, "p90": 3.0, "p99": 3.5, "maximum": 4.0}
    assert Summary(**good).p99 == 3.5
    for change in ({"p50": 0.5}, {"p99": 5.0}, {"mean": 4.1}, {"maximum": 0.0}):
        with pytest.raises(ValidationError, match="cannot come from one sample"):
            Summary(**{**good, **change})
    third = 0.1 + 0.2  # the mean of equal values may differ from them in the last bit
    assert Summary(samples=3, mean=0.3, minimum=third, p50=third, p90=third, p99=third, maximum=third)


def test_a_7b_model_fits_the_fields() -> None:
    assert made.QWEN.weight_bytes > 2**31


def test_the_published_schema_is_the_models() -> None:
    assert (ROOT / "profiles/schema/bench-v1.json").read_text() == files.json_schema(), "run scripts/schema"
    VALIDATOR.check_schema(SCHEMA)
    VALIDATOR.validate(content())
    VALIDATOR.validate(json.loads(files.dumps(made.record(made.KV4, correct=False))))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("surprise",), 1),
        (("version",), 2),
        (("format",), "other"),
        (("cache", "digest"), "sha256:zz"),
        (("cells", 0, "succeeded"), -1),
        (("cells", 0, "section"), "other"),
        (("cells", 0, "shape", "requests"), 0),
        (("environment",), None),
    ],
)
def test_the_published_schema_refuses_what_the_reader_refuses(keys: tuple[Any, ...], value: Any) -> None:
    body = content()
    inner: Any = body
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    assert not VALIDATOR.is_valid(body)
    refused(body)
