"""The two names that SGLang imports at start."""

from typing import Any


def display(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("IPython is not installed: nothing can be displayed in this environment")


HTML = display
