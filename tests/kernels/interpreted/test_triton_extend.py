"""Extend: new tokens over a packed prefix and their chunk, against plain attention in float64."""

import math

import pytest
import torch

from kvtuner_kernels import extend as extend_module
from kvtuner_kernels.extend import extend
from kvtuner_kernels.layout import CODE_BITS, RAW, LayerSpec, LayoutError, TensorSpec
from kvtuner_kernels.reference import pack_rows, unpack_rows
from kvtuner_kernels.tuning import extend_launch
from tests.kernels.fitted import made_up

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}
PLAIN = LayerSpec(TensorSpec(4, 64), TensorSpec(4, 64))


def check(
    spec: LayerSpec,
    prefixes: list[int],
    new: list[int],
    heads: int = 1,
    group: int = 3,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    as_stored: bool = False,
    causal: bool = True,
    mask: str = "",
    soft_cap: float = 0.0,
    window: int = 0,
    sinks: float = 0.0,
    left_out: int = 0,
    hidden: bool = False,
) -> None:
    """One batch of requests against plain attention.

    Args:
        sinks: spread of attention sinks about 1; 0 is none.
        left_out: tokens that the masks have before a request's first slot, plus its number.
        hidden: the mask lets the first new token of each request see nothing.
    """
    torch.manual_seed(sum(prefixes))
    centres = made_up(spec, heads, head_dim)
    stored = [p + n for p, n in zip(prefixes, new, strict=True)] if as_stored else prefixes
    total = sum(stored)
    pool = torch.full((total + 20, spec.bytes_per_token(heads, head_dim)), 0xFF, dtype=torch.uint8)
    slots = torch.randperm(total + 20)[:total]
    starts = torch.tensor([0, *new]).cumsum(0).int()
    indptr = torch.tensor([0, *stored]).cumsum(0).int()
    # Every other request begins with the first token of a sequence; the others, as behind a window, do not.
    first = torch.zeros(total + 1, dtype=torch.bool)
    first[indptr[:-1:2].long()] = True
    if total:
        pool[slots] = pack_rows(*(torch.randn(2, total, heads, head_dim) + 0.5).half(), spec, centres, first[:total])
    query = torch.randn(sum(new), heads * group, head_dim).to(dtype)
    key, value = torch.randn(2, sum(new), heads, head_dim).to(dtype)
    masks = [torch.rand(n, p + n) < 0.5 for p, n in zip(prefixes, new, strict=True)]
    for prefix, visible in zip(prefixes, masks, strict=True):
        visible[torch.arange(len(visible)), prefix + torch.arange(len(visible))] = True
        if hidden:
            visible[:1] = False
    options = {}
    if mask:
        before = [left_out and left_out + request for request in range(len(new))]
        wide = [
            torch.cat((torch.rand(len(visible), more) < 0.5, visible), 1)
            for more, visible in zip(before, masks, strict=True)
        ]
        options = {
            "custom_mask": torch.cat([visible.flatten() for visible in wide]),
            "mask_indptr": torch.tensor([0, *(visible.numel() for visible in wide)]).cumsum(0),
            "skip_prefix_mask": mask == "chunk",
            "mask_offsets": torch.tensor(before) if left_out else None,
        }
    logits = torch.randn(heads * group) * sinks + 1 if sinks else None
    out = torch.full_like(query, torch.nan)
    extend(
        query, None if as_stored else key, None if as_stored else value, pool, spec, heads, starts, indptr, slots, max(new),
        out, centres=centres, causal=causal, soft_cap=soft_cap, window=window, sinks=logits, **options,
    )  # fmt: skip
    for request, (prefix, count) in enumerate(zip(prefixes, new, strict=True)):
        if count == 0:
            continue
        rows = pool[slots[indptr[request] : indptr[request + 1]]]
        chunk = slice(int(starts[request]), int(starts[request + 1]))
        keys, values = (x.double() for x in unpack_rows(rows, spec, heads, head_dim, centres, torch.float16))
        if not as_stored:
            keys, values = torch.cat((keys, key[chunk].double())), torch.cat((values, value[chunk].double()))
        folded = query[chunk].double().unflatten(1, (heads, group))
        scores = torch.einsum("thgd,shd->hgts", folded, keys) / math.sqrt(head_dim)
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        column = torch.arange(prefix + count)
        position = prefix + torch.arange(count).unsqueeze(1)
        visible = torch.ones(count, prefix + count, dtype=torch.bool)
        if mask:
            visible = masks[request].clone()
            if mask == "chunk":
                visible[:, :prefix] = True
        elif causal:
            visible = column <= position
        if window:
            visible &= column > position - window
        scores = scores.masked_fill(~visible, -math.inf)
        if logits is not None:
            column = logits.double().reshape(heads, group, 1, 1).expand(-1, -1, count, 1)
            scores = torch.cat((scores, column), -1)
        weights = scores.softmax(-1)[..., : prefix + count]
        expected = torch.einsum("hgts,shd->thgd", weights, values).flatten(1, 2)
        error = (out[chunk].double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[dtype], f"request {request}: {error:.1e}"


@pytest.mark.parametrize("key", CODE_BITS)
@pytest.mark.parametrize("value", CODE_BITS)
def test_every_pair_of_widths(key: int, value: int) -> None:
    check(LayerSpec(TensorSpec(key, 64), TensorSpec(value, 32)), [70, 0, 1], [5, 9, 0])


@pytest.mark.parametrize(
    "spec", [LayerSpec(RAW, TensorSpec(4, 64)), LayerSpec(TensorSpec(8, 64), RAW), LayerSpec()], ids=str
)
def test_sixteen_bits_and_fp16_queries(spec: LayerSpec) -> None:
    check(spec, [33, 0], [3, 40], dtype=torch.float16)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("as_stored", [False, True])
def test_transforms(rotated: bool, centred: bool, as_stored: bool) -> None:
    side = TensorSpec(4, 32, rotated, centred, rotated, 0.9)
    check(LayerSpec(side, side), [33, 5], [4, 8], as_stored=as_stored)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_every_head_dim(head_dim: int) -> None:
    spec = LayerSpec(TensorSpec(4, head_dim), TensorSpec(8, head_dim, centred=True, rotated=True))
    check(spec, [35, 0], [3, 2], head_dim=head_dim)


@pytest.mark.parametrize(
    "spec",
    [
        "b65443322/b54433221",  # words of keys, of values, and shared
        "b88888888/b11111111",
        "b30000000/b00000004",
        "b76543210/4-g32-asym-c-r",
        "8-g32-sym/b43332222",
    ],
)
@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bands(spec: str, as_stored: bool, dtype: torch.dtype) -> None:
    check(LayerSpec.parse(spec), [70, 40, 1, 0, 0], [5, 9, 2, 3, 0], as_stored=as_stored, dtype=dtype)


@pytest.mark.parametrize("spec", ["16/b54433222", "b54433222/16"])
@pytest.mark.parametrize("as_stored", [False, True])
def test_bands_beside_sixteen_bits(spec: str, as_stored: bool) -> None:
    check(LayerSpec.parse(spec), [33, 1, 0], [3, 40, 2], dtype=torch.float16, as_stored=as_stored)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_bands_of_every_head_dim(head_dim: int) -> None:
    check(LayerSpec.parse("b65443322/b54433221"), [35, 0], [3, 2], head_dim=head_dim)


@pytest.mark.parametrize("mask", ["", "chunk", "all"])
@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize("window", [0, 1, 30])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_bands_with_mask_window_and_soft_cap(mask: str, as_stored: bool, window: int, soft_cap: float) -> None:
    if as_stored and mask == "chunk":  # the stored rows include the chunk, so the whole mask applies
        mask = "all"
    spec = LayerSpec.parse("b65443322/b54433221")
    check(spec, [40, 26, 0], [6, 9, 33], heads=2, as_stored=as_stored, mask=mask, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("causal", [True, False])
def test_bands_in_tiles_of_every_size(causal: bool) -> None:
    check(LayerSpec.parse("b54433221/b65443322"), [65, 3], [65, 1], heads=3, group=2, causal=causal)


@pytest.mark.parametrize(("heads", "group", "new"), [(1, 20, 7), (3, 1, 65), (2, 7, 19)])
def test_tiles_of_every_size(heads: int, group: int, new: int) -> None:
    check(PLAIN, [65, 3], [new, 1], heads=heads, group=group)


@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize("mask", ["chunk", "all"])
def test_custom_mask(as_stored: bool, mask: str) -> None:
    if as_stored:  # the stored rows include the chunk, so the whole mask applies
        mask = "all"
    check(PLAIN, [33, 0, 70], [5, 3, 20], as_stored=as_stored, mask=mask)


@pytest.mark.parametrize("as_stored", [False, True])
@pytest.mark.parametrize("window", [1, 9, 64])
def test_window(as_stored: bool, window: int) -> None:
    check(PLAIN, [70, 0, 3], [5, 66, 1], as_stored=as_stored, window=window)


@pytest.mark.parametrize("as_stored", [False, True])
def test_soft_cap_sees_what_centring_took(as_stored: bool) -> None:
    spec = LayerSpec(TensorSpec(4, 64, centred=True, rotated=True), TensorSpec(8, 64))
    check(spec, [40, 9], [3, 6], as_stored=as_stored, soft_cap=2.0)


def test_not_causal() -> None:
    check(PLAIN, [5], [33], causal=False)


@pytest.mark.parametrize("cut", [0, 40])
def test_results_do_not_depend_on_the_batch(cut: int) -> None:
    """A prompt of 41 tokens, of which ``cut`` are prefix already, beside one that takes a larger tile.

    That the cut does not matter either is left to scripts/check_gpu: on a CPU a product's row depends on where it stands.
    """
    torch.manual_seed(0)
    spec = LayerSpec(TensorSpec(4, 64), TensorSpec(2, 64, rotated=True))
    pool = pack_rows(*torch.randn(2, 41 + 150, 1, 64).half(), spec)
    slots, query = torch.randperm(len(pool)), torch.randn(len(pool), 3, 64)

    def run(tokens: list[int], stored: list[int], chosen: torch.Tensor, most: int) -> torch.Tensor:
        starts, indptr = (torch.tensor([0, *counts]).cumsum(0).int() for counts in (tokens, stored))
        return extend(chosen, None, None, pool, spec, 1, starts, indptr, slots, most, batch_invariant=True)

    alone = run([41 - cut], [41], query[cut:41], 41 - cut)
    together = run([41 - cut, 150], [41, 150], query[cut:], 150)
    assert torch.equal(alone, together[: 41 - cut])


def test_the_invariant_tile_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter adds in one order whatever the tile; a GPU does not."""
    used = []
    monkeypatch.setattr(extend_module, "extend_launch", lambda *a: used.append(extend_launch(*a)) or used[-1])
    pool, start = torch.zeros(64, PLAIN.bytes_per_token(1, 64), dtype=torch.uint8), torch.tensor([0, 1]).int()
    for new in (1, 64):
        for invariant in (False, True):
            extend(
                torch.zeros(new, 2, 64), None, None, pool, PLAIN, 1, start * new, start * new, torch.arange(64), new,
                batch_invariant=invariant,
            )  # fmt: skip
    assert used[0] != used[2]
    assert used[1] == used[3]


def test_half_a_chunk_is_refused() -> None:
    rows = torch.zeros(1, PLAIN.bytes_per_token(1, 64), dtype=torch.uint8)
    start = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(LayoutError, match="both of key and value"):
        extend(torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), None, rows, PLAIN, 1, start, start, torch.arange(1), 1)
