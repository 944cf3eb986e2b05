"""KVTuner's presets: a YAML mapping from layer to ``nbits_key`` and ``nbits_value`` (github.com/cmd2001/KVTuner).

The file has only bits. How they are applied is an argument of KVTuner's cache, and only the file's name hints at it:

* ``pertoken``: ``axis_key=0, axis_value=0, q_group_size=-1, residual_length=0``: asymmetric over the whole head_dim;
* ``kivi``: ``axis_key=1, axis_value=0, q_group_size=32, residual_length=32``: keys per channel over 32 tokens, values per token
  over 32 channels, and a window of up to 32 tokens that are not quantized.
"""

from __future__ import annotations

import re
from typing import Any, Final

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.profile.convert.base import (
    Exported,
    Imported,
    Source,
    changes,
    integer,
    mapping,
    round_bits,
    tensor,
    widest,
)
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import quoted, ranges, runs, shortened

SCHEMES: Final = ("pertoken", "kivi")
_HINT: Final = re.compile(r"_(pertoken|kivi)_", re.ASCII)
_KIVI_GROUP: Final = 32


def read(source: Source) -> Imported:
    """A preset as layers; the scheme must be given.

    Raises:
        UsageError: if the scheme is missing, or the file's name hints at the other one.
        DataError: if the file is not a preset, or is for another number of layers.
    """
    scheme = _scheme(source)
    head_dim = source.model.head_dim
    group_size = head_dim if scheme == "pertoken" else _KIVI_GROUP
    content = numbered(source.content, "the preset", source.name)
    expected = range(source.model.num_layers)
    if sorted(content) != list(expected):
        raise DataError(
            f"{source.name} has {_layers(sorted(content))}, the model has 0 to {expected[-1]}: it is a preset of another model"
        )
    result = Imported([])
    rounded: list[str] = []
    for index in expected:
        bits = []
        for part in ("key", "value"):
            given = _bits(content[index], part, index, source, result)
            bits.append(round_bits(given))
            rounded.append(f"{part} bits {given} become {bits[-1]}" if bits[-1] != given else "")
        result.layers.append(LayerSpec(*(tensor(width, group_size, head_dim, source.name) for width in bits)))
    for indices, text in runs(rounded):
        if text:
            result.lost.append(f"layers {ranges(sorted({i // 2 for i in indices}))}: {text}")
    if scheme == "kivi":
        result.lost += [
            f"keys are quantized per channel over {_KIVI_GROUP} tokens; here per token over {_KIVI_GROUP} channels",
            f"up to {_KIVI_GROUP} of the newest tokens stay unquantized; here every token is quantized at once",
        ]
    return result


def numbered(content: Any, what: str, source: str) -> dict[int, Any]:
    """A mapping by number; JSON, and YAML with quotes, write numbers as text.

    Raises:
        DataError: if it is not a mapping, a key is not a number, or a key is given twice.
    """
    found: dict[int, Any] = {}
    for key, value in mapping(content, what, source).items():
        number = int(key) if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", key) else key
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise DataError(
                f"{source}: {what} has {quoted(key)} where a number is expected: it is not a preset of KVTuner"
            )
        if number in found:
            raise DataError(f"{source}: {what} has {number} twice, as a number and as text: keep one of them")
        found[number] = value
    return found


def _layers(indices: list[int]) -> str:
    return f"layers {shortened(ranges(indices))}" if indices else "no layers"


def _scheme(source: Source) -> str:
    hint = _HINT.search(source.name)
    if source.scheme is None:
        advice = f"its name hints at {hint[1]}: say so with --scheme {hint[1]}" if hint else "give --scheme"
        raise UsageError(f"{source.name} has bits but not how they are applied; {advice}")
    if hint and hint[1] != source.scheme:
        raise UsageError(f"--scheme {source.scheme} contradicts the name of {source.name}, which hints at {hint[1]}")
    return source.scheme


def _bits(entry: Any, part: str, index: int, source: Source, result: Imported) -> int:
    """Bits of one tensor; those of the widest head if a preset has an entry for each head."""
    name = f"nbits_{part}"
    fields = mapping(entry, f"layer {index}", source.name)
    if name in fields:
        return integer(fields[name], f"layer {index} {name}", source.name, 1, 16)
    heads = range(source.model.num_kv_heads)
    if any(str(key).startswith("nbits_") for key in fields):
        raise DataError(f"{source.name}: layer {index} has no {name}: it is not a preset of KVTuner")
    by_head = numbered(fields, f"layer {index}", source.name)
    if sorted(by_head) != list(heads):
        raise DataError(f"{source.name}: layer {index} has no {name}, nor an entry for each of {len(heads)} KV heads")
    widths = {
        integer(
            mapping(by_head[head], f"layer {index} head {head}", source.name).get(name),
            f"layer {index} head {head} {name}",
            source.name,
            1,
            16,
        )
        for head in heads
    }
    if len(widths) > 1:
        result.lost.append(
            f"layer {index}: {part} bits differ from head to head; all heads get the widest, {max(widths)}"
        )
    return max(widths)


def write(profile: Profile) -> Exported:
    """A preset for the per-token scheme."""
    dim = profile.model.head_dim
    layers = [LayerSpec(*(TensorSpec(min(widest(t), 8), dim) for t in (x.key, x.value))) for x in profile.layer_specs()]
    lines = [f"{i}:\n  nbits_key: {x.key.bits}\n  nbits_value: {x.value.bits}\n" for i, x in enumerate(layers)]
    note = "the preset needs axis_key=0, axis_value=0, q_group_size=-1, residual_length=0, asym=True, which it does not contain"
    return Exported("".join(lines), changes(profile, layers), [note])
