"""The layout: names, sizes and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtuner_kernels.layout import RAW, LayerSpec, LayoutError, TensorSpec, bytes_per_token, effective_bits

SPECS = st.one_of(
    st.just(RAW),
    st.builds(
        TensorSpec,
        bits=st.sampled_from([2, 4, 8]),
        group_size=st.sampled_from([32, 64, 128, 80, 192]),
        symmetric=st.booleans(),
        centred=st.booleans(),
        rotated=st.booleans(),
        clip=st.integers(30, 100).map(lambda percent: percent / 100),
    ),
)


@given(st.builds(LayerSpec, SPECS, SPECS))
def test_a_name_reads_back(spec: LayerSpec) -> None:
    assert LayerSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    ["", "5-g64-asym", "4-g64", "4-g64-asym-r-c", "4-g64-asym-x1.1", "4-g064-asym", "16-g64-asym", "4-g64-asym\n"],
)
def test_a_wrong_name_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(LayoutError) as caught:
        TensorSpec.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3, "group_size": 64},
        {"bits": 4},
        {"bits": 16, "group_size": 64},
        {"bits": 16, "centred": True},
        {"bits": 4, "group_size": 64, "clip": 0.29},
        {"bits": 4, "group_size": 64, "clip": float("nan")},
        {"bits": 4, "group_size": 64, "clip": 0.555},
    ],
)
def test_what_cannot_be_stored_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        TensorSpec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("group", "head_dim"), [(128, 64), (64, 96), (48, 96), (128, 192)])
def test_a_group_must_divide_the_head(group: int, head_dim: int) -> None:
    with pytest.raises(LayoutError):
        TensorSpec(4, group).check(head_dim)


def test_effective_bits_count_everything_stored() -> None:
    per_head = LayerSpec(TensorSpec(4, 128), TensorSpec(4, 128))
    assert per_head.effective_bits(4, 128) == 4.25
    assert LayerSpec(TensorSpec(4, 32), TensorSpec(4, 32)).effective_bits(4, 128) == 5.0
    assert (
        LayerSpec(TensorSpec(2, 128, symmetric=True), RAW).effective_bits(1, 128) == (2.125 + 16) / 2 + 0.0625
    )  # 2 bytes of padding
    assert per_head.bytes_per_token(4, 128) == 544  # Qwen2.5-7B: one row of 34 16-byte words
    assert bytes_per_token([LayerSpec()] * 28, 4, 128) == 57344
    assert effective_bits([per_head, LayerSpec()], 4, 128) == (4.25 + 16) / 2


@given(st.builds(LayerSpec, SPECS, SPECS), st.integers(1, 9), st.sampled_from([64, 80, 96, 128, 192, 256]))
def test_parts_of_a_row_do_not_overlap(spec: LayerSpec, heads: int, head_dim: int) -> None:
    try:
        row = spec.row(heads, head_dim)
    except LayoutError:
        return
    ends = [
        row.key_codes + heads * spec.key.code_bytes(head_dim),
        row.value_codes + heads * spec.value.code_bytes(head_dim),
        row.key_metadata + heads * spec.key.metadata_bytes(head_dim),
        row.value_metadata + heads * spec.value.metadata_bytes(head_dim),
    ]
    starts = [row.value_codes, row.key_metadata, row.value_metadata, row.nbytes]
    assert all(0 <= start - end < 4 for end, start in zip(ends, starts, strict=True))
    assert row.nbytes % 4 == row.key_metadata % 2 == 0
    parts = (spec.key.effective_bits(head_dim) + spec.value.effective_bits(head_dim)) / 2
    assert effective_bits([spec], heads, head_dim) >= parts * (1 - 1e-12)  # padding adds, rounding may take


@given(SPECS, st.sampled_from([64, 80, 96, 128, 192, 256]))
def test_a_plane_lies_within_one_group(spec: TensorSpec, head_dim: int) -> None:
    try:
        spec.check(head_dim)
    except LayoutError:
        return
    segment = spec.segment(head_dim)
    assert head_dim % segment == 0
    if not spec.raw:
        words = segment * spec.bits // 16
        assert words * 16 == segment * spec.bits
        assert segment % spec.group_size == spec.group_size % words == 0


def test_codes_fill_whole_words() -> None:
    with pytest.raises(LayoutError, match="16-bit words"):
        TensorSpec(2, 36).check(36)
