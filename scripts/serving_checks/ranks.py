"""Several ranks against one: the same tokens, the bytes that the layout gives, the same bits in every row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving_checks import stored_rows
from serving_checks.greedy import ANSWERS, Offline, compare, mixed, prompts
from serving_checks.machine import Machine, count_gpus
from serving_checks.parts import Found, Measurement, Part, Task
from serving_checks.results import Record, check
from serving_checks.servers import Config, Server

from kvtuner_search.profile.canonical import load
from kvtuner_search.profile.schema import Profile
from kvtuner_search.serving.capacity import heads_per_rank, stage_bytes
from kvtuner_search.serving.sglang.partition import of_profile

PARTS = {"tp": (2, 1, 1), "pp": (1, 2, 1), "nodes": (1, 2, 2), "tp-pp": (2, 2, 1), "tp-pp-nodes": (2, 2, 2)}


def placed(tp: int, pp: int, gpus: int) -> tuple[int, ...]:
    """The GPU of each rank, stage by stage.

    Where ranks must share GPUs, those of a stage and those that hold the same heads in other stages are on different ones, which
    NCCL demands of the members of a group.
    """
    if tp * pp <= gpus:
        return tuple(range(tp * pp))
    return tuple((stage + rank) % gpus for stage in range(pp) for rank in range(tp))


def stored(server: Server, _seconds: float) -> dict[str, str]:
    """Folders with the rows of all prompts in one: of the model without sums over ranks, and of the model as it is."""
    model, folder = Path(server.config.model), Path(server.config.variables[stored_rows.FOLDER])
    prompt = [token for prompt in prompts() for token in prompt]
    models = {"exact": stored_rows.without_sums(model, folder.parent / "without-sums"), "whole": model}
    return {
        name: str(stored_rows.take(server, folder, server.config.ranks, prompt, one)) for name, one in models.items()
    }


STORED = Measurement("stored", stored)


def part_ranks(machine: Machine, offline: Offline, name: str) -> Part:
    """An arrangement of two or four ranks on one host, against one rank."""
    tp, pp, nodes = PARTS[name]
    gpus = placed(tp, pp, count_gpus()) if machine.device == "cuda" else ()
    single, config = mixed(machine), mixed(machine, name, tp, pp, nodes, gpus)

    def conclude(found: Found) -> list[Record]:
        mine, one = (found.get(c.name, {}) for c in (config, single))
        if not mine.get("answers") or not one.get("answers"):
            return []
        records = compare_answers(name, mine["answers"], one["answers"], offline.result())
        profile = load(machine.mixed_profile())
        records += compare_capacity(config, profile, name, mine["answers"], one["answers"])
        if mine.get("stored") and one.get("stored"):
            records += compare_rows(config, profile, name, mine["stored"], one["stored"])
        return records

    tasks = [Task(c, measurement) for c in (single, config) for measurement in (ANSWERS, STORED)]
    return Part(name, tasks, conclude)


def compare_answers(part: str, mine: dict[str, Any], single: dict[str, Any], reference: dict[str, Any]) -> list[Record]:
    """Greedy tokens."""
    return [
        compare(part, "against one GPU", mine["alone"], single["alone"], reference["tie"]),
        compare(part, "in a batch, against one GPU", mine["batch"], single["batch"], reference["tie"]),
        compare(part, "against offline", mine["alone"], reference, reference["tie"]),
    ]


def compare_capacity(
    config: Config, profile: Profile, part: str, mine: dict[str, Any], single: dict[str, Any]
) -> list[Record]:
    """Before the first request, every rank compared its own pool with the layout's bytes and its tokens with the others'."""
    model, layers = profile.model, profile.layer_specs()
    counts = of_profile(profile, config.tp, config.pp).counts
    stages = stage_bytes(layers, counts, heads_per_rank(model.num_kv_heads, config.tp), model.head_dim)
    (whole,) = stage_bytes(layers, [model.num_layers], model.num_kv_heads, model.head_dim)
    report, tokens = mine["kvtuner"], mine["tokens"]
    met = (
        report["tokens"] == tokens
        and report["pool_bytes"] == (tokens + mine["page"]) * report["bytes_per_token"]
        and report["bytes_per_token"] == stages[0].stored
    )
    text = f"{tokens:,} tokens, stages of {'+'.join(map(str, counts))} layers"
    predicted = whole.stored / max(stage.stored for stage in stages)
    return [
        check(part, "capacity of each rank", met, text, "bytes and tokens as the layout gives"),
        Record(
            part, "capacity over one GPU", f"{tokens / single['tokens']:.3f}x",
            wanted=f"{predicted:.3f}x by bytes of the heaviest stage, for a GPU a rank",
        ),
    ]  # fmt: skip


def compare_rows(
    config: Config, profile: Profile, part: str, mine: dict[str, str], single: dict[str, str]
) -> list[Record]:
    """All bits, but for the model's own rounding where two ranks add up what one product adds at once."""
    model, layers = profile.model, profile.layer_specs()
    records = []
    for name, title in (("exact", "stored rows without sums over ranks"), ("whole", "stored rows")):
        rows = [stored_rows.read(Path(folders[name]), layers, model.head_dim) for folders in (mine, single)]
        same = stored_rows.compare(rows[0], rows[1], model.num_layers, model.num_kv_heads)
        rounded = name == "whole" and config.tp > 1
        met = same.complete and same.equal[0] == 1.0 if rounded else same.all_equal
        text = f"layer 0 {same.equal.get(0, 0.0):.6f}, least of all layers {same.least:.6f} of bytes equal"
        records.append(
            check(part, f"{title}, against one GPU", met, text, "layer 0: all bits" if rounded else "all bits")
        )
    return records
