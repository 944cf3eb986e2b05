"""The summary at the end of a calibration: complete at 100 columns, without colour, in one screen."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from kvtuner_search.report.terminal import print_summary, summary
from tests.search.report import calibration_record as made


def printed(record: made.Json, width: int = 100) -> str:
    stream = io.StringIO()
    summary(made.typed(record), Console(file=stream, width=width, color_system=None, force_terminal=False))
    return stream.getvalue()


def line_of(text: str, *starts: str) -> str:
    return next(line for line in text.splitlines() if line.split()[: len(starts)] == list(starts))


@pytest.mark.parametrize("name", made.variants())
def test_fits_in_100_columns_and_cuts_no_figure(name: str) -> None:
    text = printed(made.variants()[name])
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text
    assert "\x1b" not in text
    assert not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.parametrize("name", made.variants())
def test_in_a_pipe_no_line_ends_in_spaces(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = made.variants()[name]
    print_summary(made.typed(record))
    out = capsys.readouterr().out
    assert out.splitlines() == [line.rstrip() for line in printed(record).splitlines()]


def test_one_target_stays_under_60_lines() -> None:
    assert len(printed(made.record(16)).splitlines()) < 60
    assert len(printed(made.record(128)).splitlines()) < 60


def test_figures_are_the_records() -> None:
    record = made.record()
    text = printed(record)
    assert "Calibration of reference" in text
    assert "embedded reference model" in text
    for row in record["targets"][0]["rivals"]:
        line = line_of(text, *row["name"].split(), row["origin"])
        found = re.search(r"(\S+) +(\S+) +(\S+) \[(\S+), (\S+)\] +(\w+)", line)
        assert found is not None
        minus = row["chosen_minus_this"]
        expected = [row["effective_bits"], row["loss"], minus["estimate"], minus["low"], minus["high"]]
        assert [float(x) for x in found.groups()[:5]] == pytest.approx(expected, rel=5e-3)
        assert found[6] == {"inconclusive": "undecided"}.get(row["verdict"], row["verdict"])
    assert "+0.022 [+0.014, +0.029]" in line_of(text, "NLL", "recall")
    assert line_of(text, "accuracy", "recall").split()[2] == "0.750"
    assert line_of(text, "keys", "bits").split() == ["keys", "bits", "4242"]
    assert line_of(text, "values", "bits").split() == ["values", "bits", "2424"]
    assert "search 64.2" in text
    assert "81.8 seconds in all" in text
    assert "1.5 GiB" in text


def test_bands_are_shown_by_their_rounded_mean() -> None:
    text = printed(made.banded())
    assert line_of(text, "keys", "bits").split() == ["keys", "bits", "4352"], "of 3.625, 2.875, 4.625 and 1.75"
    assert line_of(text, "values", "bits").split() == ["values", "bits", "3424"]
    assert "F is 16 bits; a side in bands shows the rounded mean of its bits." in " ".join(text.split())
    assert "rounded mean" not in printed(made.record())


def test_sentences_say_whether_the_search_paid() -> None:
    text = " ".join(printed(made.record()).split())
    assert "The search found the chosen setting (trial 3, refined)." in text
    assert (
        "It beats the proxy's optimum (trial 0) by 50 %: KL 0.0217 against 0.0434 at equal effective bits (3.375)."
        in text
    )
    assert "It beats the best uniform setting (2-g64-sym/2-g64-sym) by 97 %" in text, (
        "one of 8.5 bits does not fit in 4"
    )
    assert "It is not shown to differ from the random search (trial 1)" in text


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("fisher", "best allocation by worth alone"),
        ("proxy", "proxy's optimum"),
        ("uniform", "best uniform setting"),
        ("random", "random search"),
        ("preset", "published preset"),
    ],
)
def test_a_search_that_lost_is_said_to_have_lost(origin: str, words: str) -> None:
    record = made.record()
    record["targets"][0]["chosen"]["origin"] = origin
    text = " ".join(printed(record).split())
    assert f"The search did not beat the {words}: that is the chosen setting (trial 3, {origin})." in text
    assert "The search found" not in text
    assert f"It beats the {words}" not in text


def test_nothing_is_beaten_by_itself() -> None:
    record = made.record(4)
    chosen = record["targets"][0]["chosen"]
    chosen["layers"] = ["4-g64-asym-c/4-g64-sym", "4-g64-asym-c-r-x0.9/4-g64-sym"] * 2
    record["random_trials"][0]["layers"] = chosen["layers"]
    text = " ".join(printed(record).split())
    assert "It is itself a uniform setting" in text
    assert "The random search found the same setting." in text
    assert "the best uniform setting (" not in text
    assert "random search (" not in text


@pytest.mark.parametrize(
    ("layers", "uniform"),
    [(["b65443322/b44333222"] * 4, True), (["b65443322/b44333222"] * 3 + ["b56443322/b44333222"], False)],
)
def test_other_bands_are_not_uniform(layers: list[str], uniform: bool) -> None:
    record = made.record(4)
    record["targets"][0]["chosen"]["layers"] = layers
    assert ("It is itself a uniform setting" in " ".join(printed(record).split())) is uniform


def test_with_a_loss_as_goal_sizes_are_compared() -> None:
    text = " ".join(printed(made.record(8, max_loss=0.05)).split())
    assert "It takes 60.3 % fewer bytes than the best uniform setting (8-g64-asym/8-g64-asym)" in text
    assert "It takes as many bytes as the proxy's optimum (trial 0)" in text


def test_text_is_neither_markup_nor_control_sequence() -> None:
    record = made.record()
    record["model"]["id"] = "[bold red]evil[/]\x1b[31m\n:smile:"
    record["targets"][0]["label"] = "[link=x]4[/link]"
    record["targets"][0]["rivals"][0]["name"] = "[red]" + "Ω" * 150
    record["seconds"] = {"[b]stage[/b]\x07": 1.0}
    text = printed(record)
    assert "[bold red]evil[/]" in text
    assert "[link=x]4[/link]" in text
    assert "[b]stage[/b]" in text
    assert ":smile:" in text
    assert text.count("Ω") == 300, "in the sentence and in the table, folded and not cut"
    assert not set(text) & {"\x1b", "\x07"}
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100


def test_colour_adds_no_information() -> None:
    stream = io.StringIO()
    summary(made.typed(made.record()), Console(file=stream, width=100, color_system="truecolor", force_terminal=True))
    coloured = stream.getvalue()
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).split() == printed(made.record()).split()
