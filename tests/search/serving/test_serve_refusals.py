"""``serve`` refuses what it cannot do before SGLang starts: each refusal with its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtuner_kernels.layout import LAYOUT_VERSION
from kvtuner_search.profile.canonical import canonical_json, digest_of
from kvtuner_search.serving.sglang import launch
from tests.search.profile_factory import profile, write
from tests.search.serving import serve_command
from tests.search.serving.serve_command import SMALL_CONFIG, Run, folder

command, small = serve_command.command, serve_command.small  # fixtures


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
