"""``calibrate``, ``sensitivity`` and ``evaluate`` from the command line, on a tiny random model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.calibration.patience import FIRST
from kvtuner_search.cli.main import run
from kvtuner_search.evaluation.offline import open_profile
from kvtuner_search.models.runner import Runner
from kvtuner_search.profile.canonical import load

SMALL = ("--data", "list", "--data", "text", "--samples", "3", "--length", "170", "--trials", "16", "--quiet")
BITS_16 = 2 * 2 * 2 * 16 * 4  # bytes a token of the tiny model: K and V, two bytes, two heads, 16 channels, four layers


def calibrate(model: Path, output: Path, *more: str) -> int:
    return run(["calibrate", "--model", str(model), "--output", str(output), *SMALL, *more])


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "first"
    assert calibrate(tiny_model, output, "--target-bits", "6", "--target-bits", "5") == 0
    return output


def test_it_writes_valid_profiles_within_their_budgets(finished: Path, tiny_model: Path) -> None:
    names = sorted(p.name for p in finished.iterdir())
    assert {"report.html", "record.json", "study.journal", "tiny-qwen2-5.00bit.json", "tiny-qwen2-6.00bit.json"} <= set(
        names
    )
    for bits in (5, 6):
        profile, centres = open_profile(finished / f"tiny-qwen2-{bits}.00bit.json")
        assert profile.storage.effective_bits <= bits
        assert profile.storage.bytes_per_token_16bit == BITS_16
        assert profile.model.id == "tiny-qwen2"
        assert {(m.metric, m.split) for m in profile.quality} >= {("kl", "test"), ("nll", "test"), ("accuracy", "test")}
        assert profile.provenance.search is not None
        assert profile.provenance.search.trials == 16
        assert len({d.digest for d in profile.provenance.data}) == 6  # two sources, three splits
        for index, layer in enumerate(profile.layer_specs()):
            for side, held in ((layer.key, centres[index].key), (layer.value, centres[index].value)):
                assert (held is not None) == side.fitted
                assert held is None or held.shape == ((2, 18, 16) if side.banded else (2, 16))
    arguments = [str(finished / "tiny-qwen2-5.00bit.json"), "--model", str(tiny_model)]
    assert run(["check", *arguments]) == 0


def test_the_first_trials_are_what_gradients_alone_say_in_bands(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    for trial, bits in zip(record["trials"], (6, 5), strict=False):
        assert trial["origin"] == "fisher"
        assert trial["complete"]
        specs = [LayerSpec.parse(text) for text in trial["layers"]]
        assert all(side.banded for spec in specs for side in (spec.key, spec.value))
        word = 16 // 8 * 2 * 16 // 8  # bytes of a word of both heads
        assert bits / 16 * BITS_16 - word < trial["bytes_per_token"] <= bits / 16 * BITS_16
    for layer in record["sensitivity"]:
        assert "centres" not in layer
        for side in ("keys", "values"):
            bands, heads = layer["worth"][side], layer["worth_by_head"][side]
            assert len(bands) == 8
            assert bands == sorted(bands, reverse=True)
            assert bands == pytest.approx([sum(head[band] for head in heads) for band in range(8)])
            assert {"1.5-bands", "2.5-bands", "4-bands"} <= set(layer[side])
            assert layer[side]["1.5-bands"][1] > layer[side]["4-bands"][1] > 0
            measured = {row[0]: row[1:] for row in layer["errors"]}
            for name in ("1.5-bands", "2.5-bands", "4-bands"):
                spec = layer[side][name][0]
                assert measured[f"{spec}/16" if side == "keys" else f"16/{spec}"][3] > 0


def test_without_bands_nothing_is_banded(tiny_model: Path, tmp_path: Path) -> None:
    assert calibrate(tiny_model, tmp_path, "--target-bits", "5", "--no-random-baseline", "--no-bands") == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["options"]["bands"] is False
    assert "gradients" not in record["seconds"]
    assert "fisher" not in {trial["origin"] for trial in record["trials"]}
    texts = [text for trial in record["trials"] for text in trial["layers"]]
    texts += [row[0] for layer in record["sensitivity"] for row in layer["errors"]]
    assert not [text for text in texts if "b" in text]
    assert all("worth" not in layer for layer in record["sensitivity"])


def test_the_choice_is_no_worse_than_its_rivals_where_it_was_made(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    for target in record["targets"]:
        chosen = target["chosen"]
        assert chosen["effective_bits"] <= target["target_bits"]
        assert {"fisher", "uniform", "proxy"} <= {r["origin"] for r in target["rivals"]} | {chosen["origin"]}
        assert [r for r in target["rivals"] if r["name"] == "plain K4V4"]
        for rival in target["rivals"]:
            low, high = (rival["chosen_minus_this"][end] for end in ("low", "high"))
            assert {"better": high < 0, "worse": low > 0, "inconclusive": low <= 0 <= high, "same": low == high == 0}[
                rival["verdict"]
            ]
    complete = [t for t in record["trials"] if t["complete"]]
    assert len([t for t in record["trials"] if not t["duplicate"]]) == 16
    proposed = [t for t in record["trials"] if not t["duplicate"] and t["origin"] not in FIRST]
    assert len([t for t in record["random_trials"] if not t["duplicate"]]) == len(proposed) > 0
    assert all(len(t["rungs"]) == 3 for t in complete)
    assert record["hypervolume"]["searched"] >= record["hypervolume"]["uniform"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(
    finished: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert calibrate(tiny_model, tmp_path / "again", "--target-bits", "6", "--target-bits", "5") == 0
    for name in ("tiny-qwen2-5.00bit.json", "tiny-qwen2-6.00bit.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()
    for path in finished.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert calibrate(tiny_model, tmp_path / "other", "--target-bits", "5", "--seed", "1") == 0
    other = load(tmp_path / "other" / "tiny-qwen2-5.00bit.json")
    assert other.provenance.data != load(finished / "tiny-qwen2-5.00bit.json").provenance.data


def test_a_killed_run_resumes_to_the_same_profile(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    arguments = [
        "calibrate",
        "--model",
        str(tiny_model),
        "--output",
        str(output),
        *SMALL,
        "--target-bits",
        "6",
        "--target-bits",
        "5",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", "kvtuner_search", *arguments], env=environment)
    deadline = time.monotonic() + 120
    journal = output / "study.journal"
    while b'"rungs"' not in (journal.read_bytes() if journal.exists() else b""):  # a trial has finished
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(output.glob("*.json"))
    assert run(arguments) == 2  # neither --resume nor --overwrite
    assert run([*arguments, "--resume"]) == 0
    for name in ("tiny-qwen2-5.00bit.json", "tiny-qwen2-6.00bit.json"):
        assert (output / name).read_bytes() == (finished / name).read_bytes()


def test_a_shared_storage_gives_every_machine_the_profile(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for machine in ("one", "two"):  # the second finds all trials done
        assert (
            calibrate(tiny_model, tmp_path / machine, "--target-bits", "6", "--target-bits", "5", "--storage", url) == 0
        )
        name = "tiny-qwen2-5.00bit.json"
        assert (tmp_path / machine / name).read_bytes() == (finished / name).read_bytes()
    assert not list(tmp_path.rglob("*.journal"))


def test_resuming_with_other_options_is_refused(
    finished: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrate(tiny_model, finished, "--target-bits", "7", "--resume") == 2
    assert "other options, another model or other data" in capsys.readouterr().err


def test_a_bound_on_the_loss_gives_the_cheapest_setting_that_holds_it(tiny_model: Path, tmp_path: Path) -> None:
    assert calibrate(tiny_model, tmp_path, "--max-loss", "0.3", "--no-random-baseline") == 0
    profile = load(tmp_path / "tiny-qwen2-loss0.3.json")
    assert profile.provenance.search is not None
    assert profile.provenance.search.max_loss == 0.3
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["targets"][0]["target_bits"] is None
    assert record["random_trials"] == []
    assert 2 < profile.storage.effective_bits < 16


def test_pipeline_stages_and_workers(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "calibrate",
        "--model",
        str(tiny_model),
        "--output",
        str(tmp_path),
        *SMALL,
        "--pp",
        "2",
        "--workers",
        "2",
        "--sampler",
        "nsga2",
        "--no-random-baseline",
        "--target-bits",
        "6",
    ]
    monkeypatch.setattr(sys, "argv", ["kvtuner-search", *arguments])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert run(arguments) == 0
    profile = load(tmp_path / "tiny-qwen2-6.00bit.json")
    assert profile.provenance.search is not None
    assert profile.provenance.search.pipeline_stages == 2
    layer_bytes = [spec.bytes_per_token(2, 16) for spec in profile.layer_specs()]
    heaviest = min(max(sum(layer_bytes[:cut]), sum(layer_bytes[cut:])) for cut in range(1, 4))
    assert 2 * heaviest <= 6 / 16 * BITS_16
    trials = json.loads((tmp_path / "record.json").read_text())["trials"]
    assert {t["origin"] for t in trials} >= {"uniform", "proxy"}


def test_evaluate_agrees_with_the_setting_it_was_given(
    finished: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = finished / "tiny-qwen2-5.00bit.json"
    common = ["evaluate", "--model", str(tiny_model), "--data", "recall", "--samples", "3", "--quiet"]
    assert (
        run([*common, "--profile", str(profile), "--uniform", "16/16", "--uniform", "2-g16-asym/2-g16-asym", "--json"])
        == 0
    )
    ours, raw, rough = json.loads(capsys.readouterr().out)
    assert ours["effective_bits"] == pytest.approx(load(profile).storage.effective_bits)
    assert raw["loss"] == pytest.approx(0, abs=1e-7)
    assert ours["loss"] < rough["loss"]
    assert run([*common, "--profile", str(profile)]) == 0
    assert "recall" in capsys.readouterr().out


def test_sensitivity_lists_every_pair(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sensitivity.json"
    assert (
        run(
            [
                "sensitivity",
                "--model",
                str(tiny_model),
                *SMALL[:8],
                "--bits",
                "4,2,16",
                "--pair-loss",
                "--output",
                str(output),
                "--quiet",
            ]
        )
        == 0
    )
    layers = json.loads(output.read_text())["layers"]
    assert len(layers) == 4
    for layer in layers:
        errors = {row[0]: row[1:] for row in layer["errors"]}
        assert (
            len(errors) == 11 * 11 + 2 * 3
        )  # raw; asymmetric plain, centred, rotated; symmetric centred, rotated; at two widths
        assert errors["16/16"] == [0, 0, 0, 0]
        for name, (e_k, e_v, e_a, e_o) in errors.items():
            spec = LayerSpec.parse(name)
            assert (e_k > 0) == (e_a > 0) == (not spec.key.raw)
            assert (e_v > 0) == (not spec.value.raw)
            assert 0 <= e_a <= 1
            assert (e_o > 0) == (name != "16/16")
        assert len(layer["pair_losses"]) == 5 * 5
        assert layer["pair_losses"]["16/16"] == 0
    outlier = {row[0]: row[1:] for row in layers[0]["errors"]}
    plain = min(
        e[3]
        for name, e in outlier.items()
        if name.startswith("2-g16-asym") and "-c" not in name.split("/")[0] and name.endswith("/16")
    )
    centred = min(e[3] for name, e in outlier.items() if name.startswith("2-g16-asym-c") and name.endswith("/16"))
    assert centred < plain  # the tiny model has a key outlier
    out = capsys.readouterr().out
    assert "4-g16-" in out
    assert "layer" in out


BAD = [
    (["--model", "no/such/model/folder"], 3, "does not exist"),
    (["--data", "nothing-like-this"], 3, "unknown source 'nothing-like-this'"),
    (["--target-bits", "0.5"], 2, "not in the range 1<=x<=16"),
    (["--target-bits", "1.5", "--no-bands"], 2, "below 3"),
    (["--target-bits", "4", "--max-loss", "1"], 2, "exclude each other"),
    (["--max-loss", "-1"], 2, "not positive"),
    (["--resume"], 2, "no study to resume"),
    (["--resume", "--overwrite"], 2, "exclude each other"),
    (["--pp", "5"], 2, "4 layers"),
    (["--bits", "3"], 2, "'3'"),
    (["--group-size", "64"], 2, "head_dim=16"),
    (["--device", "cuda:7"], 2, "cuda:7"),
    (["--length", "8"], 3, "raise"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "says"), BAD, ids=lambda value: "_".join(value) if isinstance(value, list) else None
)
def test_bad_input_is_one_line_with_its_exit_code(
    arguments: list[str], code: int, says: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "calibrate",
        "--model",
        str(tiny_model),
        "--output",
        str(tmp_path / "out"),
        "--quiet",
        "--samples",
        "3",
        "--data",
        "list",
    ]
    assert run([*base, *arguments]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("Try ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert captured.out == ""
    assert not list((tmp_path / "out").glob("*.json")) if (tmp_path / "out").exists() else True


def test_bad_files_are_refused(
    tiny_model: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert (
        run(["calibrate", "--model", str(tiny_model), "--output", str(tmp_path / "o"), "--quiet", "--data", str(empty)])
        == 3
    )
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert calibrate(tiny_model, blocked) == 2
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "study.journal").write_bytes(b"\x00\x01 not a journal\nat all\n")
    assert calibrate(tiny_model, damaged, "--resume") == 3
    profile = finished / "tiny-qwen2-5.00bit.json"
    assert (
        run(["evaluate", "--profile", str(profile), "--samples", "1", "--quiet"]) == 4
    )  # the reference model is another one
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for says in ("empty.txt", "blocked", "study.journal", "another model"):
        assert says in error


def test_a_gpu_out_of_memory_is_one_line_with_what_helps(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(Runner, "hidden", fail)
    assert calibrate(tiny_model, tmp_path) == 3
    error = capsys.readouterr().err
    assert "Tried to allocate 2.00 GiB" in error
    assert "--batch-tokens" in error
    assert len(error.splitlines()) == 1


def test_an_interrupt_says_how_to_go_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "hidden", stop)
    assert calibrate(tiny_model, tmp_path) == 130
    assert "--resume" in capsys.readouterr().err
