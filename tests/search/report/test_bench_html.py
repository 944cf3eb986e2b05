"""The HTML report of benchmarks: well-formed, self-contained, escaped, and its figures and floors are where the records say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvtuner_search.bench import files
from kvtuner_search.bench.claims import AdapterReport, parse
from kvtuner_search.bench.record import Gate, Record, Violation
from kvtuner_search.cli.main import run
from kvtuner_search.report.bench_html import report
from kvtuner_search.report.bench_tables import runs, share
from tests.search.bench import record_factory as made
from tests.search.report.html_page import Page

EVIL = "<script>alert('x')</script>&\"\x1b[31m"


def adapter() -> AdapterReport:
    """A small report of the adapter's form: 2 ms for a thousand tokens and 231,321 tokens/s cannot be, the last batch can."""
    return parse(
        {
            "model": "Qwen2.5-7B",
            "hardware": {"gpus": 4, "gpu": "NVIDIA GeForce RTX 4090 24GB", "nodes": 2},
            "parallel": {"tp": 2, "pp": 2, "nnodes": 2},
            "quantization": {"key_bits": 4, "value_bits": 4},
            "ttft_ms": [
                {"prompt_tokens": 10, "mean": 2.55, "min": 1.35, "max": 3.78},
                {"prompt_tokens": 1000, "mean": 40.0, "min": 38.0, "max": 45.0},
            ],
            "throughput": [{"concurrency": 2, "req_per_s": 543.94, "mean_latency_ms": 2.59, "success": 1.0}],
            "long_sequence": [{"input": 100, "output": 500, "latency_ms": 2.16, "tok_per_s": 231321}],
            "batch": [{"batch": 2, "total_ms": 950, "mean_latency_ms": 900, "req_per_s": 2.1, "succeeded": 2}],
            "memory_stress": {"rounds": 20, "success": 1.0, "mean_latency_ms": 2.55, "gpu_memory_mib": 21610, "fluctuation_mib": 0},
            "gpu_memory_mib": [{"gpu": 0, "used": 21610, "total": 24564}],
            "single_node_vs_distributed": [{"metric": "mean_ttft_ms", "single_tp2": "2.3-3.0", "tp2_pp2": "2.1-2.9"}],
            "memory_estimates_gb": {"fp16": 43, "kv8": 32, "kv4": 22, "kv2": 16},
            "monitoring_targets": {"ttft_ms_below": 5, "success_rate_above": 0.999, "gpu_memory_below": 0.90},
        },
        "a test",
    )  # fmt: skip


def drawings(content: str) -> dict[str, ElementTree.Element]:
    """Name -> drawing; keys of legends are left out."""
    found = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", content, re.DOTALL)]
    return {element.attrib["aria-label"]: element for element in found if " over " in element.attrib["aria-label"]}


def drawing(content: str, start: str) -> ElementTree.Element:
    (found,) = [element for name, element in drawings(content).items() if name.startswith(start)]
    return found


def of_class(element: ElementTree.Element, name: str, tag: str = "path") -> list[ElementTree.Element]:
    return [e for e in element.iter(tag) if name in e.attrib.get("class", "").split()]


def heights(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", line.attrib["d"])]


def scale(element: ElementTree.Element) -> Any:
    """Pixel of a value on the y axis, from the labels of the grid."""
    grid = [float(line.attrib["y1"]) for line in of_class(element, "grid", "line")]
    labels = [float((t.text or "").replace(",", "")) for t in element.iter("text") if t.attrib.get("text-anchor") == "end" and re.fullmatch(r"[\d.,]+", t.text or "")]  # fmt: skip
    (y0, v0), (y1, v1) = list(zip(grid, labels, strict=True))[:2]
    slope = (y1 - y0) / (math.log(v1) - math.log(v0))
    return lambda value: y0 + slope * (math.log(value) - math.log(v0))


def everything() -> list[Record]:
    gate = Gate(name="ttft_p99", relation="at most", limit=5.0, value=7.0, where="ttft", passed=False)
    unmeasured = Gate(name="memory", relation="at most", limit=0.9, value=None, where="not read", passed=False)
    violation = Violation(rule="below-floor", where="ttft 10 in", figure="ttft 1 ms", reason="at least 3 ms is needed")
    return [
        made.record(gates=[gate, unmeasured]),
        made.record(made.KV4, slower=1.1, seed=1, violations=[violation]),
        made.record(made.KV4, tensor_parallel=2, pipeline_parallel=2, nodes=2),
        made.record(made.KV4, correct=False),
    ]


def variants() -> dict[str, tuple[list[Record], AdapterReport | None]]:
    bare = made.record(small=True, scrapes=[], cross_check={})
    no_floor = made.record(
        small=True,
        environment=bare.environment.model_copy(update={"hardware": None}),
        cells=[cell.model_copy(update={"floor": None}) for cell in bare.cells],
    )
    return {
        "one": ([made.record()], None),
        "small": ([bare], adapter()),
        "all": (everything(), adapter()),
        "no floors": ([no_floor], None),
        "no cells": ([made.record(cells=[])], None),
        "red": ([made.record(correct=False)], adapter()),
        "lost": ([made.record(cells=[made.cell("ttft", 10, 1, failed=16)])], None),
    }


@pytest.mark.parametrize("name", variants())
def test_page_is_well_formed_and_fetches_nothing(name: str) -> None:
    content = report(*variants()[name])
    page = Page(content)
    drawings(content)
    assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "img", "iframe", "object", "use", "image"}
    ids = [value for _, attribute, value in page.attributes if attribute == "id"]
    for _, attribute, value in page.attributes:
        if attribute in ("href", "src", "srcset", "data", "action", "xlink:href"):
            assert value.startswith("#")
            assert value[1:] in ids
        assert not attribute.startswith("on")
    for target in re.findall(r"url\((.*?)\)", content):
        assert target.startswith("#")
        assert target[1:] in ids
    assert "@import" not in content
    assert not re.search(r"https?://", content)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<style>.*?</style>", "", content, flags=re.DOTALL))
    assert '<meta name="viewport" content="width=device-width' in content
    assert "prefers-color-scheme: dark" in content


def test_ids_of_patterns_are_unique_among_drawings() -> None:
    content = report(everything(), adapter())
    names = re.findall(r'<pattern[^>]* id="([^"]+)"', content)
    drawn = [name for name in names if not name.startswith("key-")]
    assert len(drawn) == len(set(drawn))
    assert len(drawn) > 10


def test_text_from_records_is_escaped() -> None:
    record = made.record(small=True)
    nasty = record.model_copy(
        update={
            "command": EVIL,
            "created": EVIL,
            "preset": EVIL,
            "model": record.model.model_copy(update={"name": EVIL}),
            "cache": record.cache.model_copy(update={"profile": EVIL, "digest": made.DIGEST}),
            "served": record.served.model_copy(update={"arguments": [EVIL], "attention_backend": EVIL}),
            "violations": [Violation(rule=EVIL, where=EVIL, figure=EVIL, reason=EVIL)],
            "gates": [Gate(name=EVIL, relation="at most", limit=1.0, value=2.0, where=EVIL, passed=False)],
        }
    )
    content = report([nasty])
    Page(content)
    drawings(content)
    assert "<script" not in content
    assert "\x1b" not in content
    assert "&lt;script&gt;" in content


def test_floor_line_and_forbidden_zone_lie_where_the_record_says() -> None:
    record = made.record()
    drawn = drawing(report([record]), "Time to the first token")
    y = scale(drawn)
    (line,) = of_class(drawn, "floor")
    floors = [cell.floor.ttft for cell in record.cells if cell.section == "ttft" and cell.floor]
    points = heights(line)
    assert [at for _, at in points[1:-1]] == pytest.approx([y(floor) for floor in floors], abs=0.02)
    assert (points[0][1], points[-1][1]) == (points[1][1], points[-2][1]), "level to both edges"
    (zone,) = of_class(drawn, "zone")
    bottom = max(float(e.attrib["y1"]) for e in drawn.iter("line") if e.attrib.get("class") == "axis")
    assert zone.attrib["d"].endswith(f"V{bottom:.2f}H{points[0][0]:.2f}Z"), "all below the line"
    assert [e for e in drawn.iter("path") if "url(#" in e.attrib.get("style", "")], "hatched"


def test_dots_lie_at_the_records_figures() -> None:
    record = made.record()
    drawn = drawing(report([record]), "Time to the first token")
    y = scale(drawn)
    means = [cell.speed.ttft.mean for cell in record.cells if cell.section == "ttft" and cell.speed and cell.speed.ttft]
    dots = [float(dot.attrib["cy"]) for dot in of_class(drawn, "r0", "circle")]
    assert dots == pytest.approx([y(mean) for mean in means], abs=0.02)


def test_ceilings_forbid_what_is_above() -> None:
    drawn = drawing(report([made.record()]), "Output tokens")
    (line,), (zone,) = of_class(drawn, "floor"), of_class(drawn, "zone")
    top = min(y for _, y in heights(line))
    edge = float(re.findall(r"V(-?[\d.]+)H", zone.attrib["d"])[0])
    assert edge < top


def test_impossible_claims_are_ringed_and_the_possible_ones_are_not() -> None:
    content = report([made.record(small=True)], adapter())
    ttft = drawing(content, "Time to the first token")
    titles = [t.text or "" for t in ttft.iter("title")]
    claims = {t.split(";")[0]: "impossible" in t for t in titles if t.startswith("claimed: ")}
    assert claims == {"claimed: 2.55 ms": True, "claimed: 40 ms": False}
    assert len(of_class(ttft, "ring", "circle")) == 1
    (line,) = of_class(ttft, "claimedfloor")
    (ring,) = of_class(ttft, "ring", "circle")
    assert float(ring.attrib["cy"]) > heights(line)[0][1], "it lies inside the forbidden zone, below the line"
    assert len(of_class(drawing(content, "100 prompt tokens"), "ring", "circle")) == 1
    assert not of_class(drawing(content, "Requests by batch size"), "ring", "circle")


def test_the_claims_floor_is_that_of_its_own_hardware_and_prompt_length() -> None:
    content = report([made.record(small=True)], adapter())
    drawn = drawing(content, "Time to the first token")
    (line,) = of_class(drawn, "claimedfloor")
    start = next(i for i, row in enumerate(Page(content).rows) if "greatest" in row)
    rows = [row for row in Page(content).rows[start : start + 4] if row[1] == "claimed"]
    floors = [float(row[8]) for row in rows]
    assert floors[0] < floors[1], "a thousand tokens are more work than ten"
    y = scale(drawn)
    assert [at for _, at in heights(line)[1:-1]] == pytest.approx([y(floor) for floor in floors], abs=0.1)


@pytest.mark.parametrize(
    ("value", "floor", "above", "text"),
    [
        (30.0, 10.0, False, "3 x"),
        (10.0, 10.0, False, "1 x"),
        (9.9, 10.0, False, "0.99 x"),  # within the margin of clocks
        (9.7, 10.0, False, "1/1.03, impossible"),
        (0.0, 10.0, False, "0, impossible"),
        (5.0, 10.0, True, "50%"),
        (10.1, 10.0, True, "101%"),
        (10.3, 10.0, True, "1.03 x, impossible"),
        (15185.0, 10.0, True, "1,518 x, impossible"),
        (5.0, None, True, "–"),
    ],
)
def test_how_far_a_figure_is_from_its_floor(value: float, floor: float | None, above: bool, text: str) -> None:
    assert share(value, floor, above) == text


def test_the_claimed_tables_stand_beside_ours() -> None:
    record = made.record()
    rows = Page(report([record, made.record(made.KV4, seed=1)], adapter())).rows
    at = next(i for i, row in enumerate(rows) if row[:2] == ["10", "16-bit"])
    ours, kv4, theirs = rows[at : at + 3]
    assert (kv4[1], theirs[1]) == ("qwen2.5-7b-kv4", "claimed")
    first = record.cells[0].speed
    assert first is not None
    assert first.ttft is not None
    assert [float(x) for x in ours[2:7]] == pytest.approx([first.ttft.mean, first.ttft.minimum, first.ttft.p50, first.ttft.p99, first.ttft.maximum], rel=1e-3)  # fmt: skip
    assert ours[7] == "16 of 16"
    assert theirs[2:7] == ["2.55", "1.35", "–", "–", "3.78"]
    assert re.fullmatch(r"1/[\d.]+, impossible", theirs[9])
    long = next(row for row in rows if row[2:3] == ["claimed"] and "231,321" in row)
    assert sum("impossible" in cell for cell in long) == 2
    stress = next(row for row in rows if row[0] == "claimed" and "20" in row)
    assert "2.55, impossible" in stress
    assert any(row[0] == "mean TTFT by prompt length, ms" and "2.1 to 2.9, impossible" in row for row in rows)
    assert any(row[0] == "claimed, GPU 0" and "88.0%" in row for row in rows)
    assert any(row[:2] == ["16-bit", "ttft_mean"] and "at most 5 ms" in row for row in rows)
    text = " ".join(Page(report([record], adapter())).text)
    assert "Impossible claims of the adapter's report" in text
    assert "Usual causes" in text


def test_a_record_that_is_no_result_says_so_first() -> None:
    for record, reason in ((everything()[1], "below-floor at ttft 10 in: ttft 1 ms"), (everything()[3], "profile")):
        text = " ".join(Page(report([record])).text)
        assert text.index("No result:") < text.index("Runs")
        assert reason in text
        assert "✓ passed" not in text
    assert "misses an objective" in " ".join(Page(report([everything()[0]])).text)
    assert "No result:" not in report([made.record()])


def test_our_own_impossible_figure_is_ringed_too() -> None:
    cell = made.cell("ttft", 10, 1)
    assert cell.floor is not None
    raised = cell.model_copy(update={"floor": cell.floor.model_copy(update={"ttft": 50.0})})
    drawn = drawing(report([made.record(cells=[raised])]), "Time to the first token")
    assert len(of_class(drawn, "ring", "circle")) == 1


def test_another_model_than_the_adapters_is_said() -> None:
    record = made.record(small=True)
    other = record.model_copy(update={"model": record.model.model_copy(update={"name": "reference"})})
    assert "of another model" in report([other], adapter())
    assert "of another model" not in report([record], adapter())


def test_command_environment_and_metrics_are_shown() -> None:
    record = made.record(small=True)
    page = Page(report([record]))
    text = " ".join(page.text)
    assert record.command in text
    assert "sglang 0.5.14" in text
    assert any(row[0] == "sglang:token_usage" and row[1] == "40" for row in page.rows)
    assert any(row == ["output_tokens_per_second", "1.01"] for row in page.rows)


def test_every_run_has_a_name_of_its_own() -> None:
    one = made.record(small=True)
    many = [one, one, made.record(made.KV4, small=True), made.record(small=True, tensor_parallel=2)]
    names = [run.name for run in runs(many)]
    assert len(set(names)) == 4
    assert [run.name for run in runs([one, many[2]])] == ["16-bit", "qwen2.5-7b-kv4"]


def test_the_command_writes_a_page_and_prints_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # else words are broken where the terminal of whoever runs the tests ends
    paths = []
    for index, record in enumerate(everything()):
        paths.append(str(tmp_path / f"{index}.json"))
        files.write(record, Path(paths[-1]))
    claims = tmp_path / "claims.json"
    claims.write_text(adapter().model_dump_json())
    page = tmp_path / "pages" / "report.html"
    assert run(["bench", "report", *paths, "--html", str(page), "--claims", str(claims)]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"wrote {page}\n")
    assert page.read_text() == report(everything(), adapter())
    assert run(["bench", "report", *paths, "--claims", str(claims)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for said in (
        "no result",
        "misses ttft_p99, memory",
        "231,321",
        "of the adapter's figures are impossible",
        "verdict: pass",
    ):
        assert said in out
    assert run(["bench", "report", str(tmp_path / "none.json")]) == 3
    assert run(["bench", "report"]) == 2
    assert run(["bench", "report", paths[0], "--html", str(claims / "page.html")]) == 2


def test_the_whole_report_of_the_adapter_is_marked() -> None:
    """Every time to the first token, every rate of the throughput table, and every long sequence that it claims."""
    path = Path(__file__).parents[1] / "bench" / "adapter_report.json"
    content = report([made.record()], parse(json.loads(path.read_text()), "claimed"))
    for name, count in (("Time to the first token", 5), ("Requests: requests/s", 4)):
        assert len(of_class(drawing(content, name), "ring", "circle")) == count
    for prompt in ("100", "500", "1,000", "2,000", "4,000"):
        assert len(of_class(drawing(content, f"{prompt} prompt tokens"), "ring", "circle")) == 3
