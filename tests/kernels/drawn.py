"""Numbers to quantize, of the kinds that arithmetic may stumble over, and what rounding to fp16 costs."""

import torch
from hypothesis import strategies as st

HALF_ULP = 2.0**-11  # relative rounding error of fp16
TINY = 2.0**-25  # half the smallest fp16 subnormal


def draw_values(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "constant":
        return x[..., :1].expand(shape).clone()
    if kind == "denormal":
        return x * 1e-40
    if kind == "small":
        return x * 1e-6
    if kind == "huge":
        return (x * 3e4).clamp(-65000, 65000)
    if kind == "outlier":
        x[..., 3] += 900.0
    return x


KINDS = st.sampled_from(["normal", "constant", "denormal", "small", "huge", "outlier"])
