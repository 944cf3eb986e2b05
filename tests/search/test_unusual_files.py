"""Pipes, devices, sockets and folders where a file should be: one line, nothing hangs, and what is there stays."""

import os
import resource
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtuner_search.calibration.storage import open_storage
from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.files import unusual, write_atomic
from kvtuner_search.servers.folder import RunFolder, whole_lines

PROFILE = Path(__file__).parent / "profile" / "stored" / "reference-4.00bit.json"
KINDS = {"pipe": "a pipe", "folder": "a folder", "socket": "a socket", "full": "a device", "null": "a device"}


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """What waits for the other end of a pipe is ended, and so fails, instead of holding up all tests."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make(kind: str, path: Path) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))  # a socket's path has at most 107 bytes
    else:
        path.symlink_to(f"/dev/{kind}")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["{}", "sqlite:///{}", "sqlite:///file:{}?uri=true"])
def test_a_study_is_in_a_file(kind: str, form: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / "study")
    with pytest.raises(UsageError, match=rf"study.*: it is {KINDS[kind]}: name a file$") as raised:
        open_storage(form.format(path))
    assert "\n" not in str(raised.value)
    assert [each.name for each in tmp_path.iterdir()] == ["study"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_is_written_over_what_is_none(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / "out")
    before = path.lstat()
    with pytest.raises(UsageError, match=f"out is {KINDS[kind]}: name a file"):
        write_atomic(path, "text")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_files_links_to_files_and_nothing_are_not_unusual(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert [unusual(tmp_path / name) for name in ("file", "link", "gone", "loop", "none")] == [None] * 5
    write_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").read_text() == "text"


def test_a_limit_on_the_size_of_files_is_no_matter_of_usage(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write .*out: File too large: raise the limit .*ulimit -f"):
            write_atomic(tmp_path / "out", "x" * 101)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", str(PROFILE), "--html", "pipe"],
        ["export", str(PROFILE), "--to", "kvtuner", "--allow-lossy", "--output", "pipe"],
        ["calibrate", "--output", "pipe"],
        ["calibrate", "--storage", "pipe"],
        ["calibrate", "--storage", "sqlite:///pipe"],
        ["calibrate", "--output", "run", "--resume"],
        ["calibrate", "--output", "run", "--overwrite"],
        ["calibrate", "--output", "locked"],
    ],
)
def test_commands_name_a_pipe_and_end(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for folder, name in (("run", "study.journal"), ("locked", "study.lock")):
        Path(folder).mkdir()
        os.mkfifo(Path(folder, name))
    assert run(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("kvtuner-search: ")
    assert "pipe" in line
    pipes = [path for path in tmp_path.rglob("*") if stat.S_ISFIFO(path.stat().st_mode)]
    assert sorted(path.name for path in pipes) == ["pipe", "study.journal", "study.lock"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["sensitivity", "--model", "nowhere", "--output"],
        ["bench", "ablate", "--model", "nowhere", "--output"],
        ["bench", "--url", "http://127.0.0.1:1", "--output"],
        ["bench", "--url", "http://127.0.0.1:1", "--report"],
        ["validate", "--profile", "nowhere.json", "--output"],
    ],
)
def test_where_the_result_goes_is_looked_at_before_the_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("file").touch()
    for output, says in (("pipe", "pipe is a pipe: name a file"), ("file/out", "cannot write file/")):
        assert run([*arguments, output]) == 2
        assert f"kvtuner-search: {says}" in capsys.readouterr().err
    assert run([*arguments, "folder/out"]) != 2  # what is wrong beside it is said, and no probe is left
    assert not list(Path("folder").iterdir())


def test_a_step_summary_that_nobody_reads_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "summary")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    assert run(["diff", str(PROFILE), str(PROFILE), "--format", "github"]) == 2
    assert "cannot write GITHUB_STEP_SUMMARY" in capsys.readouterr().err


def test_a_run_of_validate_has_no_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers.jsonl")
    with pytest.raises(UsageError, match=r"answers\.jsonl is a pipe"):
        list(whole_lines(tmp_path / "answers.jsonl"))
    (tmp_path / "done.jsonl").write_text("{}\n")
    os.mkfifo(tmp_path / "kvtuner-run.json")
    with pytest.raises(UsageError, match=r"kvtuner-run\.json is a pipe"):
        RunFolder(tmp_path, {}, resume=True, overwrite=False, journals=["done.jsonl"])
