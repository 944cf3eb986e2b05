"""What is read beside the load: metrics, device memory, and SGLang's own client."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import STEPS, Start, measure, step

from kvtuner_search.bench.record import Hardware, Scrape
from kvtuner_search.bench.served import first_device, public_arguments
from kvtuner_search.bench.watch import merge, parse_metrics
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.servers.transport import ServerError


def test_device_memory_is_that_of_the_servers_first_gpu(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for nvidia-smi: each call says one MiB more than the last."""
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexpr 1000 + $(wc -l < {tmp_path}/calls)\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    given = Hardware(name="gpu", count=1, bandwidth=1e12, flops=1e15, source="given", memory=10**10)
    record = measure(tmp_path / "run", url=fake(device="cuda", base_gpu_id=1).url, hardware=given, steps=STEPS[-1:])
    (cell,) = record.cells
    assert cell.device_bytes == (1001 * 2**20, 1004 * 2**20)
    assert [reading.device_bytes for reading in cell.readings] == [n * 2**20 for n in (1001, 1002, 1003, 1004)]
    assert "--id=7" in (tmp_path / "calls").read_text()


def test_the_busiest_throughput_cell_goes_through_the_other_client_too(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def other(python: str, url: str, tokenizer: str, prompts: Any, cell: Any, timeout: float) -> dict[str, float]:
        seen.append((python, url, tokenizer, prompts, cell))
        return {"ttft_mean": 1.02}

    monkeypatch.setattr("kvtuner_search.bench.session.cross_check", other)
    url, cells = fake().url, [STEPS[0], step("throughput", 2, 1, 20, 5), STEPS[1]]
    record = measure(tmp_path / "run", url=url, steps=cells, cross_check=True)
    assert record.cross_check == {"ttft_mean": 1.02}
    ((python, where, tokenizer, prompts, cell),) = seen
    assert (python, where, tokenizer) == (sys.executable, url, str(reference_model_path()))
    assert (cell.shape, len(prompts), {len(prompt) for prompt in prompts}) == (STEPS[1].shape, 6, {20})
    measure(tmp_path / "run", url=url, steps=cells, cross_check=True, resume=True)
    assert len(seen) == 1, "it is not repeated"


def test_readings_of_a_resumed_run_are_merged() -> None:
    def scrape(name: str, *values: float) -> Scrape:
        return Scrape(name=name, samples=len(values), minimum=min(values), maximum=max(values), last=values[-1])

    assert merge([scrape("a", 1, 3), scrape("b", 5)], [scrape("a", 0, 2)]) == [scrape("a", 1, 3, 0, 2), scrape("b", 5)]


def test_metrics_are_read_by_rank_without_folders() -> None:
    text = (
        "# HELP sglang:token_usage x\n# TYPE sglang:token_usage gauge\n"
        'sglang:token_usage{model_name="/m",tp_rank="0"} 0.5\nsglang:token_usage{model_name="/m",tp_rank="1"} 0.25\n'
        'sglang:prompt_tokens_total{a="1"} 3.0\nsglang:prompt_tokens_total{a="2"} 4.0\n'
        'sglang:gen_throughput{a="1"} NaN\nsglang:token_usage_other 1.0\n'
    )
    assert parse_metrics(text.splitlines()) == {
        'sglang:token_usage{tp_rank="0"}': 0.5,
        'sglang:token_usage{tp_rank="1"}': 0.25,
        "sglang:prompt_tokens_total": 7.0,
    }


@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize("digits", [19, 310, 4000])
def test_a_figure_of_any_length_is_implausible(sign: str, digits: int) -> None:
    with pytest.raises(ServerError, match=f"the metrics say sglang:token_usage={sign}[0-9.]+e.18: implausibly large"):
        parse_metrics([f"sglang:token_usage {sign}{'9' * digits}"])


@pytest.mark.parametrize("tail", [" 1 " + "9" * 400, "{", '{a="', " x"])
def test_what_prometheus_cannot_read_are_no_metrics(tail: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_metrics([f"sglang:token_usage{tail}"])


def test_arguments_name_no_folders_and_devices_are_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert public_arguments(["--model-path", "/data/m", "--x=~/y/z", "--tp", "2", "org/model"]) == [
        "--model-path", "m", "--x=z", "--tp", "2", "org/model",
    ]  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [first_device(base) for base in (0, 1, 2)] == ["3", "5", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert first_device(1) == "1"
