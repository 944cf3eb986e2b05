"""Start SGLang for a profile: read the options, check everything that can be checked, print the plan, become the server.

``serve`` replaces itself with SGLang's launcher (exec) instead of starting it as a child. Signals, exit code, terminal and logs are
then SGLang's own, and no parent can die and leave a server behind: SGLang's processes ask the kernel to end them
with the launcher.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Final, NoReturn

from kvtuner_search.errors import ServingError, UsageError
from kvtuner_search.models.reference_model import REFERENCE_NAME, reference_model_path
from kvtuner_search.profile.model_config import text_config
from kvtuner_search.profile.schema import Profile
from kvtuner_search.serving.configuration import ServingConfiguration
from kvtuner_search.serving.sglang import flags
from kvtuner_search.serving.sglang.arguments import ServerOptions, parse_flags, read_options, variables
from kvtuner_search.serving.sglang.kinds import pool_ratio
from kvtuner_search.serving.sglang.model import context_remark, served_config, served_model, weight_bytes
from kvtuner_search.serving.sglang.plan import Memory, ServePlan, make_plan
from kvtuner_search.serving.sglang.plugin import ADAPTERS
from kvtuner_search.serving.sglang.refusals import ALL, attention_backend, check_speculation

_GROUP: Final = "sglang.srt.plugins"  # the entry-point group that SGLang loads in each of its processes
_PLUGIN: Final = "kvtuner_search.serving.sglang.plugin:register"
INSTALL: Final = "kvtuner-search[serve]"
_INSTALL: Final = f"pip install '{INSTALL}'"
_METRICS: Final = "--enable-metrics"
_NVIDIA_SMI: Final = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
_TIMEOUT: Final = 20  # seconds; the driver may have to load first


def prepare(
    arguments: Sequence[str], profile: str | None, as_stored: bool, gpu_memory: int | None
) -> tuple[ServePlan, list[str]]:
    """Check a command line and plan the server; nothing is started or written.

    Args:
        arguments: all that ``serve`` did not take for itself: the adapter's flags and SGLang's options.
        profile: the profile's file, if one is given.
        as_stored: in prefill, too, read a prompt's own keys and values as stored.
        gpu_memory: bytes of one GPU's memory, if the user gives them.

    Returns:
        the plan, and SGLang's whole argument list.

    Raises:
        KVTunerError: with the reason and the remedy.
    """
    namespace, rest = parse_flags(arguments, flags.add_arguments)
    namespace.kvtuner_profile, namespace.kvtuner_as_stored = profile, as_stored
    if not flags.requested(namespace):
        raise UsageError(f"nothing says how layers are stored: give --profile FILE, or {flags.ENABLE} and its bits")
    options = read_options(rest)
    named_anew = []
    if options.model_path == REFERENCE_NAME:  # a name that SGLang does not know; of two it takes the last
        options = replace(options, model_path=str(reference_model_path()))
        named_anew = ["--model-path", options.model_path]
    backend = _check_options(options)
    named = options.model_path, options.revision, options.json_model_override_args
    model = served_model(*named, options.context_length)
    config = served_config(*named)
    remark = context_remark(config, options.context_length, options.model_path)
    if remark is not None:
        print(f"kvtuner-search: {remark}", file=sys.stderr)
    loaded, path = flags.profile_of(namespace, model, options.model_path)
    check_dtype(options, loaded)
    added = named_anew if options.host is not None else [*named_anew, "--host", "127.0.0.1"]
    added += [] if options.attention_backend is not None else ["--attention-backend", backend]
    added += [flags.PROFILE, str(path), *([flags.AS_STORED] if as_stored else [])]
    configuration = ServingConfiguration(str(path), loaded.digest, as_stored)
    memory = _memory(options, gpu_memory)
    from_flags = profile is None
    environment = configuration.to_environment() | variables(rest)
    opted_in = bool(text_config(config).get("is_hybrid_swa"))
    ratio = pool_ratio(model, opted_in, options.disable_hybrid_swa_memory, options.swa_full_tokens_ratio)
    plan = make_plan(options, loaded, path, from_flags, memory, added, environment, sglang_version(), ratio)
    return plan, [*rest, *added]


def sglang_version() -> str | None:
    """The version of the installed SGLang, without importing it; None if it is not installed."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def check_installation(version: str | None) -> None:
    """Refuse an SGLang that is missing, has no adapter, or would not load the plugin.

    Raises:
        ServingError: with what to install or unset.
    """
    if version is None:
        raise ServingError(
            f"SGLang is not installed for {sys.executable}: {_INSTALL}, or print the plan with --dry-run"
        )
    if version not in ADAPTERS:
        raise ServingError(f"SGLang {version} is not supported, only {' and '.join(ADAPTERS)}: {_INSTALL}")
    found = [point.name for point in metadata.entry_points(group=_GROUP) if point.value == _PLUGIN]
    if not found:
        raise ServingError(
            f"SGLang would not find the plugin, because kvtuner-search is not installed as a package: {_INSTALL}"
        )
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and not set(found) & set(allowed):
        raise ServingError(f"SGLANG_PLUGINS={','.join(allowed)} keeps the plugin out: add {found[0]}, or unset it")


def server_arguments(
    model_path: str, given: Sequence[str], *, profile: str | None, as_stored: bool = False, metrics: bool = False
) -> list[str]:
    """See :meth:`kvtuner_search.serving.engine.Engine.server_arguments`."""
    arguments = ["--model-path", model_path, *given]
    if profile is not None:
        arguments += [flags.PROFILE, profile]
    if as_stored:
        arguments += [flags.AS_STORED]
    if metrics and _METRICS not in arguments:
        arguments += [_METRICS]
    return arguments


def command(python: str, arguments: Sequence[str], port: int | None = None) -> list[str]:
    """See :meth:`kvtuner_search.serving.engine.Engine.command`."""
    listen = () if port is None else ("--host", "127.0.0.1", "--port", str(port))
    return [python, "-m", "sglang.launch_server", *arguments, *listen]


def start(plan: ServePlan, arguments: Sequence[str]) -> NoReturn:
    """Become the server. Only a failure to do so returns, as an error.

    Raises:
        ServingError: if the interpreter cannot be started.
        UsageError: if a profile made from flags cannot be written.
    """
    if plan.from_flags:
        flags.save_profile(plan.profile, plan.path)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, command(sys.executable, arguments), os.environ | plan.environment)
    except OSError as error:
        raise ServingError(f"cannot start {sys.executable}: {error.strerror or error}") from error


def _check_options(options: ServerOptions) -> str:
    """Refuse options that cannot be combined with a profile, before SGLang is imported; the plugin checks SGLang's resolved arguments again.

    Returns:
        the one attention backend that reads packed rows.

    Raises:
        UsageError: if another backend, or an option that cannot be combined with a profile, is given.
    """
    for refusal in ALL:
        if refusal.field in options.refusable:
            refusal.check(options.refusable[refusal.field])
    device = "cpu" if options.on_cpu else options.device or "cuda"
    backend = attention_backend(device)
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        value = getattr(options, name)
        if value not in (None, backend):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} {value} cannot read packed rows: on {device} give {backend}, or leave it out")
    check_speculation(options.speculative_algorithm, device)
    if options.speculative_algorithm is not None and options.pp_size > 1:
        raise UsageError(
            f"--speculative-algorithm {options.speculative_algorithm} with --pp-size {options.pp_size}: SGLang cannot combine pipeline stages with"
            " speculation: leave one out"
        )
    return backend


def check_dtype(options: ServerOptions, profile: Profile) -> None:
    """Refuse a model of 32 bits where packed rows, or sides that are stored raw, need 16; each rank checks again.

    Raises:
        UsageError: names the dtypes that can be served.
    """
    raw = any(side.raw for layer in profile.layer_specs() for side in (layer.key, layer.value))
    if options.dtype in ("float32", "float") and (raw or not options.on_cpu):
        raise UsageError(
            f"--dtype {options.dtype}: on a GPU, and if a side is stored raw, a profile needs a model of 16 bits; give --dtype"
            " bfloat16 or float16"
        )


def _memory(options: ServerOptions, gpu_memory: int | None) -> Memory:
    weights = None if options.quantization else weight_bytes(options.model_path)
    if gpu_memory is not None:
        return Memory(gpu_memory, "--gpu-memory", weights)
    if options.on_cpu:
        return Memory(None, "the memory that is free on the CPU changes as the server starts", weights)
    free = _free_gpu_memory()
    return Memory(free, "free now, by nvidia-smi" if free is not None else "nvidia-smi finds no GPU here", weights)


def _free_gpu_memory() -> int | None:
    """Free bytes of the fullest of the visible GPUs; None if nvidia-smi does not say."""
    import subprocess

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = [*_NVIDIA_SMI, *(["-i", visible] if visible else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    figures = done.stdout.split()
    if done.returncode or not figures or not all(figure.isdigit() for figure in figures):
        return None
    return min(map(int, figures)) * 2**20
