"""SGLang's own scheduling over a packed pool, without a server and without a model: requests come, share prefixes, are cut into chunks,
decoded, retracted, moved and aborted, and after every step each live request's rows must be what the offline reference makes of its tokens.

Requests, batches, admission, allocator, radix cache, positions and the attention backend are SGLang's and ours as they are on a server.
The scheduler's loop alone is written anew (a real one needs processes), as are keys and values: those of a token follow from the tokens
before it, as a model's do, and are such that rows can be compared bit for bit (:mod:`exact_bases`).
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from exact_bases import eighths, made_up_centres
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator import paged as paged_allocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import Tensor

from kvtuner_kernels.layout import LayerSpec
from kvtuner_kernels.reference import attend, pack_rows
from kvtuner_search.serving.sglang.attention import PackedTorchBackend
from kvtuner_search.serving.sglang.pool import PackedPool

HEADS, GROUP, DIM = 2, 2, 16
SPECS = [LayerSpec.parse(text) for text in ("b65443322/b54433221", "8-g16-asym-c/b83322211", "b44332222/16")]
VOCABULARY = 50
SLOTS = {1: 260, 64: 64 * 14}  # page size -> slots: few, so that requests are retracted and prefixes evicted
LONGEST = {1: 60, 64: 200}  # tokens of a prompt
CHUNK = {1: 16, 64: 64}  # tokens of a prefill
MOST = 8  # requests at a time
PLACES = 40_000  # different tokens in different places that a run may come to


def layer_of(index: int) -> SimpleNamespace:
    """As much of SGLang's attention layer as a backend reads."""
    return SimpleNamespace(
        layer_id=index, tp_q_head_num=HEADS * GROUP, qk_head_dim=DIM, v_head_dim=DIM, scaling=DIM**-0.5, logit_cap=0.0,
        logit_capping_method="tanh", sliding_window_size=-1, is_cross_attention=False, attn_type=AttentionType.DECODER,
    )  # fmt: skip


class Naive:
    """In the place of one of the allocator's two Triton kernels: SGLang's own plain version, or the same for decode."""

    def __init__(self, extend: bool) -> None:
        self._extend = extend

    def __getitem__(self, _: Any) -> Any:
        return self._extend_pages if self._extend else self._decode_page

    def _extend_pages(self, prefixes: Tensor, *more: Any) -> None:
        lengths, last, free, out, _, page = more
        paged_allocator.alloc_extend_naive(prefixes, lengths, last, free, out, page, "cpu")

    def _decode_page(self, lengths: Tensor, *more: Any) -> None:
        self._extend_pages(lengths - 1, lengths, *more)


class Serving:
    """The state of a scheduler, and the steps that it can take; all but the loop are SGLang's own calls.

    Args:
        page: tokens of a page.
        seed: of everything random.
        dirty: slots hold what an earlier life might have left in them; else zeros.
    """

    def __init__(self, page: int, seed: int, dirty: bool = True) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.page = page
        self.arguments = ServerArgs(model_path="dummy", device="cpu", attention_backend="torch_native", page_size=page)
        set_global_server_args_for_scheduler(self.arguments)
        self.centres = made_up_centres(SPECS, HEADS, DIM)
        self.pool = PackedPool(
            SLOTS[page], page_size=page, dtype=torch.bfloat16, head_num=HEADS, head_dim=DIM, layer_num=len(SPECS), device="cpu",
            enable_memory_saver=False, start_layer=0, end_layer=len(SPECS), layers=SPECS, centres=self.centres,
            heads=slice(0, HEADS),
        )  # fmt: skip
        if dirty:
            for rows in self.pool.k_buffer:
                rows.random_(0, 256, generator=self.generator)
        kind = TokenToKVPoolAllocator if page == 1 else PagedTokenToKVPoolAllocator
        more = {} if page == 1 else {"page_size": page}
        self.allocator = kind(
            size=SLOTS[page], dtype=torch.uint8, device="cpu", kvcache=self.pool, need_sort=False, **more
        )
        self.requests = ReqToTokenPool(MOST, max_context_len=512, device="cpu", enable_memory_saver=False)
        self.tree = RadixCache(CacheInitParams(False, self.requests, self.allocator, page))
        self.model = SimpleNamespace(is_encoder_decoder=False, vocab_size=VOCABULARY)
        self.runner = SimpleNamespace(
            device="cpu", server_args=self.arguments, req_to_token_pool=self.requests, token_to_kv_pool=self.pool,
            use_ngram_embedding=False, model_is_mrope=False,
        )  # fmt: skip
        self.backend = PackedTorchBackend(self.runner)
        self.waiting: list[Req] = []
        self.running: ScheduleBatch | None = None
        self.chunked: Req | None = None
        self.texts: list[list[int]] = []  # of requests that came before
        self.tokens: dict[tuple[int, int], int] = {}  # place of what comes before, token -> place
        self.filled = 0
        self.keys, self.values = torch.zeros(2, len(SPECS), PLACES, HEADS, DIM, dtype=torch.bfloat16)
        self.rows = [torch.zeros(PLACES, rows.shape[1], dtype=torch.uint8) for rows in self.pool.k_buffer]
        self.count = 0
        self.seen: dict[str, int] = {}  # how often something happened

    # what a model does

    def learn(self, texts: Iterable[Sequence[int]]) -> None:
        """Make up what follows from each token and those before it, where that was not seen yet."""
        first = []
        for text in texts:
            before = -1
            for token in text:
                place = self.tokens.setdefault((before, token), len(self.tokens))
                if place == self.filled + len(first):
                    first.append(before == -1)
                before = place
        if first:
            self._fill(torch.tensor(first))

    def places(self, text: Sequence[int]) -> Tensor:
        """Where in the tables each token lies."""
        found = [-1]
        for token in text:
            found.append(self.tokens[found[-1], token])
        return torch.tensor(found[1:])

    def _fill(self, first: Tensor) -> None:
        """Keys, values and rows of new places, ``first`` of which are at the beginning of a text."""
        part = slice(self.filled, self.filled + len(first))
        self.filled = part.stop
        key, value = eighths(2, len(SPECS), len(first), HEADS, DIM, generator=self.generator).bfloat16()
        self.keys[:, part], self.values[:, part] = key, value
        for layer, spec in enumerate(SPECS):
            self.rows[layer][part] = pack_rows(key[layer], value[layer], spec, self.centres[layer], first)

    def expected(self, tokens: Sequence[int], layer: int) -> Tensor:
        """The rows of all tokens, by the offline reference."""
        return self.rows[layer][self.places(tokens)]

    def forward(self, batch: ScheduleBatch, texts: Sequence[Sequence[int]], new: Sequence[int]) -> None:
        """Run all layers for the last ``new`` tokens of each request, whose whole texts are ``texts``."""
        batch.input_ids = torch.tensor(
            [token for text, count in zip(texts, new, strict=True) for token in text[-count:]]
        )
        with get_parallel().override(moe_ep_size=1):
            forward = ForwardBatch.init_new(batch, self.runner)
        self.learn(texts)
        places = torch.cat([self.places(text)[-count:] for text, count in zip(texts, new, strict=True)])
        self.backend.init_forward_metadata(forward)
        for layer, spec in enumerate(SPECS):
            query = torch.randn(sum(new), HEADS * GROUP, DIM, generator=self.generator).bfloat16()
            key, value = self.keys[layer, places], self.values[layer, places]
            found = self.backend.forward(query.flatten(1), key, value, layer_of(layer), forward)
            begin = 0
            for text, count in zip(texts, new, strict=True):
                part = slice(begin, begin + count)
                right = attend(query[part], self.expected(text, layer), spec, HEADS, self.centres[layer])
                assert torch.equal(found[part].view_as(query[part]), right.bfloat16()), f"attention of layer {layer}"
                begin = part.stop

    # what a scheduler does

    def note(self, what: str, often: int = 1) -> None:
        self.seen[what] = self.seen.get(what, 0) + often

    def admit(self) -> None:
        """A new request, whose text may begin like an earlier one's, or be the same."""
        longest = LONGEST[self.page]
        text = [self.random.randrange(VOCABULARY) for _ in range(self.random.randint(1, longest))]
        if self.texts and self.random.random() < 0.6:
            old = self.random.choice(self.texts)
            shared = old[: self.random.choice([len(old), self.random.randint(1, len(old))])]
            text = (shared + text[: self.random.choice([0, len(text)])])[:longest]
        self.count += 1
        sampling = SamplingParams(max_new_tokens=self.random.randint(1, 24), temperature=0)
        request = Req(f"r{self.count}", "", array("q", text), sampling, vocab_size=VOCABULARY)
        self.waiting.append(request)
        self.texts = [*self.texts[-12:], text]

    def prefill(self, mixed: bool) -> None:
        """As ``Scheduler._get_new_batch_prefill_raw``: the chunk that is under way, then those that wait; with decode, if asked."""
        decoding = self.running if mixed and self.running is not None else None
        if decoding is not None and not decoding.check_decode_mem():
            return
        adder = PrefillAdder(
            self.page, self.tree, self.allocator, self.running, 0.1, 10_000, CHUNK[self.page],
            len(decoding.reqs) if decoding is not None else 0,
        )  # fmt: skip
        if self.chunked is not None:
            self.tree.cache_unfinished_req(self.chunked, chunked=True)
            self.chunked.init_next_round_input()
            self.chunked = adder.add_chunked_req(self.chunked)
        for request in self.waiting:
            if len(adder.can_run_list) >= self.requests.available_size():
                break
            request.init_next_round_input(self.tree)
            if adder.add_one_req(request, self.chunked is not None, None) != AddReqResult.CONTINUE:
                break
        chosen = adder.can_run_list
        if not chosen:
            return
        self.waiting = [request for request in self.waiting if request not in chosen]
        self.chunked = adder.new_chunked_req or self.chunked
        batch = ScheduleBatch.init_new(
            chosen, self.requests, self.allocator, self.tree, self.model, False, SpeculativeAlgorithm.NONE, self.chunked
        )
        batch.prepare_for_extend()
        self.note("prefix in the radix cache", sum(request.cache_protected_len > 0 for request in chosen))
        whole = [
            request.cache_protected_len == (request.fill_len - 1) // self.page * self.page > 0 for request in chosen
        ]
        self.note("whole prompt cached", sum(whole))
        self.note("first token stored", sum(len(request.prefix_indices) == 0 for request in chosen))
        self.note("chunk", self.chunked is not None)
        if decoding is not None:
            self.note("mixed batch")
            decoding.prepare_for_decode()
            batch.mix_with_running(decoding)
            self.running = None
        texts = [list(self.text(request))[: request.fill_len] for request in batch.reqs]
        self.forward(batch, texts, batch.extend_lens)
        for request in batch.reqs:  # as BatchResultProcessor.process_batch_result_prefill
            if request is not self.chunked:
                request.output_ids.append(self.random.randrange(VOCABULARY))
                if decoding is None or request in chosen:
                    self.tree.cache_unfinished_req(request)
        batch.filter_batch(chunked_req_to_exclude=self.chunked)
        self._join(batch)

    def _join(self, batch: ScheduleBatch) -> None:
        if batch.is_empty():
            return
        if self.running is None:
            self.running = batch
        else:
            self.running.merge_batch(batch)
        self._end([request for request in self.running.reqs if self.is_done(request)], insert=True)

    def decode(self) -> None:
        """As ``Scheduler.update_running_batch``: retract if need be, then one token for each."""
        if self.running is None:
            return
        if not self.running.check_decode_mem():
            self.retract()
            if self.running is None:
                return
        batch = self.running
        batch.prepare_for_decode()
        self.forward(batch, [self.text(request) for request in batch.reqs], [1] * len(batch.reqs))
        for request in batch.reqs:
            request.output_ids.append(self.random.randrange(VOCABULARY))
        self._end([request for request in batch.reqs if self.is_done(request)], insert=True)

    def retract(self) -> None:
        """Give up what the youngest hold; they start again."""
        if self.running is None or len(self.running.reqs) < 2:
            return
        retracted, _, aborted = self.running.retract_decode(self.arguments)
        assert not aborted
        self.note("retracted", len(retracted))
        self.waiting = [*retracted, *self.waiting]

    def abort(self) -> None:
        """A running request, or the one whose prompt is half read, ends at once."""
        if self.chunked is not None:
            self.note("chunked request aborted")
            release_kv_cache(self.chunked, self.tree, is_insert=self.random.random() < 0.5)
            self.chunked = None
        elif self.running is not None:
            self.note("aborted")
            self._end([self.random.choice(self.running.reqs)], insert=self.random.random() < 0.5)

    def _end(self, requests: Sequence[Req], insert: bool) -> None:
        assert self.running is not None
        for request in requests:
            self.texts.append(self.text(request))
            release_kv_cache(request, self.tree, is_insert=insert)
        self.running.filter_batch(keep_indices=[i for i, r in enumerate(self.running.reqs) if r not in requests])
        if self.running.is_empty():
            self.running = None

    def move(self) -> None:
        """Decoded tokens go to other slots, as speculation moves those that it accepts."""
        if self.running is None or self.page > 1:
            return
        request = self.random.choice(self.running.reqs)
        table = self.requests.req_to_token[request.req_pool_idx]
        # What comes before belongs to the radix cache.
        begin = self.random.randint(request.cache_protected_len, self.stored(request))
        old = table[begin : self.stored(request)].long()
        new = self.allocator.alloc(len(old)) if len(old) else None
        if new is None:
            return
        self.note("moved")
        self.pool.move_kv_cache(new, old)
        table[begin : self.stored(request)] = new.int()
        self.allocator.free(old)

    def travel(self) -> None:
        """A request's rows go to the host and back, and what they were is overwritten meanwhile."""
        if self.running is None:
            return
        slots = self.slots(self.random.choice(self.running.reqs))
        copy = self.allocator.get_cpu_copy(slots)
        for rows in self.pool.k_buffer:
            rows[slots] = torch.randint(0, 256, rows[slots].shape, dtype=torch.uint8, generator=self.generator)
        self.pool.load_cpu_copy(copy, slots)
        self.note("travelled")

    def evict(self) -> None:
        """Some of what nobody uses leaves the radix cache, and its slots are handed out again."""
        before = self.allocator.available_size()
        self.tree.evict(EvictParams(num_tokens=self.random.randint(1, SLOTS[self.page])))
        self.note("evicted", self.allocator.available_size() > before)

    # what must hold

    @staticmethod
    def text(request: Req) -> list[int]:
        """Prompt and answer."""
        return [*request.origin_input_ids, *request.output_ids]

    @staticmethod
    def is_done(request: Req) -> bool:
        return len(request.output_ids) >= request.sampling_params.max_new_tokens

    @staticmethod
    def stored(request: Req) -> int:
        """Tokens whose keys and values are in the cache."""
        return int(request.kv_committed_len)

    def slots(self, request: Req) -> Tensor:
        return self.requests.req_to_token[request.req_pool_idx, : self.stored(request)].long()

    def check(self) -> None:
        """The rows of every live request, bit for bit."""
        for request in [*(self.running.reqs if self.running else []), *([self.chunked] if self.chunked else [])]:
            text, slots = self.text(request)[: self.stored(request)], self.slots(request)
            for layer, rows in enumerate(self.pool.k_buffer):
                assert torch.equal(rows[slots], self.expected(text, layer)), f"rows of {request.rid} in layer {layer}"

    def run(self, steps: int) -> None:
        """Steps at random."""
        kinds = {
            self.admit: 6, lambda: self.prefill(False): 6, lambda: self.prefill(True): 3, self.decode: 10, self.retract: 1,
            self.abort: 1, self.move: 1, self.travel: 1, self.evict: 1,
        }  # fmt: skip
        for _ in range(steps):
            self.random.choices(list(kinds), list(kinds.values()))[0]()
            self.check()

    def drain(self) -> None:
        """Finish everything; all slots must come back."""
        while self.waiting or self.chunked is not None or self.running is not None:
            self.prefill(False)
            self.check()
            self.decode()
            self.check()
        self.tree.evict(EvictParams(num_tokens=10**9))
        assert self.allocator.available_size() == SLOTS[self.page]
