"""What the checks need of the machine: an environment in which SGLang finds the plugin, models, profiles, memory and bandwidth."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.profile.build import build, write
from kvtuner_search.profile.canonical import load
from kvtuner_search.profile.schema import Profile, Provenance

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ROOT / "profiles"
GROUP = "sglang.srt.plugins"
# The shape of Qwen/Qwen2.5-7B; weights are made up by SGLang (--load-format dummy).
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
COMMON = ("--sampling-backend", "pytorch", "--grammar-backend", "none", "--random-seed", "0")
GPU = ("--cuda-graph-backend-prefill", "disabled", "--disable-custom-all-reduce")


@dataclass(frozen=True)
class Subject:
    """The model whose speed is measured, and its profiles."""

    model: str
    vocabulary: int
    profiles: dict[str, Path]  # label -> profile
    main: str  # the label that has targets
    arguments: tuple[str, ...]  # of SGLang, for servers with and without a profile


@dataclass
class Machine:
    """One kind of device, and a folder for what a run writes."""

    device: str  # cuda or cpu
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)  # of all processes that are started
    bases: bool = False  # the mixed profile has layers in fitted bases

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KVTUNER_")}
        self.variables = inherited | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        search = [str(ROOT / "kernels"), str(ROOT), str(ROOT / "scripts")]
        if not plugin_installed():
            search.append(str(write_entry_point(self.folder / "entry-point")))
        search.append(str(write_check_plugin(self.folder / "check-plugin")))
        known = inherited.get("PYTHONPATH", "").split(os.pathsep)
        self.variables["PYTHONPATH"] = os.pathsep.join([*search, *(path for path in known if path)])
        if self.device == "cpu":
            self.variables |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}

    @property
    def own_backend(self) -> str:
        """SGLang's name of the attention backend that reads packed rows here."""
        return "triton" if self.device == "cuda" else "torch_native"

    def common(self) -> list[str]:
        """Arguments of every server."""
        return [*COMMON, *(GPU if self.device == "cuda" else ("--device", "cpu"))]

    def small(self) -> list[str]:
        """Arguments of servers of the reference model: little memory, and graphs for no more requests than are sent at a time."""
        if self.device == "cpu":
            return ["--mem-fraction-static", "0.02"]
        return ["--mem-fraction-static", "0.3", "--cuda-graph-max-bs-decode", "64"]

    def reference(self) -> str:
        """The folder of the reference model."""
        from kvtuner_search.models.reference_model import reference_model_path

        return str(reference_model_path())

    def mixed_profile(self) -> Path:
        """A profile of the reference model with sides of several bit-widths, rotated, centred and clipped, or in fitted bases."""
        path = PROFILES / "reference" / "reference-4.00bit.json"
        if not self.bases:
            return path
        from serving_checks.bases import reference_profile
        from serving_checks.greedy import prompts

        return reference_profile(self.folder, path, prompts())

    def raw_profile(self) -> Path:
        """The reference model with 16 bits in every layer."""
        path = self.folder / "reference-16bit.json"
        model = load(self.mixed_profile()).model
        layers = [LayerSpec()] * model.num_layers
        return write(
            build(path.stem, layers, model, Provenance(origin="uniform", tool="scripts/check_serving")), path.parent
        )

    def subject(self, memory: float, context: int, main: str = "K4V4", labels: Collection[str] = ()) -> Subject:
        """Qwen2.5-7B's shape on a GPU; on the CPU, where nothing is fast, the reference model.

        Args:
            memory: SGLang's ``--mem-fraction-static`` on a GPU.
            context: longest request in tokens.
            main: label of the profile that has targets.
            labels: of further profiles that are made, from those in bases; ``main`` is made too.
        """
        arguments = ("--context-length", str(context), "--skip-tokenizer-init", "--mem-fraction-static")
        if self.device == "cpu":
            model, name = self.reference(), "mixed"
            return Subject(model, 8000, {name: self.mixed_profile()}, name, (*arguments, "0.02", "--dtype", "bfloat16"))
        folder = self.folder / "qwen2.5-7b-shape"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(QWEN, indent=1))
        profiles = {
            label: PROFILES / "qwen2.5-7b" / f"qwen2.5-7b-{name}.json"
            for label, name in (("K8V8", "kv8"), ("K4V4", "kv4"), ("K4V2", "k4v2"))
        }
        profiles |= self._banded(profiles["K4V4"], {main, *labels})
        return Subject(
            str(folder), QWEN["vocab_size"] - 64, profiles, main, (*arguments, str(memory), "--load-format", "dummy")
        )

    def _banded(self, base: Path, labels: Collection[str]) -> dict[str, Path]:
        """Profiles of the same model with all layers in bases, which fit nothing: the weights are made up. Each is 15 MB."""
        from serving_checks.bases import SPEED, example_profile

        model = load(base).model
        return {
            label: example_profile(self.folder / f"{label}.json", model, [LayerSpec.parse(spec)] * model.num_layers)
            for label, spec in SPEED.items()
            if label in labels
        }


def plugin_installed() -> bool:
    """Whether SGLang would find the plugin in this interpreter's environment."""
    return any(point.value.startswith("kvtuner_search.") for point in metadata.entry_points(group=GROUP))


def write_entry_point(folder: Path) -> Path:
    """Metadata that lets SGLang find the plugin of this checkout, for an environment into which nothing can be installed.

    Args:
        folder: to be put on PYTHONPATH.

    Returns:
        the folder.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    target.mkdir(parents=True, exist_ok=True)
    (target / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"{name} = {value}" for name, value in project["entry-points"][GROUP].items()]
    (target / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *points, ""]))
    return folder


def write_check_plugin(folder: Path) -> Path:
    """The same for :mod:`serving_checks.plugin`, which no installation has."""
    target = folder / "serving_checks-0.dist-info"
    target.mkdir(parents=True, exist_ok=True)
    (target / "METADATA").write_text("Metadata-Version: 2.1\nName: serving-checks\nVersion: 0\n")
    (target / "entry_points.txt").write_text(f"[{GROUP}]\nchecks = serving_checks.plugin:register\n")
    return folder


def effective_bits(profile: Profile) -> float:
    """Stored bits of one number of the cache, everything counted."""
    return 16 * profile.storage.bytes_per_token / profile.storage.bytes_per_token_16bit


def about(machine: Machine) -> dict[str, Any]:
    """What the figures depend on."""
    import platform
    from datetime import UTC, datetime

    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {
            name: _version(name) for name in ("sglang", "torch", "triton", "flashinfer-python", "transformers")
        },
        "device": machine.device,
    }
    if machine.device == "cuda":
        found["gpus"] = nvidia_smi("gpu=name,driver_version")
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def nvidia_smi(query: str) -> list[str]:
    """The answer's lines."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip().splitlines()


def gpu_memory_used(processes: Collection[int]) -> tuple[int, str]:
    """MiB in use on all GPUs together, and by whom: these processes, or all where the driver does not tell them apart."""
    rows = [line.split(", ") for line in nvidia_smi("compute-apps=pid,used_memory")]
    held = [used for pid, used in rows if int(pid) in processes]
    if held and all(used.isdigit() for used in held):
        return sum(map(int, held)), "the server's GPU memory"
    return sum(map(int, nvidia_smi("gpu=memory.used"))), "memory of all GPUs"


def count_gpus() -> int:
    """GPUs of this machine."""
    return len(nvidia_smi("gpu=name"))
