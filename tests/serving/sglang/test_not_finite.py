"""A request whose keys are NaN ends with an error of its own; the server, and those beside it, go on."""

from __future__ import annotations

import json
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from servers import Server, running
from serving_checks.bases import example_profile
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.serving.sglang.model import served_model
from kvtuner_search.serving.sglang.not_finite import NO_TOKEN, finish, forward, sample

ROOT = Path(__file__).parents[3]
POISON = 77  # the embedding of this token is NaN
GOOD, BAD = [5, 9, 300, 17, 2000, 41], [5, 9, 300, POISON, 2000, 41]
LAYERS = [LayerSpec.parse(text) for text in ("b87665544/b76655443", "8-g64-asym-c/4-g64-asym")]


def test_rows_with_nan_get_no_token() -> None:
    logits = torch.tensor([[0.0, 2.0], [torch.nan, 1.0], [3.0, -torch.inf]])
    seen: list[torch.Tensor] = []

    def original(_: Any, output: Any, *more: Any) -> torch.Tensor:
        seen.append(output.next_token_logits.clone())
        return output.next_token_logits.argmax(-1)

    output = SimpleNamespace(next_token_logits=logits)
    assert sample(original, None, output, "more").tolist() == [1, NO_TOKEN, 0]
    assert not seen[0].isnan().any()
    assert torch.equal(seen[0][::2], torch.tensor([[0.0, 2.0], [3.0, -torch.inf]]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_without_a_token_is_ended(count: int) -> None:
    request = SimpleNamespace(output_ids=[4, NO_TOKEN][-count:], to_finish=None)
    called: list[int] = []
    finish(lambda _, new: called.append(new), request, count)
    assert (called, NO_TOKEN in request.output_ids) == ([count], False)
    assert isinstance(request.to_finish, FINISH_ABORT)
    assert request.to_finish.status_code == 500
    assert request.skip_radix_cache_insert
    fine = SimpleNamespace(output_ids=[4, 5], to_finish=None)
    finish(lambda *_: None, fine)
    assert fine.to_finish is None


def test_the_token_that_is_none_is_not_looked_up() -> None:
    """Where batches overlap, it goes through the model once more, and no embedding has a row -1."""
    batch = SimpleNamespace(input_ids=torch.tensor([4, NO_TOKEN, 7]))
    assert forward(lambda _, given, more: (given.input_ids.tolist(), more), None, batch, "more") == ([4, 0, 7], "more")
    idle = SimpleNamespace(input_ids=None)
    assert forward(lambda _, given: given, None, idle) is idle


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sys.path.append(str(ROOT / "tests" / "search"))
    from tiny_models import write_model

    shape = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "head_dim": 64}
    model = write_model(tmp_path_factory.mktemp("models") / "tiny", "Qwen3", **shape)
    import safetensors.torch

    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    safetensors.torch.save_file(weights, model / "model.safetensors", {"format": "pt"})
    folder = tmp_path_factory.mktemp("server")
    profile = example_profile(folder / "tiny.json", served_model(str(model)), LAYERS)
    more = ["--attention-backend", "torch_native", "--max-total-tokens", "512", "--dtype", "float32"]
    with running(folder, "--kvtuner-profile", str(profile), *more, model=model) as server:
        yield server


def error_of(server: Server, **more: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.generate(BAD, 8, **more)
    return caught.value.code, caught.value.read().decode()


def test_a_request_with_nan_keys_ends_and_no_other(server: Server) -> None:
    alone = server.generate(GOOD, 8)["output_ids"]
    for _ in range(2):  # once more: nothing of it is in the prefix cache
        with ThreadPoolExecutor() as pool:
            bad = pool.submit(error_of, server)
            beside = [pool.submit(server.generate, [*GOOD[:4], number], 8) for number in range(4)]
            code, text = bad.result()
            assert all(len(one.result()["output_ids"]) == 8 for one in beside)
        assert code == 500
        assert "not finite, or too large for the cache" in text
    assert server.generate(GOOD, 8)["output_ids"] == alone


@pytest.mark.parametrize("sampling", [{"max_new_tokens": 1}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}])
def test_however_it_is_sampled(server: Server, sampling: dict[str, Any]) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post("/generate", {"input_ids": BAD, "sampling_params": {"max_new_tokens": 8, **sampling}})
    assert caught.value.code == 500
    assert len(server.generate(GOOD, 8)["output_ids"]) == 8


def test_a_stream_ends_with_the_error(server: Server) -> None:
    body = {"input_ids": BAD, "sampling_params": {"max_new_tokens": 8}, "stream": True}
    lines = [line for line in server.post("/generate", body).decode().split("\n") if line.startswith("data: {")]
    last = json.loads(lines[-1].removeprefix("data: "))
    reason = last["meta_info"]["finish_reason"] if "meta_info" in last else last["error"]
    assert "not finite" in json.dumps(reason)
    assert len(server.generate(GOOD, 8)["output_ids"]) == 8
