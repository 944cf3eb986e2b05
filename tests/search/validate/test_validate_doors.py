"""Servers behind a key, and answers that the tokenizer or the offline evaluation would trip over, through the whole command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.search.servers.fake_sglang import Fake, Handler
from tests.search.validate.test_validate_command import PROFILE, at, block_of, profile_server, validate

Start = Callable[..., Fake]


@pytest.mark.parametrize("way", ["option", "variable"])
def test_servers_behind_a_key_are_asked_with_it_and_it_is_kept_nowhere(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    key = "sk-test-0123456789"

    class Keyed(Handler):
        def do_GET(self) -> None:
            self._if_known(super().do_GET)

        def do_POST(self) -> None:
            self._if_known(super().do_POST)

        def _if_known(self, answer: Callable[[], None]) -> None:
            if self.headers.get("Authorization") == f"Bearer {key}":
                answer()
            else:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.reply(401, b"Unauthorized")

    baseline, ours = fake(), profile_server(fake)
    baseline.RequestHandlerClass = ours.RequestHandlerClass = Keyed
    assert validate(PROFILE, tmp_path / "a", *at(baseline, ours)) == 5
    assert "it requires an API key: --api-key, or KVTUNER_API_KEY" in capsys.readouterr().err
    more = ["--api-key", key] if way == "option" else []
    if way == "variable":
        monkeypatch.setenv("KVTUNER_API_KEY", key)
    monkeypatch.setattr(sys, "argv", ["kvtuner-search", "validate", *more])
    assert validate(PROFILE, tmp_path / "b", *at(baseline, ours), *more) == 0
    assert block_of(tmp_path / "b")["command"] == "kvtuner-search validate" + (" --api-key ***" if more else "")
    shown = capsys.readouterr()
    for text in (shown.out + shown.err, *(path.read_text() for path in (tmp_path / "b").iterdir())):
        assert key not in text


def test_tokens_outside_the_vocabulary_end_the_run(
    fake: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer, and the embedding of the offline evaluation, would trip over them."""
    monkeypatch.setattr("kvtuner_search.validate.measure._PAUSE", 0.0)
    ours = profile_server(fake)
    ours.next = lambda prefix: 8192  # type: ignore[method-assign]  # the reference model's ids end at 8191
    assert validate(PROFILE, tmp_path / "run", *at(fake(), ours)) == 5
    assert "answered token 8192, and the vocabulary ends at 8191" in capsys.readouterr().err
