"""Speculative decoding: what was tried on GPUs is let through, the rest is refused by name."""

from typing import Any

import pytest

from kvtuner_search.errors import UsageError
from kvtuner_search.serving.sglang.refusals import ALL, check_arguments


class Arguments:
    """SGLang's server arguments, of which all that are not given here are off."""

    def __init__(self, device: str, algorithm: str | None) -> None:
        self.device, self.speculative_algorithm = device, algorithm
        self.attention_backend = "triton" if device == "cuda" else "torch_native"
        self.kv_cache_dtype, self.disaggregation_mode = "auto", "null"

    def __getattr__(self, name: str) -> Any:
        return None


@pytest.mark.parametrize("algorithm", [None, "STANDALONE", "NGRAM"])
def test_what_was_tried_passes(algorithm: str | None) -> None:
    check_arguments(Arguments("cuda", algorithm), ALL)


@pytest.mark.parametrize(("device", "algorithm"), [("cuda", "EAGLE"), ("cuda", "EAGLE3"), ("cpu", "NGRAM")])
def test_the_rest_is_refused(device: str, algorithm: str) -> None:
    with pytest.raises(UsageError, match=f"--speculative-algorithm {algorithm}: with a profile only STANDALONE, NGRAM"):
        check_arguments(Arguments(device, algorithm), ALL)
