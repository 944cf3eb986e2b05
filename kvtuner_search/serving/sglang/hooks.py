"""Code for all versions of SGLang: how hooks are placed, and what they do.

A version's module names the places (:class:`HookPoints`) and adds the two hooks that size and make the pool.
"""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from kvtuner_search.errors import ServingError
from kvtuner_search.serving.configuration import ServingConfiguration
from kvtuner_search.serving.sglang import flags, launcher, not_finite
from kvtuner_search.serving.sglang.refusals import BY_VERSION

Hook = tuple[str, Callable[..., Any], HookType]  # a dotted path, the function called there, and how


@dataclass(frozen=True)
class HookPoints:
    """Where one version of SGLang is hooked."""

    version: str
    arguments: str  # dotted path of the class of server arguments
    ready: str  # of the function with which the launcher waits for its schedulers
    info: str  # of the method with which a scheduler answers it
    pool: tuple[Hook, ...]  # the version's own hooks
    resolved: Callable[[Any], Any] = lambda arguments: arguments  # server arguments as SGLang will read them


_active: list[ServingConfiguration] = []  # at most one: the configuration that this process serves


def active() -> ServingConfiguration:
    """The configuration that this process serves. Called from hooks, which are placed only if there is one."""
    return _active[0]


def register_flags(places: HookPoints) -> None:
    """Let SGLang's command line know our flags.

    Raises:
        ServingError: if SGLang's code is not what the version's module was written for.
    """

    def from_cli_args(original: Callable[..., Any], cls: type, arguments: argparse.Namespace) -> Any:
        with launcher.refusing():
            configuration = launcher.configure(arguments, _device(arguments.device))
            if configuration is not None:
                activate(places, configuration)
                HookRegistry.apply_hooks()  # SGLang does so once, after the plugins; this is later
        return original(cls, arguments)

    _place(places, f"{places.arguments}.add_cli_args", lambda _, parser: flags.add_arguments(parser), HookType.AFTER)
    _place(places, f"{places.arguments}.from_cli_args", from_cli_args, HookType.AROUND)


def activate(places: HookPoints, configuration: ServingConfiguration) -> None:
    """Let this process serve a profile.

    Raises:
        ServingError: if SGLang's code is not what the version's module was written for.
    """
    if _active:
        return
    _active.append(configuration)
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    def check_server_args(_: None, arguments: Any) -> None:
        with launcher.refusing():
            launcher.check_server(places.resolved(arguments), active(), BY_VERSION[places.version])

    _place(places, f"{places.arguments}.check_server_args", check_server_args, HookType.AFTER)
    _place(places, places.ready, _wait_until_ready, HookType.AROUND)
    _place(places, places.info, _add_report, HookType.AFTER)
    for hook in (*places.pool, *not_finite.HOOKS):
        _place(places, *hook)
    for name in ("triton", "torch_native"):
        ATTENTION_BACKENDS[name] = _backend(name, ATTENTION_BACKENDS[name])


def _place(places: HookPoints, target: str, function: Callable[..., Any], kind: HookType) -> None:
    """Register a hook. SGLang only logs one that it cannot place, so check first."""
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise ServingError(
            f"SGLang has no {target}: its files were changed; install SGLang {places.version} again"
        ) from error
    HookRegistry.register(target, function, kind)


def _device(given: str | None) -> str:
    """The device that SGLang will choose."""
    from sglang.srt.utils import get_device

    return given or str(get_device())


def _wait_until_ready(original: Callable[..., list[dict[str, Any]]], readers: Any, processes: Sequence[Any]) -> Any:
    """In the launcher: wait for the schedulers that it started, and check that each serves the profile."""
    try:
        infos = original(readers, processes)
    except RuntimeError:
        for process in processes:
            process.join(timeout=1)
        launcher.check_exits([process.exitcode for process in processes])
        raise
    with launcher.refusing():
        launcher.check_ready(infos, active())
    return infos


def set_bytes(configurator: Any, full: int, windows: int) -> None:
    """Let SGLang's configurator of two pools reckon with our bytes, as if each had one layer.

    Args:
        configurator: a HybridSWAPoolConfigurator.
        full: bytes a token of all this rank's layers that keep every token.
        windows: the same of its layers that keep a window.
    """
    configurator._full_layers_num = configurator._swa_layers_num = 1
    configurator._full_per_token, configurator._swa_per_token = full, windows
    configurator._cell_size = full + configurator._swa_full_tokens_ratio * windows


def reserve(configurator: Any, nbytes: int) -> None:
    """Remember, for :func:`leave_room`, the bytes that a rank will hold beside its rows."""
    configurator.kvtuner_reserved = nbytes


def leave_room(original: Callable[..., Any], configurator: Any, available_bytes: int, page_size: int) -> Any:
    """SGLang's tokens for these bytes, minus those held beside the rows, which are allocated with the pool, after SGLang has measured."""
    reserved = getattr(configurator, "kvtuner_reserved", 0)  # a draft model's has none
    return original(configurator, available_bytes - reserved, page_size)


def _add_report(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Add the report that the launcher expects and ``/server_info`` shows. Checks again, because other plugins have run since."""
    from kvtuner_search.serving.sglang import rank

    runner = scheduler.tp_worker.model_runner
    with launcher.refusing():
        rank.check_own(runner.token_to_kv_pool, runner.attn_backend)
    return {**info, "kvtuner": rank.reported().to_json()}


def _backend(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The attention backend called ``name``, over packed rows; a draft model keeps SGLang's."""

    def make(runner: Any, *arguments: Any, **named: Any) -> Any:
        if runner.is_draft_worker:
            return original(runner, *arguments, **named)
        from kvtuner_search.serving.sglang.attention import PackedTorchBackend, PackedTritonBackend

        if name == "torch_native":
            return PackedTorchBackend(runner)
        with launcher.refusing():
            return PackedTritonBackend(runner, as_stored=active().as_stored)

    return make
