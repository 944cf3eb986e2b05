"""Servers that users point at and that are not quite SGLang: behind a key, a proxy, an OpenAI-compatible gateway, or with a model id of the hub."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import Fake, Handler
from small_runs import PROFILE, STEPS, Start, measure, rules

from kvtuner_search.bench import presets
from kvtuner_search.bench.client import FAILURES
from kvtuner_search.bench.presets import CellPlan
from kvtuner_search.bench.record import Shape
from kvtuner_search.cli.main import run
from kvtuner_search.errors import UsageError
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.progress import Reporter
from kvtuner_search.servers.transport import ServerError
from kvtuner_search.serving.sglang.arguments import api_key
from kvtuner_search.serving.sglang.bench_serving import _environment

ROOT = Path(__file__).parents[3]
KEY = "sk-test-0123456789"


class Odd(Handler):
    """What is odd about it is the server's ``odd``."""

    server: Any

    def _refused(self) -> bool:
        odd = self.server.odd
        if odd == "key" and self.path != "/health" and self.headers.get("Authorization") != f"Bearer {KEY}":
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.reply(401, {"error": f"Unauthorized: {self.headers.get('Authorization')}"})
            return True
        if odd.startswith("openai") and (self.path, odd) == ("/v1/models", "openai"):
            self.reply(200, {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]})
            return True
        if odd.startswith("openai") or (odd == "worker" and self.path != "/health"):
            self.reply(404, {"detail": "Not Found"})
            return True
        return False

    def do_GET(self) -> None:
        if not self._refused():
            super().do_GET()

    def do_POST(self) -> None:
        if not self._refused():
            super().do_POST()

    def meta(self, *arguments: Any) -> dict[str, Any]:
        found = super().meta(*arguments)
        if self.server.odd == "uncounted":
            del found["prompt_tokens"], found["completion_tokens"]
        return found

    def stream(self, *arguments: Any) -> None:
        self.collected: list[bytes] | None = [] if self.server.odd in ("buffer", "halves") else None
        super().stream(*arguments)

    def chunk(self, data: bytes) -> None:
        collected = getattr(self, "collected", None)
        if collected is None or not data:
            if collected:
                self.collected = None
                super().chunk(b"".join(collected))
            super().chunk(data)
        else:
            collected.append(data)


@pytest.fixture
def odd() -> Iterator[Callable[..., Any]]:
    servers: list[Fake] = []

    def start(kind: str, profile: Path | None = PROFILE, **info: Any) -> Any:
        server: Any = Fake(profile=profile and str(profile), **{"model_path": str(reference_model_path()), **info})
        server.RequestHandlerClass, server.odd = Odd, kind
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset of one tiny cell."""
    shape = Shape(requests=2, concurrency=2, input_tokens=20, output_tokens=4)
    monkeypatch.setitem(presets.PRESETS, "quick", [CellPlan("throughput", shape)])


def bench(*arguments: str) -> int:
    return run(["bench", "--quiet", *arguments])


# a key


def test_without_its_key_a_server_is_not_measured_and_the_option_is_named(
    odd: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = odd("key")
    assert bench("--url", server.url, "--folder", str(tmp_path / "a")) == 5
    assert "answered 401: " in (said := capsys.readouterr().err)
    assert "it requires an API key: --api-key, or KVTUNER_API_KEY" in said
    assert bench("--url", server.url, "--folder", str(tmp_path / "b"), "--api-key", "sk-of-another-server") == 5
    said = capsys.readouterr().err
    assert "it rejects the given key" in said
    assert "sk-of-another-server" not in said, "though the server sends it back"
    assert bench("--url", server.url, "--folder", str(tmp_path / "c"), "--api-key=two words") == 2


@pytest.mark.parametrize("way", ["option", "variable"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_key_opens_the_server_and_is_kept_nowhere(
    odd: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    way: str,
    workers: str,
) -> None:
    arguments = [
        "bench",
        "--url",
        odd("key").url,
        "--folder",
        str(tmp_path / "run"),
        "--workers",
        workers,
        "--report",
        str(tmp_path / "page.html"),
    ]
    if way == "option":
        arguments += ["--api-key", KEY]
    else:
        monkeypatch.setenv("KVTUNER_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["kvtuner-search", *arguments])
    assert run(arguments) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["cells"][0]["succeeded"] == 2
    assert "sglang:token_usage" in json.dumps(record["scrapes"]), "the metrics are behind the key too"
    assert ("--api-key ***" in record["command"]) == (way == "option")
    shown = capsys.readouterr()
    files = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"record.json", "requests.jsonl", "kvtuner-run.json", "page.html"} <= files.keys()
    for name, text in {**files, "stdout": shown.out, "stderr": shown.err}.items():
        assert KEY not in text, name


KEYED = """
import os, sys
assert "KVTUNER_API_KEY" not in os.environ
arguments = sys.argv[3:]  # after: -m sglang.launch_server
at = arguments.index("--api-key")
key = arguments[at + 1]
print(f"server_args=ServerArgs(api_key={{key!r}}, port=1)", key, flush=True)
sys.argv = ["launch", *arguments[:at], *arguments[at + 2 :]]
sys.path[:0] = [{folder!r}]
import fake_server as f

def guarded(answer):
    def guard(self):
        if self.path != "/health" and self.headers.get("Authorization") != "Bearer " + key:
            return self.reply(401, b"no")
        answer(self)
    return guard

f.Handler.do_POST, f.Handler.do_GET = map(guarded, (f.Handler.do_POST, f.Handler.do_GET))
f.main()
"""


def test_a_server_that_is_started_with_a_key_is_asked_with_it(
    fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log, which SGLang begins with all its arguments, has no key; nor has what the run keeps."""
    python = tmp_path / "python"
    (tmp_path / "keyed.py").write_text(KEYED.format(folder=str(Path(__file__).parent)))
    python.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {fake_python} "$@"; fi\nexec {sys.executable} {tmp_path}/keyed.py "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("KVTUNER_API_KEY", "")
    arguments = ["bench", "--quiet", "--model-path", "reference", "--profile", str(PROFILE), "--server-python", str(python), "--folder", str(tmp_path / "run"), "--", "--api-key", KEY]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["kvtuner-search", *arguments])
    assert run(arguments) == 0
    log = (tmp_path / "run" / "server.log").read_text()
    assert "--api-key ***" in log.splitlines()[0]
    assert "ServerArgs(api_key='***', port=1) ***" in log
    for path in (tmp_path / "run").iterdir():
        assert KEY not in path.read_text(), path.name


def test_the_servers_key_is_that_of_its_arguments_or_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("api-key: from-the-file\ntp-size: 2\n")
    assert api_key("given", ["--api-key", "other"]) == "given"
    assert api_key(None, ["--tp", "2", "--api-key=from-it"]) == "from-it"
    assert api_key(None, ["--config", str(file)]) == "from-the-file"
    assert api_key(None, ["--config", str(file), "--api-key", "later"]) == "later"
    assert api_key(None, ["--config", str(tmp_path / "none.yaml")]) is None
    assert api_key(None, []) is None


def test_sglangs_own_client_gets_this_key_and_no_other_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    monkeypatch.setenv("API_KEY", "of-something")
    assert not {"OPENAI_API_KEY", "API_KEY"} & _environment(None).keys()
    assert _environment(KEY)["OPENAI_API_KEY"] == KEY
    assert "API_KEY" not in _environment(KEY)


def test_a_password_in_the_address_is_used_and_kept_nowhere(
    odd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = odd("").url.replace("http://", "http://user:hunter2-S3cret@")
    arguments = ["bench", "--url", url, "--folder", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["kvtuner-search", *arguments])
    assert run(arguments) == 0
    assert run([*arguments, "--resume"]) == 0
    assert (
        run(["bench", "--url", url.replace("hunter2-S3cret", "another-pass"), "--folder", str(tmp_path / "run")]) == 2
    )
    shown = capsys.readouterr()
    for text in (shown.out + shown.err, *(path.read_text() for path in (tmp_path / "run").iterdir())):
        assert "hunter2" not in text
    assert "http://user:***@127.0.0.1" in (tmp_path / "run" / "record.json").read_text()


# other servers


@pytest.mark.parametrize(
    ("kind", "path", "said"),
    [
        (
            "openai",
            "",
            "this is an OpenAI-compatible endpoint of vllm, and SGLang's own /server_info and /generate are missing",
        ),
        (
            "openai-bare",
            "/v1",
            "this is an OpenAI-compatible endpoint, and SGLang's own .* are missing: leave /v1 off if",
        ),
        ("openai-bare", "", "there is no SGLang at this address and path"),
        (
            "worker",
            "",
            "use the first node's address: this one answers only /health, as a node of rank above 0 does",
        ),
    ],
)
def test_a_404_says_what_is_there_and_what_is_missing(
    odd: Callable[..., Any], tmp_path: Path, kind: str, path: str, said: str
) -> None:
    with pytest.raises(ServerError, match=f"/server_info answered 404: .*{said}"):
        measure(tmp_path / "run", url=odd(kind).url + path, steps=STEPS[:1])


def test_an_answer_without_counts_is_named_for_what_it_lacks(odd: Callable[..., Any], tmp_path: Path) -> None:
    record = measure(tmp_path / "run", url=odd("uncounted").url, steps=STEPS[:1])
    (check,) = [check for check in record.correctness if not check.passed]
    assert (
        "/generate answered without prompt_tokens, so prompt and answer cannot be checked for completeness"
        in check.detail
    )

    server = odd("")
    answered = server.RequestHandlerClass.meta
    server.RequestHandlerClass = type(
        "Streams", (Odd,), {"meta": lambda self, body, *rest: _dropped(answered(self, body, *rest), body)}
    )
    record = measure(tmp_path / "stream", url=server.url, steps=STEPS[:1])
    assert record.correct
    assert rules(record) == {"uncounted"}
    (violation,) = record.violations
    assert violation.reason.startswith(FAILURES["uncounted"])
    assert "the last event has no prompt_tokens and no completion_tokens" in violation.reason


def _dropped(meta: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in meta.items()
        if not body.get("stream") or (not name.endswith("n_tokens") and name != "prompt_tokens")
    }


def test_an_answer_that_a_proxy_collected_is_not_streamed(
    odd: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of answers of five tokens nothing can be told; those of twenty are enough."""
    record = measure(tmp_path / "run", url=odd("buffer").url, steps=STEPS[1:3], reporter=Reporter())
    assert rules(record) == {"not-streamed"}
    assert not record.passed
    assert [violation.figure for violation in record.violations] == ["2 of 2 answers in one piece"]
    said = " ".join(capsys.readouterr().err.split())
    assert "20 in, 5 out, 3 at a time: 6 of 6 answers came in one piece; their tokens are too few to tell" in said


# a model that the server names


def test_a_model_id_that_a_server_names_is_never_fetched(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' loader is only asked what it has; --model-path allows more."""
    import transformers.utils.hub as hub

    asked: list[tuple[str, bool]] = []

    def cached_file(name: str, file: str, revision: str | None = None, local_files_only: bool = False) -> str:
        asked.append((name, local_files_only))
        raise OSError("not here")

    monkeypatch.setattr(hub, "cached_file", cached_file)
    url = fake(model_path="evil/model").url
    with pytest.raises(
        UsageError, match="name the model with --model-path, because a path or id that a server names is not fetched"
    ):
        measure(tmp_path / "a", url=url, model=None, steps=STEPS[:1])
    assert asked == [("evil/model", True)]
    assert bench("--url", url, "--folder", str(tmp_path / "b"), "--model-path", "own/model") == 3
    assert asked[1:] == [("own/model", False)]


def test_nor_is_its_tokenizer_for_sglangs_own_client(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((reference_model_path() / "config.json").read_text())
    monkeypatch.setattr("kvtuner_search.serving.sglang.engine.served_config", lambda *_, **__: config)
    server = fake(model_path="evil/model")
    with pytest.raises(
        UsageError, match=r"would fetch the tokenizer of evil/model, which .* names: name the model with --model-path"
    ):
        measure(tmp_path / "run", url=server.url, model=None, steps=STEPS[1:2], cross_check=True)
    assert server.streams == 0


def test_a_handful_of_damaged_answers_gives_no_traceback() -> None:
    """``scripts/fuzz_answers 3000`` is the whole of it."""
    command = [sys.executable, str(ROOT / "scripts" / "fuzz_answers"), "60", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, last = done.stdout.splitlines()
    assert last.startswith("60 answers: bench 0 x ")
    assert "bench 5 x " in last
    assert "validate 5 x " in last
