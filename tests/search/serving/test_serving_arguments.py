"""SGLang's options as serve understands them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtuner_search.errors import KVTunerError, UsageError
from kvtuner_search.serving.sglang.arguments import node_ranks, read_options

M = ["--model-path", "m"]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--model-path", "a"], "model_path", "a"),
        (["--model=a"], "model_path", "a"),
        ([*M, "--tp-size", "2"], "tp_size", 2),
        ([*M, "--tp-size=2"], "tp_size", 2),
        ([*M, "--tensor-parallel-size", "2"], "tp_size", 2),
        ([*M, "--tp", "2"], "tp_size", 2),
        ([*M, "--tp=2"], "tp_size", 2),
        ([*M, "--tp", "2", "--tp-size", "4"], "tp_size", 4),
        ([*M, "--pp-size", "3"], "pp_size", 3),
        ([*M, "--pipeline-parallel-size=3"], "pp_size", 3),
        ([*M, "--nccl-init-addr", "h:1"], "dist_init_addr", "h:1"),
        ([*M, "--dist-init-addr", "h:1"], "dist_init_addr", "h:1"),
        ([*M, "--host", "::1"], "host", "::1"),
        ([*M, "--port", "31000"], "port", 31000),
        (M, "port", 30000),
        ([*M, "--mem-fraction-static", "0.5"], "mem_fraction_static", 0.5),
        ([*M, "--max-total-tokens", "1000"], "max_total_tokens", 1000),
        ([*M, "--max-total-tokens", "25.6k"], "max_total_tokens", 25600),
        ([*M, "--max-total-tokens", "1Mi"], "max_total_tokens", 2**20),
        ([*M, "--page-size", "64"], "page_size", 64),
        ([*M, "--device", "cpu"], "on_cpu", True),
        (M, "on_cpu", False),
        (M, "refusable", {}),
        ([*M, "--dp", "2"], "refusable", {"dp_size": 2}),
        ([*M, "--data-parallel-size=2"], "refusable", {"dp_size": 2}),
        ([*M, "--attention-context-parallel-size", "2"], "refusable", {"attn_cp_size": 2}),
        (
            [*M, "--enable-lmcache", "--kv-cache-dtype", "fp8_e4m3"],
            "refusable",
            {"enable_lmcache": True, "kv_cache_dtype": "fp8_e4m3"},
        ),
        ([*M, "--chunked-prefill-size", "-1", "--lora-paths", "a", "b", "--tp", "2"], "tp_size", 2),
        ([*M, "--served-model-name=--tp", "--trust-remote-code"], "tp_size", 1),
    ],
)
def test_spellings(arguments: list[str], name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    assert getattr(read_options(arguments), name) == value


def test_the_cpu_engine_is_known_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert read_options(M).on_cpu
    assert not read_options([*M, "--device", "cuda"]).on_cpu


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model-path is missing"),
        ([*M, "--tp", "two"], "invalid int value"),
        ([*M, "--tp"], "expected one argument"),
        ([*M, "--tp", "0"], "--tp-size 0: give a positive number"),
        ([*M, "--page-size", "0"], "--page-size 0: give a positive number"),
        ([*M, "--mem-fraction-static", "1.5"], "give a fraction between 0 and 1"),
        ([*M, "--mem-fraction-static", "nan"], "give a fraction between 0 and 1"),
        ([*M, "--max-total-tokens", "1.5"], "is not a number of tokens"),
        ([*M, "--max-total-tokens", "1.5Ki"], "is not a number of tokens"),
        ([*M, "--max-total-tokens", "1K"], "is not a number of tokens"),
        ([*M, "--nnodes", "2"], "needs --dist-init-addr"),
        ([*M, "--nnodes", "2", "--node-rank", "2", "--dist-init-addr", "h:1"], "--node-rank 2 with --nnodes 2: give 0 to 1"),
        ([*M, "--node-rank", "-1"], "--node-rank -1 with --nnodes 1: give 0 to 0"),
        ([*M, "--nnodes", "2", "--dist-init-addr", "h:1"], "do not divide among 2 nodes"),
        ([*M, "--pp", "2"], "--pp is an abbreviation: write --pp-size"),
        ([*M, "--tensor", "2"], "--tensor is an abbreviation: write --tensor-parallel-size"),
        ([*M, "--mem-frac=0.5"], "--mem-frac is an abbreviation: write --mem-fraction-static"),
        ([*M, "--kvtuner-nbits", "4"], "--kvtuner-nbits is an abbreviation: write --kvtuner-nbits-key or"),
        ([*M, "--kvtuner-profil=x"], "--kvtuner-profil is an abbreviation: write --kvtuner-profile"),
        ([*M, "--kvtuner-bits", "4"], "there is no option --kvtuner-bits"),
        ([*M, "--config"], "--config names no file"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_options(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_options_comes_before_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("model-path: m\ntp-size: 2\npp-size: 2\nenable-lmcache: false\nlora-paths: [a, b]\ndp-size: 1\n")
    options = read_options(["--config", str(file), "--tp", "4"])
    assert (options.model_path, options.tp_size, options.pp_size, options.refusable) == ("m", 4, 2, {"dp_size": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- tp-size", "holds no mapping"),
        ("kvtuner-profile: p.json", "give kvtuner-search's own options on the command line"),
        ("enable_kvtuner_quant: true", "give kvtuner-search's own options on the command line"),
    ],
)
def test_a_file_of_options_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_options([*M, "--config", str(file)])
    with pytest.raises(KVTunerError, match="does not exist"):
        read_options([*M, "--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("tp", "pp", "nnodes", "rank", "expected"),
    [
        (2, 2, 2, 0, ([0], [0, 1])),
        (2, 2, 2, 1, ([1], [0, 1])),
        (4, 1, 2, 1, ([0], [2, 3])),
        (1, 4, 2, 1, ([2, 3], [0])),
        (2, 2, 4, 3, ([1], [1])),
    ],
)
def test_ranks_of_a_node(tp: int, pp: int, nnodes: int, rank: int, expected: tuple[list[int], list[int]]) -> None:
    sizes = {"--tp-size": tp, "--pp-size": pp, "--nnodes": nnodes, "--node-rank": rank}
    arguments = [text for name, value in sizes.items() for text in (name, str(value))]
    stages, ranks = node_ranks(read_options([*M, *arguments, "--dist-init-addr", "h:1"]))
    assert (list(stages), list(ranks)) == expected
