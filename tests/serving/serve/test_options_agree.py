"""``serve`` reads SGLang's options as the installed SGLang itself does. Run in SGLang's environment."""

from __future__ import annotations

import argparse
import itertools
from importlib import metadata

import pytest
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.entrypoints.engine import _calculate_rank_ranges
from sglang.srt.server_args import ServerArgs

from kvtuner_search.errors import UsageError
from kvtuner_search.serving.sglang.arguments import ServerOptions, node_ranks, read_options
from kvtuner_search.serving.sglang.flags import FLAGS, add_arguments
from kvtuner_search.serving.sglang.partition import ENVIRONMENT, choose
from kvtuner_search.serving.sglang.refusals import BY_VERSION

M = ["--model-path", "m"]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """SGLang's own, which knows nothing of kvtuner-search here."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    return parser


@pytest.mark.parametrize(
    "arguments",
    [
        M,
        ["--model=m", "--revision", "r"],
        [*M, "--tp", "2"],
        [*M, "--tp=2", "--pp-size", "3"],
        [*M, "--tensor-parallel-size", "4", "--pipeline-parallel-size=2", "--tp-size", "8"],
        [*M, "--nnodes", "2", "--node-rank=1", "--nccl-init-addr", "h:1", "--pp-size", "2"],
        [*M, "--dist-init-addr", "h:1", "--host", "0.0.0.0", "--port", "1234", "--device", "cpu"],
        [*M, "--max-total-tokens", "25.6k", "--page-size", "64", "--mem-fraction-static", "0.5"],
        [*M, "--max-total-tokens", "1Mi", "--chunked-prefill-size", "-1", "--quantization", "fp8"],
        [*M, "--attention-backend", "triton", "--decode-attention-backend", "fa3", "--speculative-algorithm", "EAGLE"],
        [*M, "--json-model-override-args", '{"a": 1}', "--prefill-attention-backend=triton"],
    ],
)
def test_the_same_values(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    theirs, ours = parser.parse_args(arguments), read_options(arguments)
    for name in ServerOptions.__dataclass_fields__:
        if name != "refusable":
            value = getattr(ours, name)
            if value is None:  # not given: SGLang's default
                value = parser.get_default(name)
            assert getattr(theirs, name) == value, name


def test_the_same_refusable_options(parser: argparse.ArgumentParser) -> None:
    """Each has the names and the kind that SGLang gives it."""
    for refusal in BY_VERSION[metadata.version("sglang")]:
        action = next(action for action in parser._actions if action.dest == refusal.field)
        for name in action.option_strings:
            text = action.choices[-1] if action.choices else "3" if action.type is int else "some"
            value = [] if action.nargs == 0 else [text]
            theirs = parser.parse_args([*M, name, *value])
            ours = read_options([*M, name, *value, "--tp", "1"])
            assert ours.refusable == {refusal.field: getattr(theirs, refusal.field)}, name


def test_no_option_of_sglang_is_taken_for_an_abbreviation_or_for_ours(parser: argparse.ArgumentParser) -> None:
    ours = argparse.ArgumentParser()
    add_arguments(ours)
    refused = []
    for name in parser._option_string_actions:
        assert name not in {flag.name for flag in FLAGS}
        try:
            read_options([*M, name])
        except UsageError as error:  # of those that want a value
            refused.append(str(error))
    assert not [message for message in refused if "abbreviation" in message]


@pytest.mark.parametrize(
    ("tp", "pp", "nnodes"), [(1, 1, 1), (2, 2, 1), (2, 2, 2), (4, 1, 2), (1, 4, 2), (2, 2, 4), (8, 2, 4), (4, 4, 2)]
)
def test_the_same_ranks_on_each_node(tp: int, pp: int, nnodes: int) -> None:
    for node in range(nnodes):
        sizes = {"--tp-size": tp, "--pp-size": pp, "--nnodes": nnodes, "--node-rank": node}
        arguments = [text for name, value in sizes.items() for text in (name, str(value))]
        ours = node_ranks(read_options([*M, *arguments, "--dist-init-addr", "h:1"]))
        assert ours == _calculate_rank_ranges(nnodes, pp, tp, node)[:2]


@pytest.mark.parametrize(("layers", "stages"), list(itertools.product((16, 28, 30, 33), (1, 2, 3, 4))))
def test_the_same_division_of_layers(layers: int, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    even = choose([1] * layers, stages)
    for _ in range(2):  # SGLang's own division of equal layers, then ours through its variable
        counts = [end - start for start, end in (get_pp_indices(layers, stage, stages) for stage in range(stages))]
        assert tuple(counts) == even.counts
        monkeypatch.setenv(ENVIRONMENT, str(even))
