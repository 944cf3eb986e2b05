"""The HTML report: well-formed, self-contained, complete, and its figures are the record's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from kvtuner_search.report import calibration_html
from tests.search.report import calibration_record as made
from tests.search.report.html_page import Page


def render(record: made.Json) -> str:
    return calibration_html.render(made.typed(record))


def drawings(content: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", content, re.DOTALL)]


def drawing(content: str, start: str) -> ElementTree.Element:
    return next(d for d in drawings(content) if d.attrib["aria-label"].startswith(start))


def titles(element: ElementTree.Element) -> list[str]:
    return [title.text or "" for title in element.iter("title")]


@pytest.mark.parametrize("name", made.variants())
def test_page_is_well_formed_and_fetches_nothing(name: str) -> None:
    content = render(made.variants()[name])
    page = Page(content)
    assert len(drawings(content)) >= 4
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"script", "link", "img", "iframe", "object", "use", "image"}
    for _, attribute, value in page.attributes:
        if attribute in ("href", "src", "srcset", "data", "action", "xlink:href"):
            assert value.startswith("#"), value
            assert ("section", "id", value[1:]) in page.attributes
        assert attribute not in ("onload", "onclick", "onerror", "onmouseover")
    assert "url(" not in content
    assert "@import" not in content
    assert not re.search(r"https?://", content)
    assert not re.search(r"\b(nan|inf)\b", content)


@pytest.mark.parametrize(("layers", "targets"), [(1, (4.0,)), (16, (3.25, 4.0)), (128, (4.0,))])
def test_every_layer_and_target_is_drawn(layers: int, targets: tuple[float, ...]) -> None:
    record = made.record(layers, targets)
    content = render(record)
    bits = [d for d in drawings(content) if d.attrib["aria-label"].startswith("Bits")]
    assert len(bits) == len(targets)
    for target, drawn in zip(record["targets"], bits, strict=True):
        assert target["label"] in Page(content).text
        said = titles(drawn)
        for layer, text in enumerate(target["chosen"]["layers"]):
            key, value = text.split("/")
            assert any(t.startswith(f"layer {layer} keys: {key},") for t in said)
            assert any(t.startswith(f"layer {layer} values: {value},") for t in said)
    heat = titles(drawing(content, "Layer-alone KL"))
    for layer in range(layers):
        for side in ("keys", "values"):
            for name in set(made.CLASSES) - {"16"}:
                assert any(t.startswith(f"layer {layer} {side} as {name} ") for t in heat)


def test_heat_map_has_the_records_figures_and_marks_the_choice() -> None:
    record = made.record(4)
    heat = titles(drawing(render(record), "Layer-alone KL"))
    cell = next(t for t in heat if t.startswith("layer 2 keys as 4-g64-asym "))
    assert f"KL {made.alone(2, '4-g64-asym', 0):#.3g} nats" in cell
    assert cell.endswith("; chosen for 4 bits")
    assert "chosen" not in next(t for t in heat if t.startswith("layer 1 keys as 4-g64-asym "))


def test_bars_of_bands_have_the_mean_bits() -> None:
    record = made.banded()
    drawn = drawing(render(record), "Bits of keys and values by layer")
    assert "layer 0 keys: b65443322, 3.625 bits on average" in titles(drawn)
    assert "layer 0 values: b44333222, 2.875 bits on average" in titles(drawn)
    assert any(t.startswith("layer 1 values: 4-g64-asym-c-r-x0.95, 4.500 effective") for t in titles(drawn))
    written = [text.text for text in drawn.iter("text")]
    assert {"3.62", "2.88", "4.62"} <= set(written)
    assert sum(r.attrib["class"] == "bb" for r in drawn.iter("rect")) == 7, "four keys and three values"
    heights = [float(r.attrib["height"]) for r in drawn.iter("rect") if r.attrib["class"] == "bb"]
    assert min(heights) > 0


def test_each_band_is_drawn_with_its_bits() -> None:
    drawn = drawing(render(made.banded()), "Bits of each band")
    said = titles(drawn)
    for layer, text in enumerate(made.banded()["targets"][0]["chosen"]["layers"]):
        for side, spec in zip(("keys", "values"), text.split("/"), strict=True):
            found = [t for t in said if t.startswith(f"layer {layer} {side}")]
            if spec.startswith("b"):
                bits = [f"layer {layer} {side}, band {band + 1}: {digit} bits" for band, digit in enumerate(spec[1:])]
                assert found == bits
            else:
                assert found == [f"layer {layer} {side}: {spec}, without bands"]
    opacity = {
        title: float(r.attrib["fill-opacity"])
        for r in drawn.iter("rect")
        for title in [r.find("title").text]  # type: ignore[union-attr]
        if title is not None
    }
    assert opacity["layer 2 keys, band 1: 8 bits"] == 1
    assert opacity["layer 2 keys, band 7: 2 bits"] < opacity["layer 2 keys, band 6: 3 bits"]


def test_the_spectrum_has_the_records_figures_and_the_bits() -> None:
    record = made.banded()
    drawn = drawing(render(record), "Worth of each band of keys")
    said = titles(drawn)
    assert (
        f"layer 3 keys, band 1: {sum(made.worth(3, 0, h)[0] for h in range(made.HEADS)):#.3g} nats; 3 bits for 4 bits"
        in said
    )
    assert len(said) == 4 * 2 * 8
    without = next(t for t in said if t.startswith("layer 1 values, band 8"))
    assert without.endswith(" nats"), "a side without bands has no bits to show"
    shades = [
        float(r.attrib["fill-opacity"])
        for r in drawn.iter("rect")
        if (title := r.find("title")) is not None and str(title.text).startswith("layer 2 keys")
    ]
    assert shades == sorted(shades, reverse=True), "the strongest first"
    assert shades[0] > shades[-1]


def test_each_head_has_its_line() -> None:
    said = titles(drawing(render(made.banded()), "Worth of each band by layer and KV head"))
    assert len(said) == 4 * 2 * made.HEADS
    row = ", ".join(f"{value:#.3g}" for value in made.worth(2, 1, 1))
    assert f"layer 2 values, head 1: {row} nats" in said


@pytest.mark.parametrize(("name", "drawn"), [("bands", 2), ("no worth by head", 1), ("one target", 0)])
def test_worth_is_drawn_where_it_was_recorded(name: str, drawn: int) -> None:
    content = render(made.variants()[name])
    assert sum(d.attrib["aria-label"].startswith("Worth") for d in drawings(content)) == drawn
    assert ('<section id="worth">' in content) is (drawn > 0)
    assert ('href="#worth"' in content) is (drawn > 0)


def test_a_record_without_bands_says_nothing_of_them() -> None:
    content = render(made.record())
    assert "Bits of each band" not in content
    assert '<span class="key bb">' not in content


def test_a_class_that_a_layer_lacks_leaves_its_place_empty() -> None:
    heat = titles(drawing(render(made.variants()["worth of some layers"]), "Layer-alone KL"))
    assert [t for t in heat if " keys as 2-g64-sym " in t and t.startswith("layer 2")] == []
    assert len([t for t in heat if " keys as 2-g64-sym " in t]) == 3


def test_comparison_table_has_the_records_figures() -> None:
    record = made.record()
    rows = Page(render(record)).rows
    for row in record["targets"][0]["rivals"]:
        cells = next(r for r in rows if r[:2] == [row["name"], row["origin"]])
        minus = row["chosen_minus_this"]
        assert float(cells[2]) == pytest.approx(row["effective_bits"], abs=5e-4)
        assert float(cells[3]) == pytest.approx(row["loss"], rel=5e-3)
        assert cells[4] == f"{next(m for m in row['measures'] if m['metric'] == 'accuracy')['value']:.0%}"
        shown = [float(x) for x in re.findall(r"[-+]?\d[\d.e-]*", cells[5])]
        assert shown == pytest.approx([minus["estimate"], minus["low"], minus["high"]], rel=5e-3)
        assert cells[6] == {"inconclusive": "undecided"}.get(row["verdict"], row["verdict"])
    source = next(r for r in rows if r[0] == "trial 0 (proxy)")
    nll = next(m for m in record["targets"][0]["rivals"][0]["measures"] if (m["metric"], m["data"]) == ("nll", "text"))
    expected = [nll["value"] - nll["baseline"], nll["ci_low"], nll["ci_high"]]
    heads = next(r for r in rows if "NLL, text" in r)
    shown = [float(x) for x in re.findall(r"[-+]?\d[\d.e-]*", source[heads.index("NLL, text")])]
    assert shown == pytest.approx(expected, rel=5e-3)


def test_front_shows_complete_trials_on_the_search_split_and_intervals_on_the_test_split() -> None:
    record = made.record()
    drawn = drawing(render(record), "Loss against")
    said = titles(drawn)
    assert any(t.startswith("refined trial 3: ") and "KL 0.0231 nats" in t for t in said)
    assert not any("trial 2:" in t for t in said), "a trial that was stopped early has no loss on the whole split"
    assert not any(t.startswith("tpe trial 4") for t in said), "a repeated proposal is not a point of its own"
    chosen = next(t for t in said if t.startswith("chosen for 4 bits"))
    low, high = (float(x) for x in re.search(r"\[(.*), (.*)\]", chosen).groups())  # type: ignore[union-attr]
    assert low < record["targets"][0]["chosen"]["loss"] < high
    whiskers = [p for p in drawn.iter("path") if p.attrib.get("class") == "line o-chosen"]
    assert len(whiskers) == 1


def test_exact_interval_of_the_record_is_preferred() -> None:
    record = made.record()
    record["targets"][0]["chosen"] |= {"loss_low": 0.0111, "loss_high": 0.0333}
    assert "[0.0111, 0.0333]" in render(record)


def test_history_falls_and_keeps_to_the_budget() -> None:
    record = made.record(4, (3.0, 4.0))
    said = titles(drawing(render(record), "Search history"))
    assert sum(t.startswith("proxy trial 0:") for t in said) == 1, "3.375 bits do not fit in 3"
    assert "refined trial 3: 0.0231; best so far 0.0231" in said
    assert not any(" trial 2:" in t for t in said), "its loss is that of the first rung"


def test_hypervolume_space_data_and_cost() -> None:
    record = made.record()
    page = Page(render(record))
    assert ["the whole study", "12.5", "100.0%"] in page.rows
    assert ["random", "4.50", "36.0%"] in page.rows
    assert ["preset", "none tried", "–"] in page.rows
    text = " ".join(page.text)
    assert "silhouette of 0.31" in text
    for data in record["data"]:
        assert [data["name"], data["split"], "12", f"{data['tokens']}", data["digest"]] in page.rows
    assert ["search", "64.2", ""] in page.rows
    assert "81.8 seconds in all" in text
    assert "1.5 GiB" in text


def test_grouping_in_use_is_reported() -> None:
    record = made.record(4)
    record["space"] = {
        "variables": [
            {"name": "layer 0,1,3", "layers": [0, 1, 3], "pairs": ["2-g64-sym/2-g64-sym"]},
            {"name": "layer 2", "layers": [2], "pairs": ["2-g64-sym/2-g64-sym", "4-g64-sym/4-g64-sym"]},
        ],
        "grouping_quality": 0.625,
        "rejected_quality": None,
    }
    page = Page(render(record))
    assert "4 layers share 2 variables; the silhouette of the groups is 0.62." in " ".join(page.text)
    assert ["layer 0,1,3", "0-1, 3", "1", "2-g64-sym/2-g64-sym"] in page.rows


def test_text_is_escaped() -> None:
    record = made.record()
    evil = '"><script>alert(1)</script>&\u202e' + "x" * 300
    record["model"]["id"] = record["model"]["architecture"] = record["tool"] = evil
    record["data"][0]["name"] = evil
    target = record["targets"][0]
    target["label"] = target["chosen"]["name"] = target["rivals"][0]["name"] = evil
    for row in (target["chosen"], *target["rivals"]):
        for measure in row["measures"]:
            measure["data"] += evil
    record["seconds"][evil] = 1.0
    record["environment"]["device"] = evil
    record["space"]["variables"][0]["name"] = evil
    content = render(record)
    assert "<script" not in content
    assert "\u202e" not in content
    Page(content)
    drawings(content)


def test_reference_model_is_labelled_and_others_are_not() -> None:
    record = made.record()
    assert "embedded reference model" in render(record)
    record["model"]["id"] = "example/other"
    content = render(record)
    assert "embedded reference model" not in content
    assert "No server was started" in content


def test_report_needs_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, kvtuner_search.report.calibration_html, kvtuner_search.report.terminal;"
        "print([m for m in ('torch', 'optuna', 'transformers', 'numpy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == "[]"
