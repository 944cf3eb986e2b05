"""``serve`` up to the start of SGLang: the plan as text and JSON, and what is imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtuner_kernels.layout import BITS, LayerSpec
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.profile.canonical import load
from kvtuner_search.serving.sglang import launch
from tests.search.profile_factory import HEAD_DIM, KV_HEADS, safetensors, write, write_fitted
from tests.search.serving import serve_command
from tests.search.serving.serve_command import SMALL_CONFIG, Run, folder, plan

command, small = serve_command.command, serve_command.small  # fixtures

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = ROOT / "profiles" / "reference" / "reference-4.00bit.json"
QWEN = sorted((ROOT / "profiles" / "qwen2.5-7b").glob("*.json"))
QWEN_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
    "sliding_window": 131072, "use_sliding_window": False,
}  # fmt: skip


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


def test_the_adapters_command_line(command: Run, small: tuple[Path, Path], tmp_path: Path) -> None:
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


def test_help_says_what_passes_through(command: Run) -> None:
    code, out, _ = command("--help")
    text = " ".join(out.split())
    assert code == 0
    assert "Any option of SGLang, passed on unchanged" in text
    widths = "|".join(map(str, BITS))
    for name in (
        f"--kvtuner-nbits-key [{widths}]",
        "--kvtuner-asym [true|false]",
        "--kvtuner-as-stored",
        "Exit codes:",
    ):
        assert name in text


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
