"""Do two arrangements of ranks store the same bits? The files in which each rank leaves its rows, and the comparison.

Two ranks add up what one product adds at once, so a model's own rounding differs from its second layer on. A model whose layers
add nothing to the embedding (:func:`without_sums`) has no such sums, and all its rows must be the same in every bit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtuner_kernels.layout import LayerSpec

FOLDER = "CHECK_STORED_ROWS"  # environment variable: where the ranks write
TOKENS = "CHECK_STORED_ROWS_TOKENS"  # environment variable: how many slots, from the first that is handed out
Stored = dict[tuple[int, int], NDArray[np.uint8]]  # (layer, KV head) of the whole model -> [tokens, bytes]


class Server(Protocol):
    """A running server whose ranks have the plugin and FOLDER."""

    def post(self, path: str, content: Any) -> bytes: ...
    def info(self) -> dict[str, Any]: ...
    def generate(self, prompts: Any, count: int) -> Any: ...


def without_sums(model: Path, folder: Path) -> Path:
    """A copy of a model with output projections of zero, which attention and MLP end with.

    Args:
        model: folder with safetensors.
        folder: where the copy goes; one that is there already is used.

    Returns:
        ``folder``.
    """
    from safetensors.torch import load_file, save_file

    if not folder.exists():
        partial = folder.with_name(f".{folder.name}")
        shutil.copytree(model, partial, dirs_exist_ok=True)
        for file in partial.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    tensor.zero_()
            save_file(tensors, file, {"format": "pt"})
        partial.rename(folder)
    return folder


def take(server: Server, folder: Path, ranks: int, prompt: Sequence[int], model: Path) -> Path:
    """Have a model's rows of one prompt written: alone in an empty cache, its tokens have the first slots.

    Args:
        server: its weights are replaced by the model's.
        folder: the server's FOLDER.
        ranks: of the server.
        prompt: token ids; the server's TOKENS is their number.
        model: folder, of the same architecture.

    Returns:
        a folder within ``folder`` for :func:`read`.
    """
    server.post("/update_weights_from_disk", {"model_path": str(model)})
    server.post("/flush_cache?timeout=60", {})
    server.generate(list(prompt), 1)
    for old in folder.glob("layer*.npz"):
        old.unlink()
    server.info()
    deadline = time.monotonic() + 30
    while len(files := list(folder.glob("layer*.npz"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.1)  # the first rank answers before the others have written
    taken = folder / model.name
    taken.mkdir(exist_ok=True)
    for file in files:
        file.rename(taken / file.name)
    return taken


def write(folder: Path, first_layer: int, heads: slice, rows: dict[str, NDArray[np.uint8]]) -> None:
    """A rank's file.

    Args:
        folder: of all ranks.
        first_layer: of the rank's stage.
        heads: the rank's KV heads.
        rows: by layer, [tokens, bytes].
    """
    name = f"layer{first_layer}-head{heads.start}.npz"
    content: dict[str, Any] = {"heads": np.array([heads.start, heads.stop]), **rows}
    np.savez(folder / f".{name}", **content)
    (folder / f".{name}").rename(folder / name)


def read(folder: Path, layers: Sequence[LayerSpec], head_dim: int) -> Stored:
    """What all ranks wrote; empty if none did."""
    found: Stored = {}
    for file in sorted(folder.glob("layer*.npz")):
        with np.load(file) as content:
            heads = range(*content["heads"])
            for name in set(content.files) - {"heads"}:
                for head, part in zip(
                    heads, _by_head(content[name], layers[int(name)], len(heads), head_dim), strict=True
                ):
                    found[int(name), head] = part
    return found


def _by_head(rows: NDArray[np.uint8], spec: LayerSpec, heads: int, head_dim: int) -> Iterator[NDArray[np.uint8]]:
    """A row has the keys' codes of all heads, the values' (or both in the same words), the keys' metadata, the values'."""
    row = spec.row(heads, head_dim)
    parts = [
        (row.key_codes, row.key_head), (row.value_codes, 0 if spec.shares_words else row.value_head),
        (row.key_metadata, spec.key.metadata_bytes(head_dim)), (row.value_metadata, spec.value.metadata_bytes(head_dim)),
    ]  # fmt: skip
    for head in range(heads):
        yield np.concatenate([rows[:, at + head * size : at + (head + 1) * size] for at, size in parts], axis=1)


class Agreement(NamedTuple):
    """How two servers' rows compare."""

    complete: bool  # both have every layer and head of the model, and something in each
    equal: dict[int, float]  # layer -> fraction of its bytes that are equal

    @property
    def all_equal(self) -> bool:
        return self.complete and all(share == 1.0 for share in self.equal.values())

    @property
    def least(self) -> float:
        return min(self.equal.values(), default=0.0)


def compare(one: Stored, other: Stored, layers: int, heads: int) -> Agreement:
    """Byte by byte."""
    wanted = {(layer, head) for layer in range(layers) for head in range(heads)}
    complete = set(one) == wanted == set(other) and all(part.any() for part in one.values())
    same: dict[int, list[float]] = {}
    for layer, head in sorted(set(one) & set(other)):
        same.setdefault(layer, []).append(float((one[layer, head] == other[layer, head]).mean()))
    return Agreement(complete, {layer: float(np.mean(shares)) for layer, shares in same.items()})
