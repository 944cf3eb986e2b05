"""The location of the embedded reference model. Nothing heavy is imported here."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from kvtuner_search.errors import DataError

REFERENCE_NAME: Final = "reference"


def reference_model_path() -> Path:
    """The folder with the reference model's config, tokenizer and safetensors, for ``from_pretrained``.

    Raises:
        DataError: if the package is in an archive, or was installed without the model.
    """
    folder = resources.files("kvtuner_search.models") / REFERENCE_NAME
    if not (isinstance(folder, Path) and (folder / "config.json").is_file()):
        raise DataError(
            f"the reference model is not in {folder}: install kvtuner-search unpacked, with its package data, or name a model"
        )
    return folder
