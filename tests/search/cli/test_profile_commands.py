"""show, check, diff, import, export and completion as a shell sees them."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtuner_kernels.layout import LAYOUT_VERSION
from kvtuner_search.profile.canonical import canonical_json, digest_of, load
from kvtuner_search.profile.rules import RULES
from tests.search.profile_factory import digest, measure, profile, safetensors, write

K8V8, K8V4 = "8-g64-asym/8-g64-asym", "8-g64-asym/4-g64-asym"
ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "old.json", K8V8), write(tmp_path / "new.json", K8V4, quality=[measure(value=0.02)])


def config(folder: Path, **changes: object) -> Path:
    body = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
    } | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(body))
    return folder


# exit codes


def test_exit_0_and_1(command: Run, files: tuple[Path, Path]) -> None:
    assert command("diff", *files)[0] == 0
    code, out, err = command("diff", *files, "--fail-on", "warning")
    assert (code, err) == (1, "")
    assert "verdict: fail" in out
    assert command("diff", *files, "--max-bytes-per-token", 831)[0] == 1
    assert command("diff", *files, "--max-bytes-per-token", 832)[0] == 0
    assert command("diff", *files, "--max-bytes-per-token", 831, "--fail-on", "none")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["diff"],
        ["diff", "old.json"],
        ["diff", "-", "-"],
        ["diff", "old.json", "new.json", "more.json"],
        ["diff", "old.json", "new.json", "--fail-on", "never"],
        ["diff", "old.json", "new.json", "--memory", "lots"],
        ["diff", "old.json", "new.json", "--max-loss-increase", "nan"],
        ["diff", "old.json", "new.json", "--max-loss-increase", "inf"],
        ["diff", "old.json", "new.json", "--max-loss-increase", "-1"],
        ["diff", "old.json", "new.json", "--config", "missing.toml"],
        ["diff", "--nonsense"],
        ["diff", ":x", "new.json"],
        ["check"],
        ["show"],
        ["show", "old.json", "--html", "old.json/x.html"],
        ["import", "x", "--from", "onnx"],
        ["export", "old.json"],
        ["completion", "tcsh"],
        ["nonsense"],
    ],
)
def test_exit_2(command: Run, files: tuple[Path, Path], arguments: list[str]) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("kvtuner-search: ")


def test_exit_3(command: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for arguments in (
        ["diff", "bad.json", "new.json"],
        ["diff", "old.json", "missing.json"],
        ["check", "bad.json"],
        ["show", "bad.json"],
        ["export", "bad.json", "--to", "vllm"],
        ["check", "old.json", "--model", "missing"],
        ["import", "missing.yaml", "--from", "kvtuner", "--scheme", "kivi", "--model", config(tmp_path / "m")],
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (3, ""), arguments
        assert len(err.splitlines()) == 1


def test_exit_4(command: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.json", K8V8, model__config_digest=digest("other"))
    code, out, _ = command("diff", files[0], other, "--fail-on", "none")
    assert code == 4
    assert "incomparable-model" in out
    assert "verdict: not-comparable" in out
    body = profile(K8V8).model_dump(mode="json") | {"layout_version": LAYOUT_VERSION + 1}
    (tmp_path / "layout.json").write_text(canonical_json(body | {"digest": digest_of(body)}))
    assert command("diff", files[0], "layout.json")[0] == 4
    assert command("check", "layout.json")[0] == 3, "what these kernels cannot serve is not sound"
    code, _, err = command("check", files[0], "--model", config(tmp_path / "m", num_hidden_layers=5))
    assert code == 4
    assert "num_layers=4" in err


# diff


def test_every_format(command: Run, files: tuple[Path, Path]) -> None:
    for style, sign in (
        ("markdown", "### ✅"),
        ("github", "::warning"),
        ("junit", "<?xml"),
        ("json", "{"),
        ("text", "example/"),
    ):
        code, out, _ = command("diff", *files, "--format", style)
        assert code == 0
        assert out.startswith(sign)
    assert json.loads(command("diff", *files, "--json")[1]) == json.loads(
        command("diff", *files, "--format", "json")[1]
    )


def test_rules(command: Run) -> None:
    assert [rule["id"] for rule in json.loads(command("diff", "--rules", "--json")[1])] == list(RULES)
    text = command("diff", "--rules")[1]
    assert all(rule in text for rule in RULES)
    assert command("diff", "--rules", "--format", "markdown")[1].startswith("| rule |")


def test_standard_input(command: Run, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(files[1].read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    code, out, _ = command("diff", files[0], "-", "--json")
    assert (code, json.loads(out)["new"]["source"]) == (0, "-")


def test_pyproject_is_found_and_options_win(command: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.kvtuner-search.diff]\nfail-on = "warning"\n')
    assert command("diff", *files)[0] == 1
    assert command("diff", *files, "--fail-on", "error")[0] == 0
    fingerprints = [
        f["fingerprint"]
        for f in json.loads(command("diff", *files, "--json")[1])["findings"]
        if f["severity"] == "warning"
    ]
    (tmp_path / "pyproject.toml").write_text(
        f'[tool.kvtuner-search.diff]\nfail-on = "warning"\nignore = {json.dumps(fingerprints)}\n'
    )
    code, out, _ = command("diff", *files)
    assert code == 0
    assert f"{len(fingerprints)} findings are ignored" in out


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_revisions(command: Run, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    path = write(tmp_path / "profiles" / "a.json", K8V8)
    with (tmp_path / "profiles" / "huge.json").open("wb") as stream:
        stream.truncate(17 * 2**20)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    write(path, K8V4)
    code, out, _ = command("diff", "HEAD:profiles/a.json", path, "--json")
    assert code == 0
    assert json.loads(out)["old"]["bytes_per_token"] == 4 * 272
    assert command("show", "HEAD:./profiles/a.json")[0] == 0
    for spec, code, message in (
        ("HEAD:profiles/none.json", 3, "neither a file nor in git"),
        ("HEAD:profiles", 3, "is a git tree"),
        ("HEAD:profiles/huge.json", 3, "more than"),
        ("nowhere:profiles/a.json", 3, "neither a file nor in git"),
        ("--output=x:profiles/a.json", 2, ""),
        ("--upload-pack=x:y", 2, ""),
        (":profiles/a.json", 2, "names no revision"),
    ):
        result = command("diff", "--", spec, path)
        assert result[0] == code, spec
        assert message in result[2]
    assert not (tmp_path / "x").exists()
    write(tmp_path / "a:b.json", K8V4)
    assert command("diff", "a:b.json", path)[0] == 0, "a file of that very name wins"


def test_outside_of_git(command: Run, files: tuple[Path, Path]) -> None:
    code, _, err = command("diff", "HEAD:a.json", files[0])
    assert code == 3
    assert "neither a file nor in git" in err


# check


def test_check_of_several_ends_with_the_gravest(command: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    unproven = write(tmp_path / "unproven.json", K8V8, quality=[])
    code, out, err = command("check", files[0], unproven)
    assert (code, err) == (0, "")
    assert "remark quality-unproven" in out
    assert command("check", "--strict", files[0])[0] == 0
    assert command("check", "--strict", files[0], unproven)[0] == 1
    code, out, err = command("check", "--strict", unproven, "bad.json", files[0])
    assert code == 3
    assert "old.json: sound" in out, "the others are still checked"
    assert "bad.json" in err
    data = json.loads(command("check", "--json", "--strict", unproven, "bad.json")[1])
    assert data["exit_code"] == 3
    assert [entry["exit_code"] for entry in data["profiles"]] == [1, 3]
    assert data["profiles"][0]["remarks"][0]["id"] == "quality-unproven"


def test_check_reads_the_transforms_beside_the_profile(command: Run, tmp_path: Path) -> None:
    data = safetensors({f"layers.{index}.key": [2, 64] for index in range(4)})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "t.safetensors").write_bytes(data)
    transforms = {"file": "t.safetensors", "digest": "sha256:" + hashlib.sha256(data).hexdigest()}
    path = write(tmp_path / "sub" / "a.json", "4-g64-asym-c/4-g64-asym", transforms=transforms)
    assert command("check", path)[0] == 0
    (tmp_path / "sub" / "t.safetensors").write_bytes(data + b"x")
    code, _, err = command("check", path)
    assert code == 3
    assert "has digest" in err


def test_check_against_the_model(command: Run, tmp_path: Path) -> None:
    folder = config(tmp_path / "m")
    (tmp_path / "p.json").write_text(json.dumps({"kv_cache_scheme": None}))
    assert command("import", "p.json", "--from", "compressed-tensors", "--model", folder, "-o", "a.json")[0] == 0
    assert command("check", "a.json", "--model", folder)[0] == 0
    assert command("check", "a.json", "--model", folder / "config.json", "--strict")[0] == 0
    config(folder, rope_theta=5e5)
    assert command("check", "a.json", "--model", folder)[0] == 4


# show


def test_show(command: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    out = command("show", files[0], "--memory", "1GiB")[1]
    assert "effective bits" in out
    assert "986,895" in out
    data = json.loads(command("show", files[0], "--json", "--memory", "1GiB")[1])
    assert data["derived"]["capacity_tokens"] == 986895
    assert data["derived"]["layers"][0] == {
        "spec": K8V8,
        "kind": "full",
        "bytes_per_token": 272,
        "effective_bits": 8.5,
        "mean_bits": {"key": 8.0, "value": 8.0},
        "bands": {"key": None, "value": None},
    }
    code, out, err = command("show", files[0], "--html", tmp_path / "new" / "x.html")
    assert (code, out) == (0, "")
    assert "wrote" in err
    assert (tmp_path / "new" / "x.html").read_text().startswith("<!doctype html>")


# import and export


def test_import_writes_a_sound_profile_and_says_where_it_comes_from(command: Run, tmp_path: Path) -> None:
    preset = tmp_path / "small_kivi_x.yaml"
    preset.write_text("".join(f"{i}: {{nbits_key: 4, nbits_value: 2}}\n" for i in range(4)))
    arguments = ["import", preset, "--from", "kvtuner", "--model", config(tmp_path / "m"), "-o", "out.json"]
    assert command(*arguments)[0] == 2
    code, _, err = command(*arguments, "--scheme", "kivi")
    assert code == 1
    assert err.count("lost: ") == 2
    assert "--allow-lossy" in err
    assert not (tmp_path / "out.json").exists()
    assert command(*arguments, "--scheme", "kivi", "--allow-lossy", "--model-id", "org/small")[0] == 0
    loaded = load(tmp_path / "out.json")
    assert loaded.name == "small_kivi_x"
    assert loaded.model.id == "org/small"
    assert loaded.provenance.origin == "imported"
    assert loaded.provenance.source == "kvtuner file small_kivi_x.yaml, scheme kivi"
    assert sum("Lost in the import" in note for note in loaded.provenance.notes) == 2
    assert command("check", "out.json", "--model", tmp_path / "m")[0] == 0
    assert command("import", preset, "--from", "vllm", "--scheme", "kivi", "--model", tmp_path / "m")[0] == 2
    assert command(*arguments, "--scheme", "kivi", "--allow-lossy", "--name", "no such/name")[0] == 2


def test_export(command: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", "4-g64-asym/4-g64-asym")
    code, out, _ = command("export", path, "--to", "transformers")
    assert code == 0
    assert json.loads(out)["cache_config"]["nbits"] == 4
    code, out, err = command("export", path, "--to", "vllm", "-o", "x.yaml")
    assert (code, out) == (1, "")
    assert "vllm cannot express 2 of these settings" in err
    assert not (tmp_path / "x.yaml").exists()
    assert command("export", path, "--to", "vllm", "-o", "x.yaml", "--allow-lossy")[0] == 0
    assert (tmp_path / "x.yaml").read_text() == "kv-cache-dtype: int8_per_token_head\n"
