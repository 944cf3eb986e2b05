"""The validation block: what is valid, which profile it belongs to, and how it is shown and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvtuner_search.cli.main import run
from kvtuner_search.profile.canonical import digest_without_validation, load, save
from kvtuner_search.profile.validation import Validation
from kvtuner_search.profile.validation_text import check_rows, fact_rows, is_stale, measure_rows
from tests.search.profile_factory import capacity, digest, profile, validated, validation

ROOT = Path(__file__).parents[3]
STALE = {"validation": validation(digest("another profile"))}


def test_a_block_changes_the_digest_but_not_what_it_refers_to() -> None:
    plain, with_block = profile(), validated()
    assert plain.digest != with_block.digest
    assert digest_without_validation(plain) == digest_without_validation(with_block) == plain.digest


def test_profiles_without_a_block_keep_their_digests() -> None:
    paths = [path for path in (ROOT / "profiles").glob("*/*.json") if path.parent.name != "schema"]
    assert len(paths) >= 14
    for path in paths:
        found = load(path)
        if found.validation is None:
            assert digest_without_validation(found) == found.digest


def test_a_block_of_another_profile_is_stale() -> None:
    assert not is_stale(profile())
    assert not is_stale(validated())
    assert is_stale(profile(**STALE))
    assert is_stale(profile(name="renamed", validation=validation(digest_without_validation(profile()))))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"verdict": "fail"}, "does not follow from the checks"),
        ({"checks__0__passed": False}, "is not False"),
        ({"checks__0__value": None}, "is not True"),
        ({"checks": []}, "at least 1 item"),
        ({"capacity": capacity(399_000) | {"ratio": 4.0}}, "ratio 4.0 is not 399000 / 100000"),
        ({"date": "yesterday"}, "match pattern"),
        ({"profile_digest": "sha256:0"}, "match pattern"),
        ({"server__colour": "red"}, "Extra inputs"),
        ({"semantics__method": "guessed"}, "Input should be"),
        ({"likelihood__0__ci_low": 9.0}, "is above ci_high"),
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, Any], reason: str) -> None:
    body = validation(digest("x"))
    for path, value in change.items():
        target: Any = body
        *parents, last = path.split("__")
        for parent in parents:
            target = target[int(parent) if parent.isdigit() else parent]
        target[last] = value
    with pytest.raises(ValidationError, match=reason):
        Validation.model_validate(body)


def test_check_strict_refuses_a_stale_and_a_failed_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, remark in (
        ("own", validated(), None),
        ("failed", validated(failing=True), "validation-failed: the validation failed: nll.recall"),
        ("stale", profile(**STALE), "validation-stale"),
    ):
        save(content, tmp_path / f"{name}.json")
        run(["check", "--strict", str(tmp_path / f"{name}.json")])
        out = capsys.readouterr().out
        assert ("validation" in out) == (remark is not None)
        assert remark is None or remark in out


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        (validated(), "pass"),
        (validated(failing=True), "fail"),
        (profile(**STALE), f"stale: it belongs to a profile with digest {digest('another profile')[:19]}"),
    ],
    ids=["pass", "fail", "stale"],
)
def test_show_says_the_verdict_in_both_forms(
    content: Any, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    save(content, tmp_path / "p.json")
    assert run(["show", str(tmp_path / "p.json")]) == 0
    out = capsys.readouterr().out
    assert f"validation on a server: {verdict}" in out
    assert run(["show", str(tmp_path / "p.json"), "--html", str(tmp_path / "p.html")]) == 0
    page = (tmp_path / "p.html").read_text()
    assert f"<h2>Validation on a server: {verdict}" in page
    assert ('<p class="warn">Validation on a server' in page) == (verdict != "pass")


def test_what_a_file_says_cannot_steer_the_terminal_or_the_page(tmp_path: Path) -> None:
    nasty = "\x1b[31m<script>alert(1)</script>"
    block = validated(hardware=nasty, notes=[nasty], command=nasty, tool=nasty).validation
    assert block is not None
    rows = [*check_rows(block), *measure_rows(block), *fact_rows(block)]
    assert not any("\x1b" in cell for row in rows for cell in row)
    save(validated(hardware=nasty, notes=[nasty]), tmp_path / "p.json")
    assert run(["show", str(tmp_path / "p.json"), "--html", str(tmp_path / "p.html")]) == 0
    assert "<script>" not in (tmp_path / "p.html").read_text()


def test_the_rows_say_what_was_measured() -> None:
    block = validated(failing=True).validation
    assert block is not None
    assert check_rows(block) == [("nll.recall", "0.02", "at most 0.01", "FAIL")]
    facts = dict(fact_rows(block))
    assert facts["flips"] == "recall: 1 lost, 1 gained of 100"
    assert facts["greedy agreement"].endswith("1 of 3 prompts identical, median first divergence at token 30")
    assert facts["token capacity"] == "399,000 tokens against 100,000: 3.9900x, predicted 4.0000x"
    assert facts["offline"].startswith("NLL of the server minus offline +0.001 [-0.001, +0.003] on 20,000 tokens")
