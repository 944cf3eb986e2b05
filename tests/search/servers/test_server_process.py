"""Servers that are started are stopped, whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtuner_search.secrets import remember
from kvtuner_search.servers.process import failure_line, started_server
from kvtuner_search.servers.transport import ServerError

ARGUMENTS = ["--model-path", "m"]


def group(pid: int) -> list[int]:
    """Processes of a group that are no zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while group(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group(pid)


def test_a_server_and_its_children_end_with_the_block(server_python: str, tmp_path: Path) -> None:
    with started_server(server_python, ARGUMENTS, tmp_path / "log") as server:
        asyncio.run(server.wait_until_ready(30))
        pid = server.process.pid
        assert len(group(pid)) == 2
    assert wait_until_gone(pid)


def test_they_end_when_the_block_fails(server_python: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), started_server(server_python, ARGUMENTS, tmp_path / "log") as server:  # noqa: PT012
        pid = server.process.pid
        raise KeyboardInterrupt
    assert wait_until_gone(pid)


def test_a_server_that_cannot_start_says_why(
    server_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIE", "1")
    with (
        pytest.raises(ServerError, match="ended with 1: ValueError: this server cannot start"),
        started_server(server_python, ARGUMENTS, tmp_path / "log") as server,
    ):
        asyncio.run(server.wait_until_ready(30))


def test_a_server_that_never_listens_is_given_up(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    with (
        pytest.raises(ServerError, match=r"not ready after 0\.3 s"),
        started_server(str(python), ARGUMENTS, tmp_path / "log") as server,
    ):
        asyncio.run(server.wait_until_ready(0.3))


def test_a_serving_configuration_of_the_environment_does_not_reach_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNER_SERVING", "{}")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    with started_server(str(python), ARGUMENTS, tmp_path / "log") as server:
        server.process.wait(10)
    log = (tmp_path / "log").read_text()
    assert "PATH=" in log
    assert "KVTUNER_SERVING" not in log


@pytest.mark.parametrize(
    ("more", "own", "expected"),
    [
        (["--device", "cpu"], None, "1"),
        (["--device", "cpu"], "0", "0"),
        (["--config", "options.yaml"], None, "1"),
        (["--device", "cuda"], None, None),
        (["--device"], None, None),
        ([], None, None),
    ],
)
def test_a_server_on_the_cpu_gets_the_variable_of_its_engine_unless_the_user_sets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], own: str | None, expected: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_text("device: cpu\n")
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    if own is not None:
        monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", own)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nenv\n")
    python.chmod(0o755)
    with started_server(str(python), [*ARGUMENTS, *more], tmp_path / "log") as server:
        server.process.wait(10)
    found = dict(line.partition("=")[::2] for line in (tmp_path / "log").read_text().splitlines())
    assert found.get("SGLANG_USE_CPU_ENGINE") == expected


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_server_dies_with_a_parent_that_was_killed(server_python: str, tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from kvtuner_search.servers.process import started_server\n"
        f"with started_server({server_python!r}, {ARGUMENTS!r}, pathlib.Path({str(tmp_path / 'log')!r})) as server:\n"
        "    asyncio.run(server.wait_until_ready(30))\n"
        "    print(server.process.pid, flush=True)\n"
        "    input()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert pid in group(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while pid in group(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = group(pid)  # the fake's child, which unlike SGLang's is not tied to its parent
    for other in left:
        os.kill(other, signal.SIGKILL)
    assert pid not in left


def test_the_reason_is_the_last_line_that_looks_like_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('Traceback (most recent call last):\n  File "error.py"\nValueError: \x1bbad\n[info] cleaning up\n')
    assert failure_line(log) == "ValueError: �bad"
    log.write_text("one\ntwo\n")
    assert failure_line(log) == "two"
    log.write_text("")
    assert failure_line(log) == "it printed nothing"


def test_the_log_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on its first line, which is the command, nor in what the server writes; the rest is as it came, bytes that are no text too."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nprintf 'ServerArgs(api_key=%s)\\nmysql://u:hunter2@h/d \\377\\nthe key: %s' \"'sk-1'\" topsecret-key\n"
        'echo "$KVTUNER_API_KEY" >&2\nexit 3\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("KVTUNER_API_KEY", "topsecret-key")
    remember("topsecret-key")
    with (
        pytest.raises(ServerError, match=r"ended with 3: the key: \*\*\*"),
        started_server(str(python), ["--model-path", "m", "--api-key", "topsecret-key"], tmp_path / "log") as server,
    ):
        asyncio.run(server.wait_until_ready(30))
    first, *rest = (tmp_path / "log").read_bytes().splitlines()
    assert b"--model-path m --api-key *** --host 127.0.0.1" in first
    assert rest == [b"ServerArgs(api_key='***')", b"mysql://u:***@h/d \xff", b"the key: ***"]
