"""The one way from a setting to a profile."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_search.profile.build import build, write
from kvtuner_search.profile.canonical import load, seal
from kvtuner_search.profile.schema import Provenance
from tests.search.profile_factory import profile, safetensors

ROOT = Path(__file__).parents[3]
MADE = Provenance(origin="uniform", tool="a test")


def test_it_is_what_sealing_the_content_gives() -> None:
    first = profile()
    again = build(
        first.name, first.layer_specs(), first.model, first.provenance, quality=first.quality, pareto=first.pareto
    )
    assert again == first
    assert seal(first.model_dump(mode="json", exclude={"digest"})) == again


def test_the_transforms_are_written_beside_it(tmp_path: Path) -> None:
    model = profile().model
    layers = [LayerSpec.parse("4-g64-asym-c/4-g64-asym")] + [LayerSpec()] * (model.num_layers - 1)
    data = safetensors({"layers.0.key": [model.num_kv_heads, model.head_dim]})
    made = build("centred", layers, model, MADE, transforms=data)
    assert write(made, tmp_path, data) == tmp_path / "centred.json"
    assert load(tmp_path / "centred.json") == made
    assert made.transforms is not None
    assert made.transforms.file == "centred.safetensors"
    assert (
        made.transforms.digest == "sha256:" + hashlib.sha256((tmp_path / made.transforms.file).read_bytes()).hexdigest()
    )


def test_what_cannot_be_stored_is_refused() -> None:
    model = profile().model
    with pytest.raises(LayoutError, match="head_dim"):
        build("odd", [LayerSpec.parse("4-g128-asym/4-g128-asym")] * model.num_layers, model, MADE)


def test_nothing_else_works_out_what_layers_add_up_to() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kvtuner_search", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and re.search(r"\bstorage_of\(", path.read_text(errors="replace"))
    }
    assert users == {
        f"kvtuner_search/profile/{name}.py" for name in ("build", "schema", "storage")
    }  # where it is, and its two users
