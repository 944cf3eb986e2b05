"""The parts of scripts/check_serving that need neither a server nor a GPU; what they import stands in SGLang's environment."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "scripts"))

from serving_checks import decode, greedy, plugin, ranks, servers, stored_rows, stress  # noqa: E402
from serving_checks.load import Outcome, Request, judge  # noqa: E402
from serving_checks.machine import GROUP, Machine, write_entry_point  # noqa: E402
from serving_checks.parts import Measurement, Part, Task, gather  # noqa: E402
from serving_checks.results import Run, at_least, at_most, check, failed  # noqa: E402
from serving_checks.servers import Config, Server  # noqa: E402
from serving_checks.speed import Sizes, Speed  # noqa: E402

from kvtuner_kernels.layout import LayerSpec  # noqa: E402
from kvtuner_kernels.reference import Centres, pack_rows  # noqa: E402
from kvtuner_kernels.warm_up import example_centres  # noqa: E402
from kvtuner_search.models.reference_model import reference_model_path  # noqa: E402
from kvtuner_search.serving.sglang.model import served_model  # noqa: E402


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine("cuda", tmp_path)


def test_a_checkout_is_found_as_a_plugin(tmp_path: Path) -> None:
    (found,) = metadata.distributions(path=[str(write_entry_point(tmp_path))])
    (point,) = [point for point in found.entry_points if point.group == GROUP]
    assert (found.name, point.name) == ("kvtuner-search", "kvtuner")
    assert point.value == "kvtuner_search.serving.sglang.plugin:register"


def test_the_made_up_model_is_the_one_of_the_profiles(machine: Machine) -> None:
    from kvtuner_search.profile.canonical import load
    from kvtuner_search.profile.checks import check_model

    subject = machine.subject(0.5, 4096, labels=["B4", "B3"])
    bits = {}
    for label, profile in subject.profiles.items():
        check_model(load(profile), served_model(subject.model), subject.model)
        bits[label] = load(profile).storage.effective_bits
    assert bits == {"K8V8": 8.25, "K4V4": 4.25, "K4V2": 3.25, "B4": 4.0, "B3": 3.0}


def test_a_failed_check_counts_and_a_missed_target_does_not(tmp_path: Path) -> None:
    records = [at_least("p", "a", 1.0, 2.0), at_most("p", "b", 3.0, 2.0), check("p", "c", False, "x", "y")]
    assert [record.met for record in records] == [False, False, False]
    assert [record.name for record in failed(records)] == ["c"]


def test_runs_are_added_to_the_file_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    for number in range(2):
        run = Run(path, {"number": number})
        run.note("server", "capacity", 5)
        run.add([check("p", "c", True, "x", "y")])
    runs = json.loads(path.read_text())["runs"]
    assert [run["number"] for run in runs] == [0, 1]
    assert runs[1]["measured"] == {"server": {"capacity": 5}}
    assert runs[1]["records"][0]["name"] == "c"


def test_a_server_is_started_once_for_all_its_parts() -> None:
    one, two = Config("one", "m"), Config("two", "m")
    same, other = Measurement("same", lambda *_: 1), Measurement("other", lambda *_: 2)
    parts = [
        Part("a", [Task(one, same), Task(two, same)], lambda _: []),
        Part("b", [Task(one, same), Task(one, other)], lambda _: []),
    ]
    plan = gather(parts)
    assert [(config.name, [m.name for _, m in tasks]) for config, tasks in plan.items()] == [
        ("one", ["same", "other"]),
        ("two", ["same"]),
    ]


REQUEST = Request((1, 2, 3), 2)
WHOLE = {
    "output_ids": [7, 8],
    "meta_info": {"prompt_tokens": 3, "completion_tokens": 2, "finish_reason": {"type": "length"}, "cached_tokens": 1},
}


def test_a_whole_answer_counts() -> None:
    assert judge(REQUEST, WHOLE, 1.5, 0.5) == Outcome((7, 8), 1.5, 0.5, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"output_ids": [7]},
        {"output_ids": []},
        {"meta_info": {**WHOLE["meta_info"], "prompt_tokens": 2}},  # type: ignore[dict-item]
        {"meta_info": {**WHOLE["meta_info"], "finish_reason": {"type": "abort"}}},  # type: ignore[dict-item]
        {"meta_info": {**WHOLE["meta_info"], "completion_tokens": 3}},  # type: ignore[dict-item]
        {"meta_info": None},
    ],
)
def test_any_other_answer_is_an_error(change: dict[str, Any]) -> None:
    outcome = judge(REQUEST, {**WHOLE, **change}, 1.0, None)
    assert outcome.error
    assert not outcome.tokens


EXPECTED = {"tokens": [[1, 2, 3], [4, 5, 6]], "margins": [[1.0, 0.02, 1.0], [1.0, 1.0, 1.0]]}


@pytest.mark.parametrize(
    ("found", "met"),
    [
        ([[1, 2, 3], [4, 5, 6]], True),
        ([[1, 9, 9], [4, 5, 6]], True),  # a tie, and what follows from it
        ([[1, 2, 9], [4, 5, 6]], False),
        ([[1, 2, 3], [9, 5, 6]], False),
    ],
)
def test_only_ties_may_differ(found: list[list[int]], met: bool) -> None:
    assert greedy.compare("p", "n", {"tokens": found}, EXPECTED, 0.05).met is met


def test_margins_are_read_from_the_servers_answer() -> None:
    top = [[[-0.5, 7, None], [-2.0, 3, None]], [[-0.1, 8, None], [-0.4, 9, None]]]
    found = greedy.tokens_and_margins([{"output_ids": [7, 8], "meta_info": {"output_top_logprobs": top}}])
    assert found == {"tokens": [[7, 8]], "margins": [pytest.approx([1.5, 0.3])]}


def test_noise_ends_where_the_answers_part() -> None:
    class Answer:
        def __init__(self, tokens: list[int], margins: list[float]) -> None:
            self.tokens, self.margins = tokens, margins

    one = Answer([1, 2, 3], [0.5, 0.1, 9.0])
    assert greedy.noise(one, Answer([1, 2, 3], [0.4, 0.1, 9.0])) == pytest.approx([0.1, 0, 0])
    assert greedy.noise(one, Answer([1, 7, 3], [0.4, 0.2, 0.0])) == pytest.approx([0.1, 0.3])


def test_mixed_requests_are_what_they_are_said_to_be() -> None:
    sizes = stress.Sizes(requests=2000, longest=4096, output=64, pool=8192)
    requests = stress.mixed_requests(sizes, 8000)
    lengths = [len(request.prompt) for request in requests]
    assert (min(lengths), max(lengths) <= 4096, max(lengths) > 3500) == (1, True, True)
    assert all(1 <= request.output <= 64 for request in requests)
    assert 50 < sum(request.abort_after is not None for request in requests) < 150
    starts = [request.prompt[:16] for request in requests if len(request.prompt) >= 16]
    assert max(map(starts.count, set(starts))) > 20
    burst = requests[1000 : 1000 + stress.CONCURRENCY]
    prompts, answers = (sum(counts) for counts in ([len(r.prompt) for r in burst], [r.output for r in burst]))
    assert prompts < sizes.pool < prompts + answers
    chosen = stress.sampled(requests, 100)
    assert len(set(chosen)) == 100
    assert all(requests[index].abort_after is None for index in chosen)
    assert requests == stress.mixed_requests(sizes, 8000)


def test_agreement_counts_answers_and_tokens() -> None:
    one, other = (
        [Outcome((1, 2)), Outcome((3, 4)), Outcome(cut=True)],
        [Outcome((1, 2)), Outcome((3, 5)), Outcome((1,))],
    )
    assert stress.agreement(one, other) == {"compared": 2, "equal": 1, "tokens": 0.75}


def test_retractions_are_counted_from_the_log() -> None:
    line = "KV cache pool is full. Retract requests. #retracted_reqs: 3, #new_tokens_gained: 40\n"
    assert (stress.retractions(f"x\n{line}y\n{line}"), stress.retractions("nothing")) == (6, 0)


def decode_figures(rate: float, capacity: int) -> dict[str, Any]:
    allocated, shuffled = (
        [
            {"batch": size, "context": 100, "seconds": size / each, "tokens_per_second": each, "graph": True}
            for size in (2, 4)
        ]
        for each in (rate, rate / 2)
    )
    return {
        "copy_bytes_per_second": 1e3, "weight_bytes": 100, "bytes_per_token": 2, "capacity": capacity,
        "batches": allocated, "shuffled": shuffled,
    }  # fmt: skip


def test_decode_is_compared_with_the_faster_backend() -> None:
    found = {"bf16 a": decode_figures(10, 100), "bf16 b": decode_figures(20, 100), "K4V4": decode_figures(40, 370)}
    records = {record.name: record for record in decode.conclude(found, "K4V4", graphs=True)}
    few, full = (records[f"K4V4 over bf16, {which}, slots as allocated"] for which in ("2 requests", "as many as fit"))
    assert (few.value, few.met, full.met) == ("2.000x", True, False)
    assert records["K4V4 over bf16, 2 requests, slots shuffled"].kind == "figure"
    assert records["K4V4: capacity over bf16"].value == "3.700x"
    assert decode.floor_seconds(found["K4V4"], 2, 100) == pytest.approx((100 + 2 * 100 * 2) / 1e3)


def test_capacity_is_judged_by_effective_bits(machine: Machine) -> None:
    part = Speed(machine, machine.subject(0.5, 4096), ["triton", "flashinfer"], Sizes()).part("capacity")
    names = [task.config.name for task in part.tasks]
    assert names == ["bf16-triton", "bf16-flashinfer", "K4V4"]
    for tokens, met in ((3760, True), (3700, False)):
        found = {names[0]: {"capacity": 1000}, names[1]: {"capacity": 990}, names[2]: {"capacity": tokens}}
        assert part.conclude(found)[-1].met is met
    assert part.conclude({names[2]: {"capacity": 5}}) == []  # without a baseline there is nothing to say


@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
def test_ranks_of_a_group_are_on_different_gpus(gpus: int) -> None:
    for tp, pp, _ in ranks.PARTS.values():
        found = ranks.placed(tp, pp, gpus)
        assert set(found) <= set(range(gpus))
        assert len(set(found)) == min(gpus, tp * pp)
        stages = [found[stage * tp : (stage + 1) * tp] for stage in range(pp)]
        assert all(len(set(group)) == len(group) for group in [*stages, *zip(*stages, strict=True)])
    assert ranks.placed(2, 2, 2) == (0, 1, 1, 0)


def test_each_node_knows_the_gpus_of_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(servers.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    for nodes in (1, 2):
        Server(Config("c", "m", tp=2, pp=2, nodes=nodes, gpus=(0, 1, 1, 0)), [], {}, tmp_path)
    Server(Config("c", "m"), [], {}, tmp_path)
    assert [env.get(plugin.GPUS) for env in started] == ["0,1,1,0", "0,1", "1,0", None]
    monkeypatch.setenv(plugin.GPUS, "1,0")
    with plugin._placed(None, 0) as gpu:
        assert gpu == 1


def test_without_sums_only_the_output_projections_are_zero(tmp_path: Path) -> None:
    model = reference_model_path()
    copy = stored_rows.without_sums(model, tmp_path / "copy")
    assert {file.name for file in copy.iterdir()} == {file.name for file in model.iterdir()}
    changed = set()
    for file in model.glob("*.safetensors"):
        before, after = load_file(file), load_file(copy / file.name)
        assert list(before) == list(after)
        for name in before:
            if not before[name].equal(after[name]):
                assert not after[name].any()
                changed.add(name.split(".", 3)[3])
    assert changed == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_rows_that_are_missing_or_differ_are_found(tmp_path: Path) -> None:
    layers, dim = [LayerSpec(), LayerSpec()], 4
    one, two = (np.arange(3 * heads * 4 * dim, dtype=np.uint8).reshape(3, -1) for heads in (1, 2))
    for first, heads in ((0, slice(0, 1)), (0, slice(1, 2)), (1, slice(0, 2))):
        stored_rows.write(tmp_path, first, heads, {str(first): two if first else one})
    rows = stored_rows.read(tmp_path, layers, dim)
    assert set(rows) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(part.shape == (3, 4 * dim) for part in rows.values())
    assert stored_rows.compare(rows, rows, 2, 2).all_equal
    other = rows | {(1, 1): rows[1, 1] ^ 1}
    same = stored_rows.compare(rows, other, 2, 2)
    assert (same.complete, same.all_equal, same.equal) == (True, False, {0: 1.0, 1: 0.5})
    missing = {key: part for key, part in rows.items() if key != (0, 1)}
    assert not stored_rows.compare(rows, missing, 2, 2).all_equal


@pytest.mark.parametrize("text", ["b65443322/b54433221", "b83322211/8-g32-asym", "16/b44332200"])
def test_a_heads_bytes_are_the_same_however_many_heads_a_rank_has(tmp_path: Path, text: str) -> None:
    """Also where keys and values share words."""
    spec, dim, heads = LayerSpec.parse(text), 64, 3
    centres = example_centres(spec, heads, dim, torch.device("cpu"))
    key, value = torch.randn(2, 5, heads, dim, generator=torch.Generator().manual_seed(0)).half()
    parts = [slice(0, 2), slice(2, 3)]
    for folder, chosen in (("all", [slice(0, heads)]), ("each", parts)):
        (tmp_path / folder).mkdir()
        for part in chosen:
            own = Centres(*(None if side is None else side[part].contiguous() for side in centres))
            rows = pack_rows(key[:, part], value[:, part], spec, own, torch.arange(5) == 0)
            stored_rows.write(tmp_path / folder, 0, part, {"0": rows.numpy()})
    one, other = (stored_rows.read(tmp_path / folder, [spec], dim) for folder in ("all", "each"))
    assert sum(part.shape[1] for part in one.values()) <= spec.bytes_per_token(heads, dim)
    assert stored_rows.compare(one, other, 1, heads).all_equal


def test_unknown_parts_are_refused() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_serving"), "--parts", "greedy,speed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no part speed: choose from greedy, tp" in done.stderr
