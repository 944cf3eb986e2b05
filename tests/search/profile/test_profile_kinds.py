"""Profiles of models with layers of several kinds: what is stored of them, shown, compared and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.cli.main import run
from kvtuner_search.errors import NotComparableError, ProfileError
from kvtuner_search.profile.canonical import canonical_json, digest_of, loads, seal
from kvtuner_search.profile.capacity import capacity, kinds_line, request_rows
from kvtuner_search.profile.checks import check_model
from kvtuner_search.profile.compare import added, compare
from kvtuner_search.profile.kinds import LayerKind
from kvtuner_search.profile.model_config import model_info
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.storage import bytes_per_request, storage_of
from kvtuner_search.report.profile_html import profile_html
from tests.search.profile_factory import content, profile, write

KINDS: Final = ["sliding:512", "sliding:512", "full", "chunked:1024"]
SPECS: Final = ["16/16", "8-g64-asym/8-g64-asym", "4-g64-asym/4-g64-asym", "4-g64-asym/4-g64-asym"]
RAW, EIGHT, FOUR = (LayerSpec.parse(text).bytes_per_token(2, 64) for text in SPECS[:3])


def mixed(**more: Any) -> Profile:
    return profile(SPECS, kinds=KINDS, **more)


def test_full_layers_and_windows_add_up_apart() -> None:
    storage = mixed().storage
    assert storage.bytes_per_token == RAW + EIGHT + 2 * FOUR
    assert storage.bytes_per_token_full == FOUR
    assert storage.bytes_per_request_windows == 512 * (RAW + EIGHT) + 1024 * FOUR
    plain = storage_of([LayerSpec()] * 2, 2, 64, [LayerKind()] * 2)
    assert plain == storage_of([LayerSpec()] * 2, 2, 64)
    assert "bytes_per_token_full" not in plain.model_dump()


@pytest.mark.parametrize("context", [1, 511, 512, 513, 1024, 1025, 32768])
def test_a_request_keeps_no_more_than_its_windows(context: int) -> None:
    made = mixed()
    nbytes = made.bytes_per_request(context)
    assert nbytes == FOUR * context + (RAW + EIGHT) * min(512, context) + FOUR * min(1024, context)
    assert nbytes <= made.storage.bytes_per_token * context
    assert (nbytes == made.storage.bytes_per_token * context) is (context <= 512)
    plain = profile(SPECS)
    assert plain.bytes_per_request(context) == plain.storage.bytes_per_token * context
    assert bytes_per_request([LayerSpec()] * 2, 1, 64, [LayerKind("sliding", 512), LayerKind()], 4096) == 256 * (
        512 + 4096
    )


def test_capacity_at_a_context() -> None:
    made = mixed()
    assert capacity(2**30, made) == 2**30 // made.storage.bytes_per_token
    assert capacity(2**30, made, 32768) == 2**30 * 32768 // made.bytes_per_request(32768) > capacity(2**30, made)
    assert request_rows(made, 2**30, 8192) == [
        (8192, made.bytes_per_request(8192), 2**30 // made.bytes_per_request(8192))
    ]
    assert [row[0] for row in request_rows(made, None)] == [4096, 32768]
    assert request_rows(profile(), None) == []
    assert kinds_line(made) == "layers: 2 sliding:512, 1 full, 1 chunked:1024"
    assert kinds_line(profile()) == ""


def test_models_without_windows_say_nothing_of_kinds(tmp_path: Path) -> None:
    text = write(tmp_path / "p.json").read_text()
    assert "layer_kinds" not in text
    assert "bytes_per_token_full" not in text
    assert "bytes_per_request_windows" not in text


INCONSISTENT: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "too few": ({"model__layer_kinds": KINDS[:3]}, "3 layer_kinds are given, the model has 4 layers"),
    "too many": ({"model__layer_kinds": [*KINDS, "full"]}, "5 layer_kinds are given, the model has 4 layers"),
    "all full": ({"model__layer_kinds": ["full"] * 4}, "all layer_kinds are full: leave them out"),
    "no kind": ({"model__layer_kinds": ["linear:4", *KINDS[1:]]}, "layer_kinds.0"),
    "no window": ({"model__layer_kinds": ["sliding:0", *KINDS[1:]]}, "layer_kinds.0"),
    "another window": ({"model__layer_kinds": ["sliding:513", *KINDS[1:]]}, "bytes_per_request_windows is 548864, the layers add up to 549376"),
    "other full layers": ({"storage__bytes_per_token_full": 1}, "bytes_per_token_full is 1, the layers add up to 144"),
    "no full layers": ({"storage__bytes_per_token_full": None}, "bytes_per_token_full is None, the layers add up to 144"),
}  # fmt: skip


@pytest.mark.parametrize("case", INCONSISTENT)
def test_what_contradicts_itself_is_refused(case: str) -> None:
    changes, says = INCONSISTENT[case]
    with pytest.raises(ProfileError, match=says):
        seal(content(SPECS, kinds=KINDS, **changes))


def test_kinds_without_their_storage_and_storage_without_kinds_are_refused() -> None:
    for body in (
        content(SPECS, model__layer_kinds=KINDS),
        content(SPECS, storage__bytes_per_token_full=0, storage__bytes_per_request_windows=0),
    ):
        with pytest.raises(ProfileError, match="bytes_per_token_full"):
            seal(body)


def test_a_file_edited_by_hand_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.json", SPECS, kinds=KINDS)
    assert run(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert (
        f"{FOUR} of them in full layers; windows take at most {mixed().storage.bytes_per_request_windows} per request"
        in shown
    )
    body = json.loads(path.read_text())
    body["model"]["layer_kinds"][2:] = ["chunked:1024", "full"]  # of layers that take the same bytes
    path.write_text(canonical_json(body))
    assert run(["check", str(path)]) == 3
    assert "digest" in capsys.readouterr().err
    body["model"]["layer_kinds"] = ["sliding:512", "sliding:512", "sliding:512", "chunked:1024"]
    body["digest"] = digest_of(body)
    path.write_text(canonical_json(body))
    assert run(["check", str(path)]) == 3
    assert "bytes_per_token_full is 144, the layers add up to 0" in capsys.readouterr().err


def test_it_is_written_and_read_again() -> None:
    made = mixed()
    text = canonical_json(made.model_dump(mode="json"))
    assert loads(text.encode(), "it") == made
    assert made.model.kinds == tuple(map(LayerKind.parse, KINDS))


def test_check_compares_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = mixed()
    check_model(made, made.model, "it")
    for kinds, says in (
        (["sliding:512", "sliding:256", "full", "full"], "layer 1=sliding:512, it has sliding:256 .and 1 more layers differ"),
        (None, "layer 0=sliding:512, it has full"),
    ):  # fmt: skip
        with pytest.raises(NotComparableError, match=says):
            check_model(made, made.model.model_copy(update={"layer_kinds": kinds}), "it")
    config = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 256, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 4, "sliding_window": 16}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    same = {"model__architecture": "Gemma2ForCausalLM", "model__config_digest": None}
    fits = write(tmp_path / "a.json", SPECS, kinds=["sliding:16", "full"] * 2, **same)
    other = write(tmp_path / "b.json", SPECS, kinds=["sliding:32", "full"] * 2, **same)
    plain = write(tmp_path / "c.json", SPECS, **same)
    codes = [run(["check", str(path), "--model", str(tmp_path)]) for path in (fits, other, plain)]
    assert codes == [0, 4, 4]
    assert "layer 0=full, " in capsys.readouterr().err


def test_kinds_that_the_served_context_cannot_tell_apart_are_one_model() -> None:
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "mistral", "hidden_size": 256, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 4, "max_position_embeddings": 4096, "sliding_window": 512}  # fmt: skip
    plain = profile(SPECS, model__config_digest=None)
    windows = profile(SPECS, kinds=["sliding:512"] * 4, model__config_digest=None)
    for made in (plain, windows):
        check_model(made, model_info(config, "it", most=512), "it")
    check_model(windows, model_info(config, "it", most=513), "it")
    with pytest.raises(NotComparableError, match="layer 0=full, it has sliding:512"):
        check_model(plain, model_info(config, "it", most=513), "it")


def test_diff_says_that_other_kinds_are_another_model() -> None:
    made = mixed()
    other = profile(SPECS, kinds=["sliding:256", "sliding:256", "full", "full"])
    found = compare(made, other)
    assert not found.comparable
    assert [finding.message for finding in found.findings] == [
        "layers 0-1 are sliding:512 and sliding:256: two models",
        "layers 3 are chunked:1024 and full: two models",
    ]
    assert not compare(made, profile(SPECS)).comparable
    assert added(made).comparable


def test_diff_sees_bytes_move_from_windows_into_full_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["sliding:512", "full"] * 2
    few, many = "4-g64-asym/4-g64-asym", "8-g64-asym/8-g64-asym"
    old = write(tmp_path / "old.json", [many, few] * 2, kinds=kinds)
    new = write(tmp_path / "new.json", [few, many] * 2, kinds=kinds)
    for profiles, fires in (((old, new), True), ((new, old), False)):
        run(["diff", *map(str, profiles), "--json"])
        report = json.loads(capsys.readouterr().out)
        rules = {finding["rule"] for finding in report["findings"]}
        assert ("bytes-per-request-increased" in rules) is fires
        assert "bytes-per-token-increased" not in rules
        assert report["new"]["layer_kinds"] == kinds
        assert report["new"]["bytes_per_request"]["4096"] > 0
    run(["diff", str(old), str(new)])
    assert "bytes of 32,768 tokens" in capsys.readouterr().out
    run(["diff", str(old), str(new), "--format", "markdown"])
    assert "bytes of 4,096 tokens" in capsys.readouterr().out


def test_show_says_which_layers_have_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.json", SPECS, kinds=KINDS)
    assert run(["show", str(path), "--memory", "1GiB"]) == 0
    shown = capsys.readouterr().out
    made = mixed()
    assert "attention in layers: 2 sliding:512, 1 full, 1 chunked:1024" in shown
    for tokens in (4096, 32768):
        nbytes = made.bytes_per_request(tokens)
        assert f"bytes of {tokens:,} tokens" in shown
        assert f"{nbytes:,}" in shown
        assert f"{2**30 // nbytes:,} such requests in 1 GiB" in shown
    assert run(["show", str(path), "--context", "100", "--json"]) == 0
    derived = json.loads(capsys.readouterr().out)["derived"]
    assert derived["requests"] == [{"context_tokens": 100, "bytes": made.bytes_per_request(100), "fit": None}]
    assert [layer["kind"] for layer in derived["layers"]] == KINDS
    assert run(["show", str(path), "--context", "0"]) == 2


def test_the_page_marks_windowed_layers() -> None:
    page = profile_html(mixed(), 2**30)
    assert page.count('<rect class="window"') == 3
    assert "<title>layer 3: chunked:1024</title>" in page
    assert "Attention in layers: 2 sliding:512" in page
    assert "bytes of a request of 32,768 tokens" in page
    plain = profile_html(profile(SPECS))
    assert 'class="window"' not in plain
    assert "bytes of a request" not in plain
    assert "bytes of a request of 7 tokens" in profile_html(profile(SPECS), None, 7)


def test_import_takes_kinds_from_the_model_and_export_says_that_it_does_not_write_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 256, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2, "max_position_embeddings": 8192}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "k.yaml").write_text("0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}\n")
    new = tmp_path / "new.json"
    arguments = ["--from", "kvtuner", "--scheme", "pertoken", "--model", str(tmp_path), "-o", str(new)]
    assert run(["import", str(tmp_path / "k.yaml"), *arguments]) == 0
    made = loads(new.read_bytes(), "it")
    assert made.model.layer_kinds == ["sliding:4096", "full"]
    assert made.storage.bytes_per_token_full == made.layer_specs()[1].bytes_per_token(2, 64)
    assert run(["check", str(new), "--model", str(tmp_path)]) == 0
    capsys.readouterr()
    assert run(["export", str(new), "--to", "kvtuner"]) == 0
    assert "layers: 1 sliding:4096, 1 full: the format does not say so" in capsys.readouterr().err
