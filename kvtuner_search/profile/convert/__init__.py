"""Other tools' KV-cache settings as profiles, and back. Settings that the other format cannot express are listed, never silently dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvtuner_search.profile.convert import compressed_tensors, engines, kvtuner, transformers
from kvtuner_search.profile.convert.base import Exported, Imported, Source
from kvtuner_search.profile.schema import Profile


@dataclass(frozen=True)
class Format:
    """One format, both ways."""

    summary: str
    read: Callable[[Source], Imported]
    write: Callable[[Profile], Exported]


FORMATS: Final = {
    "kvtuner": Format("KVTuner's presets (YAML or JSON): bits by layer", kvtuner.read, kvtuner.write),
    "transformers": Format("cache_config of transformers' QuantizedCache (JSON)", transformers.read, transformers.write),
    "vllm": Format("vLLM's --kv-cache-dtype options (YAML for --config), or its scales JSON", engines.read_vllm, engines.write_vllm),
    "sglang": Format("SGLang's --kv-cache-dtype (YAML for --config), or its scales JSON", engines.read_sglang, engines.write_sglang),
    "compressed-tensors": Format("kv_cache_scheme of a config.json or a recipe, or ModelOpt's hf_quant_config.json", compressed_tensors.read, compressed_tensors.write),
}  # fmt: skip
