"""The published JSON Schema accepts every profile of the repository, and refuses what the loader refuses."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvtuner_kernels.layout import BITS
from kvtuner_search.profile.schema import SCHEMA_VERSION

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / f"profiles/schema/v{SCHEMA_VERSION}.json").read_text())
PROFILES = sorted(path for path in (ROOT / "profiles").glob("*/*.json") if path.parent.name != "schema")
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_it_accepts_the_profiles_here(path: Path) -> None:
    VALIDATOR.check_schema(SCHEMA)
    VALIDATOR.validate(json.loads(path.read_text()))


def test_the_document_names_the_current_schema() -> None:
    assert f"profiles/schema/v{SCHEMA_VERSION}.json" in (ROOT / "docs" / "profile.md").read_text()


def change(content: dict[str, Any], *keys: Any, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    inner: Any = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("surprise",), 1),
        (("schema_version",), SCHEMA_VERSION - 1),
        (("layers", 0, "key", "bands"), "65443329"),
        (("layers", 0, "key", "bands"), "6544332"),
        (("layers", 0, "key", "bands"), [6, 5, 4, 4, 3, 3, 2, 2]),
        (("layers", 0, "key", "bits"), min(set(range(1, 16)) - set(BITS))),
        (("layers", 0, "key", "clip"), 0.1),
        (("digest",), "sha256:zz"),
        (("storage", "bytes_per_token"), -1),
        (("name",), ".."),
    ],
)
def test_it_refuses_what_the_loader_refuses(keys: tuple[Any, ...], value: Any) -> None:
    content = json.loads(PROFILES[0].read_text())
    assert not VALIDATOR.is_valid(change(content, *keys, value=value))
