"""The table of devices against their buses and clocks, names as tools give them, detection, and figures that are given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtuner_search.bench import hardware
from kvtuner_search.bench.floors import BANDWIDTH_HEADROOM
from kvtuner_search.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
# What the data sheets' figures are made of: bus in bits, Gbit/s a pin, multiprocessors, dense bf16 operations a clock of each, highest clock in
# GHz (of the family where the device's own is not known), and MiB on the chip (last-level cache; then KiB of shared memory, registers and tensor memory of a multiprocessor).
MADE_OF = {
    "NVIDIA B200": (8192, 7.99, 148, 8192, 1.965, 126, 768),
    "NVIDIA H200": (6144, 6.40, 132, 4096, 1.980, 50, 512),
    "NVIDIA H200 NVL": (6144, 6.40, 132, 4096, 1.980, 50, 512),
    "NVIDIA H100 SXM": (5120, 5.24, 132, 4096, 1.980, 50, 512),
    "NVIDIA H100 PCIe": (5120, 3.19, 114, 4096, 1.755, 50, 512),
    "NVIDIA H100 NVL": (6144, 5.13, 132, 4096, 1.980, 50, 512),
    "NVIDIA A100 SXM 80GB": (5120, 3.19, 108, 2048, 1.410, 40, 448),
    "NVIDIA A100 PCIe 80GB": (5120, 3.02, 108, 2048, 1.410, 40, 448),
    "NVIDIA A100 40GB": (5120, 2.43, 108, 2048, 1.410, 40, 448),
    "NVIDIA L40S": (384, 18.0, 142, 1024, 2.520, 96, 384),
    "NVIDIA L4": (192, 12.5, 58, 1024, 2.040, 48, 384),
    "NVIDIA A10": (384, 12.5, 72, 1024, 1.710, 6, 384),
    "NVIDIA GeForce RTX 5090": (512, 28.0, 170, 512, 3.105, 96, 384),
    "NVIDIA GeForce RTX 4090": (384, 21.0, 128, 512, 3.105, 72, 384),
    "NVIDIA GeForce RTX 3090": (384, 19.5, 82, 512, 2.100, 6, 384),
    "AMD Instinct MI300X": (8192, 5.20, 304, 2048, 2.100, 288, 608),
}


def test_every_device_is_checked() -> None:
    assert [row.name for row in hardware.TABLE] == list(MADE_OF)


def test_the_documented_table_is_this_one() -> None:
    lines = (ROOT / "docs" / "bench-floors.md").read_text().splitlines()
    for row in hardware.TABLE:
        figures = (row.bandwidth / 1e9, row.flops / 1e12, row.boost, row.memory, row.on_chip / 1e6)
        assert f"| {row.name} | {' | '.join(f'{figure:g}' for figure in figures)} | {row.source} |" in lines


@pytest.mark.parametrize("row", hardware.TABLE, ids=lambda row: row.name)
def test_no_device_exceeds_the_figures_that_floors_are_drawn_with(row: hardware.GpuModel) -> None:
    bits, pin, processors, operations, clock, cache, each = MADE_OF[row.name]
    bandwidth, flops = bits / 8 * pin * 1e9, processors * operations * clock * 1e9
    assert row.bandwidth * 0.95 < bandwidth <= row.bandwidth * BANDWIDTH_HEADROOM
    assert row.flops * 0.98 < flops <= row.flops * row.boost
    assert cache * 2**20 + processors * each * 2**10 <= row.on_chip
    assert row.source


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "NVIDIA H200"),
        ("h200", "NVIDIA H200"),
        ("NVIDIA H200 NVL", "NVIDIA H200 NVL"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H100 NVL", "NVIDIA H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 40GB"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090 24GB", "NVIDIA GeForce RTX 4090"),
        ("RTX 5090", "NVIDIA GeForce RTX 5090"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("AMD Instinct MI300X", "AMD Instinct MI300X"),
    ],
)
def test_names_as_tools_give_them(name: str, found: str) -> None:
    row = hardware.find(name, 4)
    assert row is not None
    assert (row.name, row.count) == (found, 4)


@pytest.mark.parametrize("row", hardware.TABLE, ids=lambda row: row.name)
def test_a_row_is_found_by_its_own_name(row: hardware.GpuModel) -> None:
    found = hardware.find(row.name)
    assert found is not None
    assert found.name == row.name


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GH200 480GB",
        "NVIDIA A10G",
        "NVIDIA A100",
        "Tesla V100",
        "",
    ],
)
def test_other_devices_are_not_taken_for_one_of_the_table(name: str) -> None:
    assert hardware.find(name) is None


def test_given_figures_replace_the_table() -> None:
    found = hardware.parse("NVIDIA H200, bandwidth=4.1e12", 2)
    assert (found.bandwidth, found.flops, found.count) == (4.1e12, 989.5e12, 2)
    assert found.source.endswith("; bandwidth given")
    assert hardware.parse("H200") == hardware.find("H200")


def test_an_unknown_device_needs_both_rates_and_is_credited_with_the_largest_chip() -> None:
    found = hardware.parse("Accelerator X,bandwidth=1e12,flops=2e14,memory=3e10")
    assert (found.name, found.bandwidth, found.flops, found.memory) == ("Accelerator X", 1e12, 2e14, 30_000_000_000)
    assert found.on_chip == max(row.on_chip for row in hardware.TABLE)
    assert found.boost == max(row.boost for row in hardware.TABLE)
    assert found.source == "given"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Accelerator X", "not in the table .* add bandwidth and flops"),
        ("Accelerator X,bandwidth=1e12", "add flops"),
        ("H200,bandwith=1e12", "'bandwith=1e12'"),
        ("H200,bandwidth=fast", "'bandwidth=fast'"),
        ("H200,bandwidth=0", "'bandwidth=0'"),
        ("H200,bandwidth=nan", "'bandwidth=nan'"),
        ("H200,bandwidth", "'bandwidth'"),
        (",bandwidth=1e12,flops=1e14", "no name"),
        ("\x1b[2J,bandwidth=1", "flops"),
    ],
)
def test_hardware_that_cannot_be_used_is_a_usage_error(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        hardware.parse(text)
    assert "\x1b" not in str(caught.value)


def pretend_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """An nvidia-smi that runs this shell text."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_detection_takes_the_name_and_the_memory_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    pretend_smi(tmp_path, monkeypatch, f'echo "$@" > {asked}\nprintf "NVIDIA H200, 143771\\nNVIDIA H200, 143771\\n"')
    found = hardware.detect(False, 2)
    assert found is not None
    assert (found.name, found.count, found.memory) == ("NVIDIA H200", 2, 143771 * 2**20)
    assert asked.read_text() == "--query-gpu=name,memory.total --format=csv,noheader,nounits\n"


@pytest.mark.parametrize(
    "body",
    [
        'printf "NVIDIA H200, 143771\\nNVIDIA L4, 23034\\n"',  # two kinds: either may serve
        'echo "NVIDIA Imaginary, 1000"',
        "echo NVIDIA-SMI has failed because it could not communicate with the driver; exit 9",
        "true",
    ],
)
def test_what_cannot_be_told_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    pretend_smi(tmp_path, monkeypatch, body)
    assert hardware.detect(False, 1) is None


def test_without_nvidia_smi_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.detect(False, 1) is None


def test_a_processor_is_bounded_by_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    texts = {
        "/proc/cpuinfo": "model name\t: Some Processor\nflags\t\t: fpu avx512_bf16\n",
        "/proc/meminfo": "MemTotal:  1024 kB\n",
    }
    monkeypatch.setattr(hardware, "_read", lambda path: texts.get(str(path), ""))
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    found = hardware.detect(True, 2)
    assert found is not None
    assert (found.name, found.count, found.memory, found.boost) == ("Some Processor", 2, 2**20, 1.0)
    assert found.bandwidth == 8 * 6.2e9 * 64
    assert found.flops == 8 * 6.2e9 * 128
    assert found.on_chip == 8 * 32 * 2**20  # the system did not tell: more than any core has
    texts["/proc/cpuinfo"] += "flags\t\t: fpu amx_tile\n"
    assert hardware.processor().flops == 8 * 6.2e9 * 1024


def test_this_machines_processor_has_a_name() -> None:
    found = hardware.parse("cpu", 3)
    assert found.count == 3
    assert found.name
    assert found == hardware.processor(3)
