"""One sample gives no interval: calibration says so, and the gate calls the quality unproven instead of failing on rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtuner_search.cli.main import run
from kvtuner_search.evaluation.statistics import paired_ratio
from kvtuner_search.profile.canonical import dumps, load
from kvtuner_search.profile.checks import strict_remarks
from kvtuner_search.profile.compare import Budgets, compare
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import interval_of
from kvtuner_search.report.profile_html import profile_html
from tests.search.profile_factory import measure, profile, server_measure, validated


def test_calibration_says_so_and_the_gate_says_unproven(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--model",
        str(tiny_model),
        "--output",
        str(tmp_path),
        "--data",
        "list",
        "--data",
        "text",
        "--length",
        "170",
    ]
    assert (
        run(
            [
                "calibrate",
                *arguments,
                "--samples",
                "1",
                "--trials",
                "1",
                "--target-bits",
                "6",
                "--no-bands",
                "--no-random-baseline",
            ]
        )
        == 0
    )
    assert (
        "warning: one sample gives no interval, so quality is unproven on list, text; give more --samples"
        in capsys.readouterr().err
    )
    (path,) = tmp_path.glob("*bit.json")
    found = load(path)
    assert any("one sample gives no interval" in note for note in found.provenance.notes)
    assert run(["check", str(path)]) == 0
    assert "remark quality-unproven: everything was measured on one sample" in capsys.readouterr().out
    assert run(["check", "--strict", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.count("error ") == 1, "nothing but that it is unproven"
    assert "error quality-unproven" in out


def one(value: float = 0.02, **more: Any) -> dict[str, Any]:
    """A measure of one sample, whose interval is what resampling it gives."""
    return measure(value=value, half=0.0, samples=1, **more)


def remarks(made: Profile) -> list[str]:
    return [remark.id for remark in strict_remarks(made, dumps(made).encode())]


def test_unproven_is_said_once_and_only_if_nothing_is_proven() -> None:
    assert remarks(profile(quality=[one(), one(data="x")])) == ["quality-unproven"]
    assert remarks(profile(quality=[one(), measure(data="x")])) == []
    assert remarks(profile("16/16", quality=[one(0.0)])) == [], "16 bits need no proof"
    assert remarks(profile(quality=[one() | {"ci_low": 1.0, "ci_high": 2.0}])) == ["quality-unproven"]


def test_the_interval_of_rounded_means_is_not_held_against_a_profile() -> None:
    """The interval is of summed differences, the change that of two means: they differ in the last digits."""
    rng = np.random.default_rng(0)
    outside = 0
    for _ in range(200):
        ours, base = rng.random(2) * 50 + 1, np.zeros(2)
        ours[1], weight = ours[0], np.full(2, 97.0)
        base += rng.random() * 40
        interval = paired_ratio(ours - base, weight)
        entry = measure("nll", data="x") | {
            "samples": 2, "value": ours.sum() / weight.sum(), "baseline": base.sum() / weight.sum(), "ci_low": interval.low, "ci_high": interval.high,
        }  # fmt: skip
        made = profile(quality=[entry])
        outside += not interval.low <= made.quality[0].delta <= interval.high
        assert remarks(made) == []
    assert outside > 20, "this is not a rare case"
    assert remarks(profile(quality=[measure(ci_low=0.03, ci_high=0.04)])) == ["interval-excludes-value"]
    assert remarks(profile(quality=[measure(ci_low=0.02 + 1e-9, ci_high=0.04)])) == ["interval-excludes-value"]


@pytest.mark.parametrize(
    ("old", "new"), [(one(0.02), one(0.5)), (measure(value=0.02), measure(value=0.5, samples=1)), (one(0.5), one(0.02))]
)
def test_a_change_on_one_sample_is_inconclusive(old: dict[str, Any], new: dict[str, Any]) -> None:
    tokens = {"samples": 1, "tokens": 300}
    found = compare(profile(quality=[old | tokens]), profile("4-g64-asym/4-g64-asym", quality=[new | tokens])).findings
    rules = {finding.rule: finding for finding in found}
    assert "quality-inconclusive" in rules
    assert "on one sample, which has no interval: inconclusive" in rules["quality-inconclusive"].message
    assert "nothing was measured on more than one sample" in rules["quality-unproven"].message
    assert not {"quality-regressed", "quality-improved"} & set(rules)


def test_a_budget_still_counts_one_sample() -> None:
    found = compare(
        profile(quality=[one(0.02)]), profile("4-g64-asym/4-g64-asym", quality=[one(0.5)]), Budgets(None, 0.1)
    ).findings
    assert "loss-over-budget" in {finding.rule for finding in found}


def test_no_interval_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = profile(quality=[one()])
    assert interval_of(made.quality[0]) == "(one sample, no interval)"
    (tmp_path / "a.json").write_text(dumps(made))
    assert run(["show", str(tmp_path / "a.json")]) == 0
    assert "one sample, no" in capsys.readouterr().out  # the rest may be on the next line
    assert "no interval" in profile_html(made, None)


def test_an_interval_from_counts_needs_one_prompt_only() -> None:
    task = server_measure("accuracy", "recall", 0.0, 0.9, samples=1, tokens=5) | {"lost": 0, "gained": 0}
    block = validated(tasks=[task]).validation
    assert block is not None
    assert interval_of(block.tasks[0]) == "[-0.9, +0.9]"
