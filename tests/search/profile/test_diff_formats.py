"""A comparison in each format: complete, within limits, and escaped."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvtuner_search.profile import report as formats
from kvtuner_search.profile.capacity import capacity
from kvtuner_search.profile.compare import Budgets, compare
from kvtuner_search.profile.report import DiffReport, to_github, to_json, to_junit, to_markdown
from kvtuner_search.profile.rules import RULES
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.settings import Settings
from kvtuner_search.profile.terminal import print_card, print_report
from kvtuner_search.report.profile_html import profile_html
from tests.search.profile_factory import digest, fitted, front, measure, profile

K8V8, K8V4, K4V4 = "8-g64-asym/8-g64-asym", "8-g64-asym/4-g64-asym", "4-g64-asym/4-g64-asym"
HOSTILE = "\x1b[31m<script>alert(1)</script> | `x` @user [a](b) &amp; %0A::error::x\r\n::stop-commands::t \u202e [bold]"


def report(
    old: Profile, new: Profile, budgets: Budgets | None = None, name: str = "new.json", **settings: Any
) -> DiffReport:
    comparison = compare(old, new, budgets)
    chosen = Settings(**settings)
    findings, ignored = chosen.apply(comparison.findings)
    return DiffReport(comparison, findings, ignored, chosen, "old.json", name)


@pytest.fixture(autouse=True)
def _no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def hostile() -> Profile:
    return profile(
        K4V4,
        model__id=HOSTILE,
        provenance__notes=[HOSTILE],
        provenance__device=HOSTILE,
        quality=[measure(value=0.1, data=HOSTILE)],
        pareto=[{**point, "origin": HOSTILE} for point in front((K4V4, 0.1))],
    )


def test_json_has_everything() -> None:
    data = json.loads(to_json(report(profile(K8V8), profile([K8V4, K8V8, K8V8, K8V8]), memory=2**30)))
    assert data["verdict"] == "pass"
    assert data["exit_code"] == 0
    assert data["old"]["bytes_per_token"] == 4 * 272
    assert data["new"]["capacity_tokens"] == 2**30 // (3 * 272 + 208)
    assert [layer["changed"] for layer in data["layers"]] == [True, False, False, False]
    assert data["layers"][0] == {
        "index": 0,
        "changed": True,
        "old": K8V8,
        "new": K8V4,
        "old_bytes_per_token": 272,
        "new_bytes_per_token": 208,
        "old_effective_bits": 8.5,
        "new_effective_bits": 6.5,
    }
    assert {finding["rule"] for finding in data["findings"]} == {"layer-bits-lowered", "bytes-per-token-decreased"}
    assert all(len(finding["fingerprint"]) == 16 for finding in data["findings"])


def test_json_of_what_cannot_be_compared() -> None:
    data = json.loads(to_json(report(profile(), profile(model__config_digest=digest("x")))))
    assert (data["verdict"], data["exit_code"], data["layers"]) == ("not-comparable", 4, [])


def test_capacity_is_whole_tokens() -> None:
    assert capacity(4 * 272 * 10 - 1, profile(K8V8)) == 9


def test_markdown_tables_hold_together_whatever_the_names_say() -> None:
    text = to_markdown(report(profile(K8V8, model__id="a"), hostile()))
    assert "<script" not in text
    assert "@user" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    for line in text.splitlines():
        if line.startswith("| "):
            unescaped = line.replace("\\|", "")
            assert unescaped.count("|") in (5, 6), line


def test_annotations_cannot_be_broken_out_of() -> None:
    lines = to_github(report(profile(K8V8), hostile(), name="HEAD:a,b\n::error::x")).splitlines()
    for line in lines[:-1]:
        assert line.startswith(("::error file=a%2Cb�%3A", "::warning file=a%2Cb�%3A", "::notice file=a%2Cb�%3A"))
        assert not any(ord(character) < 32 for character in line)
    assert lines[-1] == "kvtuner-search diff: pass"


def test_at_most_ten_annotations_of_each_level() -> None:
    specs = [
        f"{bits}-g{group}-{sign}/4-g64-asym" for bits in (2, 4) for group in (32, 64) for sign in ("sym", "asym")
    ] * 2
    new = [f"{spec}-x0.{50 + index}" for index, spec in enumerate(specs)]
    result = report(profile("8-g64-asym/8-g64-asym", 16), profile(new))
    warnings = [line for line in to_github(result).splitlines() if line.startswith("::warning")]
    assert len(warnings) == 10
    assert "more findings of this level" in warnings[-1]
    nine = report(profile("8-g64-asym/8-g64-asym", 16), profile([*new[:8], *["8-g64-asym/8-g64-asym"] * 8]))
    assert len([line for line in to_github(nine).splitlines() if line.startswith("::warning")]) == 8


def test_layers_with_the_same_change_are_one_annotation() -> None:
    lines = to_github(report(profile(K8V8), profile([K8V4, K8V4, K8V8, K8V4]))).splitlines()
    assert sum("layer-bits-lowered" in line for line in lines) == 1
    assert "layers 0-1, 3: 8-g64-asym/8-g64-asym becomes 8-g64-asym/4-g64-asym (3 findings)" in lines[0]


def test_the_step_summary_is_appended_and_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.md"
    file.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(file))
    result = report(profile(K8V8), profile(K8V4))
    to_github(result)
    assert file.read_text() == "before\n" + to_markdown(result)
    monkeypatch.setattr(formats, "SUMMARY_BYTES", 300)
    file.write_text("")
    to_github(result)
    assert len(file.read_bytes()) <= 300
    assert "did not fit" in file.read_text()
    to_github(result)
    assert len(file.read_bytes()) <= 300


def test_junit_has_a_case_for_each_rule_and_fails_what_fails_the_gate() -> None:
    old, new = profile(K8V8), profile(K8V4, quality=[measure(value=0.1, data="a<>&\"'")])
    root = ElementTree.fromstring(to_junit(report(old, new, fail_on="warning")).split("\n", 1)[1])
    suite = root[0]
    assert (suite.get("tests"), suite.get("failures")) == (str(len(RULES)), "2")
    cases = {case.get("name"): case for case in suite}
    assert set(cases) == set(RULES)
    assert cases["layer-bits-lowered"].find("failure") is not None
    assert cases["bytes-per-token-decreased"].find("failure") is None
    assert cases["bytes-per-token-decreased"].find("system-out") is not None
    assert list(cases["quality-regressed"]) == []


def test_junit_survives_any_text() -> None:
    assert ElementTree.fromstring(to_junit(report(profile(K8V8), hostile())).split("\n", 1)[1]) is not None


def test_what_cannot_be_compared_fails_in_junit_whatever_the_gate() -> None:
    text = to_junit(report(profile(), profile(model__config_digest=digest("x")), fail_on="none"))
    assert 'failures="1"' in text


def test_the_terminal_shows_text_as_it_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_report(report(profile(K8V8, model__id="a"), hostile(), memory=2**30))
    print_card(hostile(), 2**30)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]" in out, "markup is not interpreted"
    assert "verdict: pass" in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("variable", "coloured"), [("", True), ("1", False)])
def test_no_color(variable: str, coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    print_card(profile(), None)
    assert ("\x1b[" in stream.getvalue()) is coloured


def test_the_page_is_self_contained_and_escaped() -> None:
    text = profile_html(hostile(), 2**30)
    assert "<script" not in text
    assert "\x1b" not in text
    for marker in ("http:", "https:", "src=", "@import", "url("):
        assert marker not in text
    assert text.count("<rect") == 8
    assert text.count("<circle") == 1
    assert "prefers-color-scheme: dark" in text
    body = text.split("<body>")[1].split("</body>")[0].replace('<div class="figures">', "<div>")
    for void in ("<span class=dim>", "<p class=dim>", "<td class=n>", "<th class=n>"):
        body = body.replace(void, void.split(" ")[0] + ">")
    assert ElementTree.fromstring(f"<body>{body}</body>") is not None, "tags are balanced"


def test_the_page_of_a_bare_profile_says_what_is_missing() -> None:
    text = profile_html(profile(quality=[]))
    assert "No quality was measured" in text
    assert "<h2>Front" not in text


def test_the_page_of_a_banded_profile_draws_each_band() -> None:
    layers = ["b65443322/16", "8-g64-asym/b10000000", "b65443322/b44333222", "16/16"]
    text = profile_html(fitted(layers))
    assert "<h2>Bits by band of channels</h2>" in text
    assert "In bands of a fitted basis: keys of layers 0, 2, values of layers 1-2." in text
    bars, bands = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    said = [title.text or "" for title in bands.iter("title")]
    assert [t for t in said if t.startswith("layer 2 keys")] == [
        f"layer 2 keys, band {band + 1}: {bits} bits" for band, bits in enumerate("65443322")
    ]
    assert "layer 1 keys: 8-g64-asym, without bands" in said
    assert len(said) == 4 * 8 + 4
    columns = {str(rect.findtext("title")): rect.attrib for rect in bars.iter("rect")}
    assert len(columns) == 8
    few, some, eight = (
        columns[name]
        for name in (
            "layer 1 values: b10000000, 0.125 bits on average",
            "layer 0 keys: b65443322, 3.625 bits on average",
            "layer 1 keys: 8-g64-asym",
        )
    )
    assert 0 < float(few["height"]) < float(some["height"]) < float(eight["height"]) == 48
    assert (some["class"], eight["class"]) == ("band", "b8")
    assert "Bits by band" not in profile_html(profile())
