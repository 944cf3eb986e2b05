"""What decode keeps of the space for partial results: no more than the largest batch takes, and what captured graphs write to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvtuner_kernels import decode
from kvtuner_kernels.decode import Workspace, Workspaces, decode_parts

HEADS, DIM, PROGRAMS, SPLITS = 28, 128, 264, 16


def parts(per_request: bool) -> Callable[[int], int]:
    return lambda requests: decode_parts(requests, SPLITS if per_request else PROGRAMS, per_request)


class Alive:
    """The buffers that were handed out and have not been freed."""

    def __init__(self) -> None:
        self.seen: dict[int, weakref.ref[Tensor]] = {}

    def add(self, workspace: Workspace) -> None:
        for buffer in workspace:
            self.seen[id(buffer)] = weakref.ref(buffer)

    def nbytes(self) -> int:
        gc.collect()
        return sum(buffer.nbytes for reference in self.seen.values() if (buffer := reference()) is not None)


def needed(requests: int, per_request: bool) -> int:
    return parts(per_request)(requests) * HEADS * (DIM + 1) * 4


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """``capture(True)``: as if the current stream were being captured from now on."""
    state = [False]
    monkeypatch.setattr(decode, "is_capturing", lambda _: state[0])

    def set_state(now: bool) -> None:
        state[0] = now

    return set_state


@pytest.mark.parametrize("per_request", [False, True], ids=["spread", "batch-invariant"])
@pytest.mark.parametrize(
    "order",
    [range(1, 447), [446, *range(1, 447)], range(446, 0, -1), range(1, 301)],
    ids=["up", "large", "down", "up-to-300"],
)
def test_batches_keep_what_the_largest_takes(per_request: bool, order: list[int]) -> None:
    spaces, alive = Workspaces(parts(per_request), HEADS, DIM, torch.device("meta")), Alive()
    for requests in order:
        workspace = spaces.of(requests)
        assert workspace.partial.numel() >= parts(per_request)(requests) * HEADS * DIM
        assert workspace.lse.numel() >= parts(per_request)(requests) * HEADS
        alive.add(workspace)
        del workspace
    least = needed(max(order), per_request)
    assert least <= alive.nbytes() <= 1.5 * least


def test_a_captured_workspace_stays_and_the_others_go(capture: Callable[[bool], None]) -> None:
    spaces, alive = Workspaces(parts(False), HEADS, DIM, torch.device("meta")), Alive()
    capture(True)
    kept = weakref.ref(spaces.of(160).partial)
    assert spaces.of(8).partial is kept()  # smaller graphs share it
    capture(False)
    for requests in range(150, 447):
        alive.add(spaces.of(requests))
    assert kept() is not None
    assert spaces.of(446).partial is not kept()
    assert alive.nbytes() <= needed(160, False) + 1.5 * needed(446, False)


def test_what_was_used_before_a_capture_outgrew_it_is_kept_until_then(capture: Callable[[bool], None]) -> None:
    """A capture that needs more than there is takes it from the graph's memory; no tensor is freed in the middle of one."""
    spaces = Workspaces(parts(False), HEADS, DIM, torch.device("meta"))
    before = weakref.ref(spaces.of(4).partial)
    capture(True)
    grown = weakref.ref(spaces.of(400).partial)
    gc.collect()
    assert before() is not None
    capture(False)
    spaces.of(1000)
    gc.collect()
    assert grown() is not None
