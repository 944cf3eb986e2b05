"""The reference's attention against plain formulas and transformers' own: sinks, windows, soft caps, and all of them together."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from kvtuner_kernels.layout import LayerSpec, LayoutError
from kvtuner_kernels.reference import attend, pack_rows, unpack_rows
from tests.kernels.fitted import made_up


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    cap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """[T, Hq, D] in float64, token by token and head by head: ``sum exp(s) v / (sum exp(s) + exp(sink))``."""
    tokens, query_heads, head_dim = query.shape
    group, out = query_heads // key.shape[1], torch.zeros(query.shape, dtype=torch.float64)
    for token in range(tokens):
        position = len(key) - tokens + token
        begin = max(0, position - window + 1) if window else 0
        seen = slice(begin, position + 1)
        for head in range(query_heads):
            scores = key[seen, head // group].double() @ query[token, head].double() * head_dim**-0.5
            if cap:
                scores = cap * torch.tanh(scores / cap)
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
            out[token, head] = weights / total @ value[seen, head // group].double()
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["16/16", "4-g64-asym/4-g64-asym", "4-g64-asym-c-r/8-g32-sym-c", "b65443322/b54433221"]),
    st.booleans(),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from([0, 1, 3, 100]),
    st.integers(1, 9),
    st.integers(0, 9),
    st.integers(0, 2**31),
)
def test_attention_is_a_softmax_with_one_more_logit(
    text: str, sinks: bool, cap: float, window: int, tokens: int, before: int, seed: int
) -> None:
    torch.manual_seed(seed)
    spec, heads, group = LayerSpec.parse(text), 2, 3
    centres = made_up(spec, heads, 64)
    first = torch.arange(before + tokens) == 0
    rows = pack_rows(*torch.randn(2, before + tokens, heads, 64).half(), spec, centres, first)
    query = torch.randn(tokens, heads * group, 64)
    logits = torch.randn(heads * group) * 4 if sinks else None
    key, value = unpack_rows(rows, spec, heads, 64, centres, torch.float16)
    expected = plain(query, key, value, logits, cap, window)
    got = attend(query, rows, spec, heads, centres, soft_cap=cap, window=window, sinks=logits, dtype=torch.float16)
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_sinks_are_those_of_gpt_oss() -> None:
    torch.manual_seed(0)
    key, value = torch.randn(2, 7, 2, 64)
    query, sinks = torch.randn(7, 6, 64), torch.randn(6) * 3
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=3, training=False)
    mask = torch.full((7, 7), float("-inf")).triu(1)
    theirs = eager_attention_forward(module, *(x.transpose(0, 1)[None] for x in (query, key, value)), mask, 0.2)[0][0]  # type: ignore[arg-type]
    rows = pack_rows(key.half(), value.half(), LayerSpec())
    got = attend(query, rows, LayerSpec(), 2, sinks=sinks, softmax_scale=0.2, dtype=torch.float16)
    assert torch.allclose(got, theirs, atol=3e-3)
    assert not torch.allclose(
        attend(query, rows, LayerSpec(), 2, softmax_scale=0.2, dtype=torch.float16), theirs, atol=0.1
    )


@pytest.mark.parametrize("size", [1, 3, 64])
def test_windows_are_those_of_transformers(size: int) -> None:
    """A row's value is its number, in 16 bits, and all keys are equal: the mean tells which rows were seen."""
    value = torch.arange(1.0, 12.0)[:, None, None].expand(11, 1, 64).half()
    rows = pack_rows(torch.zeros_like(value), value, LayerSpec())
    got = attend(torch.zeros(5, 1, 64), rows, LayerSpec(), 1, dtype=torch.float16, window=size)
    sees = sliding_window_causal_mask_function(size)
    for token in range(5):
        seen = torch.tensor(
            [float(row + 1) for row in range(11) if sees(0, 0, torch.tensor(6 + token), torch.tensor(row))]
        )
        assert torch.allclose(got[token], seen.mean().expand(1, 64), rtol=1e-5), token


def test_extreme_sinks() -> None:
    """One of minus infinity is none, a huge one takes everything; neither gives NaN."""
    torch.manual_seed(0)
    rows, query = pack_rows(*torch.randn(2, 5, 1, 64).half(), LayerSpec()), torch.randn(2, 2, 64)
    got = attend(query, rows, LayerSpec(), 1, sinks=torch.tensor([float("-inf"), 1e4]), dtype=torch.float16)
    assert torch.equal(got[:, 0], attend(query, rows, LayerSpec(), 1, dtype=torch.float16)[:, 0])
    assert not got[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_of_16_bits_are_converted(dtype: torch.dtype) -> None:
    rows, query = pack_rows(*torch.randn(2, 5, 1, 64).half(), LayerSpec()), torch.randn(1, 2, 64)
    sinks = torch.tensor([0.3, -1.7]).to(dtype)
    got = attend(query, rows, LayerSpec(), 1, sinks=sinks, dtype=torch.float16)
    assert torch.equal(got, attend(query, rows, LayerSpec(), 1, sinks=sinks.float(), dtype=torch.float16))


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int64)])
def test_other_sinks_are_refused(sinks: torch.Tensor) -> None:
    rows = pack_rows(*torch.zeros(2, 5, 1, 64).half(), LayerSpec())
    with pytest.raises(LayoutError, match=r"attention sinks are .* expected floating point \[2\]"):
        attend(torch.zeros(1, 2, 64), rows, LayerSpec(), 1, sinks=sinks, dtype=torch.float16)
