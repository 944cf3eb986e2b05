"""The SGLang options that ``serve`` has to understand; all others pass through unread. SGLang is not imported."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NoReturn

from kvtuner_search.addresses import check_key
from kvtuner_search.errors import KVTunerError, UsageError, first_line
from kvtuner_search.profile.canonical import read_limited
from kvtuner_search.serving.sglang.flags import FLAGS
from kvtuner_search.serving.sglang.refusals import ALL

CONFIG: Final = "--config"
API_KEY: Final = "--api-key"
CPU_ENGINE: Final = "SGLANG_USE_CPU_ENGINE"  # SGLang's variable that chooses the kernels of the CPU
_MAX_CONFIG: Final = 2**20  # bytes
_ALIASES: Final = {
    "dp_size": ("--data-parallel-size", "--dp"),
    "attn_cp_size": ("--attention-context-parallel-size",),
}
_COUNT: Final = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)(Ki|Mi|Gi|Ti|k|M|G|T)?", re.ASCII)
_LOOPBACK: Final = ("localhost", "ip6-localhost")
_FACTORS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip


@dataclass(frozen=True)
class ServerOptions:
    """The given options, by SGLang's field names; None if SGLang chooses."""

    model_path: str
    revision: str | None
    json_model_override_args: str | None
    context_length: int | None
    host: str | None
    port: int
    tp_size: int
    pp_size: int
    nnodes: int
    node_rank: int
    dist_init_addr: str | None
    attention_backend: str | None
    prefill_attention_backend: str | None
    decode_attention_backend: str | None
    device: str | None
    dtype: str | None
    quantization: str | None
    speculative_algorithm: str | None
    mem_fraction_static: float | None
    max_total_tokens: int | None
    page_size: int | None
    disable_hybrid_swa_memory: bool
    swa_full_tokens_ratio: float | None
    refusable: Mapping[str, Any]  # the given options that cannot always be combined with a profile

    @property
    def address(self) -> str:
        """Where the server listens: SGLang's own default is this machine alone, too."""
        return "127.0.0.1" if self.host is None else self.host

    @property
    def public(self) -> bool:
        """Whether other machines can reach it; a name that is not known to be this machine's own counts as reachable."""
        try:
            return not ipaddress.ip_address(self.address).is_loopback
        except ValueError:
            return self.address not in _LOOPBACK

    @property
    def on_cpu(self) -> bool:
        """Whether SGLang will run on the CPU."""
        return (self.device or ("cpu" if os.environ.get(CPU_ENGINE) == "1" else "cuda")) == "cpu"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: see kvtuner-search serve --help")


def parse_flags(
    arguments: Sequence[str], add: Callable[[argparse.ArgumentParser], None]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags that ``add`` puts into a parser, and all other arguments in their order.

    Raises:
        UsageError: if a flag's value cannot be used.
    """
    parser = _Parser(prog="kvtuner-search serve", add_help=False, allow_abbrev=False)
    add(parser)
    return parser.parse_known_args(list(arguments))


def read_options(arguments: Sequence[str]) -> ServerOptions:
    """SGLang's options, with those of a ``--config`` file before them, as SGLang merges the two.

    Raises:
        UsageError: if an option cannot be used, or has an ambiguous abbreviation.
    """
    merged = [*_config_file(arguments), *arguments]
    namespace, rest = parse_flags(merged, _add_options)
    _check_abbreviations(rest)
    if namespace.model_path is None:
        raise UsageError("--model-path is missing: give the model's folder or hub id")
    given = vars(namespace)
    refusable = {field: given[field] for field in (refusal.field for refusal in ALL) if given[field] is not None}
    read = {field.name: given[field.name] for field in fields(ServerOptions) if field.name != "refusable"}
    options = ServerOptions(**read, refusable=refusable)
    _check_sizes(options)
    _check_address(options)
    return options


def variables(arguments: Sequence[str]) -> dict[str, str]:
    """The variables that a server with these arguments needs and the user has not set.

    On the CPU SGLang's kernels are chosen by a variable, not by ``--device``: without it SGLang ends at ``import vllm``.

    Example:
        >>> variables(["--model-path", "m", "--device", "cuda"])
        {}
    """
    found = argparse.Namespace(device=None)
    with suppress(KVTunerError):  # the server will say what is wrong with its options
        found, _ = parse_flags([*_config_file(arguments), *arguments], _add_device)
    return {CPU_ENGINE: "1"} if found.device == "cpu" and CPU_ENGINE not in os.environ else {}


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device")


def api_key(given: str | None, arguments: Sequence[str]) -> str | None:
    """The API key of a server: as given, or from the arguments of a server that is started.

    Raises:
        UsageError: if no HTTP header can carry it.
    """
    if given is None:
        with suppress(KVTunerError):  # the server will say what is wrong with its file
            arguments = [*_config_file(arguments), *arguments]
        found, _ = parse_flags(arguments, _add_key)
        given = found.api_key
    return check_key(given)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(API_KEY)


def _add_options(parser: argparse.ArgumentParser) -> None:
    # SGLang 0.5.14 declares neither --tp nor --dp, but takes them as abbreviations of --tp-size and --dp-size.
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--revision")
    parser.add_argument("--json-model-override-args")
    parser.add_argument("--context-length", type=int)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--tp-size", "--tensor-parallel-size", "--tp", type=int, default=1)
    parser.add_argument("--pp-size", "--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--dist-init-addr", "--nccl-init-addr")
    parser.add_argument("--attention-backend")
    parser.add_argument("--prefill-attention-backend")
    parser.add_argument("--decode-attention-backend")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--quantization")
    parser.add_argument("--speculative-algorithm")
    parser.add_argument("--mem-fraction-static", type=float)
    parser.add_argument("--max-total-tokens", type=_count)
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--disable-hybrid-swa-memory", action="store_true")
    parser.add_argument("--swa-full-tokens-ratio", type=float)
    parser.add_argument(CONFIG)
    for refusal in ALL:  # switches and options with a value alike
        parser.add_argument(refusal.option, *_ALIASES.get(refusal.field, ()), type=_value, nargs="?", const=True)


def _value(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _count(text: str) -> int:
    """A number of tokens as SGLang writes it: 1000, 25.6k, 1Mi."""
    match = _COUNT.fullmatch(text.strip())
    suffix = match[2] or "" if match else ""
    if match is None or ("." in match[1] and (not suffix or suffix.endswith("i"))):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens: write for example 100000, 25.6k or 1Mi")
    whole, _, decimals = match[1].partition(".")
    return int(whole + decimals) * _FACTORS[suffix] // int(10 ** len(decimals))


def _config_file(arguments: Sequence[str]) -> list[str]:
    """The options in SGLang's YAML file of options as arguments, or none."""
    if CONFIG not in arguments:
        return []
    index = list(arguments).index(CONFIG) + 1
    if index == len(arguments):
        raise UsageError(f"{CONFIG} names no file")
    import yaml

    path = Path(arguments[index])
    if list(arguments).count(CONFIG) > 1:
        raise UsageError(f"{CONFIG} is given twice: SGLang takes one file")
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(f"{path} is not a YAML file by its name: SGLang takes .yaml and .yml")
    try:
        content = yaml.safe_load(read_limited(path, "a YAML file of SGLang's options", _MAX_CONFIG)) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no mapping of options: write for example 'tp-size: 2'")
    found: list[str] = []
    own = {flag.dest for flag in FLAGS}
    for key, value in content.items():
        if str(key).replace("-", "_") in own:
            raise UsageError(f"{path} sets {key}: give kvtuner-search's own options on the command line")
        if value is False:  # a switch that is off; SGLang leaves it out too
            continue
        if value == []:  # as SGLang does
            continue
        value = json.dumps(value) if isinstance(value, dict) else value
        values = [] if value is True else value if isinstance(value, list) else [value]
        found += [f"--{key}", *map(str, values)]
    return found


def _check_abbreviations(rest: Sequence[str]) -> None:
    """Refuse abbreviations: SGLang completes unique prefixes, which is not possible here without the list of all its options."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_options(parser)
    known = [name for action in parser._actions for name in action.option_strings] + [flag.name for flag in FLAGS]
    for argument in rest:
        name = argument.partition("=")[0]
        meant = [full for full in known if len(name) > 2 and full.startswith(name)]
        if name.startswith("--") and meant:
            raise UsageError(f"{name} is an abbreviation: write {' or '.join(meant)}")
        if name.startswith(("--kvtuner-", "--enable-kvtuner-")):
            raise UsageError(f"there is no option {name}: see kvtuner-search serve --help")


def _check_sizes(options: ServerOptions) -> None:
    for name in ("tp_size", "pp_size", "nnodes", "page_size", "max_total_tokens", "context_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a positive number")
    if options.mem_fraction_static is not None and not 0 < options.mem_fraction_static < 1:
        raise UsageError(f"--mem-fraction-static {options.mem_fraction_static}: give a fraction between 0 and 1")
    if options.swa_full_tokens_ratio is not None and not 0 < options.swa_full_tokens_ratio <= 1:
        raise UsageError(f"--swa-full-tokens-ratio {options.swa_full_tokens_ratio}: give a fraction above 0, at most 1")
    if not 0 <= options.node_rank < options.nnodes:
        raise UsageError(
            f"--node-rank {options.node_rank} with --nnodes {options.nnodes}: give 0 to {options.nnodes - 1}"
        )
    if options.nnodes > 1 and options.dist_init_addr is None:
        raise UsageError(
            f"--nnodes {options.nnodes} needs --dist-init-addr: give node 0's HOST:PORT, the same on every node"
        )
    if options.tp_size * options.pp_size % options.nnodes:
        raise UsageError(
            f"{options.tp_size} x {options.pp_size} ranks do not divide among {options.nnodes} nodes: change --tp-size,"
            " --pp-size or --nnodes"
        )


def _check_address(options: ServerOptions) -> None:
    host = options.host
    if host is not None and (
        not host or not re.fullmatch(r"[\w.:%-]+", host) or host in ("None", "null", "true", "false")
    ):
        # An empty host binds to every interface, which the user did not request.
        raise UsageError(
            f"--host {host!r} is not an address: give 127.0.0.1 for this machine alone, 0.0.0.0 for every interface, or leave it out"
        )
    if not 1 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: give a number from 1 to 65535")


def node_ranks(options: ServerOptions) -> tuple[range, range]:
    """The pipeline stages and tensor-parallel ranks on this node, as SGLang assigns them."""
    stages = max(options.pp_size // options.nnodes, 1)
    nodes_per_stage = max(options.nnodes // options.pp_size, 1)
    ranks = options.tp_size // nodes_per_stage
    first_stage = stages * (options.node_rank // nodes_per_stage)
    first_rank = ranks * (options.node_rank % nodes_per_stage)
    return range(first_stage, first_stage + stages), range(first_rank, first_rank + ranks)
