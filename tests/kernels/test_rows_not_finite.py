"""Rows of tokens that cannot be stored: refused, or read back as NaN while all others stay as they are."""

from __future__ import annotations

import math

import pytest
import torch

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import QuantizationError, attend, pack_rows, unpack_rows
from tests.kernels.fitted import made_up

HEADS, DIM, TOKENS = 2, 64, 6
SPECS = ("4-g64-asym/4-g64-asym", "8-g32-sym-c-r/16", "16/2-g64-asym-r", "b65443322/b54433221", "b65443322/4-g64-sym")
BAD = (math.nan, math.inf, -math.inf, 3e38)


@pytest.mark.parametrize("number", BAD)
@pytest.mark.parametrize("text", SPECS)
def test_a_token_that_cannot_be_stored_reads_as_nan_and_no_other(text: str, number: float) -> None:
    spec, generator = LayerSpec.parse(text), torch.Generator().manual_seed(0)
    centres, first = made_up(spec, HEADS, DIM), torch.arange(TOKENS) == 0
    key, value = torch.randn(2, TOKENS, HEADS, DIM, generator=generator).bfloat16()
    good = pack_rows(key, value, spec, centres, first)
    # In the side that is not raw, which has room for any number of 16 bits.
    (value if spec.key.raw else key)[3, 1, 17] = number
    with pytest.raises(QuantizationError):
        pack_rows(key, value, spec, centres, first)
    rows = pack_rows(key, value, spec, centres, first, refuse=False)
    others = torch.arange(TOKENS) != 3
    assert torch.equal(rows[others], good[others])
    sides = unpack_rows(rows, spec, HEADS, DIM, centres)
    assert any(side[3].isnan().all() for side in sides)
    query = torch.randn(TOKENS, HEADS, DIM, generator=generator).bfloat16()
    found = attend(query, rows, spec, HEADS, centres)
    assert found[3:].isnan().all()  # they see that token


def test_good_rows_are_the_same_either_way() -> None:
    spec = LayerSpec.parse(SPECS[0])
    key, value = torch.randn(2, TOKENS, HEADS, DIM)
    assert torch.equal(pack_rows(key, value, spec, refuse=False), pack_rows(key, value, spec))
