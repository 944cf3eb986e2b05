"""[tool.kvtuner-search.diff]: found upward, strict, and applied to findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtuner_search.errors import UsageError
from kvtuner_search.profile.compare import compare
from kvtuner_search.profile.settings import Settings, load_settings, parse_size
from tests.search.profile_factory import digest, profile


def configure(folder: Path, text: str) -> Path:
    file = folder / "pyproject.toml"
    file.write_text(text)
    return file


def test_everything_is_read(tmp_path: Path) -> None:
    configure(
        tmp_path,
        """
        [tool.kvtuner-search.diff]
        fail-on = "warning"
        max-bytes-per-token = 1000
        max-loss-increase = 0.5
        memory = "2GiB"
        ignore = ["pareto-changed", "0123456789abcdef"]
        severity = { layer-bits-lowered = "error", model-renamed = "ignore" }
        """,
    )
    assert load_settings(None, tmp_path) == Settings(
        "warning",
        1000,
        0.5,
        2**31,
        {"layer-bits-lowered": "error", "model-renamed": "ignore"},
        frozenset({"pareto-changed", "0123456789abcdef"}),
    )


def test_the_nearest_file_with_the_table_wins(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    configure(tmp_path, '[tool.kvtuner-search.diff]\nfail-on = "none"')
    assert load_settings(None, inner).fail_on == "none"
    configure(inner.parent, "[tool.ruff]\nline-length = 3")
    assert load_settings(None, inner).fail_on == "none"
    configure(inner, '[tool.kvtuner-search.diff]\nfail-on = "warning"')
    assert load_settings(None, inner).fail_on == "warning"
    assert load_settings(tmp_path / "pyproject.toml", inner).fail_on == "none"


def test_no_file_means_defaults(tmp_path: Path) -> None:
    assert load_settings(None, tmp_path / "nowhere").fail_on == "error"
    with pytest.raises(UsageError, match="does not exist"):
        load_settings(tmp_path / "missing.toml", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fail_on = 1", r"no key 'fail_on' \(did you mean fail-on\?\)"),
        ('fail-on = "info"', "use one of error, warning, none"),
        ("fail-on = []", "use one of"),
        ("max-bytes-per-token = -1", "not negative"),
        ("max-bytes-per-token = 1.5", "whole bytes"),
        ("max-bytes-per-token = true", "give a number"),
        ("max-loss-increase = nan", "not negative"),
        ("max-loss-increase = inf", "not negative"),
        ('memory = "lots"', "not a size"),
        ("severity = 3", "severity is a table"),
        ('severity = { quality-regresed = "info" }', "did you mean quality-regressed"),
        ('severity = { quality-regressed = "fatal" }', "use one of error, warning, info, ignore"),
        ("severity = { quality-regressed = [] }", "use one of"),
        ('severity = { incomparable-model = "info" }', "cannot be changed"),
        ('ignore = ["incomparable-layout"]', "cannot be changed"),
        ('ignore = ["0123456789ABCDEF"]', "no rule"),
        ("ignore = [3]", "as strings"),
        ("x = ", "not valid TOML"),
        ("x = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, line: str, message: str) -> None:
    configure(tmp_path, f"[tool.kvtuner-search.diff]\n{line}\n")
    with pytest.raises(UsageError, match=message):
        load_settings(None, tmp_path)


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nkvtuner-search = 3", "[tool.kvtuner-search]\ndiff = 3"])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    configure(tmp_path, text)
    with pytest.raises(UsageError, match="is not a table"):
        load_settings(None, tmp_path)


def test_overrides_and_ignores() -> None:
    findings = compare(
        profile("8-g64-asym/8-g64-asym"), profile(["8-g64-asym/4-g64-asym"] + ["8-g64-asym/8-g64-asym"] * 3)
    ).findings
    by_rule = {finding.rule: finding for finding in findings}
    assert set(by_rule) == {"layer-bits-lowered", "bytes-per-token-decreased"}
    kept, ignored = Settings(severity={"bytes-per-token-decreased": "error"}).apply(findings)
    assert (kept[0].rule, kept[0].severity) == ("bytes-per-token-decreased", "error"), "gravest first"
    assert ignored == 0
    for settings in (
        Settings(ignore=frozenset({"layer-bits-lowered"})),
        Settings(severity={"layer-bits-lowered": "ignore"}),
        Settings(ignore=frozenset({by_rule["layer-bits-lowered"].fingerprint})),
    ):
        kept, ignored = settings.apply(findings)
        assert [f.rule for f in kept] == ["bytes-per-token-decreased"]
        assert ignored == 1


def test_what_ends_the_comparison_is_never_ignored() -> None:
    findings = compare(profile(), profile(model__config_digest=digest("x"))).findings
    kept, ignored = Settings(ignore=frozenset({findings[0].fingerprint})).apply(findings)
    assert (kept, ignored) == (findings, 0)


@pytest.mark.parametrize(
    ("fail_on", "severities", "passes"),
    [
        ("error", [], True),
        ("error", ["warning", "info"], True),
        ("error", ["error"], False),
        ("warning", ["info"], True),
        ("warning", ["warning"], False),
        ("warning", ["error"], False),
        ("none", ["error"], True),
    ],
)
def test_the_gate(fail_on: str, severities: list[str], passes: bool) -> None:
    findings = compare(profile(), profile(model__id="x")).findings
    graded = [f for severity in severities for f in Settings(severity={"model-renamed": severity}).apply(findings)[0]]
    assert Settings(fail_on=fail_on).passes(graded) is passes


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("24GB", 24 * 10**9), ("40 GiB", 40 * 2**30), (" 1.5KiB ", 1536), ("2TiB", 2**41)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "1gb", "GiB", "1e9", "nan", "0.1", "٣GiB", "9" * 40])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "x=" + "1" * 5000,
        "[tool.kvtuner-search.diff]\nfail-on=0x" + "f" * 5000,
        "[tool.kvtuner-search.diff]\nmax-loss-increase=0x" + "f" * 5000,
        "a." * 30000 + "a=1",
        "[" + "a." * 30000 + "a]",
        "[" * 5000,
    ],
)
def test_a_file_that_no_reader_bears_is_a_usage_error(text: str, tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        load_settings(file, tmp_path)
    assert len(str(error.value)) < 1000
