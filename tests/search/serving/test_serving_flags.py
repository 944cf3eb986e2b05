"""The adapter's flags: what they mean, what they become, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.errors import KVTunerError, NotComparableError, ProfileError, UsageError
from kvtuner_search.profile.canonical import load
from kvtuner_search.profile.schema import ModelInfo
from kvtuner_search.serving.configuration import ServingConfiguration
from kvtuner_search.serving.sglang.flags import FLAGS, add_arguments, profile_of, requested, resolve
from tests.search.profile_factory import digest, write

MODEL = ModelInfo(
    id="somewhere/small", architecture="Qwen2ForCausalLM", config_digest=digest("config"), num_layers=4,
    num_attention_heads=4, num_kv_heads=2, head_dim=64,
)  # fmt: skip
ON = "--enable-kvtuner-quant"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvtuner-search" / "profiles"


def parse(*arguments: str) -> argparse.Namespace:
    """As SGLang's own parser does it, abbreviations and all."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--kv-cache-dtype")
    add_arguments(parser)
    return parser.parse_args(list(arguments))


def layers(*arguments: str, **changes: Any) -> set[LayerSpec]:
    profile, _ = profile_of(parse(ON, *arguments), MODEL.model_copy(update=changes), "m")
    assert len(profile.layers) == MODEL.num_layers
    return set(profile.layer_specs())


@pytest.mark.parametrize(
    ("arguments", "spec"),
    [
        ((), "4-g64-sym/4-g64-sym"),
        (("--kvtuner-asym",), "4-g64-asym/4-g64-asym"),
        (("--kvtuner-asym", "true"), "4-g64-asym/4-g64-asym"),
        (("--kvtuner-asym", "false"), "4-g64-sym/4-g64-sym"),
        (("--kvtuner-nbits-key", "8", "--kvtuner-nbits-value=2"), "8-g64-sym/2-g64-sym"),
        (("--kvtuner-nbits-key", "16"), "16/4-g64-sym"),
        (("--kvtuner-q-group-size", "32", "--kvtuner-asym"), "4-g32-asym/4-g32-asym"),
        (("--kvtuner-axis-key", "0", "--kvtuner-axis-value", "0", "--kvtuner-residual-length", "0"), "4-g64-sym/4-g64-sym"),
        ((
            "--kvtuner-nbits-key", "4", "--kvtuner-nbits-value", "4", "--kvtuner-asym", "--kvtuner-q-group-size", "64",
            "--kvtuner-axis-key", "0", "--kvtuner-axis-value", "0", "--kvtuner-residual-length", "0",
        ), "4-g64-asym/4-g64-asym"),
    ],
)  # fmt: skip
def test_what_the_flags_mean(arguments: tuple[str, ...], spec: str) -> None:
    assert layers(*arguments) == {LayerSpec.parse(spec)}


def test_a_group_of_the_whole_head() -> None:
    assert layers("--kvtuner-q-group-size", "-1", head_dim=128) == {LayerSpec.parse("4-g128-sym/4-g128-sym")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kvtuner-axis-key", "1"), "--kvtuner-axis-key 1 (a scale per channel) is not served yet"),
        (("--kvtuner-axis-value", "1"), "--kvtuner-axis-value 1 (a scale per channel) is not served yet"),
        (("--kvtuner-residual-length", "128"), "--kvtuner-residual-length 128 (newest tokens left unquantized) is not served yet"),
        (("--kvtuner-q-group-size", "0"), "--kvtuner-q-group-size 0 is not a group size"),
        (("--kvtuner-q-group-size", "-2"), "--kvtuner-q-group-size -2 is not a group size"),
        (("--kvtuner-q-group-size", "128"), "these flags cannot be stored: head_dim=64 does not split"),
        (("--kvtuner-q-group-size", "48"), "these flags cannot be stored: group_size=48"),
    ],
)  # fmt: skip
def test_what_cannot_be_served(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        layers(*arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kvtuner-nbits-key", "4"), "--kvtuner-nbits-key is given without --enable-kvtuner-quant"),
        (("--kvtuner-asym", "false"), "--kvtuner-asym is given without --enable-kvtuner-quant"),
        (("--kvtuner-profile", "p", ON), "--kvtuner-profile and --enable-kvtuner-quant both say"),
        (("--kvtuner-profile", "p", "--kvtuner-axis-key", "0"), "--kvtuner-profile and --kvtuner-axis-key both say"),
        (("--kvtuner-as-stored",), "--kvtuner-as-stored is given without a profile"),
    ],
)
def test_flags_that_contradict_each_other(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        requested(parse(*arguments))


def test_nothing_is_asked_for_by_nothing() -> None:
    namespace = parse("--kv-cache-dtype", "auto")
    assert all(getattr(namespace, flag.dest) is None for flag in FLAGS)
    assert resolve(namespace, MODEL, "m") is None


def test_a_value_outside_the_choices_is_an_error_of_the_parser() -> None:
    for arguments in (("--kvtuner-nbits-key", "3"), ("--kvtuner-axis-key", "2"), ("--kvtuner-asym", "maybe")):
        with pytest.raises(argparse.ArgumentError):
            parse(ON, *arguments)


def test_flags_become_one_file_of_one_digest(cache: Path) -> None:
    namespace = parse(ON, "--kvtuner-asym", "--kvtuner-as-stored")
    profile, path = profile_of(namespace, MODEL, "m")
    assert not path.exists(), "asking writes nothing"
    configuration = resolve(namespace, MODEL, "m")
    assert configuration == ServingConfiguration(str(path), profile.digest, as_stored=True)
    assert path.parent == cache
    assert load(path) == profile
    other, other_path = profile_of(namespace, MODEL.model_copy(update={"id": "another-folder"}), "elsewhere")
    assert (other, other_path) == (profile, path), "another node may keep the model in another folder"
    before = path.stat().st_mtime_ns
    resolve(namespace, MODEL, "m")
    assert path.stat().st_mtime_ns == before, "a file that is whole is left alone"
    path.write_text("damaged")
    resolve(namespace, MODEL, "m")
    assert load(path) == profile
    assert profile_of(parse(ON), MODEL, "m")[1] != path


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot write"):
        resolve(parse(ON), MODEL, "m")


def test_a_profile_is_checked_against_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json")
    configuration = resolve(parse("--kvtuner-profile", str(path)), MODEL, "m")
    assert configuration == ServingConfiguration.of(path)
    with pytest.raises(NotComparableError, match="is for num_layers=4, m has 5"):
        resolve(parse("--kvtuner-profile", str(path)), MODEL.model_copy(update={"num_layers": 5}), "m")
    with pytest.raises(NotComparableError, match="config_digest"):
        resolve(parse("--kvtuner-profile", str(path)), MODEL.model_copy(update={"config_digest": digest("x")}), "m")
    path.write_text(path.read_text().replace("small", "large"))
    with pytest.raises(ProfileError, match="digest"):
        resolve(parse("--kvtuner-profile", str(path)), MODEL, "m")
    for name in ("missing.json", "."):
        with pytest.raises(KVTunerError, match="give the path of a profile"):
            resolve(parse("--kvtuner-profile", str(tmp_path / name)), MODEL, "m")
