"""SGLang as :class:`kvtuner_search.serving.engine.Engine` describes an engine. Neither torch nor SGLang is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kvtuner_search.serving.sglang import launch, partition
from kvtuner_search.serving.sglang.arguments import api_key, variables
from kvtuner_search.serving.sglang.flags import AS_STORED, FLAGS, PROFILE
from kvtuner_search.serving.sglang.launch import INSTALL, command, prepare, server_arguments, start
from kvtuner_search.serving.sglang.model import served_config, served_model
from kvtuner_search.serving.sglang.plan import ServePlan
from kvtuner_search.serving.sglang.plan import to_json as plan_json
from kvtuner_search.serving.sglang.plan import to_text as plan_text

if TYPE_CHECKING:
    from kvtuner_search.serving.engine import Engine
    from kvtuner_search.serving.sglang import engine

    _: Engine = engine  # this module is one

__all__ = [
    "AS_STORED", "EXAMPLES", "FLAGS", "INSTALL", "NAME", "PROFILE", "TITLE", "api_key", "check_installation", "command", "plan_json",
    "plan_text", "prepare", "served_config", "served_model", "server_arguments", "stage_layers", "start", "variables",
]  # fmt: skip

NAME: Final = "sglang"
TITLE: Final = "SGLang"
EXAMPLES: Final = (
    ("--model-path PATH", "The model's folder or hub id; required."),
    ("--tp-size, --pp-size N", "Tensor- and pipeline-parallel ranks. Stages are balanced by bytes."),
    ("--nnodes, --node-rank, --dist-init-addr", "Several nodes: the same command on each, with its own rank."),
    ("--mem-fraction-static F", "Memory for weights and cache; the predicted capacity follows it."),
    ("--host, --port", "Where to listen.  [default: 127.0.0.1, 30000]"),
)


def check_installation(plan: ServePlan) -> None:
    """See :meth:`kvtuner_search.serving.engine.Engine.check_installation`."""
    launch.check_installation(plan.sglang)


def stage_layers(
    layer_bytes: Sequence[int], stages: int, environment: Mapping[str, str] = os.environ
) -> tuple[int, ...]:
    """See :meth:`kvtuner_search.serving.engine.Engine.stage_layers`."""
    return partition.choose(layer_bytes, stages, environment).counts
