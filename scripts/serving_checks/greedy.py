"""Greedy tokens: the same whoever stores them in 16 bits, and the offline reference's for a mixed profile."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from serving_checks import stored_rows
from serving_checks.machine import ROOT, Machine
from serving_checks.parts import Found, Measurement, Part, Task
from serving_checks.results import Record, check
from serving_checks.servers import Config, Server

COUNT = 32  # tokens
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 2}
CHUNK = 64  # tokens of a chunk of a prompt
CONTEXT = 32768  # the reference model's positions are extended to this, for the stress test


def prompts(recalls: int = 7) -> list[list[int]]:
    """Token ids: free text, code, sums, and ``recalls`` lists of codes to be recalled, from 2 to about 180 tokens."""
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
    for seed in range(recalls):
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
        # Imported here, before the worker and the caller do it at once, which transformers does not bear.
        sys.path.append(str(ROOT / "tests" / "serving"))
        import offline_packed  # noqa: F401

        self._future: Future[dict[str, Any]] = self._worker.submit(self._compute, profile, dtype, exact)

    def result(self) -> dict[str, Any]:
        """``tokens`` and ``margins`` of each prompt, and ``tie``: how far, in logits, rounding moves 95 of 100 margins at most."""
        return self._future.result()

    @staticmethod
    def _compute(profile: Path, dtype: str, exact: str) -> dict[str, Any]:
        import torch
        from offline_packed import OfflinePacked

        reference = OfflinePacked(profile, getattr(torch, dtype))
        found = [reference.greedy(prompt, COUNT) for prompt in prompts()]
        if exact == "packed":
            reference = OfflinePacked(profile, torch.float32)
            other = [reference.greedy(prompt, COUNT) for prompt in prompts()]
        else:
            other = plain_greedy()
        moved = [change for pair in zip(found, other, strict=True) for change in noise(*pair)]
        return {
            "tokens": [one.tokens for one in found],
            "margins": [one.margins for one in found],
            "tie": max(0.01, float(np.quantile(moved, 0.95))),
        }


def plain_greedy() -> list[Any]:
    """Greedy tokens and margins of the model in fp32, without a cache."""
    import torch
    from offline_packed import Greedy
    from transformers import AutoModelForCausalLM

    from kvtuner_search.models.reference_model import reference_model_path

    model: Any = AutoModelForCausalLM.from_pretrained(reference_model_path(), dtype=torch.float32)
    model.eval()
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


def noise(one: Any, other: Any) -> list[float]:
    """How far two arithmetics' margins between the two best tokens differ, as long as they agree on the tokens."""
    found = []
    for a, b, x, y in zip(one.tokens, other.tokens, one.margins, other.margins, strict=True):
        found.append(abs(x - y) if a == b else x + y)
        if a != b:
            break
    return found


def compare(part: str, name: str, found: dict[str, Any], expected: dict[str, Any], tie: float) -> Record:
    """Equal tokens, but for ties: where the two best tokens of the expected answer are closer than rounding moves them."""
    ties: list[str] = []
    wrong: list[str] = []
    pairs = zip(found["tokens"], expected["tokens"], expected["margins"], strict=True)
    for index, (mine, other, margins) in enumerate(pairs):
        position = next((at for at, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        if position is not None:
            margin = margins[position]
            (ties if margin <= tie else wrong).append(f"prompt {index} at {position} (margin {margin:.3f})")
    value = f"{len(found['tokens']) - len(ties) - len(wrong)} of {len(found['tokens'])} equal"
    value += f"; ties: {', '.join(ties)}" if ties else ""
    value += f"; differ: {', '.join(wrong)}" if wrong else ""
    return check(part, name, not wrong, value, f"equal, but for margins up to {tie:.3f} logits")


def configs(machine: Machine) -> dict[str, Config]:
    """The servers of one rank of the reference model by short name."""
    memory = (*machine.small(), "--attention-backend", machine.own_backend)
    plain = (*memory, "--dtype", "float16")
    return {
        "stock": Config("reference-stock", machine.reference(), plain),
        "raw": Config("reference-16bit", machine.reference(), plain, machine.raw_profile()),
        "mixed": mixed(machine),
    }


def mixed(
    machine: Machine, name: str = "one", tp: int = 1, pp: int = 1, nodes: int = 1, gpus: tuple[int, ...] = ()
) -> Config:
    """A server of the reference model with the mixed profile; its ranks can write what they stored."""
    dtype = "float32" if machine.device == "cpu" else "float16"
    arguments = (
        *machine.small(), "--attention-backend", machine.own_backend, "--dtype", dtype, "--enable-cache-report",
        "--chunked-prefill-size", str(CHUNK), "--kvtuner-as-stored",
    )  # fmt: skip
    rows = machine.folder / f"rows-{name}"
    rows.mkdir(exist_ok=True)
    variables = {stored_rows.FOLDER: str(rows), stored_rows.TOKENS: str(sum(map(len, prompts())))}
    if machine.device == "cpu":
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = "0-1" if tp == 1 else "0|1"
    title = "reference-mixed" if name == "one" else f"reference-mixed-{name}"
    return Config(title, machine.reference(), arguments, machine.mixed_profile(), tp, pp, nodes, gpus, variables)


def answers(server: Server, _seconds: float) -> dict[str, Any]:
    """Every prompt alone, again (from the prefix cache), and all in one batch."""
    asked = prompts()
    server.flush()
    alone = [server.generate(prompt, COUNT, **LOGPROBS) for prompt in asked]
    again = [server.generate(prompt, COUNT, **LOGPROBS) for prompt in asked]
    server.flush()
    batch = server.generate(asked, COUNT, **LOGPROBS)
    info = server.info()
    return {
        "alone": tokens_and_margins(alone),
        "again": tokens_and_margins(again),
        "batch": tokens_and_margins(batch),
        "cached": [one["meta_info"].get("cached_tokens", 0) for one in again],
        "chunk": max(map(int, re.findall(r"Prefill batch.*?#new-token: (\d+)", server.log()))),
        "graphs": "cuda graph: True" in server.log(),
        "kvtuner": info.get("kvtuner"),
        "tokens": info["max_total_num_tokens"],
        "page": info["page_size"],
        "startup": server.startup,
    }


ANSWERS = Measurement("answers", answers)


def tokens_and_margins(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each answer, and how far its tokens were ahead of the second best, in logits."""
    best = [[position[:2] for position in one["meta_info"]["output_top_logprobs"]] for one in found]
    return {
        "tokens": [one["output_ids"] for one in found],
        "margins": [[first[0] - second[0] for first, second in one] for one in best],
    }


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
                compare(part, f"16 bits everywhere, against {name}", raw["alone"], other, raw_reference["tie"])
                for name, other in (("stock SGLang", stock["alone"]), ("offline", raw_reference))
            ]
        mixed = found.get(known["mixed"].name, {}).get("answers")
        if mixed:
            names = {
                "alone": f"mixed profile in chunks of {CHUNK}", "again": "mixed profile, prefix cached",
                "batch": "mixed profile, all in one batch",
            }  # fmt: skip
            records += [
                compare(part, f"{text}, against offline", mixed[key], reference, reference["tie"])
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
                alone, other = exact["alone"]["tokens"], exact[key]["tokens"]
                count, equal = len(alone), sum(a == b for a, b in zip(alone, other, strict=True))
                records.append(
                    check(
                        part,
                        f"deterministic mode: alone and {text}",
                        equal == count,
                        f"{equal} of {count} equal",
                        "all",
                    )
                )
            records.append(
                compare(part, "deterministic mode, against offline", exact["alone"], reference, reference["tie"])
            )
        return records

    used = [known["stock"], known["raw"], known["mixed"], deterministic]
    return Part("greedy", [Task(config, ANSWERS) for config in used], conclude)
