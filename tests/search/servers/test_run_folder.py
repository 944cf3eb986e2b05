"""The run folder: what was answered survives, and runs are never mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtuner_search.errors import UsageError
from kvtuner_search.servers.folder import RunFolder

SETTINGS = {"profile": "a", "prompts": "b"}


def open_folder(path: Path, resume: bool = False, overwrite: bool = False, **settings: str) -> RunFolder:
    return RunFolder(path, SETTINGS | settings, resume=resume, overwrite=overwrite)


def test_answers_are_there_again(tmp_path: Path) -> None:
    journal = open_folder(tmp_path / "run").journal("profile")
    journal.identify({"version": "1"})
    journal.failure("nll/0", "it stalled")
    journal.answer("nll/0", [{"x": 1}])
    journal.close()
    again = open_folder(tmp_path / "run", resume=True).journal("profile")
    assert again.done == {"nll/0": [{"x": 1}]}
    assert again.failures == ["nll/0: it stalled"]
    assert again.server == {"version": "1"}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_kill_cut_short_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    folder = open_folder(tmp_path / "run")
    journal = folder.journal("profile")
    for index in range(3):
        journal.answer(f"nll/{index}", [index])
    journal.close()
    data = journal.path.read_bytes()
    journal.path.write_bytes(data[:-cut])
    again = folder.journal("profile")
    assert list(again.done) == ["nll/0", "nll/1"]
    again.answer("nll/2", [2])
    again.close()
    assert journal.path.read_bytes() == data


def test_a_run_is_neither_overwritten_nor_resumed_unasked(tmp_path: Path) -> None:
    open_folder(tmp_path / "run").journal("profile").answer("nll/0", [0])
    with pytest.raises(UsageError, match="continue with --resume, delete it with --overwrite"):
        open_folder(tmp_path / "run")
    assert open_folder(tmp_path / "run", overwrite=True).journal("profile").done == {}


def test_a_run_with_other_settings_is_not_resumed(tmp_path: Path) -> None:
    open_folder(tmp_path / "run").journal("profile").answer("nll/0", [0])
    with pytest.raises(UsageError, match="other prompts: give the same options"):
        open_folder(tmp_path / "run", resume=True, prompts="c")


def test_a_run_that_nobody_answered_is_forgotten(tmp_path: Path) -> None:
    open_folder(tmp_path / "run").journal("profile").close()
    assert open_folder(tmp_path / "run", prompts="c").journal("profile").done == {}


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    open_folder(tmp_path / "run").journal("profile").answer("nll/0", [0])
    (tmp_path / "run" / "letter.txt").write_text("dear")
    open_folder(tmp_path / "run", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["kvtuner-run.json", "letter.txt"]


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is not empty and holds no run"):
            open_folder(tmp_path, overwrite=overwrite)
    assert (tmp_path / "letter.txt").exists()
