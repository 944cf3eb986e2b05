"""Where a model's files are: a local folder, or the hub's cache. Nothing heavy is imported except to query the hub."""

from __future__ import annotations

import json
import os
from importlib import util
from pathlib import Path
from typing import Any, Final

from kvtuner_search.errors import DataError, UsageError, first_line
from kvtuner_search.models.reference_model import REFERENCE_NAME, reference_model_path
from kvtuner_search.profile.canonical import LFS_POINTER, lfs_message
from kvtuner_search.profile.model_config import adapter_message, load_config, positions

REMEDY: Final = "give a local folder with config.json, tokenizer and safetensors weights, or a hub id while online"
TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")


WEIGHTS: Final = "model.safetensors"


def local_folder(source: str) -> Path | None:
    """The local folder that ``source`` means, or None for a hub id.

    Raises:
        DataError: if it is a path, but not of a folder with a config.json, or the folder holds an adapter.
    """
    if source == REFERENCE_NAME:
        return reference_model_path()
    path = Path(source)
    if os.path.isdir(path):  # noqa: PTH112 - unlike Path's, it never raises
        if os.path.isfile(path / "adapter_config.json"):  # noqa: PTH113
            raise DataError(
                f"{adapter_message(path)}; if its weights are merged already, remove adapter_config.json from the folder"
            )
        if not os.path.isfile(path / "config.json"):  # noqa: PTH113
            raise DataError(
                f"{path / 'config.json'} does not exist, and a folder with no config.json is not a model: {REMEDY}"
            )
        return path
    there = os.path.lexists(path)
    if there or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or not source:
        raise DataError(f"model {source} {'is a file' if there else 'does not exist'}: {REMEDY}")
    return None


def config_file(source: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """The config.json of a folder or hub id.

    The hub is queried through transformers' loader, so its cache, token, mirror and offline mode apply. Without ``fetch`` only
    the cache is read.

    Raises:
        DataError: if it cannot be found.
    """
    folder = local_folder(source)
    if folder is not None:
        return folder / "config.json"
    try:
        from transformers.utils.hub import cached_file

        found = cached_file(source, "config.json", revision=revision, local_files_only=not fetch)
    except (OSError, ValueError, ImportError) as error:
        first = first_line(error)
        raise DataError(f"cannot read the config.json of {source}: {first.rstrip('.')}: {REMEDY}") from error
    if found is None:
        raise DataError(f"the hub has no config.json for {source}: {REMEDY}")
    return Path(found)


def read_source(source: str, revision: str | None = None, *, fetch: bool = True) -> tuple[Path, dict[str, Any]]:
    """The config.json of a folder or hub id, and its content; for ``fetch`` see :func:`config_file`.

    Raises:
        DataError: if it cannot be found or read.
    """
    file = config_file(source, revision, fetch=fetch)
    return file, load_config(file)


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads weights from: those of the index, else the single file, else all safetensors files."""
    index = folder / f"{WEIGHTS}.index.json"
    try:
        named = json.loads(index.read_bytes())["weight_map"].values()
        if named:
            return sorted({folder / str(name) for name in named})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass  # no index, or one that transformers refuses with its reason
    one = folder / WEIGHTS
    return [one] if one.is_file() else sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def check_pointers(folder: Path) -> None:
    """Refuse a folder whose weights or tokenizer files, as far as they are read, are Git LFS pointers.

    Raises:
        DataError: names the first one.
    """
    tokenizer = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt")]
    if not (folder / "tokenizer.json").is_file():
        tokenizer += sorted(folder.glob("*.model"))
    for path in [*tokenizer, *weight_files(folder)]:
        if path.is_file():
            with path.open("rb") as stream:
                if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise DataError(lfs_message(path))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer that can be loaded.

    Raises:
        DataError: if it has only files of an unsupported kind, or whose package is missing.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return True
    if (folder / "tokenizer.model").is_file():
        if util.find_spec("sentencepiece") is None:
            raise DataError(
                f"{folder} has no tokenizer.json, and its tokenizer.model needs the package sentencepiece, which is not installed:"
                " pip install 'kvtuner-search[sentencepiece]', or copy tokenizer.json there"
            )
        return True
    if (folder / "tekken.json").is_file():
        raise DataError(
            f"{folder} has only tekken.json, which the package mistral-common reads and this command does not: tokenizer.json is"
            " missing; copy it there from a repository of the same model that has it"
        )
    return False


def check_length(config: dict[str, Any], length: int | None, source: str) -> tuple[str, ...]:
    """Compare a length with the model's positions; returns messages for the user.

    Raises:
        UsageError: if it is beyond them.
    """
    made_for, reach = positions(config)
    if length is None or made_for is None or reach is None or length <= made_for:
        return ()
    if length > reach:
        raise UsageError(
            f"--length {length} is beyond the {reach} positions of {source} (max_position_embeddings): give at most {reach}"
        )
    return (
        f"--length {length} is beyond the {made_for} positions that {source} was made for; its rope_scaling reaches {reach}, so it is"
        " measured there",
    )
