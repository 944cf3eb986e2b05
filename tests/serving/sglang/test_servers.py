"""Real servers on the CPU, in every arrangement of ranks: their tokens, their bytes, and what is left when they are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from offline_packed import COUNT, Greedy
from servers import Server, still_alive
from serving_checks import stored_rows
from serving_checks.machine import write_check_plugin

from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.profile.canonical import load
from kvtuner_search.serving.capacity import heads_per_rank, stage_bytes
from kvtuner_search.serving.sglang.partition import of_profile

TIE = 0.01  # logits
NEWER = metadata.version("sglang") != "0.5.14"  # binds the threads of pipeline stages one by one too


@dataclass(frozen=True)
class Case:
    """One server."""

    profile: str  # the fixture's name
    dtype: str  # with fp32, no rounding of the model can turn a code; raw sides need 16 bits
    tp: int
    pp: int
    nodes: int
    end: str  # how it is killed

    @property
    def name(self) -> str:
        return f"{self.profile.partition('_')[0]}-tp{self.tp}-pp{self.pp}-nodes{self.nodes}"


ROOT = Path(__file__).parents[3]
ONE_RANK: dict[tuple[str, Path], stored_rows.Stored] = {}  # profile, weights -> what one rank stored
CASES = [
    Case("banded_profile", "float32", 1, 1, 1, "kill the launcher"),
    Case("raw_profile", "float16", 1, 1, 1, "interrupt"),
    Case("banded_profile", "float32", 1, 2, 1, "kill a rank"),
    Case("raw_profile", "float16", 1, 2, 1, "terminate"),
    Case("banded_profile", "float32", 2, 1, 1, "terminate"),
    Case("raw_profile", "float16", 2, 1, 1, "kill a rank"),
    Case("banded_profile", "float32", 1, 2, 2, "kill the launcher"),
    Case("raw_profile", "float16", 1, 2, 2, "kill a rank"),
    Case("banded_profile", "float32", 2, 2, 2, "interrupt"),
]


# These differ from the cases beside them in raw sides alone, which the pool's tests divide among ranks too: CI has no time for all.
RARE = ("raw-tp2-pp1-nodes1", "raw-tp1-pp2-nodes2")


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[pytest.mark.slow] * (case.name in RARE)) for case in CASES],
    ids=[case.name for case in CASES],
)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def profile(case: Case, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(case.profile)
    return path


@pytest.fixture(scope="module")
def server(
    case: Case, profile: Path, prompts: Sequence[Sequence[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    started = Server(
        folder,
        [
            "--kvtuner-profile",
            str(profile),
            "--dtype",
            case.dtype,
            "--tp-size",
            str(case.tp),
            "--pp-size",
            str(case.pp),
        ],
        nodes=case.nodes,
        variables={
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1" if case.tp == 2 or (case.pp == 2 and NEWER) else "0-1",
            "PYTHONPATH": os.pathsep.join(
                [str(write_check_plugin(folder / "plugin")), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
            ),
            stored_rows.FOLDER: str(folder),
            stored_rows.TOKENS: str(sum(map(len, prompts))),
        },
    )
    try:
        yield started.wait()
    finally:
        started.kill()


def test_greedy_tokens_are_the_offline_packed_references(
    server: Server, case: Case, profile: Path, prompts: Sequence[Sequence[int]], offline: Callable[..., list[Greedy]]
) -> None:
    expected = offline(profile, case.dtype)
    # Where the two best tokens are this close, the order in which ranks add up decides; no more than one prompt is such a tie.
    clear = [index for index, greedy in enumerate(expected) if min(greedy.margins) > TIE]
    assert len(clear) >= len(prompts) - 1
    found = [server.generate(prompts[index], COUNT)["output_ids"] for index in clear]
    assert found == [expected[index].tokens for index in clear]


def test_capacity_is_what_the_layout_gives(server: Server, case: Case, profile: Path) -> None:
    loaded, info = load(profile), server.info()
    heads = heads_per_rank(loaded.model.num_kv_heads, case.tp)
    counts = of_profile(loaded, case.tp, case.pp).counts
    first = stage_bytes(loaded.layer_specs(), counts, heads, loaded.model.head_dim)[0]
    report = info["kvtuner"]
    assert report["profile_digest"] == loaded.digest
    assert (report["layers"], report["heads"]) == ([0, first.end], [0, heads])
    assert report["bytes_per_token"] == first.stored
    assert (
        report["tokens"] == info["max_total_num_tokens"] == info["internal_states"][0]["memory_usage"]["token_capacity"]
    )
    assert report["pool_bytes"] == (report["tokens"] + info["page_size"]) * first.stored


def test_every_arrangement_of_ranks_stores_the_same_bits(
    server: Server,
    case: Case,
    profile: Path,
    prompts: Sequence[Sequence[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    loaded = load(profile)
    folder, prompt = Path(server.variables[stored_rows.FOLDER]), [token for prompt in prompts for token in prompt]
    model = reference_model_path()
    zeroed = stored_rows.without_sums(model, tmp_path_factory.getbasetemp() / "without-sums")
    for weights in (zeroed, model):
        taken = stored_rows.take(server, folder, case.tp * case.pp, prompt, weights)
        rows = stored_rows.read(taken, loaded.layer_specs(), loaded.model.head_dim)
        single = ONE_RANK.setdefault((case.profile, weights), rows)  # the first case of each profile
        same = stored_rows.compare(rows, single, loaded.model.num_layers, loaded.model.num_kv_heads)
        assert same.complete
        if case.tp == 1 or weights == zeroed:
            assert same.all_equal
        else:  # two ranks add what one product adds at once: later layers see numbers that were rounded otherwise
            assert same.equal[0] == 1.0
            assert case.dtype != "float32" or same.equal[1] > 0.999


def test_killed_in_the_middle_of_a_request_it_leaves_no_process(
    server: Server, case: Case, prompts: Sequence[Sequence[int]]
) -> None:
    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            server.generate(prompts[0], 200)  # SIGTERM lets it finish

    client = threading.Thread(target=ask)
    client.start()
    deadline = time.monotonic() + 60
    while "Decode batch" not in server.log() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.is_alive(), "the request was over before the server was killed"
    processes = server.processes()
    assert len(server.schedulers()) == case.tp * case.pp
    {
        "kill the launcher": lambda: server.launchers[0].kill(),
        "kill a rank": lambda: server.schedulers()[-1].kill(),
        "terminate": lambda: server.launchers[0].terminate(),
        "interrupt": lambda: os.kill(server.launchers[0].pid, signal.SIGINT),
    }[case.end]()
    assert still_alive(processes, 120) == []
    client.join(30)
    assert not client.is_alive()
