"""``bench ablate`` as a user runs it: the table, what is kept and resumed, and speed that is refused where a check failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.bench.ablate import quality as quality_module
from kvtuner_search.bench.ablate.quality import QualityBench, quality
from kvtuner_search.bench.ablate.rows import Ablation
from kvtuner_search.bench.ablate.speed import of_record, slug, write_profile
from kvtuner_search.bench.ablate.variants import StorageVariant, catalogue
from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError
from kvtuner_search.evaluation.offline import evaluate
from kvtuner_search.evaluation.scorer import Scorer
from kvtuner_search.models.load import LoadedModel, ModelOptions, load_model
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.canonical import load
from kvtuner_search.progress import Reporter
from kvtuner_search.transforms import check_transforms

sys.path.append(str(Path(__file__).parent))  # for record_factory
from record_factory import record

ROOT = Path(__file__).parents[3]
PROFILE = ROOT / "profiles" / "reference" / "reference-4.00bit.json"
QUIET = Reporter(quiet=True)
SMALL = ["--samples", "2", "--length", "400", "--data", "list", "--data", "text", "--quiet", "--centring-data", "text"]


def ablate(folder: Path, *more: str) -> int:
    return run(["bench", "ablate", *SMALL, "--folder", str(folder), *more])


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(ModelOptions(source=str(tiny_model), dtype="float32"))


def make_bench(loaded: LoadedModel, **changed: Any) -> QualityBench:
    options: dict[str, Any] = {"samples": 2, "length": 300, "seed": 0, "batch_tokens": 2048, "reporter": QUIET}
    return QualityBench(loaded, **({"sources": ["list", "text"], "centring": ["text"]} | options | changed))


def test_a_row_says_what_evaluate_says(loaded: LoadedModel) -> None:
    bench = make_bench(loaded)
    variants = {v.name: v for v in catalogue(loaded.info, ["bits"])}
    row = bench.row(variants["KV4"], 300, "KV4")
    assert row.quality is not None
    assert variants["KV4"].setting is not None
    found = evaluate(
        loaded, [("KV4", variants["KV4"].setting, {})], ["list", "text"], samples=2, length=300, seed=0, batch_tokens=2048,
        reporter=QUIET,
    )[0]  # fmt: skip
    assert [m.model_dump() for m in row.quality.measures] == found["measures"]
    assert row.effective_bits == found["effective_bits"] == 6.0  # 4 + 2 x 16 / 16
    assert row.capacity == pytest.approx(16 / 6)
    text = next(m for m in row.quality.measures if (m.metric, m.data) == ("nll", "text"))
    assert (row.quality.nll.value, row.quality.nll.baseline) == (text.value, text.baseline)
    kl = [(m.value, m.tokens) for m in row.quality.measures if m.metric == "kl"]
    assert row.quality.kl.value == pytest.approx(sum(v * n for v, n in kl) / sum(n for _, n in kl))


def test_the_baseline_loses_nothing_and_a_window_over_everything_neither(loaded: LoadedModel) -> None:
    from kvtuner_search.bench.ablate.variants import Scheme

    bench = make_bench(loaded)
    spec = TensorSpec(2, 16)
    rows = [bench.row(v, 300, v.name) for v in catalogue(loaded.info, ["symmetric"])[:1]]
    rows.append(bench.row(StorageVariant("all", "residual window", scheme=Scheme(spec, spec, window=300)), 300, "all"))
    short = bench.row(StorageVariant("some", "residual window", scheme=Scheme(spec, spec, window=8)), 300, "some")
    for row in rows:
        assert row.quality is not None
        assert row.quality.kl.value < 1e-6
    assert short.quality is not None
    assert short.quality.kl.value > 0.01
    assert (rows[1].effective_bits, rows[1].context, rows[1].servable) == (16.0, 300, False)
    assert "not in serving" in rows[1].reason


def test_without_text_likelihood_is_of_the_tasks_and_without_tasks_there_is_no_accuracy(loaded: LoadedModel) -> None:
    for sources, tasks in ((["list"], True), (["text"], False)):
        samples = make_bench(loaded, sources=sources).split.samples
        scores = Scorer(Runner(loaded), [samples]).baseline_all()
        found = quality(scores, scores)
        assert (found.accuracy is not None) == tasks
        assert found.nll.samples == 2


def test_centring_vectors_never_come_from_what_is_evaluated(loaded: LoadedModel, tmp_path: Path) -> None:
    words = " ".join(f"word{i} stands at place {i} of this file." for i in range(400))
    (tmp_path / "a.txt").write_text(words)
    bench = make_bench(
        loaded, sources=[str(tmp_path / "a.txt")], centring=[str(tmp_path / "a.txt")], length=100, samples=8
    )
    assert not {s.tokens for s in bench.split.samples} & {s.tokens for s in bench.centring.samples}
    assert bench.centring.samples
    short = tmp_path / "short.txt"
    short.write_text(loaded.tokenizer.decode(loaded.tokenizer(words)["input_ids"][:250]))  # two windows and a half
    with pytest.raises(DataError, match="name other data with --centring-data"):
        make_bench(loaded, sources=[str(short)], centring=[str(short)], length=100, samples=2)


def test_the_table_and_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families = ["--only", "centring", "--only", "per-channel keys", "--only", "published", "--profile", str(PROFILE)]
    assert ablate(tmp_path / "run", *families, "--output", str(tmp_path / "out.json")) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    result = Ablation.model_validate_json((tmp_path / "out.json").read_bytes())
    names = ["16 bit", "KV4 centred keys", "KV2 centred keys", "KV4 per-channel keys", "KV2 per-channel keys"]
    assert [row.name for row in result.rows] == [*names, "published presets", "reference-4.00bit"]
    lines = {row.name: next(line for line in shown.out.splitlines() if row.name in line) for row in result.rows}
    assert "none is published" in lines["published presets"]
    assert "KV4 per-channel keys*" in lines["KV4 per-channel keys"]
    by_name = {row.name: row for row in result.rows}
    assert by_name["reference-4.00bit"].effective_bits == 4.0
    assert by_name["published presets"].quality is None
    four, two = (by_name[f"KV{bits} centred keys"].quality for bits in (4, 2))
    assert four is not None
    assert two is not None
    assert 0 < four.kl.value < two.kl.value
    assert "tokens/s" not in shown.out  # no server was asked for
    assert set(result.data) == {"list", "text"}
    assert set(result.centring) == {"text"}
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()


def test_finished_rows_are_kept_and_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, only = tmp_path / "run", ("--only", "symmetric", "--json")
    measured: list[str] = []
    real = quality_module.QualityBench.row

    def row(self: QualityBench, variant: StorageVariant, *rest: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(variant.name)
        return real(self, variant, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quality_module.QualityBench, "row", row)
        assert ablate(folder, *only) == 130
    with (folder / "rows.jsonl").open("a") as stream:
        stream.write('{"row": {"name": "KV4 symm')  # a kill in the middle of a line
    capsys.readouterr()
    assert ablate(folder, *only) == 2
    assert "--resume" in capsys.readouterr().err
    assert ablate(folder, *only, "--resume", "--seed", "1") == 2
    assert "other data" in capsys.readouterr().err

    def counted(self: QualityBench, variant: StorageVariant, *rest: Any) -> Any:
        measured.append(variant.name)
        return real(self, variant, *rest)

    monkeypatch.setattr(quality_module.QualityBench, "row", counted)
    assert ablate(folder, *only, "--resume") == 0
    resumed = json.loads(capsys.readouterr().out)
    assert measured == ["16 bit", "KV8 symmetric", "KV4 symmetric", "KV2 symmetric"]
    assert ablate(tmp_path / "other", *only) == 0
    whole = json.loads(capsys.readouterr().out)
    assert resumed["rows"] == whole["rows"]


def test_options_that_mean_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate(tmp_path, "--resume", "--overwrite") == 2
    assert ablate(tmp_path, "--", "--device", "cpu") == 2
    assert "--server-python" in capsys.readouterr().err


def test_a_profile_of_another_model_has_the_exit_code_that_it_has_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--profile", str(ROOT / "profiles" / "qwen2.5-7b" / "qwen2.5-7b-kv4.json")]
    assert ablate(tmp_path, *other) == 4
    assert "qwen2.5-7b" in capsys.readouterr().err.lower()
    assert run(["evaluate", *other, "--quiet"]) == 4
    assert "it belongs to another model" in capsys.readouterr().err


def test_a_centred_row_becomes_a_profile_that_can_be_served(loaded: LoadedModel, tmp_path: Path) -> None:
    variant = next(v for v in catalogue(loaded.info, ["centring"]) if v.centred)
    path = write_profile(variant, loaded.info, make_bench(loaded).centres(), tmp_path)
    profile = load(path)
    assert profile.layer_specs() == list(variant.setting or ())
    assert check_transforms(profile, tmp_path) is not None
    assert path.name == "kv4-centred-keys.json"
    own = StorageVariant("mine", "profile", (LayerSpec(),) * 4, profile=PROFILE)
    assert write_profile(own, loaded.info, {}, tmp_path) == PROFILE
    assert len({slug(v.name) for v in catalogue(loaded.info)}) == len(catalogue(loaded.info))


def test_a_record_that_is_no_result_gives_no_speed() -> None:
    good = of_record(record(small=True), "speed/x/record.json")
    assert {cell.section for cell in good.cells} == {"ttft", "throughput"}
    assert good.reason == ""
    assert all(cell.tokens_per_second > 0 and cell.ttft_ms > 0 for cell in good.cells)
    wrong = of_record(record(small=True, correct=False), "speed/x/record.json")
    assert wrong.cells == []
    assert "failed" in wrong.reason
    impossible = record(small=True)
    from kvtuner_search.bench.record import Violation

    violation = Violation(rule="below-floor", where="ttft", figure="2 ms", reason="weights cannot be read in that time")
    found = of_record(impossible.model_copy(update={"violations": [violation]}), "x")
    assert found.cells == []
    assert "below-floor" in found.reason


def test_rows_are_served_gated_and_measured_again_after_a_failure(
    tmp_path: Path, fake_python: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["--only", "centring", "--only", "per-channel keys"]
    assert ablate(tmp_path / "run", *only) == 0  # quality first, and a server later
    assert "tokens/s" not in capsys.readouterr().out
    options = [*only, "--resume", "--server-python", fake_python, "--requests", "2"]
    options += ["--concurrency", "2", "--prompt-tokens", "16", "--output-tokens", "8", "--json"]
    monkeypatch.setenv("FAKE_GARBLED", "1")
    assert ablate(tmp_path / "run", *options) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    for name in ("16 bit", "KV4 centred keys"):
        assert rows[name]["speed"]["cells"] == []
        assert "likelihood" in rows[name]["speed"]["reason"]
    monkeypatch.delenv("FAKE_GARBLED")
    assert ablate(tmp_path / "run", *options) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    speed = rows["KV4 centred keys"]["speed"]
    assert [cell["section"] for cell in speed["cells"]] == ["ttft", "throughput"]
    assert speed["cells"][1]["tokens_per_second"] > 0
    assert speed["token_capacity"] == int(rows["16 bit"]["speed"]["token_capacity"] * 16 / 4.5)
    assert (tmp_path / "run" / speed["record"]).is_file()
    assert rows["KV4 per-channel keys"]["speed"] is None
    assert ablate(tmp_path / "run", *options[:-1]) == 0
    shown = capsys.readouterr().out
    assert "not in serving" in next(line for line in shown.splitlines() if "KV4 per-channel keys" in line)
