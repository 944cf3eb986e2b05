"""Random cases: a spec, a shape and a batch are drawn, and store, gather, decode and extend compared with references."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from gpu_checks import DEVICE
from kvtuner_kernels.bands import basis, is_first, join_basis, unpack_bands
from kvtuner_kernels.decode import decode
from kvtuner_kernels.extend import extend
from kvtuner_kernels.gather import gather
from kvtuner_kernels.layout import BITS, GROUP_SIZES, RAW, LayerSpec, TensorSpec
from kvtuner_kernels.places import BANDS
from kvtuner_kernels.quantize import store
from kvtuner_kernels.reference import Centres, pack_rows, unpack_rows
from kvtuner_kernels.sides import HEAD_DIMS

TOLERANCE = 2e-3  # relative error of the output, its own rounding to 16 bits apart
TURNED = 3e-4  # of a banded side's codes: the product with the basis is a sum whose order is the hardware's
CASES_A_KERNEL = 50  # lengths, splits and data are drawn anew for each case, specs and shapes for each so many
SUMMED = 1e-5  # relative error of a product with the basis in fp32, before it is rounded to 16 bits
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def draw_side(draw: random.Random, head_dim: int) -> TensorSpec:
    if draw.random() < 0.4:
        bands = sorted((draw.choice((0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 8)) for _ in range(BANDS)), reverse=True)
        return TensorSpec(bits=0, bands=tuple(bands) if any(bands) else (1,) * BANDS)
    bits = draw.choice(BITS)
    if bits == 16:
        return RAW
    groups = [g for g in (*GROUP_SIZES, head_dim) if head_dim % g == 0]
    return TensorSpec(
        bits,
        draw.choice(groups),
        symmetric=draw.random() < 0.3,
        centred=draw.random() < 0.3,
        rotated=draw.random() < 0.3,
        clip=draw.choice((1.0, 1.0, 0.8)),
    )


def draw_centre(side: TensorSpec, heads: int, head_dim: int, exact: bool) -> Tensor | None:
    """What a side needs from the transforms file; ``exact``: a basis in which products are exact, so that no code can turn."""
    if side.centred:
        return torch.randn(heads, head_dim, device=DEVICE) * 2
    if not side.banded:
        return None
    if exact:
        order = torch.stack([torch.randperm(head_dim) for _ in range(heads)])
        sizes = 2.0 ** torch.randint(-2, 3, (heads, head_dim, 1)) * torch.randn(heads, head_dim, 1).sign()
        matrix = torch.eye(head_dim)[order] * sizes
        mean, first = torch.randint(-3, 4, (2, heads, head_dim)).float()
    else:
        matrix = torch.linalg.qr(torch.randn(heads, head_dim, head_dim))[0] * (torch.rand(heads, head_dim, 1) + 0.5)
        mean, first = torch.randn(heads, head_dim), torch.randn(heads, head_dim) * 4
    return join_basis(matrix, mean, first).to(DEVICE)


def mean_of(side: TensorSpec, centre: Tensor | None) -> Tensor | int:
    """What a side's numbers lie about."""
    return 0 if centre is None else basis(centre).mean if side.banded else centre


def check_turned(name: str, got: Tensor, expected: Tensor, spec: LayerSpec, heads: int, head_dim: int) -> None:
    """Two pools' rows differ in few codes, each by one, and in scales by their last place."""
    row = spec.row(heads, head_dim)
    for index, (side, codes_at, nbytes, at) in enumerate(
        (
            (spec.key, row.key_codes, row.key_head, row.key_metadata),
            (spec.value, row.value_codes, row.value_head, row.value_metadata),
        )
    ):
        end = at + heads * side.metadata_bytes(head_dim)
        plain = [rows[:, codes_at : codes_at + heads * nbytes] for rows in (got, expected)]
        if not side.banded:
            scales = [rows[:, at:end].contiguous().view(torch.float16) for rows in (got, expected)]
            assert torch.equal(*scales), f"{name}: side {index} has other scales"
            assert torch.equal(*plain), f"{name}: side {index} has other codes"
            continue
        found = [unpack_bands(x.reshape(len(x), heads, nbytes), spec, index, head_dim) for x in plain]
        assert torch.equal(*(is_first(x.scale) for x in found)), f"{name}: other first tokens are marked"
        # A number that lies between two of fp16 may turn the scale, and with it the codes of a head: seldom, and no worse a choice.
        same = found[0].scale == found[1].scale
        assert int((~same).sum()) <= 1 + TURNED * same.numel() * head_dim, f"{name}: {int((~same).sum())} scales differ"
        turned = (found[0].codes.int() - found[1].codes.int()).abs()[same]
        if not len(turned):
            continue
        assert int(turned.max()) <= 1, f"{name}: side {index} has codes that differ by {int(turned.max())}"
        assert int((turned > 0).sum()) <= 3 + TURNED * turned.numel(), (
            f"{name}: {int((turned > 0).sum())} of {turned.numel()} codes turned"
        )


def attend_float64(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    soft_cap: float,
    window: int,
    visible: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[T, Hq, D], the last T tokens, over [S, H, D]; causal, or by ``visible`` [T, S]; ``sinks`` fp32 [Hq]."""
    tokens, heads = query.shape[0], key.shape[1]
    folded = query.double().unflatten(1, (heads, -1))
    scores = torch.einsum("thgd,shd->hgts", folded, key.double()) * query.shape[-1] ** -0.5
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    column = torch.arange(len(key), device=key.device)
    position = column[len(key) - tokens :, None]
    visible = column <= position if visible is None else visible
    if window:
        visible = visible & (column > position - window)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        logits = sinks.double().reshape(*scores.shape[:2], 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, logits], -1)
    weights = scores.softmax(-1)[..., : len(key)]
    return torch.einsum("hgts,shd->thgd", weights, value.double()).flatten(1, 2)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """NaN counts as infinite."""
    error = ((got.double() - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def check_case(seed: int) -> float:
    """One random layer: store, gather, decode, extend. Returns the worst relative error, or raises AssertionError."""
    draw = random.Random(seed // CASES_A_KERNEL)  # what kernels are compiled for
    head_dim = draw.choice(HEAD_DIMS)
    heads = draw.choice((1, 2, 3, 4, 8))
    group = draw.choice((1, 2, 4, 7, 8, 12, 20))
    dtype = draw.choice((torch.bfloat16, torch.float16))
    spec = LayerSpec(draw_side(draw, head_dim), draw_side(draw, head_dim))
    soft_cap = draw.choice((0.0, 0.0, 0.0, 20.0))
    window = draw.choice((0, 0, 0, 100))
    per_request = draw.random() < 0.3
    as_stored = draw.random() < 0.3
    masked = draw.random() < 0.2
    with_sinks = draw.random() < 0.3
    windowed = masked and draw.random() < 0.5  # a mask of all tokens, over the slots of a window
    torch.manual_seed(seed)
    draw = random.Random(seed)
    lengths = [
        draw.choice((0, 1, 2, 63, 64, 65, 257, 1000, draw.randrange(1, 4000))) for _ in range(draw.randrange(1, 7))
    ]
    name = f"seed {seed}: {spec} H{heads} G{group} D{head_dim} {dtype} {lengths} cap {soft_cap} window {window}"
    name += f" sinks {with_sinks} masked {masked} windowed {windowed}"
    tokens = sum(lengths)
    rows = tokens + 50
    exact = draw.random() < 0.3
    centres = Centres(*(draw_centre(s, heads, head_dim, exact) for s in (spec.key, spec.value)))
    means = [mean_of(*pair) for pair in zip((spec.key, spec.value), centres, strict=True)]
    # Rows that no request uses hold 0xFF: NaN wherever they are read as a scale, a minimum or a raw number.
    pool = torch.full((rows, spec.bytes_per_token(heads, head_dim)), 0xFF, dtype=torch.uint8, device=DEVICE)
    slots = torch.randperm(rows, device=DEVICE)[:tokens]
    key, value = (
        (torch.randn(tokens, heads, head_dim, device=DEVICE) + shift).to(dtype)
        for shift in (torch.randn(heads, head_dim, device=DEVICE) if isinstance(mean, int) else mean for mean in means)
    )
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)[:-1]
    positions = torch.full((tokens,), 7, device=DEVICE)
    if draw.random() < 0.8:
        positions[starts[torch.tensor(lengths, device=DEVICE) > 0]] = 0
    expected_pool = pool.clone()
    if tokens:
        packed = pack_rows(key, value, spec, centres, positions == 0)
        layout = spec.row(heads, head_dim)
        used = layout.value_metadata + heads * spec.value.metadata_bytes(head_dim)
        if spec.value.raw:
            used = max(used, layout.value_codes + heads * spec.value.code_bytes(head_dim))
        expected_pool[slots, :used] = packed[:, :used]
    store(key, value, pool, slots, spec, centres, positions)
    banded = spec.key.banded or spec.value.banded
    if exact or not banded:
        assert torch.equal(pool, expected_pool), (
            f"{name}: {int((pool != expected_pool).sum())} bytes differ from the reference"
        )
    elif tokens:
        unused = torch.ones(rows, dtype=torch.bool, device=DEVICE).index_fill_(0, slots, False)
        assert torch.equal(pool[unused], expected_pool[unused]), f"{name}: a row was written that is nobody's"
        check_turned(name, pool[slots], expected_pool[slots], spec, heads, head_dim)

    plain_key, plain_value = unpack_rows(pool[slots], spec, heads, head_dim, centres, dtype)
    got_key, got_value = gather(pool, slots, spec, heads, head_dim, centres, dtype)
    for what, side, got, plain in (
        ("keys", spec.key, got_key, plain_key),
        ("values", spec.value, got_value, plain_value),
    ):
        if side.banded and tokens:
            error = relative_error(got, plain.double())
            assert error <= HALF_ULP[dtype] + SUMMED, f"{name}: gathered {what}: relative error {error:.2e}"
        else:
            assert torch.equal(got, plain.to(dtype)), f"{name}: gathered {what} differ"

    indptr = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    query = torch.randn(len(lengths), heads * group, head_dim, device=DEVICE).to(dtype)
    options: dict[str, Any] = {}
    if per_request:
        options = {
            "num_kv_splits": torch.tensor([draw.randrange(1, 9) for _ in lengths], dtype=torch.int32, device=DEVICE),
            "max_kv_splits": 8,
        }
    out = torch.full_like(query, float("nan"))
    sinks = torch.randn(heads * group, device=DEVICE) * 3 + 1 if with_sinks else None
    arguments = (query, pool, spec, heads, indptr, slots)
    options |= {"centres": centres, "soft_cap": soft_cap, "window": window, "sinks": sinks}
    decode(*arguments, out, **options)
    again = decode(*arguments, **options)
    assert torch.equal(out, again), f"{name}: two runs differ"
    worst = 0.0
    for request, length in enumerate(lengths):
        part = slice(int(indptr[request]), int(indptr[request + 1]))
        if length == 0:
            assert not out[request].any(), f"{name}: request {request} is empty, its output is not 0"
            continue
        keys, values = plain_key[part], plain_value[part]
        expected = attend_float64(query[request, None], keys, values, soft_cap, window, sinks=sinks)[0]
        error = relative_error(out[request], expected)
        assert error <= TOLERANCE + HALF_ULP[dtype], f"{name}: decode, request {request}: relative error {error:.2e}"
        worst = max(worst, error)

    new = [draw.choice((0, 1, 17, draw.randrange(1, 90))) for _ in lengths]
    if as_stored:
        new = [min(pair) for pair in zip(new, lengths, strict=True)]
    first = [0, *torch.tensor(new).cumsum(0).tolist()]
    query = torch.randn(first[-1], heads * group, head_dim, device=DEVICE).to(dtype)
    chunk_key, chunk_value = (
        (torch.randn(first[-1], heads, head_dim, device=DEVICE) + mean).to(dtype) for mean in means
    )
    extra: dict[str, Any] = {}
    masks: list[Tensor | None] = [None] * len(new)
    if masked:
        for request, (count, length) in enumerate(zip(new, lengths, strict=True)):
            total = length if as_stored else length + count
            masks[request] = mask = torch.rand(count, total, device=DEVICE) < 0.5
            mask[torch.arange(count), total - count + torch.arange(count)] = True  # a token sees itself
        wide = [mask for mask in masks if mask is not None]
        if windowed:  # what the masks have before a request's slots must not matter
            more = [draw.randrange(0, 200) for _ in wide]
            wide = [
                torch.cat([torch.rand(len(mask), left, device=DEVICE) < 0.5, mask], 1)
                for left, mask in zip(more, wide, strict=True)
            ]
            extra["mask_offsets"] = torch.tensor(more, device=DEVICE)
        sizes = [mask.numel() for mask in wide]
        extra["custom_mask"] = torch.cat([mask.flatten() for mask in wide])
        extra["mask_indptr"] = torch.tensor([0, *sizes], device=DEVICE).cumsum(0)
        extra["skip_prefix_mask"] = False
    out = torch.full_like(query, float("nan"))
    extend(
        query, None if as_stored else chunk_key, None if as_stored else chunk_value, pool, spec, heads,
        torch.tensor(first, dtype=torch.int32, device=DEVICE), indptr, slots, max(new), out,
        centres=centres, soft_cap=soft_cap, window=window, sinks=sinks, **extra,
    )  # fmt: skip
    for request, count in enumerate(new):
        part = slice(int(indptr[request]), int(indptr[request + 1]))
        chunk = slice(first[request], first[request + 1])
        if count == 0:
            continue
        all_keys, all_values = plain_key[part].float(), plain_value[part].float()
        if not as_stored:
            all_keys = torch.cat([all_keys, chunk_key[chunk].float()])
            all_values = torch.cat([all_values, chunk_value[chunk].float()])
        expected = attend_float64(query[chunk], all_keys, all_values, soft_cap, window, masks[request], sinks)
        error = relative_error(out[chunk], expected)
        assert error <= TOLERANCE + HALF_ULP[dtype], (
            f"{name}: extend by {new}, request {request}: relative error {error:.2e}"
        )
        worst = max(worst, error)
    return worst
