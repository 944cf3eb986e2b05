"""The plan of a server's cache: bits by layer, bytes by rank, layers by stage, tokens that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from kvtuner_kernels.layout import LayerSpec, TensorSpec, bytes_per_token
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import printable, ranges, runs, size
from kvtuner_search.serving.capacity import (
    StageBytes,
    heads_per_rank,
    share_of_windows,
    stage_bytes,
    token_capacity,
)
from kvtuner_search.serving.sglang.arguments import ServerOptions, node_ranks
from kvtuner_search.serving.sglang.partition import ENVIRONMENT, Partition, of_profile

GIB: Final = 2**30
ASSUMED_FRACTION: Final = 0.88  # SGLang's own choice if it does not know the GPU's memory


@dataclass(frozen=True)
class Memory:
    """The inputs of a prediction of token capacity; None for unknown ones."""

    device_bytes: int | None  # memory of one GPU
    device_source: str  # source of that figure
    weight_bytes: int | None  # weights of the whole model, from its safetensors files


@dataclass(frozen=True)
class ServePlan:
    """The content printed before a server starts."""

    options: ServerOptions
    profile: Profile
    path: Path  # the profile's file
    from_flags: bool  # the profile was made from the adapter's flags; its file is written when the server starts
    kv_heads: int  # on one rank
    partition: Partition
    stages: list[StageBytes]
    memory: Memory
    added: list[str]  # arguments that SGLang gets besides the user's
    environment: dict[str, str]  # variables that SGLang gets besides the user's
    sglang: str | None  # installed version
    ratio: float | None = (
        None  # slots of layers with windows for each slot of the others; None: one pool for all layers
    )

    @property
    def heaviest(self) -> float:
        """Bytes that a token costs on a rank of the heaviest stage."""
        return max(share_of_windows(stage.stored, stage.windows, self.ratio) for stage in self.stages)

    @property
    def heaviest_raw(self) -> float:
        """The same for a server without a profile, whose layers SGLang divides evenly unless the user does."""
        layers, stages = self.profile.model.num_layers, len(self.stages)
        if self.ratio is not None:  # which layers are together matters too: as they are here
            return max(share_of_windows(stage.raw, stage.windows_raw, self.ratio) for stage in self.stages)
        longest = max(self.partition.counts) if self.partition.by_user else -(-layers // stages)
        return bytes_per_token([LayerSpec()] * longest, self.kv_heads, self.profile.model.head_dim)

    @property
    def fraction(self) -> float:
        """The static fraction of memory that a prediction assumes."""
        given = self.options.mem_fraction_static
        return ASSUMED_FRACTION if given is None else given

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of cache on a rank, if they can be predicted: the static fraction minus the weights."""
        memory = self.memory
        if memory.device_bytes is None or memory.weight_bytes is None:
            return None
        ranks = self.options.tp_size * self.options.pp_size
        return max(0, int(memory.device_bytes * self.fraction) - memory.weight_bytes // ranks)

    @property
    def basis_bytes(self) -> int:
        """Bytes of bases on the rank that has most of them; they are subtracted from the cache's."""
        return max(stage.bases for stage in self.stages)

    @property
    def tokens(self) -> int | None:
        """Predicted token capacity; None if it cannot be predicted."""
        return None if self.cache_bytes is None else self._fit(self.cache_bytes - self.basis_bytes, self.heaviest)

    @property
    def tokens_raw(self) -> int | None:
        """The same for a server without a profile."""
        return None if self.cache_bytes is None else self._fit(self.cache_bytes, self.heaviest_raw)

    def _fit(self, cache_bytes: int, nbytes: float) -> int:
        return token_capacity(cache_bytes, nbytes, self.options.page_size or 1, self.options.max_total_tokens)

    def tokens_per_gib(self, nbytes: float) -> int:
        """Tokens for each GiB of cache on every rank, if a token takes ``nbytes`` on the heaviest stage."""
        return token_capacity(GIB, nbytes, self.options.page_size or 1)

    def unknown(self) -> list[str]:
        """What is missing for a prediction, each with its remedy where there is one."""
        missing = []
        if self.memory.device_bytes is None:
            missing.append(f"{self.memory.device_source}; give --gpu-memory")
        if self.memory.weight_bytes is None:
            missing.append(
                f"the size of the weights is not known ({printable(self.options.model_path)} has no safetensors files here)"
                if self.options.quantization is None
                else f"--quantization {self.options.quantization} changes the size of the weights"
            )
        return missing


def make_plan(
    options: ServerOptions,
    profile: Profile,
    path: Path,
    from_flags: bool,
    memory: Memory,
    added: list[str],
    environment: dict[str, str],
    sglang: str | None,
    ratio: float | None = None,
) -> ServePlan:
    """Divide a profile's layers and heads over the ranks of a server.

    Raises:
        UsageError: if they cannot be divided that way.
    """
    model = profile.model
    kv_heads = heads_per_rank(model.num_kv_heads, options.tp_size)
    partition = of_profile(profile, options.tp_size, options.pp_size)
    stages = stage_bytes(profile.layer_specs(), partition.counts, kv_heads, model.head_dim, model.kinds)
    environment = environment | partition.to_environment()
    return ServePlan(
        options, profile, path, from_flags, kv_heads, partition, stages, memory, added, environment, sglang, ratio
    )


def to_json(plan: ServePlan) -> dict[str, Any]:
    """The plan for scripts."""
    options, profile, model = plan.options, plan.profile, plan.profile.model
    stages, ranks = node_ranks(options)
    return {
        "profile": {"path": str(plan.path), "name": profile.name, "digest": profile.digest},
        "model": {
            "path": options.model_path,
            "architecture": model.architecture,
            "num_layers": model.num_layers,
            "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
        },
        "layers": [
            {
                "layers": indices,
                "spec": str(spec),
                "bytes_per_token": spec.bytes_per_token(model.num_kv_heads, model.head_dim),
                "effective_bits": spec.effective_bits(model.num_kv_heads, model.head_dim),
            }
            for indices, spec in runs(profile.layer_specs())
        ],
        "storage": profile.storage.model_dump(),
        "parallel": {
            "tp_size": options.tp_size,
            "pp_size": options.pp_size,
            "nnodes": options.nnodes,
            "node_rank": options.node_rank,
            "stages_on_this_node": list(stages),
            "tp_ranks_on_this_node": list(ranks),
            "kv_heads_per_rank": plan.kv_heads,
        },
        "partition": {"layers": list(plan.partition.counts), "by_user": plan.partition.by_user},
        "stages": [
            {
                "first": s.first,
                "last": s.end - 1,
                "bytes_per_token": s.stored,
                "bytes_per_token_16bit": s.raw,
                "bytes_per_token_windows": s.windows,
            }
            for s in plan.stages
        ],
        "capacity": {
            "tokens_per_gib": plan.tokens_per_gib(plan.heaviest),
            "tokens_per_gib_16bit": plan.tokens_per_gib(plan.heaviest_raw),
            "page_size": options.page_size or 1,
            "window_tokens_ratio": plan.ratio,
            "max_total_tokens": options.max_total_tokens,
            "tokens": plan.tokens,
            "tokens_16bit": plan.tokens_raw,
            "cache_bytes": plan.cache_bytes,
            "basis_bytes": plan.basis_bytes,
            "mem_fraction_static": plan.fraction,
            "mem_fraction_static_assumed": options.mem_fraction_static is None,
            **asdict(plan.memory),
            "unknown": plan.unknown(),
        },
        "sglang": plan.sglang,
        "added_arguments": plan.added,
        "environment": plan.environment,
    }


def to_text(plan: ServePlan) -> str:
    """The plan for people: a label and a line, or several, for each part."""
    lines = []
    for label, *texts in _parts(plan):
        lines += [f"{label if index == 0 else '':12}{text}" for index, text in enumerate(texts)]
    return "\n".join(lines) + "\n"


def _parts(plan: ServePlan) -> Iterator[list[str]]:
    options, profile = plan.options, plan.profile
    model, storage = profile.model, profile.storage
    yield [
        "model",
        f"{printable(options.model_path)}: {model.num_layers} layers x {model.num_kv_heads} KV heads x {model.head_dim} channels",
    ]
    measured = "" if profile.quality else ", quality not measured"
    yield [
        "profile",
        f"{profile.name}, {profile.provenance.origin}{measured}, {profile.digest[:19]}",
        printable(plan.path),
    ]
    yield ["stored", *_specs(profile)]
    ratio = storage.bytes_per_token_16bit / max(1, storage.bytes_per_token)
    yield [
        "a token",
        f"{storage.bytes_per_token:,} bytes of {storage.bytes_per_token_16bit:,} at 16 bits: {storage.effective_bits:.3f}"
        f" effective bits, {ratio:.2f} times the tokens",
    ]
    if storage.bytes_per_token_full is not None:
        yield ["windows", *_windows(plan)]
    if options.tp_size * options.pp_size * options.nnodes > 1:
        yield ["ranks", *_ranks(plan)]
    yield ["capacity", *_capacity(plan)]
    version = "not installed here" if plan.sglang is None else plan.sglang
    variables = [f"{name}={value}" for name, value in plan.environment.items() if name.startswith("SGLANG_")]
    yield ["sglang", f"{version}, with {' '.join(map(printable, [*variables, *plan.added]))}"]
    yield ["listens on", _address(options)]


def _windows(plan: ServePlan) -> Iterator[str]:
    model, storage = plan.profile.model, plan.profile.storage
    found = runs(list(map(str, model.kinds)))
    yield ", ".join(f"layer{'s' if len(indices) > 1 else ''} {ranges(indices)}: {kind}" for indices, kind in found)
    if plan.ratio is None:
        yield "SGLang keeps every token of these layers too: one pool for all layers, and windows only in attention"
        return
    yield f"{storage.bytes_per_token_full:,} bytes a token in full layers, {storage.bytes_per_request_windows:,} a request in the others"
    yield f"whose pool has {plan.ratio:g} slots for each slot of the full layers (--swa-full-tokens-ratio)"


def _specs(profile: Profile) -> list[str]:
    """One line for each distinct size and grid; transforms cost no bytes and are left to ``show``."""
    model = profile.model
    layers = [LayerSpec(_untransformed(spec.key), _untransformed(spec.value)) for spec in profile.layer_specs()]
    found = [(f"layer{'s' if len(indices) > 1 else ''} {ranges(indices)}", spec) for indices, spec in runs(layers)]
    width = min(40, max(len(name) for name, _ in found))
    return [
        f"{name:{width}}  keys {_shown(spec.key)}, values {_shown(spec.value)}: {spec.effective_bits(model.num_kv_heads, model.head_dim):.3f} bits,"
        f" {spec.bytes_per_token(model.num_kv_heads, model.head_dim):,} bytes"
        for name, spec in found
    ]


def _shown(spec: TensorSpec) -> str:
    """The spec; for bands also their mean bits."""
    return f"{spec} (mean {spec.mean_bits:g})" if spec.banded else str(spec)


def _untransformed(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.bits, spec.group_size, spec.symmetric, bands=spec.bands)


def _ranks(plan: ServePlan) -> Iterator[str]:
    options, partition = plan.options, plan.partition
    heads = f"{plan.kv_heads} of {plan.profile.model.num_kv_heads} KV heads on each"
    yield f"tensor parallel {options.tp_size} ({heads}), pipeline parallel {options.pp_size}"
    if options.nnodes > 1:
        stages, ranks = node_ranks(options)
        yield f"node {options.node_rank} of {options.nnodes}: stages {ranges(list(stages))}, tensor-parallel ranks {ranges(list(ranks))}"
    for index, stage in enumerate(plan.stages):
        layers = (
            f"stage {index}: layers {ranges(list(range(stage.first, stage.end)))}, " if len(plan.stages) > 1 else ""
        )
        yield f"{layers}{stage.stored:,} bytes a token on a rank, of {stage.raw:,}"
    if options.pp_size > 1:
        how = (
            f"as {ENVIRONMENT} says" if partition.by_user else f"balanced by bytes; set {ENVIRONMENT} to choose another"
        )
        yield f"layers divided {partition}, {how}"


def _capacity(plan: ServePlan) -> Iterator[str]:
    options, memory, stored, raw = plan.options, plan.memory, plan.heaviest, plan.heaviest_raw
    yield f"{plan.tokens_per_gib(stored):,} tokens for each GiB of cache on every rank (at 16 bits {plan.tokens_per_gib(raw):,})"
    if plan.cache_bytes is None or memory.device_bytes is None or memory.weight_bytes is None:
        if options.max_total_tokens is not None:
            yield f"at most {options.max_total_tokens:,} tokens, as --max-total-tokens says"
        yield "no total is predicted, because"
        yield from (f"- {reason}" for reason in plan.unknown())
        return
    weights = size(memory.weight_bytes // (options.tp_size * options.pp_size))
    yield f"about {plan.tokens:,} tokens (at 16 bits {plan.tokens_raw:,}), assuming {size(plan.cache_bytes)} of cache on a rank:"
    yield f"{plan.fraction:g} of {size(memory.device_bytes)} ({memory.device_source}) less {weights} of weights"
    if plan.basis_bytes:
        yield f"{size(plan.basis_bytes)} of it are taken by bases, whatever the number of tokens"
    if options.mem_fraction_static is None:
        yield f"{plan.fraction:g} is assumed: SGLang chooses the fraction itself unless --mem-fraction-static is given"
    if options.max_total_tokens is not None:
        yield f"and at most {options.max_total_tokens:,}, as --max-total-tokens says"
    if options.speculative_algorithm is not None:
        yield "less what the draft model's own cache takes, which is not counted here"


def _address(options: ServerOptions) -> str:
    if options.node_rank > 0:
        return "nothing but /health: node 0 answers requests"
    host = options.address
    public = ", which other machines can reach" if options.public else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{options.port}{public}"
