"""The layout: names, sizes and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtuner_kernels.layout import CODE_BITS, RAW, LayerSpec, LayoutError, TensorSpec, bytes_per_token, effective_bits
from kvtuner_kernels.places import BANDS, MAX_BAND_BITS, WORD_BITS, Digits, Place, place_bands

BITS_OF_BANDS = st.lists(st.integers(0, MAX_BAND_BITS), min_size=BANDS, max_size=BANDS).map(tuple)
BANDED = BITS_OF_BANDS.filter(any).map(lambda bands: TensorSpec(bits=0, bands=bands))
HEAD_DIMS = st.sampled_from([64, 80, 96, 128, 192, 256])
SPECS = st.one_of(
    st.just(RAW),
    BANDED,
    st.builds(
        TensorSpec,
        bits=st.sampled_from(CODE_BITS),
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
    [
        "", "5-g64-asym", "4-g64", "4-g64-asym-r-c", "4-g64-asym-x1.1", "4-g064-asym", "16-g64-asym", "4-g64-asym\n", "b", "b6544332",
        "b654433222", "b65443329", "B65443322", "b65443322-c", "b6544332\u0662", "b65443322\n", "65443322",
    ],
)  # fmt: skip
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
        {"bits": 0},
        {"bits": 0, "bands": (0,) * 8},
        {"bits": 0, "bands": (4,) * 7},
        {"bits": 0, "bands": (4,) * 9},
        {"bits": 0, "bands": (9,) * 8},
        {"bits": 0, "bands": (4, 4, 4, 4, 4, 4, 4, -1)},
        {"bits": 0, "bands": (4, 4, 4, 4, 4, 4, 4, 4.0)},
        {"bits": 0, "bands": (4, 4, 4, 4, 4, 4, 4, True)},
        {"bits": 4, "group_size": 64, "bands": (4,) * 8},
        {"bits": 16, "bands": (4,) * 8},
        {"bits": 0, "bands": (4,) * 8, "group_size": 64},
        {"bits": 0, "bands": (4,) * 8, "symmetric": True},
        {"bits": 0, "bands": (4,) * 8, "centred": True},
        {"bits": 0, "bands": (4,) * 8, "rotated": True},
        {"bits": 0, "bands": (4,) * 8, "clip": 0.9},
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


@given(st.builds(LayerSpec, SPECS, SPECS), st.integers(1, 9), HEAD_DIMS)
def test_parts_of_a_row_do_not_overlap(spec: LayerSpec, heads: int, head_dim: int) -> None:
    try:
        row = spec.row(heads, head_dim)
    except LayoutError:
        return
    value_codes = row.key_codes + heads * row.key_head
    if spec.shares_words:  # one part for both
        assert (row.value_codes, row.value_head) == (row.key_codes, row.key_head)
    else:
        assert row.value_codes == value_codes
        assert row.key_head == spec.key.code_bytes(head_dim)
        assert row.value_head == spec.value.code_bytes(head_dim)
    ends = [
        row.value_codes + heads * row.value_head,
        row.key_metadata + heads * spec.key.metadata_bytes(head_dim),
        row.value_metadata + heads * spec.value.metadata_bytes(head_dim),
    ]
    starts = [row.key_metadata, row.value_metadata, row.nbytes]
    assert all(0 <= start - end < 4 for end, start in zip(ends, starts, strict=True))
    assert ends[:2] == starts[:2], "only a row's end is padded"
    assert row.nbytes % 4 == row.key_metadata % 2 == 0
    if not spec.shares_words:
        parts = (spec.key.effective_bits(head_dim) + spec.value.effective_bits(head_dim)) / 2
        assert effective_bits([spec], heads, head_dim) >= parts * (1 - 1e-12)  # padding adds, rounding may take


# bands


DIGITS = st.sampled_from([1, 2])


@given(DIGITS, BITS_OF_BANDS, BITS_OF_BANDS)
def test_places_hold_every_bit_once_beside_the_scales(digit: int, key: tuple[int, ...], value: tuple[int, ...]) -> None:
    placed, words = place_bands(digit, key, value)
    assert [[place.bits for place in side] for side in placed] == [list(key), list(value)]
    taken = [
        (place.word, bit) for side in placed for place in side for bit in range(place.start, place.start + place.bits)
    ]
    assert len(set(taken)) == len(taken) == sum(key) + sum(value)
    assert all(0 <= word < words and 0 <= bit < WORD_BITS - digit * (word == 0) for word, bit in taken)
    assert {word for word, _ in taken} | {0} == set(range(words)), "no word but the scales' is empty"


def first_fit(room: int, side: tuple[int, ...]) -> int:
    """Words that a side begins, each band put where there is room first, the most bits first; ``room`` is left in another word."""
    rooms = [room]
    for bits in sorted(side, reverse=True):
        at = next((i for i, left in enumerate(rooms) if left >= bits), len(rooms))
        rooms += [WORD_BITS] * (at == len(rooms))
        rooms[at] -= bits
    return len(rooms) - 1


@given(DIGITS, BITS_OF_BANDS, BITS_OF_BANDS)
def test_a_side_takes_no_more_words_than_first_fit(digit: int, key: tuple[int, ...], value: tuple[int, ...]) -> None:
    placed, words = place_bands(digit, key, value)
    keys = max((place.word for place in placed[0] if place.bits), default=0)
    assert keys <= first_fit(WORD_BITS - digit, key)
    last = WORD_BITS - digit * (keys == 0) - sum(p.bits for p in placed[0] if p.word == keys)
    assert words - 1 - keys <= first_fit(last, value)


@pytest.mark.parametrize(
    ("bands", "most"), [((6, 5, 5, 4, 4, 3, 2, 2), 4), ((8, 7, 1, 1, 1, 1, 1, 1), 4), ((5, 5, 3, 3, 3, 3, 2, 0), 4)]
)
def test_two_words_hold_bands_in_as_few_planes_as_there_can_be(bands: tuple[int, ...], most: int) -> None:
    places = place_bands(1, bands)[0][0]
    assert max(sum(place.word == word and place.bits > 0 for place in places) for word in (0, 1)) == most


def test_keys_leave_the_other_side_as_much_room_as_there_is() -> None:
    # Ten bits are left of two words; all of them are in the second, although 11 and 10 would take fewer planes.
    assert place_bands(1, (6, 5, 4, 3, 3, 0, 0, 0), (5, 5, 0, 0, 0, 0, 0, 0))[1] == 2


@given(DIGITS, BITS_OF_BANDS, BITS_OF_BANDS)
def test_sides_lie_in_neighbouring_words(digit: int, key: tuple[int, ...], value: tuple[int, ...]) -> None:
    placed, words = place_bands(digit, key, value)
    keys, values = ({place.word for place in side if place.bits} for side in placed)
    assert len(keys & values) <= 1
    for used in (keys, values):
        assert not used or used == set(range(min(used), max(used) + 1))
    assert max(keys | values, default=0) == words - 1


def test_places_are_what_they_were() -> None:
    """Part of the byte order, and so of ``LAYOUT_VERSION``."""
    spec = LayerSpec(*(TensorSpec(bits=0, bands=b) for b in ((6, 5, 4, 4, 3, 3, 2, 2), (4, 4, 3, 3, 3, 2, 2, 0))))
    key, value = spec.places(128)
    assert key == (
        Place(1, 0, 6), Place(0, 0, 5), Place(0, 5, 4), Place(1, 6, 4), Place(0, 9, 3), Place(0, 12, 3), Place(1, 10, 2), Place(1, 12, 2),
    )  # fmt: skip
    assert value == (
        Place(3, 0, 4), Place(3, 4, 4), Place(2, 0, 3), Place(3, 8, 3), Place(3, 11, 3), Place(2, 3, 2), Place(2, 5, 2), Place(0, 0, 0),
    )  # fmt: skip
    assert spec.digits(128) == (Digits(0, 15, 1), Digits(8, 15, 1))
    assert spec.digits(80) == (Digits(0, 14, 2), Digits(4, 14, 2))
    assert LayerSpec(RAW, spec.value).digits(256) == (None, Digits(0, 15, 1))


@given(st.builds(LayerSpec, BANDED, SPECS), st.integers(1, 9), st.sampled_from([64, 80, 96, 128, 192, 256]))
def test_bytes_of_bands_are_words_and_padding(spec: LayerSpec, heads: int, head_dim: int) -> None:
    try:
        nbytes = spec.bytes_per_token(heads, head_dim)
    except LayoutError:
        return
    digit = 1 if head_dim >= 128 else 2
    if spec.value.banded:
        codes = place_bands(digit, spec.key.bands, spec.value.bands)[1] * head_dim // BANDS * 2
    else:
        codes = place_bands(digit, spec.key.bands)[1] * head_dim // BANDS * 2 + spec.value.code_bytes(head_dim)
    used = heads * (codes + spec.value.metadata_bytes(head_dim))
    assert nbytes == used + -used % 4
    assert effective_bits([spec], heads, head_dim) == nbytes * 8 / (2 * heads * head_dim)


def test_three_and_four_bits_are_whole_words() -> None:
    """63 bits of codes beside one of scales, in the mean of keys and values: no padding, and rows that lie on 32 bytes."""
    for text, bits in (("b65543332/b65443333", 4.0), ("b44433321/b44433311", 3.0), ("b33222111/b33222211", 2.0)):
        for heads in (1, 2, 4):
            assert LayerSpec.parse(text).effective_bits(heads, 128) == bits
            assert LayerSpec.parse(text).bytes_per_token(heads, 128) % 32 == 0


@given(st.builds(LayerSpec, SPECS, SPECS), st.sampled_from([64, 128]))
def test_only_banded_sides_have_places_and_digits(spec: LayerSpec, head_dim: int) -> None:
    digits = spec.digits(head_dim)
    for side, places, found in zip((spec.key, spec.value), spec.places(head_dim), digits, strict=True):
        assert [place.bits for place in places] == list(side.bands)
        assert (found is not None) == side.banded
        for place in places:
            if found is not None and place.bits and place.word == 0:
                assert place.start + place.bits <= found.start


def test_a_head_must_split_into_bands() -> None:
    spec = TensorSpec(bits=0, bands=(4,) * BANDS)
    for head_dim in (64, 80, 96, 128, 192, 256):
        spec.check(head_dim)
    with pytest.raises(LayoutError, match="head_dim=60 does not split into 8 bands"):
        LayerSpec(spec, RAW).row(1, 60)


def test_names_of_layers_have_the_mean_bits() -> None:
    assert LayerSpec.parse("b65443322/b44333222").name == "K3.625V2.875"
    assert LayerSpec.parse("8-g64-asym/b44444444").name == "K8V4"
    assert LayerSpec.parse("16/4-g64-asym").name == "K16V4"


def test_what_needs_a_tensor_of_the_transforms_file() -> None:
    fitted = {text: TensorSpec.parse(text).fitted for text in ("16", "4-g64-asym-r", "4-g64-asym-c", "b44444444")}
    assert fitted == {"16": False, "4-g64-asym-r": False, "4-g64-asym-c": True, "b44444444": True}


@pytest.mark.parametrize(
    ("text", "heads", "head_dim", "row"),
    [  # key codes, value codes, key metadata, value metadata, bytes: as layout version 1 had them
        ("4-g128-asym/4-g128-asym", 4, 128, (0, 256, 512, 528, 544)),
        ("8-g128-asym/4-g128-asym", 4, 128, (0, 512, 768, 784, 800)),
        ("4-g32-sym/2-g64-asym-c", 2, 64, (0, 64, 96, 104, 112)),
        ("16/16", 4, 128, (0, 1024, 2048, 2048, 2048)),
        ("2-g128-sym/16", 1, 128, (0, 32, 288, 290, 292)),
        ("8-g80-sym-r/4-g80-asym-c-r-x0.95", 8, 80, (0, 640, 960, 976, 1008)),
        ("2-g32-asym/2-g32-asym", 3, 96, (0, 72, 144, 180, 216)),
    ],
)
def test_rows_without_bands_are_those_of_version_1(text: str, heads: int, head_dim: int, row: tuple[int, ...]) -> None:
    found = LayerSpec.parse(text).row(heads, head_dim)
    parts = (found.key_codes, found.value_codes, found.key_metadata, found.value_metadata, found.nbytes)
    assert parts == row


@given(SPECS.filter(lambda spec: not spec.banded), HEAD_DIMS)
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
