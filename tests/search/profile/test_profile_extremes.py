"""Figures at the edge of what is accepted go through every command and format; figures that no arithmetic survives are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.cli.main import run
from kvtuner_search.profile.canonical import digest_of
from kvtuner_search.profile.fields import MAX_FIGURE
from tests.search.profile_factory import capacity, front, measure, profile, validation

STYLES = ("text", "json", "markdown", "github", "junit")
LARGEST = 1.7976931348623157e308  # a double
Json = dict[str, Any]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def put(name: str, block: Json | None = None, **changes: Any) -> None:
    """A file whose digests fit, whatever it holds."""
    body = profile().model_dump(mode="json") | changes
    body["validation"] = block and block | {"profile_digest": digest_of(body | {"validation": None})}
    Path(name).write_text(json.dumps(body | {"digest": digest_of(body)}))


def widest(value: float, baseline: float, edge: float, metric: str = "kl", samples: int = 200) -> Json:
    return measure(metric, value, baseline=baseline, samples=samples) | {"ci_low": -edge, "ci_high": edge}


def block(**parts: Any) -> Json:
    return validation("sha256:" + "0" * 64) | parts


def pair(edge: float, samples: int) -> None:
    """Two files whose measures lie as far apart as ``edge`` allows, in both directions."""
    for name, sign in (("old.json", 1), ("new.json", -1)):
        own = block(likelihood=[widest(sign * edge, -sign * edge, edge, "nll", samples)])
        quality = [widest(sign * edge, -sign * edge, edge, samples=samples)]
        put(name, own, quality=quality, pareto=front(("2-g64-sym/2-g64-sym", edge), ("4-g64-asym/4-g64-asym", -edge)))


def no_number(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def commands() -> list[list[str]]:
    diffs = [["diff", "old.json", "new.json", "--format", style, "--max-loss-increase", "0"] for style in STYLES]
    shows = [["show", "new.json", *more] for more in ([], ["--json"], ["--html", "x.html"])]
    return [*diffs, *shows, ["check", "--strict", "new.json"]]


@pytest.mark.parametrize("samples", [1, 200])
def test_the_largest_figures_that_are_accepted_are_finite_everywhere(
    samples: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pair(MAX_FIGURE, samples)
    for command in commands():
        assert run(command) in (0, 1), command
        shown = capsys.readouterr().out
        if "json" in command or "--json" in command:
            json.loads(shown, parse_constant=no_number)
    page = Path("x.html").read_text()
    assert not [word for word in ('"nan', ",nan", "inf ") if word in page]


def test_a_loss_that_rises_beyond_any_number_cannot_pass_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """Infinity minus infinity would be no number, which is over no budget."""
    quality = [widest(LARGEST, -LARGEST, LARGEST)]
    put("old.json")
    put("new.json", quality=quality)
    for style in STYLES:
        assert run(["diff", "old.json", "new.json", "--format", style, "--max-loss-increase", "0"]) == 3
        assert "quality.0.baseline: Input should be greater than or equal to -1000" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["baseline", "value", "ci_low", "ci_high"])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_figure_of_a_measure_is_bounded(name: str, sign: int) -> None:
    figure = sign * MAX_FIGURE * 1.001
    body = widest(0.0, 0.0, MAX_FIGURE) | {name: figure}
    if name.startswith("ci_") and (name == "ci_low") == (sign > 0):
        body["ci_high" if name == "ci_low" else "ci_low"] = figure
    put("new.json", quality=[body])
    assert run(["show", "new.json"]) == 3


@pytest.mark.parametrize("predicted", [0.0, -0.0, -4.0, 5e-324, 1e300])
def test_a_predicted_capacity_that_no_layout_has_is_refused(
    predicted: float, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old.json", "new.json"):
        put(name, block(capacity=capacity(399_000) | {"predicted": predicted}))
    assert run(["diff", "old.json", "new.json"]) == 3
    assert "validation.capacity.predicted: Input should be " in capsys.readouterr().err


@pytest.mark.parametrize("predicted", [1e-6, 1e6])
def test_the_least_and_the_most_that_is_predicted_are_compared(predicted: float) -> None:
    for name in ("old.json", "new.json"):
        put(name, block(capacity=capacity(399_000) | {"predicted": predicted}))
    for style in STYLES:
        assert run(["diff", "old.json", "new.json", "--format", style]) == 0


def test_greedy_continuations_without_a_prompt_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    greedy = validation("sha256:" + "0" * 64)["greedy"]
    put("new.json", block(greedy=greedy | {"first_divergence": []}))
    for more in ([], ["--html", "x.html"], ["--json"]):
        assert run(["show", "new.json", *more]) == 3
        assert "validation.greedy.first_divergence: List should have at least 1 item" in capsys.readouterr().err


@pytest.mark.parametrize("style", STYLES)
def test_profiles_of_another_layout_may_say_that_a_token_takes_nothing(style: str) -> None:
    """Bytes of a layout that is not known here are not checked, and two such profiles are compared."""
    for name, nbytes in (("old.json", 0), ("new.json", 5)):
        storage = {"bytes_per_token": nbytes, "bytes_per_token_16bit": nbytes, "effective_bits": 0.0}
        put(name, layout_version=99, storage=storage)
    assert run(["diff", "old.json", "new.json", "--format", style]) == 0
