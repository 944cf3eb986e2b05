"""Search per-layer key and value bit-widths for the KV cache, and keep the result as a reviewed profile.

The Python API is five names, which are imported when they are first used: ``calibrate``, ``evaluate``, ``Profile``, ``LayerSpec`` and
``KVTunerError`` (:mod:`kvtuner_search.api`, docs/api.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtuner_search.api import KVTunerError, LayerSpec, Profile, calibrate, evaluate

__version__ = "0.1.0"
__all__ = ["KVTunerError", "LayerSpec", "Profile", "__version__", "calibrate", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
