"""show, check, diff, export and the plan of serve on profiles with bands, and on files of schema version 1."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.profile.canonical import dumps, load
from kvtuner_search.serving.sglang.plan import _specs
from tests.search.profile_factory import BANDED, fitted, safetensors, transforms, validated, write, write_fitted

MIXED = [BANDED, "8-g64-asym-c/b33222110", "b88644321/4-g64-asym", "16/16"]
STORED = Path(__file__).resolve().parents[1] / "profile" / "stored"
Run = Callable[..., tuple[int, str, str]]


# show


def test_show_draws_a_line_for_each_band(command: Run, tmp_path: Path) -> None:
    out = command("show", write_fitted(tmp_path / "a.json", MIXED))[1]
    assert "in bands of a fitted basis: keys of layers 0, 2, values of layers 0-1\n" in out
    lines = out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("keys "))
    assert [line.split()[-1] for line in lines[at : at + 8]] == [
        "688F", "5·8·", "4·6·", "4·4·", "3·4·", "3·3·", "2·2·", "2·1·",
    ]  # fmt: skip
    assert lines[at + 8].startswith("values ")
    assert [line.split()[-1] for line in lines[at + 8 : at + 16]] == [
        "434F", "43··", "32··", "32··", "32··", "21··", "21··", "20··",
    ]  # fmt: skip
    for text in ("b65443322", "b33222110", "b88644321", "8-g64-asym-c"):
        assert text in out
    assert next(line.split() for line in lines if line.startswith("transforms "))[1] == "a.safetensors"


def test_show_of_a_plain_profile_has_one_line_a_side(command: Run, tmp_path: Path) -> None:
    out = command("show", write(tmp_path / "a.json", ["8-g64-asym/4-g64-asym"] * 3 + ["16/2-g64-asym"]))[1]
    assert "keys       0  888F\nvalues     0  4442\n" in out
    assert "band" not in out


def test_show_as_json_has_bands_as_numbers(command: Run, tmp_path: Path) -> None:
    data = json.loads(command("show", write_fitted(tmp_path / "a.json", MIXED), "--json")[1])
    layers = data["derived"]["layers"]
    assert layers[0] == {
        "spec": BANDED,
        "kind": "full",
        "bytes_per_token": LayerSpec.parse(BANDED).bytes_per_token(2, 64),
        "effective_bits": 4.0,
        "mean_bits": {"key": 3.625, "value": 2.875},
        "bands": {"key": [6, 5, 4, 4, 3, 3, 2, 2], "value": [4, 4, 3, 3, 3, 2, 2, 2]},
    }
    assert layers[1]["bands"] == {"key": None, "value": [3, 3, 2, 2, 2, 1, 1, 0]}
    assert data["layers"][0]["key"]["bands"] == "65443322"


def test_the_plan_of_serve_says_what_is_banded() -> None:
    lines = _specs(fitted(MIXED))
    assert [line.split(": ")[0] for line in lines] == [
        "layer 0  keys b65443322 (mean 3.625), values b44333222 (mean 2.875)",
        "layer 1  keys 8-g64-asym, values b33222110 (mean 1.75)",
        "layer 2  keys b88644321 (mean 4.5), values 4-g64-asym",
        "layer 3  keys 16, values 16",
    ]


# check


def test_check_reads_the_bases_beside_the_profile(command: Run, tmp_path: Path) -> None:
    path = write_fitted(tmp_path / "a.json", MIXED)
    # For each of two heads: 64 + 4 bytes, 64 + 4 + 16 + 2, 48 + 2 + 32 + 4, and 256.
    assert command("check", "--strict", path) == (0, f"{path}: sound, 7.625 effective bits, 976 bytes per token\n", "")
    data = safetensors(transforms(MIXED), numbers={"layers.0.key": {7: float("nan")}})
    (tmp_path / "a.safetensors").write_bytes(data)
    code, _, err = command("check", path)
    assert (code, "has digest" in err) == (3, True)
    path.write_text(dumps(fitted(MIXED, data, "a.safetensors")))
    code, _, err = command("check", path)
    assert code == 3
    assert err.endswith("a.safetensors: layers.0.key has a number that is not finite: calibrate again\n")
    assert len(err.splitlines()) == 1


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of schema version 1 with a validation block of its own, and its transforms."""
    for suffix in (".json", ".safetensors"):
        shutil.copy(STORED / f"reference-4.00bit{suffix}", tmp_path / f"old{suffix}")
    (tmp_path / "old.safetensors").rename(tmp_path / "reference-4.00bit.safetensors")
    return tmp_path / "old.json"


def test_an_old_file_is_sound_and_a_strict_check_asks_for_the_current_version(command: Run, old: Path) -> None:
    code, out, _ = command("check", old)
    assert code == 0
    assert "remark older-schema: the file has schema version 1, the current one is 2: check --rewrite" in out
    code, out, _ = command("check", "--strict", old, "--json")
    assert code == 1
    assert [remark["id"] for remark in json.loads(out)["profiles"][0]["remarks"]] == ["older-schema"]
    assert "validation on a server: pass" in command("show", old)[1]


def test_rewriting_loses_nothing_and_is_done_once(command: Run, old: Path, tmp_path: Path) -> None:
    before, data = load(old), old.read_bytes()
    code, out, _ = command("check", "--rewrite", "--strict", old)
    assert code == 0
    assert f"rewritten, its digest is {before.digest}" in out
    assert load(old) == before
    assert old.read_bytes() == dumps(before).encode()
    (tmp_path / "before.json").write_bytes(data)
    code, out, _ = command("diff", tmp_path / "before.json", old, "--json")
    assert (code, json.loads(out)["findings"]) == (0, [])
    moved = old.stat().st_mtime_ns
    assert "rewritten" not in command("check", "--rewrite", old)[1]
    assert old.stat().st_mtime_ns == moved
    assert json.loads(command("check", "--rewrite", old, "--json")[1])["profiles"][0]["rewritten"] is False


def test_rewriting_writes_what_a_link_names_and_mends_the_form(command: Run, tmp_path: Path) -> None:
    made = validated()
    (tmp_path / "real").mkdir()
    path = tmp_path / "real" / "a.json"
    path.write_text(json.dumps(made.model_dump(mode="json")))
    (tmp_path / "link.json").symlink_to(path)
    assert "error not-canonical" in command("check", "--strict", "link.json")[1]
    assert command("check", "--rewrite", "--strict", "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink()
    assert path.read_text() == dumps(made)


def test_what_is_not_sound_is_not_rewritten(command: Run, old: Path, tmp_path: Path) -> None:
    data = old.read_bytes()
    (tmp_path / "reference-4.00bit.safetensors").write_bytes(b"other")
    assert command("check", "--rewrite", old)[0] == 3
    edited = data.replace(b'"clip": 0.95', b'"clip": 0.96', 1)
    old.write_bytes(edited)
    assert command("check", "--rewrite", old)[0] == 3
    assert old.read_bytes() == edited


def test_a_full_disk_ends_with_the_code_of_data_and_loses_nothing(
    command: Run, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    data = old.read_bytes()
    code, _, err = command("check", "--rewrite", old, write_bad(tmp_path))
    assert (code, old.read_bytes()) == (3, data)
    assert "No space left on device" in err
    assert sorted(path.name for path in tmp_path.glob("*old*")) == ["old.json"], "nothing is left behind"


def write_bad(folder: Path) -> Path:
    (folder / "bad.json").write_text("{}")
    return folder / "bad.json"


# diff


def test_diff_of_an_old_and_a_banded_profile(command: Run, old: Path, tmp_path: Path) -> None:
    before = load(old)
    specs = ["b65443322/b44333222" for _ in before.layers]
    data = safetensors(transforms(specs, before.model.num_kv_heads, before.model.head_dim))
    (tmp_path / "new.safetensors").write_bytes(data)
    body = fitted(
        specs, data, model=before.model.model_dump(), storage=storage(specs, before.model), provenance__data=[]
    )
    (tmp_path / "new.json").write_text(dumps(body))
    code, out, _ = command("diff", old, "new.json", "--json")
    assert code == 0
    rules = {finding["rule"] for finding in json.loads(out)["findings"]}
    assert {"layer-bits-lowered", "layer-banding-changed", "transforms-changed"} <= rules
    code, out, _ = command("diff", old, "new.json")
    assert "layer-banding-changed" in out
    assert "incomparable-" not in out


def storage(specs: list[str], model: object) -> dict[str, object]:
    from kvtuner_search.profile.storage import storage_of

    layers = [LayerSpec.parse(text) for text in specs]
    return storage_of(layers, model.num_kv_heads, model.head_dim).model_dump()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("style", "marks"),
    [
        ("text", ["all layers have the same specs, in other bases", "basis-changed"]),
        ("json", ['"rule": "basis-changed"']),
        ("markdown", ["`basis-changed`", "all specs are the same, but their bases are"]),
        ("github", ["::warning file=b.json,title=kvtuner-search basis-changed::"]),
        ("junit", ['<testcase classname="kvtuner-search.diff" name="basis-changed">', 'failures="1"']),
    ],
)
def test_another_basis_shows_in_every_format(command: Run, tmp_path: Path, style: str, marks: list[str]) -> None:
    write_fitted(tmp_path / "a.json", MIXED)
    (tmp_path / "b.json").write_text(
        dumps(fitted(MIXED, safetensors(transforms(MIXED), numbers={"layers.0.key": {0: 2.0}}), "a.safetensors"))
    )
    code, out, _ = command("diff", "a.json", "b.json", "--format", style, "--fail-on", "warning")
    assert code == 1
    for mark in marks:
        assert mark in out
    if style != "json":
        assert out.count("basis-changed") == 1
    assert command("diff", "a.json", "a.json", "--format", style, "--fail-on", "warning")[0] == 0


def test_layers_with_bands_of_their_own_are_told_together(command: Run, tmp_path: Path) -> None:
    before = ["b66543322/16", "b65543322/16", "8-g64-asym/16", "b44443322/16"]
    after = ["b65443322/16", "b65443322/16", "4-g64-asym/16", "b33333322/16"]
    write_fitted(tmp_path / "a.json", before)
    write_fitted(tmp_path / "b.json", after)
    out = command("diff", "a.json", "b.json", "--format", "github")[1].splitlines()
    told = [line for line in out if "layer-bits-lowered" in line]
    assert len(told) == 2
    assert "layers 0-1, 3: each has its own bands, first b66543322/16 becomes b65443322/16" in told[0]
    assert "layer 2: 8-g64-asym/16 becomes 4-g64-asym/16" in told[1]
    found = json.loads(command("diff", "a.json", "b.json", "--json")[1])["findings"]
    assert len({f["fingerprint"] for f in found if f["rule"] == "layer-bits-lowered"}) == 4


# export


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("kvtuner", "0:\n  nbits_key: 8\n  nbits_value: 4\n"),
        ("transformers", '"nbits": 8'),
        ("vllm", "kv-cache-dtype: int8_per_token_head\n"),
        ("sglang", "kv-cache-dtype: fp8_e4m3\n"),
        ("compressed-tensors", '"num_bits": 8'),
    ],
)
def test_export_lists_the_loss_of_bands_and_never_narrows(
    command: Run, tmp_path: Path, target: str, expected: str
) -> None:
    path = write_fitted(tmp_path / "a.json", MIXED)
    code, out, err = command("export", path, "--to", target)
    assert (code, out) == (1, "")
    assert (
        "lost: fitted basis and bands of 3 layers, and the points that their first tokens are stored relative to\n"
        in err
    )
    code, out, err = command("export", path, "--to", target, "--allow-lossy")
    assert code == 0
    assert expected in out
    assert "lost: keys of layers 0: b65443322 becomes " in err


@pytest.mark.parametrize(
    ("widest", "bits"), [("b88888888", 8), ("b50000000", 8), ("b44443322", 4), ("b33333333", 4), ("b22222222", 2)]
)
def test_a_banded_tensor_is_exported_in_the_bits_of_its_widest_band(
    command: Run, tmp_path: Path, widest: str, bits: int
) -> None:
    path = write_fitted(tmp_path / "a.json", [f"{widest}/b10000000"] * 4)
    assert f"nbits_key: {bits}\n  nbits_value: 2\n" in command("export", path, "--to", "kvtuner", "--allow-lossy")[1]
    out = json.loads(command("export", path, "--to", "transformers", "--allow-lossy")[1])
    assert (out["cache_config"]["nbits"], out["cache_config"]["q_group_size"]) == (bits, 64)


def test_a_profile_without_bands_loses_none(command: Run, tmp_path: Path) -> None:
    err = command("export", write(tmp_path / "a.json", "8-g64-asym/4-g64-asym"), "--to", "transformers")[2]
    assert "bands" not in err
