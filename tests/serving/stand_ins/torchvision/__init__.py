"""Stands in for torchvision, which has no CPU build for this torch, so that transformers and SGLang can be imported.

Every name of its modules is :class:`Absent`. For tests of text models only.
"""

from typing import Any

__version__ = "0.0.0"  # newer transformers compare it


class _Names(type):
    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Absent(metaclass=_Names):
    """What is imported but cannot be used."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        raise RuntimeError("torchvision is not installed: images cannot be processed in this environment")


def __getattr__(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent
