"""Load a model and its tokenizer from a local folder, the hub, or the package itself (``reference``)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from kvtuner_search.errors import DataError, KVTunerError, UsageError, first_line
from kvtuner_search.models import attention
from kvtuner_search.models.reference_model import REFERENCE_NAME
from kvtuner_search.models.source import (
    REMEDY,
    TOKENIZERS,
    check_length,
    check_pointers,
    has_tokenizer,
    local_folder,
    read_source,
)
from kvtuner_search.models.support import check_hooked
from kvtuner_search.models.weights import check_loaded, check_quantization, keeps_codes
from kvtuner_search.profile.model_config import model_info, name_of, positions
from kvtuner_search.profile.model_support import check_supported
from kvtuner_search.profile.schema import ModelInfo

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    notes: tuple[str, ...] = ()  # messages for the user


def load_model(options: ModelOptions, length: int | None = None) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        options: which model, and how.
        length: most tokens of a sequence that it will be run on.

    Raises:
        DataError: if the model or tokenizer cannot be loaded, has a layer that is not supported, or its weights do not match the
            checkpoint: missing, left over, of another shape, quantized codes without their scales, or not finite.
        UsageError: for an unknown dtype, a missing device, or a length beyond the model's positions.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    device, dtype = pick_device(options.device), options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown: use auto or one of {', '.join(DTYPES)}")
    if device.type == "cpu" and dtype == "float16":
        raise UsageError("dtype float16 is not supported on the CPU: use float32 or bfloat16")
    folder = local_folder(options.source)
    file, content = read_source(options.source, options.revision)
    check_supported(content, options.source)
    notes = check_length(content, length, options.source)
    if folder is not None:
        check_pointers(folder)
    found = name_of(file.parent)
    public = options.source if options.source == REFERENCE_NAME else found[0] or options.source
    info = model_info(content, options.source, public, options.revision or found[1])
    if not options.random_weights:
        check_quantization(content, file.parent, options.source)
    name = options.source if folder is None else str(folder)
    common: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if folder is None and options.revision:
        common["revision"] = options.revision
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _loading(options.source, "config"):
        config = AutoConfig.from_pretrained(name, **common)
    _check_shape(config.get_text_config(), info, options.source)
    check_hooked(config, info.num_layers, options.source, options.trust_remote_code, info.kinds, positions(content)[1])
    tokenizer = None
    if folder is not None and not has_tokenizer(folder):
        if not options.random_weights:  # transformers would create an empty one
            raise DataError(f"model folder {options.source} has no tokenizer ({', '.join(TOKENIZERS)}): copy it there")
    else:
        with _loading(options.source, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, **common)
    with _loading(options.source, "weights"):
        model = (
            _random(config, options, device, dtype)
            if options.random_weights
            else _saved(name, options, dtype, common, content, file.parent)
        )
        if options.device_map is None:
            model = model.to(device)
    model.eval().requires_grad_(False)
    attention.mark_layers(model, info.kinds)
    if folder is not None and not options.random_weights:
        info = info.model_copy(update={"weights_digest": weights_digest(folder)})
    embedding: nn.Module = model.get_input_embeddings()
    return LoadedModel(model, tokenizer, info, next(embedding.parameters()).device, DTYPES[dtype], notes)


def _random(config: Any, options: ModelOptions, device: torch.device, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config,
            dtype=DTYPES[dtype],
            attn_implementation=attention.NAME,
            trust_remote_code=options.trust_remote_code,
        )


def _saved(
    name: str, options: ModelOptions, dtype: str, common: dict[str, Any], config: dict[str, Any], folder: Path
) -> Any:
    """The model with the weights of its checkpoint, and no others."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # check_loaded reports the keys, in one line
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=DTYPES[dtype],
            attn_implementation=attention.NAME,
            use_safetensors=True,
            device_map=options.device_map,
            ignore_mismatched_sizes=True,  # all of them are named below
            output_loading_info=True,
            **common,
        )
    finally:
        logging.set_verbosity(before)
    model, found = both
    check_quantization(config, folder, options.source)  # again: now the hub's files are here too
    check_loaded(model, found, keeps_codes(config), options.source)
    return model


def _check_shape(config: Any, info: ModelInfo, source: str) -> None:
    """Refuse a model whose config.json transformers reads differently from this package.

    Raises:
        DataError: names what differs.
    """
    theirs = {
        "num_layers": getattr(config, "num_hidden_layers", info.num_layers),
        "num_attention_heads": getattr(config, "num_attention_heads", info.num_attention_heads),
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or info.num_kv_heads,
        "head_dim": getattr(config, "head_dim", None) or info.head_dim,
    }
    for name, value in theirs.items():
        if getattr(info, name) != value:
            raise DataError(
                f"{source}: config.json says {name}={getattr(info, name)}, transformers reads it as {value}: write the field into"
                " config.json"
            )


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
            f"device {name!r} does not exist ({torch.cuda.device_count()} GPUs are visible): use auto, cpu or another index"
        )
    return device


def weights_digest(folder: Path) -> str:
    """``sha256:...`` over names, sizes and headers of the safetensors files: fast; the last 4 KiB of each file
    distinguish two checkpoints of the same shape."""
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
        if isinstance(error, Exception) and not isinstance(
            error, KVTunerError
        ):  # of transformers, over the user's files
            first = first_line(error)
            raise DataError(
                f"cannot load the {self.part} of {self.source}: {first.rstrip('.')[:300]}: {REMEDY}"
            ) from error
