"""``serve`` up to the start of SGLang: the plan as text and JSON, and every refusal with its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtuner_kernels.layout import LAYOUT_VERSION, LayerSpec
from kvtuner_search.cli.main import run
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.profile.canonical import canonical_json, digest_of, load
from kvtuner_search.serving.sglang import launch
from tests.search.profile_factory import HEAD_DIM, KV_HEADS, profile, safetensors, write, write_fitted

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "profiles" / "reference" / "reference-4.00bit.json"
QWEN = sorted((ROOT / "profiles" / "qwen2.5-7b").glob("*.json"))
QWEN_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
    "sliding_window": 131072, "use_sliding_window": False,
}  # fmt: skip
SMALL_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_hidden_layers": 4,
}  # fmt: skip
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``serve`` in ``tmp_path`` on a machine without a GPU: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_free_gpu_memory", lambda: None)
    for name in [name for name in os.environ if name.startswith(("KVTUNER_", "SGLANG_"))]:
        monkeypatch.delenv(name)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run(["serve", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """(profile, model folder) of a small model whose config.json alone exists."""
    model = folder(tmp_path / "small", SMALL_CONFIG)
    return write(tmp_path / "p.json", "4-g64-asym/4-g64-asym", model__config_digest=None), model


def folder(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def plan(command: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = command("--dry-run", "--json", *arguments)
    assert (code, err) == (0, "")
    loaded: dict[str, Any] = json.loads(out)
    return loaded


# the plan


def test_the_reference_profile(command: Run) -> None:
    model = reference_model_path()
    code, out, err = command("--profile", REFERENCE, "--model-path", model, "--dry-run", "--tp", "2", "--pp-size", "2",
                             "--mem-fraction-static", "0.5", "--gpu-memory", "80GiB")  # fmt: skip
    assert (code, err) == (0, "")
    assert "reference-4.00bit, calibrated, sha256:" in out
    assert "layer 11 " in out
    assert "2,048 bytes of 8,192 at 16 bits: 4.000 effective bits, 4.00 times the tokens" in out
    assert "tensor parallel 2 (1 of 2 KV heads on each), pipeline parallel 2" in out
    assert "balanced by bytes; set SGLANG_PP_LAYER_PARTITION to choose another" in out
    assert "0.5 of 80 GiB (--gpu-memory) less 6.6" in out
    assert "http://127.0.0.1:30000\n" in out
    data = plan(command, "--profile", REFERENCE, "--model-path", model, "--tp", 2, "--pp-size", 2,
                "--mem-fraction-static", 0.5, "--gpu-memory", "80GiB", "--page-size", 64)  # fmt: skip
    loaded = load(REFERENCE)
    specs = loaded.layer_specs()
    cut = data["partition"]["layers"][0]
    stored = [sum(s.bytes_per_token(1, 64) for s in part) for part in (specs[:cut], specs[cut:])]
    assert [stage["bytes_per_token"] for stage in data["stages"]] == stored
    assert [index for entry in data["layers"] for index in entry["layers"]] != []
    assert sorted(index for entry in data["layers"] for index in entry["layers"]) == list(range(16))
    assert all(str(specs[index]) == entry["spec"] for entry in data["layers"] for index in entry["layers"])
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    cache = 40 * 2**30 - weights // 4
    assert data["capacity"]["cache_bytes"] == cache
    assert data["capacity"]["tokens"] == cache // max(stored) // 64 * 64
    assert data["capacity"]["tokens_per_gib"] == 2**30 // max(stored) // 64 * 64
    assert f"about {cache // max(stored):,} tokens" in out
    assert data["storage"] == loaded.storage.model_dump()


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_the_qwen_profiles(command: Run, tmp_path: Path, path: Path) -> None:
    model = folder(tmp_path / "Qwen2.5-7B", QWEN_CONFIG)
    loaded = load(path)
    data = plan(command, "--profile", path, "--model-path", model, "--tp-size", 2)
    assert data["profile"] == {"path": str(path), "name": loaded.name, "digest": loaded.digest}
    assert data["parallel"]["kv_heads_per_rank"] == 2
    assert data["stages"][0]["bytes_per_token"] * 2 == loaded.storage.bytes_per_token
    assert data["stages"][0]["bytes_per_token_16bit"] == 28672
    assert data["capacity"]["tokens"] is None
    assert len(data["capacity"]["unknown"]) == 2
    assert data["capacity"]["tokens_per_gib_16bit"] == 2**30 // 28672
    code, out, _ = command("--profile", path, "--model-path", model, "--dry-run")
    assert code == 0
    assert f"{loaded.storage.bytes_per_token:,} bytes of 57,344 at 16 bits" in out
    assert "no total is predicted, because\n" in out


def test_what_sglang_is_given(command: Run, small: tuple[Path, Path]) -> None:
    data = plan(command, "--profile", small[0], "--model-path", small[1])
    added = ["--host", "127.0.0.1", "--attention-backend", "triton", "--kvtuner-profile", str(small[0])]
    assert data["added_arguments"] == added
    assert list(data["environment"]) == ["KVTUNER_SERVING"]
    assert json.loads(data["environment"]["KVTUNER_SERVING"])["profile"] == str(small[0])
    data = plan(command, "--profile", small[0].name, "--model-path", small[1], "--device", "cpu", "--host", "0.0.0.0",
                "--kvtuner-as-stored", "--pp-size", 2)  # fmt: skip
    added = ["--attention-backend", "torch_native", "--kvtuner-profile", str(small[0]), "--kvtuner-as-stored"]
    assert data["added_arguments"] == added
    assert data["environment"]["SGLANG_PP_LAYER_PARTITION"] == "2,2"
    assert json.loads(data["environment"]["KVTUNER_SERVING"])["as_stored"] is True
    code, out, _ = command("--profile", small[0], "--model-path", small[1], "--host", "0.0.0.0", "--dry-run")
    assert code == 0
    assert "http://0.0.0.0:30000, which other machines can reach" in out


def test_the_seeds_command_line(command: Run, small: tuple[Path, Path], tmp_path: Path) -> None:
    flags = [
        "--enable-kvtuner-quant",
        "--kvtuner-nbits-key",
        "4",
        "--kvtuner-nbits-value",
        "4",
        "--kvtuner-asym",
        "--kvtuner-q-group-size",
        "64",
    ]
    parallel = [
        "--tp-size",
        "2",
        "--pp-size",
        "2",
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--dist-init-addr",
        "10.0.0.1:5000",
        "--dist-timeout",
        "300",
    ]
    data = plan(command, "--model-path", small[1], *flags, *parallel, "--disable-custom-all-reduce")
    assert data["layers"] == [
        {"layers": [0, 1, 2, 3], "spec": "4-g64-asym/4-g64-asym", "bytes_per_token": 144, "effective_bits": 4.5}
    ]
    assert data["parallel"]["stages_on_this_node"] == [1]
    assert not (tmp_path / "cache").exists(), "a dry run writes nothing"
    out = command("--model-path", small[1], *flags, *parallel, "--dry-run")[1]
    assert "node 1 of 2: stages 1, tensor-parallel ranks 0-1" in out
    assert "nothing but /health: node 0 answers requests" in out


def test_the_users_partition_is_shown(command: Run, small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "1,3")
    code, out, _ = command("--profile", small[0], "--model-path", small[1], "--pp-size", 2, "--dry-run")
    assert code == 0
    assert "layers divided 1,3, as SGLANG_PP_LAYER_PARTITION says" in out
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "1,2")
    code, out, err = command("--profile", small[0], "--model-path", small[1], "--pp-size", 2, "--dry-run")
    assert (code, out) == (2, "")
    assert "SGLANG_PP_LAYER_PARTITION='1,2' does not divide 4 layers among 2 stages" in err


def test_the_reference_model_is_served_from_its_folder(command: Run) -> None:
    code, out, _ = command("--profile", REFERENCE, "--model-path", "reference", "--gpu-memory", "1GiB", "--dry-run")
    folder = str(reference_model_path())
    assert code == 0
    assert "no safetensors files" not in out
    assert f"model       {folder}: 16 layers" in out
    assert f"with --model-path {folder} " in out, "SGLang would look for a model of that name on the hub"


def test_limits_and_drafts_are_said(command: Run, small: tuple[Path, Path]) -> None:
    (small[1] / "model.safetensors").write_bytes(safetensors({"w": [256, 1024]}))
    arguments = ["--profile", small[0], "--model-path", small[1], "--dry-run"]
    known = ["--mem-fraction-static", 0.5, "--gpu-memory", "1GiB"]
    assert "at most 1,000 tokens, as --max-total-tokens says" in command(*arguments, "--max-total-tokens", "1k")[1]
    out = command(*arguments, *known, "--max-total-tokens", "1k", "--speculative-algorithm", "STANDALONE")[1]
    assert "about 1,000 tokens" in out
    assert "and at most 1,000, as --max-total-tokens says" in out
    assert "draft model's own cache" in out
    assert (
        "--quantization fp8 changes the size of the weights" in command(*arguments, *known, "--quantization", "fp8")[1]
    )
    assert "about 0 tokens" in command(*arguments, *known[:1], 0.0001, *known[2:])[1], "weights alone are too large"
    assert "on the CPU changes" in command(*arguments, *known[:2], "--device", "cpu")[1]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('printf "140000\\n139000\\n"', 139000 * 2**20),
        ("echo '[N/A]'", None),
        ("echo 5; exit 9", None),
        ("exit 0", None),
        (None, None),
    ],
)
def test_free_memory_by_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, expected: int | None
) -> None:
    (tmp_path / "bin").mkdir()
    if script is not None:
        (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nset -- $*\n{script}\n")
        (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert launch._free_gpu_memory() == expected


def test_only_visible_gpus_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\n[ "$4" = "1,3" ] && [ "$3" = "-i" ] && echo 7\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert launch._free_gpu_memory() == 7 * 2**20


def test_the_assumed_fraction_is_said(command: Run) -> None:
    arguments = ["--profile", REFERENCE, "--model-path", reference_model_path(), "--gpu-memory", "80GiB", "--dry-run"]
    out = command(*arguments)[1]
    assert "0.88 is assumed: SGLang chooses the fraction itself unless --mem-fraction-static is given" in out
    assert "0.88 of 80 GiB (--gpu-memory)" in out
    assert "is assumed" not in command(*arguments, "--mem-fraction-static", "0.88")[1]


def test_sixteen_bits_are_those_of_a_server_without_a_profile(
    command: Run, small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers are divided evenly, whatever a profile's bytes ask for; a user's partition holds for both."""
    uneven = write(tmp_path / "uneven.json", ["16/16", *["2-g64-asym/2-g64-asym"] * 3], model__config_digest=None)
    arguments = ["--profile", uneven, "--model-path", small[1], "--pp-size", 2]
    layer = 2 * KV_HEADS * HEAD_DIM * 2
    data = plan(command, *arguments)
    assert data["partition"] == {"layers": [1, 3], "by_user": False}
    assert data["capacity"]["tokens_per_gib"] == 2**30 // layer
    assert data["capacity"]["tokens_per_gib_16bit"] == 2**30 // (2 * layer)
    monkeypatch.setenv("SGLANG_PP_LAYER_PARTITION", "3,1")
    assert plan(command, *arguments)["capacity"]["tokens_per_gib_16bit"] == 2**30 // (3 * layer)


def test_layers_in_bases_are_shown_by_their_bands_and_their_bases_come_off_the_cache(
    command: Run, small: tuple[Path, Path], tmp_path: Path
) -> None:
    """Keys and values of a layer share words, so a stage's bytes are no sum over sides; bases are as many as layers and heads."""
    banded, other = LayerSpec.parse("b65443322/b54433221"), LayerSpec.parse("b65443322/8-g64-asym-c-r")
    path = write_fitted(tmp_path / "banded.json", [str(banded)] * 3 + [str(other)], model__config_digest=None)
    (small[1] / "model.safetensors").write_bytes(bytes(2**20))
    arguments = [
        "--profile",
        path,
        "--model-path",
        small[1],
        "--tp-size",
        2,
        "--pp-size",
        2,
        "--mem-fraction-static",
        0.5,
    ]
    data = plan(command, *arguments, "--gpu-memory", "1GiB")
    stored = [sum(layer.bytes_per_token(1, HEAD_DIM) for layer in part) for part in ([banded] * 2, [banded, other])]
    assert [stage["bytes_per_token"] for stage in data["stages"]] == stored
    assert [(entry["spec"], entry["layers"]) for entry in data["layers"]] == [
        (str(banded), [0, 1, 2]),
        (str(other), [3]),
    ]
    one = 4 * 4 * (HEAD_DIM + 1) * HEAD_DIM  # bytes of one side of one head
    assert data["capacity"]["basis_bytes"] == 4 * one
    cache = 2**29 - 2**20 // 4
    assert data["capacity"]["cache_bytes"] == cache
    assert data["capacity"]["tokens"] == (cache - 4 * one) // max(stored)
    assert data["capacity"]["tokens_16bit"] == cache // (2 * 2 * HEAD_DIM * 2)
    out = command(*arguments, "--gpu-memory", "1GiB", "--dry-run")[1]
    assert "keys b65443322 (mean 3.625), values b54433221 (mean 3): 4.000 bits" in out
    assert "layer 3     keys b65443322 (mean 3.625), values 8-g64-asym:" in out
    assert "of it are taken by bases, whatever the number of tokens" in out
    out = command("--profile", small[0], "--model-path", small[1], "--gpu-memory", "1GiB", "--dry-run")[1]
    assert "taken by bases" not in out


# refusals


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model-path", "small"], 2, "nothing says how layers are stored: give --profile FILE"),
        (["--profile", "p.json"], 2, "--model-path is missing"),
        (["--profile", "p.json", "--model-path", "small", "--enable-kvtuner-quant"], 2, "both say how layers are stored"),
        (["--model-path", "small", "--kvtuner-nbits-key", "4"], 2, "is given without --enable-kvtuner-quant"),
        (["--model-path", "small", "--enable-kvtuner-quant", "--kvtuner-nbits-key", "5"], 2, "invalid choice"),
        (["--model-path", "small", "--enable-kvtuner-quant", "--kvtuner-axis-key", "1"], 2, "is not served yet"),
        (["--model-path", "small", "--enable-kvtuner-quant", "--kvtuner-residual-length", "128"], 2, "is not served yet"),
        (["--profile", "p.json", "--model-path", "small", "--tp", "3"], 2, "2 KV heads cannot be spread over 3 ranks"),
        (["--profile", "p.json", "--model-path", "small", "--pp-size", "5"], 2, "5 pipeline stages for 4 layers"),
        (["--profile", "p.json", "--model-path", "small", "--attention-backend", "fa3"], 2, "on cuda give triton"),
        (["--profile", "p.json", "--model-path", "small", "--attention-backend", "torch_native"], 2, "on cuda give triton"),
        (["--profile", "p.json", "--model-path", "small", "--decode-attention-backend", "flashinfer"], 2,
         "--decode-attention-backend flashinfer cannot read packed rows"),
        (["--profile", "p.json", "--model-path", "small", "--prefill-attention-backend=fa4"], 2, "fa4 cannot read"),
        (["--profile", "p.json", "--model-path", "small", "--device", "cpu", "--attention-backend", "triton"], 2,
         "on cpu give torch_native"),
        (["--profile", "p.json", "--model-path", "small", "--device", "xpu"], 2, "--device xpu: a profile is served on"),
        (["--profile", "p.json", "--model-path", "small", "--enable-hierarchical-cache"], 2, "HiCache cannot be combined"),
        (["--profile", "p.json", "--model-path", "small", "--disaggregation-mode", "decode"], 2, "PD disaggregation cannot"),
        (["--profile", "p.json", "--model-path", "small", "--kv-cache-dtype=fp8_e5m2"], 2, "another KV-cache dtype cannot"),
        (["--profile", "p.json", "--model-path", "small", "--dp", "2"], 2, "--dp-size 2: data parallelism within a server"),
        (["--profile", "p.json", "--model-path", "mla"], 2, "mla has multi-head latent attention, MLA"),
        (["--profile", "p.json", "--model-path", "small", "--gpu-memory", "lots"], 2, "is not a size"),
        (["--profile", "p.json", "--model-path", "small", "--json-model-override-args", "{"], 2, "is not JSON"),
        (["--profile", "p.json", "--model-path", "small", "--json-model-override-args", "[]"], 2, "is not a JSON object"),
        (["--profile", "none.json", "--model-path", "small"], 3, "does not exist"),
        (["--profile", "cut.json", "--model-path", "small"], 3, "is not valid JSON"),
        (["--profile", "edited.json", "--model-path", "small"], 3, "it was edited or damaged"),
        (["--profile", "layout.json", "--model-path", "small"], 3, f"these kernels store version {LAYOUT_VERSION}"),
        (["--profile", "centred.json", "--model-path", "small"], 3, "c.safetensors does not exist"),
        (["--profile", "p.json", "--model-path", "./none"], 3, "model ./none does not exist: give a local folder"),
        (["--profile", "p.json", "--model-path", "p.json"], 3, "model p.json is a file"),
        (["--profile", "p.json", "--model-path", "empty"], 3, "config.json does not exist"),
        (["--profile", "p.json", "--model-path", "gpt"], 3, "num_hidden_layers=None is not a positive integer"),
        (["--profile", "p.json", "--model-path", "deeper"], 4, "is for num_layers=4, deeper has 6"),
        (["--profile", "p.json", "--model-path", "small", "--json-model-override-args", '{"num_hidden_layers": 2}'], 4,
         "is for num_layers=4, small has 2"),
        (["--profile", "p.json", "--model-path", "small"], 5, "SGLang is not installed for"),
    ],
)  # fmt: skip
def test_every_refusal(
    command: Run, small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "sglang_version", lambda: None)
    whole = small[0].read_text()
    (tmp_path / "cut.json").write_text(whole[:-30])
    (tmp_path / "edited.json").write_text(whole.replace('"small"', '"large"'))
    body = profile().model_dump(mode="json") | {"layout_version": LAYOUT_VERSION + 1}
    (tmp_path / "layout.json").write_text(canonical_json(body | {"digest": digest_of(body)}))
    transforms = {"file": "c.safetensors", "digest": "sha256:" + "0" * 64}
    write(tmp_path / "centred.json", "4-g64-asym-c/16", model__config_digest=None, transforms=transforms)
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "gpt", {"architectures": ["GPT2LMHeadModel"], "num_attention_heads": 4, "hidden_size": 64})
    folder(tmp_path / "mla", SMALL_CONFIG | {"kv_lora_rank": 512})
    folder(tmp_path / "deeper", SMALL_CONFIG | {"num_hidden_layers": 6})
    actual, out, err = command(*arguments)
    assert (actual, out) == (code, "")
    assert message in err
    assert err.splitlines()[-1].startswith("kvtuner-search: ")
    assert "Traceback" not in err


def test_a_context_beyond_the_positions_is_refused_or_remarked(
    command: Run, small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folder(tmp_path / "short", SMALL_CONFIG | {"max_position_embeddings": 4096})
    scaled = SMALL_CONFIG | {"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    yarn = folder(tmp_path / "yarn", scaled)
    given = ("--profile", small[0], "--dry-run", "--model-path")
    assert command(*given, model, "--context-length", "4096")[::2] == (0, "")
    code, out, err = command(*given, model, "--context-length", "4097")
    assert (code, out) == (2, "")
    assert "--context-length 4097: " in err
    assert "was made for 4096 positions" in err
    code, _, err = command(*given, yarn, "--context-length=16384")
    assert (code, err.count("\n")) == (0, 1)
    assert "--context-length 16384 is beyond the 4096 positions" in err
    assert command(*given, yarn, "--context-length=16385")[0] == 2
    for odd in ("0", "-1", "many"):
        assert command(*given, model, f"--context-length={odd}")[0] == 2
    monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")  # SGLang's own way to insist
    code, _, err = command(*given, model, "--context-length", "9999")
    assert (code, "nothing was measured there" in err) == (0, True)


def test_a_window_counts_by_the_context_that_is_served(command: Run, small: tuple[Path, Path], tmp_path: Path) -> None:
    window = {"max_position_embeddings": 32768, "sliding_window": 4096, "model_type": "mistral", "rope_theta": 10000.0}
    model = folder(tmp_path / "window", SMALL_CONFIG | window)
    given = ("--profile", small[0], "--dry-run", "--model-path", model)
    assert command(*given)[0] == 2
    assert command(*given, "--context-length", "4097")[0] == 2
    assert command(*given, "--context-length", "4096")[0] == 0


@pytest.mark.parametrize("text", ["[" * 100000, "{", '{"a": NaN}', '"x"', '{"a": 1, "a": 2}'])
def test_overrides_that_are_no_object_are_refused(command: Run, small: tuple[Path, Path], text: str) -> None:
    code, out, err = command(
        "--profile", small[0], "--model-path", small[1], "--dry-run", "--json-model-override-args", text
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--json-model-override-args" in err
    assert len(err) < 500


def test_a_folder_with_an_adapter_is_refused(command: Run, small: tuple[Path, Path]) -> None:
    (small[1] / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    code, _, err = command("--profile", small[0], "--model-path", small[1], "--dry-run")
    assert (code, "an adapter of org/base" in err) == (3, True)


def test_a_pointer_for_a_config_is_named(command: Run, small: tuple[Path, Path]) -> None:
    (small[1] / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    code, _, err = command("--profile", small[0], "--model-path", small[1], "--dry-run")
    assert (code, "is a Git LFS pointer" in err) == (3, True)


@pytest.mark.parametrize("version", ["0.5.13", "0.5.14.post1", "0.6.0", "1.0"])
def test_another_sglang_is_refused(
    command: Run, small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(launch, "sglang_version", lambda: version)
    code, out, err = command("--profile", small[0], "--model-path", small[1])
    assert (code, out) == (5, "")
    assert f"SGLang {version} is not supported, only 0.5.14" in err
    assert command("--profile", small[0], "--model-path", small[1], "--dry-run")[0] == 0


def test_help_says_what_passes_through(command: Run) -> None:
    code, out, _ = command("--help")
    text = " ".join(out.split())
    assert code == 0
    assert "Any option of SGLang, passed on unchanged" in text
    for name in ("--kvtuner-nbits-key [2|4|8|16]", "--kvtuner-asym [true|false]", "--kvtuner-as-stored", "Exit codes:"):
        assert name in text


# imports


def test_torch_is_not_imported_before_sglang_starts(small: tuple[Path, Path], tmp_path: Path) -> None:
    """For a folder, and for a hub id whose config.json is in the hub's local cache."""
    snapshot = tmp_path / "hub" / "models--example--small" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(SMALL_CONFIG))
    (tmp_path / "hub" / "models--example--small" / "refs").mkdir()
    (tmp_path / "hub" / "models--example--small" / "refs" / "main").write_text("0" * 40)
    program = (
        "import os, sys\nfrom kvtuner_search.serving.sglang import engine\nfrom kvtuner_search.cli.main import run\n"
        "engine.check_installation = lambda plan: None\n"
        "def execve(path, arguments, environment):\n"
        "    print([name for name in ('torch', 'sglang', 'triton', 'datasets', 'optuna') if name in sys.modules])\n"
        "    print('KVTUNER_SERVING' in environment, *arguments[1:3])\n"
        "    raise OSError(7, 'as far as this test goes')\n"
        "os.execve = execve\nsys.exit(run(sys.argv[1:]))"
    )
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for model in (str(small[1]), "example/small"):
        command = [sys.executable, "-c", program, "serve", "--profile", str(small[0]), "--model-path", model]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.splitlines() == ["[]", "True -m sglang.launch_server"], done.stderr
        assert done.returncode == 5
        assert "cannot start" in done.stderr
    command[-1] = "example/absent"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3
    assert "cannot read the config.json of example/absent" in done.stderr.splitlines()[-1]
