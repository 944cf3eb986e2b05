"""Greedy tokens: the same whoever stores them in 16 bits, the offline reference's for a mixed profile, on any arrangement of GPUs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from serving_checks import stored_rows
from serving_checks.machine import ROOT, Machine
from serving_checks.parts import Found, Measurement, Part, Task
from serving_checks.results import Record, check
from serving_checks.servers import Config, Server

from kvtuner_search.profile.canonical import load
from kvtuner_search.serving.capacity import heads_per_rank, stage_bytes
from kvtuner_search.serving.partition import of_profile

COUNT = 32  # tokens
CHUNK = 64  # tokens of a chunk of a prompt
CONTEXT = 32768  # the reference model's positions are extended to this, for the stress test


def prompts() -> list[list[int]]:
    """Token ids: free text, code, sums, and codes to be recalled, from 2 to about 180 tokens."""
    from transformers import AutoTokenizer

    from kvtuner_search.data.tasks import recall, stream
    from kvtuner_search.models.reference_model import reference_model_path

    tokenizer = AutoTokenizer.from_pretrained(reference_model_path())
    texts = [
        "Once upon a time",
        "The quick brown fox",
        "import os\n\ndef main(",
        "The language reference describes",
        "Question: What is 12 + 30?\nAnswer: ",
    ]
    for seed in range(7):
        document = recall(stream("recall", "test", seed), pairs=10)
        texts.append(document.text[: document.answers[0][0]])
    return [list(tokenizer(text)["input_ids"]) for text in texts]


class Offline:
    """What the offline packed reference makes of the prompts, computed on the CPU while servers start.

    Args:
        profile: of the reference model.
        dtype: of the model, as it is served.
        exact: what the margins' rounding is measured against: ``packed`` is the same reference in fp32; ``plain`` is the model
            without a profile in fp32, for a profile that stores 16 bits, which fp32 keys do not fit.
    """

    _worker = ThreadPoolExecutor(1)  # one at a time: transformers knows one packed reference

    def __init__(self, profile: Path, dtype: str, exact: Literal["packed", "plain"]) -> None:
        self._future: Future[dict[str, Any]] = self._worker.submit(self._compute, profile, dtype, exact)

    def result(self) -> dict[str, Any]:
        """``tokens`` and ``margins`` of each prompt, and ``tie``: the margin, in logits, within which arithmetic decides."""
        return self._future.result()

    @staticmethod
    def _compute(profile: Path, dtype: str, exact: str) -> dict[str, Any]:
        import torch

        sys.path.append(str(ROOT / "tests" / "serving"))
        from offline_packed import OfflinePacked

        reference = OfflinePacked(profile, getattr(torch, dtype))
        found = [reference.greedy(prompt, COUNT) for prompt in prompts()]
        if exact == "packed":
            reference = OfflinePacked(profile, torch.float32)
            other = [reference.greedy(prompt, COUNT) for prompt in prompts()]
        else:
            other = plain_greedy()
        return {
            "tokens": [one.tokens for one in found],
            "margins": [one.margins for one in found],
            "tie": max([0.01, *(noise(a, b) for a, b in zip(found, other, strict=True))]),
        }


def plain_greedy() -> list[Any]:
    """Greedy tokens and margins of the model in fp32, without a cache."""
    import torch
    from offline_packed import Greedy
    from transformers import AutoModelForCausalLM

    from kvtuner_search.models.reference_model import reference_model_path

    model: Any = AutoModelForCausalLM.from_pretrained(reference_model_path(), dtype=torch.float32).eval()
    found = []
    for prompt in prompts():
        greedy = Greedy([], [])
        for _ in range(COUNT):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([[*prompt, *greedy.tokens]]), use_cache=False).logits[0, -1]
            best = logits.topk(2)
            greedy.tokens.append(int(best.indices[0]))
            greedy.margins.append(float(best.values[0] - best.values[1]))
        found.append(greedy)
    return found


def noise(one: Any, other: Any) -> float:
    """How far two arithmetics' margins between the two best tokens differ, as long as they agree on the tokens."""
    worst = 0.0
    for a, b, x, y in zip(one.tokens, other.tokens, one.margins, other.margins, strict=True):
        worst = max(worst, abs(x - y) if a == b else x + y)
        if a != b:
            break
    return worst


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two answers differ; None if they are equal."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def compare(
    part: str, name: str, found: Sequence[Sequence[int]], offline: dict[str, Any], expected: Sequence[Sequence[int]]
) -> Record:
    """Equal, but for ties: where the two best tokens of the offline reference are closer than its own rounding moves them."""
    ties: list[str] = []
    wrong: list[str] = []
    for index, (mine, other) in enumerate(zip(found, expected, strict=True)):
        position = first_difference(mine, other)
        if position is None:
            continue
        # The margin is known as long as the answer is the offline reference's.
        known = first_difference(other, offline["tokens"][index])
        margin = offline["margins"][index][position] if known is None or known >= position else None
        text = f"prompt {index} at {position}" + ("" if margin is None else f" (margin {margin:.3f})")
        (ties if margin is not None and margin <= offline["tie"] else wrong).append(text)
    equal = len(found) - len(ties) - len(wrong)
    value = f"{equal} of {len(found)} equal"
    value += f"; ties: {', '.join(ties)}" if ties else ""
    value += f"; differ: {', '.join(wrong)}" if wrong else ""
    return check(part, name, not wrong, value, f"equal, but for margins up to {offline['tie']:.3f} logits")


def configs(machine: Machine) -> dict[str, Config]:
    """The servers of the reference model by short name."""
    model, backend = machine.reference(), machine.own_backend
    memory = (*machine.small(), "--attention-backend", backend)
    dtype = "float32" if machine.device == "cpu" else "float16"
    chunks = ("--chunked-prefill-size", str(CHUNK), "--kvtuner-as-stored")
    mixed = (*memory, "--dtype", dtype, "--enable-cache-report", *chunks)
    bind = {"SGLANG_CPU_OMP_THREADS_BIND": "0-1"} if machine.device == "cpu" else {}
    bind_tp = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if machine.device == "cpu" else {}
    raw, profile = machine.raw_profile(), machine.mixed_profile()
    for name in ("one", "tp", "pp", "nodes"):
        (machine.folder / f"rows-{name}").mkdir(exist_ok=True)

    def rows(name: str) -> dict[str, str]:
        count = sum(len(prompt) for prompt in prompts())
        return {stored_rows.FOLDER: str(machine.folder / f"rows-{name}"), stored_rows.TOKENS: str(count)}

    return {
        "stock": Config("reference-stock", model, (*memory, "--dtype", "float16")),
        "raw": Config("reference-16bit", model, (*memory, "--dtype", "float16"), raw),
        "mixed": Config("reference-mixed", model, mixed, profile, variables=bind | rows("one")),
        "tp": Config("reference-mixed-tp2", model, mixed, profile, tp=2, variables=bind_tp | rows("tp")),
        "pp": Config("reference-mixed-pp2", model, mixed, profile, pp=2, variables=bind | rows("pp")),
        "nodes": Config("reference-mixed-nodes2", model, mixed, profile, pp=2, nodes=2, variables=bind | rows("nodes")),
    }


def answers(server: Server, _seconds: float) -> dict[str, Any]:
    """Every prompt alone, again (from the prefix cache), and all in one batch."""
    asked = prompts()
    server.flush()
    alone = [server.generate(prompt, COUNT) for prompt in asked]
    again = [server.generate(prompt, COUNT) for prompt in asked]
    server.flush()
    batch = server.generate(asked, COUNT)
    info = server.info()
    return {
        "alone": [one["output_ids"] for one in alone],
        "again": [one["output_ids"] for one in again],
        "batch": [one["output_ids"] for one in batch],
        "cached": [one["meta_info"].get("cached_tokens", 0) for one in again],
        "chunk": max(map(int, re.findall(r"Prefill batch.*?#new-token: (\d+)", server.log()))),
        "graphs": "cuda graph: True" in server.log(),
        "kvtuner": info.get("kvtuner"),
        "tokens": info["max_total_num_tokens"],
        "page": info["page_size"],
        "startup": server.startup,
    }


ANSWERS = Measurement("answers", answers)


def stored(server: Server, _seconds: float) -> str:
    """The folder with the rows of all prompts in one: then its tokens have the first slots, whatever is decoded after it."""
    server.flush()
    server.generate([token for prompt in prompts() for token in prompt], 1)
    server.info()
    folder = server.config.variables[stored_rows.FOLDER]
    stored_rows.wait(Path(folder), server.config.gpus)
    return folder


STORED = Measurement("stored", stored)


def part_greedy(machine: Machine, offline: dict[str, Offline], deterministic: Config) -> Part:
    """One GPU."""
    known = configs(machine)

    def conclude(found: Found) -> list[Record]:
        reference, part = offline["mixed"].result(), "greedy"
        records = []
        stock, raw = (found.get(known[name].name, {}).get("answers") for name in ("stock", "raw"))
        if stock and raw:
            raw_reference = offline["raw"].result()
            records = [
                compare(part, "16 bits everywhere, against stock SGLang", raw["alone"], raw_reference, stock["alone"]),
                compare(
                    part, "16 bits everywhere, against offline", raw["alone"], raw_reference, raw_reference["tokens"]
                ),
            ]
        mixed = found.get(known["mixed"].name, {}).get("answers")
        if mixed:
            names = {
                "alone": f"mixed profile in chunks of {CHUNK}", "again": "mixed profile, prefix cached",
                "batch": "mixed profile, all in one batch",
            }  # fmt: skip
            records += [
                compare(part, f"{text}, against offline", mixed[key], reference, reference["tokens"])
                for key, text in names.items()
            ]
            hits = sum(map(bool, mixed["cached"]))
            records.append(
                check(
                    part,
                    "prefix-cache hits",
                    hits >= len(mixed["cached"]) // 2,
                    str(hits),
                    "half of the repeats, or more",
                )
            )
            whole = f"at most {CHUNK} of up to {max(map(len, prompts()))} tokens"
            records.append(check(part, "prompts in chunks", mixed["chunk"] <= CHUNK, f"{mixed['chunk']} tokens", whole))
            if machine.device == "cuda":
                records.append(check(part, "CUDA graphs", mixed["graphs"], str(mixed["graphs"]), "used"))
        exact = found.get(deterministic.name, {}).get("answers")
        if exact:
            for key, text in (("batch", "in a batch"), ("again", "with its prefix cached")):
                differ = [i for i, (a, b) in enumerate(zip(exact["alone"], exact[key], strict=True)) if a != b]
                count = len(exact["alone"])
                records.append(
                    check(
                        part,
                        f"deterministic mode: alone and {text}",
                        not differ,
                        f"{count - len(differ)} of {count} equal",
                        "all",
                    )
                )
            records.append(
                compare(part, "deterministic mode, against offline", exact["alone"], reference, reference["tokens"])
            )
        return records

    used = [known["stock"], known["raw"], known["mixed"], deterministic]
    return Part("greedy", [Task(config, ANSWERS) for config in used], conclude)


def part_ranks(machine: Machine, offline: dict[str, Offline], name: str) -> Part:
    """Two GPUs: ``tp``, ``pp``, or two ``nodes`` on one host, against one GPU."""
    known = configs(machine)
    config = known[name]

    def conclude(found: Found) -> list[Record]:
        mine, single = (found.get(c.name, {}).get("answers") for c in (config, known["mixed"]))
        if not mine or not single:
            return []
        reference = offline["mixed"].result()
        records = [
            compare(name, "against one GPU", mine["alone"], reference, single["alone"]),
            compare(name, "in a batch, against one GPU", mine["batch"], reference, single["batch"]),
            compare(name, "against offline", mine["alone"], reference, reference["tokens"]),
        ]
        profile = load(machine.mixed_profile())
        counts = of_profile(profile, config.tp, config.pp).counts
        heads = heads_per_rank(profile.model.num_kv_heads, config.tp)
        heaviest = max(
            stage.stored for stage in stage_bytes(profile.layer_specs(), counts, heads, profile.model.head_dim)
        )
        whole = stage_bytes(
            profile.layer_specs(), [profile.model.num_layers], profile.model.num_kv_heads, profile.model.head_dim
        )
        report = mine["kvtuner"]
        # Before the first request, every rank compared its own pool with the layout's bytes and its tokens with the others'.
        records.append(
            check(name, "capacity of each rank",
                  report["tokens"] == mine["tokens"] and report["pool_bytes"] == (mine["tokens"] + mine["page"]) * report["bytes_per_token"],
                  f"{mine['tokens']:,} tokens, stages of {'+'.join(map(str, counts))} layers", "bytes and tokens as the layout gives")
        )  # fmt: skip
        ratio, predicted = mine["tokens"] / single["tokens"], whole[0].stored / heaviest
        records.append(
            Record(
                name,
                "capacity over one GPU",
                f"{ratio:.3f}x",
                wanted=f"{predicted:.3f}x by bytes of the heaviest stage",
            )
        )
        folders = [found[c.name].get("stored") for c in (config, known["mixed"])]
        if all(folders):
            model, specs = profile.model, profile.layer_specs()
            rows = [stored_rows.read(Path(folder), specs, model.head_dim) for folder in folders]
            same = stored_rows.compare(*rows, model.num_layers, model.num_kv_heads)
            if name == "tp":
                # Two ranks add what one product adds at once, so from the second layer on the model's own rounding differs.
                met, wanted = same.complete and same.equal[0] == 1.0, "layer 0: all bits"
            else:
                met, wanted = same.all_equal, "all bits"
            text = f"layer 0 {same.equal.get(0, 0.0):.6f}, least of all layers {same.least:.6f} of bytes equal"
            records.append(check(name, "stored rows, against one GPU", met, text, wanted))
        return records

    tasks = [Task(c, measurement) for c in (known["mixed"], config) for measurement in (ANSWERS, STORED)]
    return Part(name, tasks, conclude)
