"""Load a model and its tokenizer from a local folder, the hub, or the package itself (``reference``)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import nn

from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.models import attention
from kvtuner_search.models.reference_model import REFERENCE_NAME, reference_model_path
from kvtuner_search.models.support import check_supported
from kvtuner_search.profile.model_config import model_info
from kvtuner_search.profile.schema import ModelInfo

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")
_REMEDY: Final = "give a local folder with config.json, tokenizer and safetensors weights, or a hub id while online"


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded."""

    source: str = REFERENCE_NAME  # folder, hub id, or the embedded reference model
    revision: str | None = None  # hub commit, branch or tag
    dtype: str = "auto"  # a key of DTYPES; auto is bfloat16 on a GPU and float32 on the CPU
    device: str = "auto"  # auto is cuda if there is one, else cpu
    device_map: str | None = None  # transformers' device_map, for models larger than one GPU
    trust_remote_code: bool = False  # run code that comes with the model
    random_weights: bool = False  # weights from the config's initializer, for measuring speed


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for calibration."""

    model: Any  # transformers PreTrainedModel, in eval mode, with the tapped attention
    tokenizer: Any  # transformers tokenizer; None with random weights and no tokenizer in the folder
    info: ModelInfo
    device: torch.device  # where token ids go
    dtype: torch.dtype


def load_model(options: ModelOptions) -> LoadedModel:
    """Load a model with its tokenizer.

    Raises:
        DataError: if the model or tokenizer cannot be loaded, or has a layer that is not supported.
        UsageError: for an unknown dtype or a device that is not there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    device, dtype = pick_device(options.device), options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown: use auto or one of {', '.join(DTYPES)}")
    if device.type == "cpu" and dtype == "float16":
        raise UsageError("dtype float16 is not supported on the CPU: use float32 or bfloat16")
    folder = _folder(options.source)
    name = options.source if folder is None else str(folder)
    common: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if folder is None and options.revision:
        common["revision"] = options.revision
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _loading(options.source, "config"):
        config = AutoConfig.from_pretrained(name, **common)
    check_supported(config.get_text_config())
    tokenizer = None
    if folder is not None and not _has_tokenizer(folder):
        if not options.random_weights:  # transformers would make up an empty one
            raise DataError(f"model folder {options.source} has no tokenizer ({', '.join(_TOKENIZERS)}): copy it there")
    else:
        with _loading(options.source, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, **common)
    with _loading(options.source, "weights"):
        if options.random_weights:
            torch.manual_seed(0)
            with torch.device(device):
                model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config, dtype=DTYPES[dtype], attn_implementation=attention.NAME
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=DTYPES[dtype],
                attn_implementation=attention.NAME,
                use_safetensors=True,
                device_map=options.device_map,
                **common,
            )
            if options.device_map is None:
                model = model.to(device)
    model.eval().requires_grad_(False)
    info = model_info(
        {"architectures": [type(model).__name__], **config.to_dict()},
        options.source,
        _public_id(options.source, folder),
        _revision(config, options),
    )
    if folder is not None and not options.random_weights:
        info = info.model_copy(update={"weights_digest": weights_digest(folder)})
    embedding: nn.Module = model.get_input_embeddings()
    return LoadedModel(model, tokenizer, info, next(embedding.parameters()).device, DTYPES[dtype])


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one.

    Raises:
        UsageError: if the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(
            f"device {name!r} is not there ({torch.cuda.device_count()} GPUs are visible): use auto, cpu or another index"
        )
    return device


def weights_digest(folder: Path) -> str:
    """``sha256:...`` over names, sizes and headers of the safetensors files: quick, and tells two checkpoints of one shape apart
    by the last 4 KiB of each file too."""
    state = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(8)
            header += stream.read(min(int.from_bytes(header, "little"), 2**24))
            stream.seek(max(size - 4096, 0))
            tail = stream.read()
        state.update(f"{path.name} {size}\n".encode() + header + tail)
    return f"sha256:{state.hexdigest()}"


def _folder(source: str) -> Path | None:
    """The local folder that ``source`` means, or None for a hub id."""
    if source == REFERENCE_NAME:
        return reference_model_path()
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"model folder {source} has no config.json: {_REMEDY}")
        return path
    if path.exists() or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise DataError(f"model folder {source} {'is a file' if path.exists() else 'does not exist'}: {_REMEDY}")
    return None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _public_id(source: str, folder: Path | None) -> str:
    """What the profile calls the model: never a private path."""
    return folder.resolve().name if folder is not None and source != REFERENCE_NAME else source


def _revision(config: Any, options: ModelOptions) -> str | None:
    return getattr(config, "_commit_hash", None) or options.revision


class _loading:
    """Turn what transformers raises into one line."""

    def __init__(self, source: str, part: str) -> None:
        self.source, self.part = source, part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            raise DataError(
                f"the GPU has no room for {self.source}: use --device-map auto, a larger GPU, or --device cpu"
            ) from error
        if isinstance(error, (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)):
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise DataError(f"cannot load the {self.part} of {self.source}: {first.rstrip('.')}: {_REMEDY}") from error
