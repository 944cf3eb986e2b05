"""Upper limits of devices: a table of GPUs from their makers' data sheets, detection, and figures from the user. No torch."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from kvtuner_search.bench.record import Hardware
from kvtuner_search.errors import UsageError
from kvtuner_search.profile.text import printable


class GpuModel(NamedTuple):
    """One GPU of the table."""

    name: str  # as nvidia-smi reports it, without memory and form factor where they do not matter
    pattern: str  # of the name in lower case, without the maker's words and separators (see _plain)
    bandwidth: float  # of its memory, bytes/s
    flops: float  # dense bf16 with fp32 accumulation, operations/s
    memory: int  # GiB: data sheets write GB
    on_chip: float  # last-level cache, shared memory and registers, bytes, rounded up
    boost: float  # highest clock over the one that flops is stated at, rounded up
    source: str


_A100: Final = "NVIDIA A100 Tensor Core GPU data sheet"
_H100: Final = "NVIDIA H100 Tensor Core GPU data sheet (rate with sparsity, halved)"
_H200: Final = "NVIDIA H200 Tensor Core GPU data sheet (rate with sparsity, halved)"
_B200: Final = (
    "an eighth of 64 TB/s and 1,440 GB (NVIDIA DGX B200 data sheet) and 36 PFLOP/s (HGX B200, with sparsity, halved)"
)

# docs/bench-floors.md says how on_chip and boost are derived.
TABLE: Final = (
    GpuModel("NVIDIA B200", "b200( 180gb| 192gb)?", 8.0e12, 2250e12, 180, 0.25e9, 1.1, _B200),
    GpuModel("NVIDIA H200", "h200( sxm5?)?( 141gb)?( hbm3e)?", 4.8e12, 989.5e12, 141, 0.13e9, 1.1, _H200),
    GpuModel("NVIDIA H200 NVL", "h200 nvl( 141gb)?", 4.8e12, 835.5e12, 141, 0.13e9, 1.3, _H200),
    GpuModel("NVIDIA H100 SXM", "h100( sxm5?)?( 80gb)?( hbm3)?", 3.35e12, 989.5e12, 80, 0.13e9, 1.1, _H100),
    GpuModel("NVIDIA H100 PCIe", "h100 pcie( 80gb)?|h100 80gb pcie", 2.0e12, 756.5e12, 80, 0.13e9, 1.1, _H100),
    GpuModel("NVIDIA H100 NVL", "h100 nvl( 94gb)?", 3.9e12, 835.5e12, 94, 0.13e9, 1.3, _H100),
    GpuModel("NVIDIA A100 SXM 80GB", "a100( sxm4?)? 80gb", 2.039e12, 312e12, 80, 0.1e9, 1.05, _A100),
    GpuModel("NVIDIA A100 PCIe 80GB", "a100 80gb pcie|a100 pcie 80gb", 1.935e12, 312e12, 80, 0.1e9, 1.05, _A100),
    GpuModel("NVIDIA A100 40GB", "a100( sxm4?| pcie)? 40gb", 1.555e12, 312e12, 40, 0.1e9, 1.05, _A100),
    GpuModel("NVIDIA L40S", "l40s( 48gb)?", 0.864e12, 362.05e12, 48, 0.16e9, 1.05, "NVIDIA L40S data sheet"),
    GpuModel("NVIDIA L4", "l4( 24gb)?", 0.3e12, 121e12, 24, 0.08e9, 1.05, "NVIDIA L4 data sheet (rate with sparsity, halved)"),
    GpuModel("NVIDIA A10", "a10( 24gb)?", 0.6e12, 125e12, 24, 0.04e9, 1.05, "NVIDIA A10 data sheet"),
    GpuModel("NVIDIA GeForce RTX 5090", "(rtx )?5090( 32gb)?", 1.792e12, 209.5e12, 32, 0.17e9, 1.35, "NVIDIA RTX Blackwell GPU Architecture white paper"),
    GpuModel("NVIDIA GeForce RTX 4090", "(rtx )?4090( 24gb)?", 1.008e12, 165.2e12, 24, 0.13e9, 1.35, "NVIDIA Ada GPU Architecture white paper"),
    GpuModel("NVIDIA GeForce RTX 3090", "(rtx )?3090( 24gb)?", 0.936e12, 71e12, 24, 0.04e9, 1.35, "NVIDIA Ampere GA102 GPU Architecture white paper"),
    GpuModel("AMD Instinct MI300X", "mi300x( oam)?( 192gb)?", 5.3e12, 1307.4e12, 192, 0.5e9, 1.05, "AMD Instinct MI300X data sheet"),
)  # fmt: skip

_GIVEN: Final = {"bandwidth": "bytes/s", "flops": "operations/s", "memory": "bytes", "on_chip": "bytes"}
_TIMEOUT: Final = 20.0  # seconds; a starting driver answers after a few

# Processors are not looked up. These are upper bounds for every processor on the market, so its floors are loose.
CLOCK: Final = 6.2e9  # cycles/s: the highest boost clock sold (Core i9-14900KS)
CYCLE_BYTES: Final = 64  # a cycle and core, from beyond the core's own caches: one cache line
CYCLE_OPERATIONS: Final = 128  # a cycle and core: two 512-bit bf16 dot products of 32 multiply-adds each
CYCLE_OPERATIONS_MATRIX: Final = (
    1024  # with a matrix unit: one AMX tile product of 16 x 16 x 32 multiply-adds in 16 cycles
)
_CORE_CACHE: Final = 32 * 2**20  # bytes a core, if the system does not tell: more than any core has


def find(name: str, count: int = 1) -> Hardware | None:
    """The table's figures for a name such as nvidia-smi, torch or a person gives it; None if the table lacks it.

    Variants are distinguished: the name of a laptop GPU, a ``4090 D`` or a MIG slice fits no row.

    Args:
        name: e.g. ``NVIDIA GeForce RTX 4090``, ``NVIDIA A100-SXM4-80GB``, ``h200``.
        count: devices that the server uses.
    """
    plain = _plain(name)
    row = next((row for row in TABLE if re.fullmatch(row.pattern, plain)), None)
    if row is None:
        return None
    return Hardware(
        name=row.name,
        count=count,
        bandwidth=row.bandwidth,
        flops=row.flops,
        memory=row.memory * 2**30,
        on_chip=int(row.on_chip),
        boost=row.boost,
        source=row.source,
    )


def parse(text: str, count: int = 1) -> Hardware:
    """Hardware as an option gives it: ``NAME[,bandwidth=BYTES/S][,flops=OPERATIONS/S][,memory=BYTES][,on_chip=BYTES]``.

    Missing figures come from the table, or for the name ``cpu`` from this machine's processor. For a name that the table lacks,
    bandwidth and flops must be given; size and boost of the chip are then the table's largest, because an overestimate keeps the floors true.

    Raises:
        UsageError: for an unknown key, a figure that is not a positive number, or figures that are missing.
    """
    name, *pairs = (part.strip() for part in text.split(","))
    given: dict[str, float] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if key not in _GIVEN or not 0 < number < 1e18:
            known = ", ".join(f"{known}= ({unit})" for known, unit in _GIVEN.items())
            raise UsageError(
                f"{printable(pair)!r} of hardware {printable(text)!r} is not one of {known} with a positive number"
            )
        given[key] = number
    if not 0 < len(name) <= 200:
        raise UsageError(f"hardware {printable(text)[:80]!r} has no name: write for example 'NVIDIA H200'")
    row = processor(count) if name.lower() == "cpu" else find(name, count)
    if row is not None:
        source = f"{row.source}; {', '.join(given)} given" if given else row.source
        return Hardware.model_validate(row.model_dump() | _figures(given) | {"source": source})
    missing = [key for key in ("bandwidth", "flops") if key not in given]
    if missing:
        names = ", ".join(row.name for row in TABLE)
        raise UsageError(
            f"hardware {printable(name)!r} is not in the table ({names}): add {' and '.join(missing)}, e.g."
            f" '{printable(name)},bandwidth=4.8e12,flops=989e12'"
        )
    on_chip = {"on_chip": int(max(row.on_chip for row in TABLE))}
    return Hardware.model_validate({"name": name, "count": count, "source": "given"} | on_chip | _figures(given))


def detect(served_on_cpu: bool, count: int) -> Hardware | None:
    """This machine's GPUs by nvidia-smi, or its processor; None if they are of several kinds, unknown, or missing.

    Args:
        served_on_cpu: the server runs on the processor.
        count: devices that the server uses: tensor x pipeline ranks.
    """
    if served_on_cpu:
        return processor(count)
    gpus = _nvidia_smi()
    row = find(gpus[0][0], count) if len({name for name, _ in gpus}) == 1 else None
    return None if row is None else row.model_copy(update={"memory": gpus[0][1]})


def processor(count: int = 1) -> Hardware:
    """Upper bounds for this machine's processor, from its cores alone.

    Ranks on one machine share its cores, and a rank may have all of them at times: each of the ``count`` is credited with the
    whole machine, which keeps the floors true.
    """
    cores = os.cpu_count() or 1
    text = _read(Path("/proc/cpuinfo"))
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    matrix = " amx_tile" in text or platform.machine().lower() not in ("x86_64", "amd64")
    operations = CYCLE_OPERATIONS_MATRIX if matrix else CYCLE_OPERATIONS
    return Hardware(
        name=printable(named[1] if named else platform.processor() or platform.machine() or "processor")[:200],
        count=count,
        bandwidth=cores * CLOCK * CYCLE_BYTES,
        flops=cores * CLOCK * operations,
        memory=_memory(),
        on_chip=cores * _core_cache(),
        boost=1.0,
        source=f"upper bounds for {cores} cores at {CLOCK / 1e9} GHz: {CYCLE_BYTES} bytes from beyond a core's own caches and"
        f" {operations} operations a cycle and core",
    )


def _figures(given: dict[str, float]) -> dict[str, float | int]:
    """Bytes as whole numbers, rates as they are."""
    return {key: int(value) if key in ("memory", "on_chip") else value for key, value in given.items()}


def _plain(name: str) -> str:
    """Lower case, single spaces, without the maker's and the family's words."""
    words = re.split(r"[\s_-]+", name.strip().lower())
    return " ".join(
        word for word in words if word not in ("nvidia", "amd", "instinct", "geforce", "tensor", "core", "gpu")
    )


def _nvidia_smi() -> list[tuple[str, int]]:
    """Name and memory in bytes of this machine's GPUs; none if nvidia-smi is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^(.+), (\d+)$", done.stdout, re.MULTILINE)
    return [(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in found]


def _core_cache() -> int:
    """Bytes of a core's first- and second-level caches."""
    total = 0
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = re.fullmatch(r"(\d+)K", _read(index / "size").strip())
        if size and _read(index / "level").strip() in ("1", "2"):
            total += int(size[1]) * 1024
    return total or _CORE_CACHE


def _memory() -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
