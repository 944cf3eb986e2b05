"""The folder of one run: its settings, and every response as received, so that an interrupted run can continue."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kvtuner_search.errors import UsageError
from kvtuner_search.files import refuse_unusual, write_atomic
from kvtuner_search.json_lines import JsonLines, whole_lines

BLOCK: Final = "validation.json"
_SETTINGS: Final = "kvtuner-run.json"
_SERVERS: Final = ("baseline", "profile")
_JOURNALS: Final = tuple(f"{name}.jsonl" for name in _SERVERS)
_RESULTS: Final = (BLOCK, *(f"{name}.log" for name in _SERVERS))


class RunFolder:
    """Claims a folder for a run.

    Args:
        path: the folder; made if it does not exist.
        settings: the settings that responses depend on; a resumed run must have the same.
        resume: continue the run in the folder.
        overwrite: delete the run in the folder.
        journals: files of answers.
        results: the run's other files; both are all that ``overwrite`` deletes.

    Raises:
        UsageError: if it holds another run, or one and neither ``resume`` nor ``overwrite`` is given.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        journals: Sequence[str] = _JOURNALS,
        results: Sequence[str] = _RESULTS,
    ) -> None:
        self.path, self._journals = path, journals
        file = path / _SETTINGS
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        if file.exists() and (overwrite or not self._has_answers()):
            for name in (_SETTINGS, *journals, *results):
                (path / name).unlink(missing_ok=True)
        elif file.exists():
            if not resume:
                raise UsageError(
                    f"{path} holds a run: continue with --resume, delete it with --overwrite, or name another"
                )
            stored = _parse(file)
            differing = [name for name in sorted({*settings, *stored}) if stored.get(name) != settings.get(name)]
            if differing:
                raise UsageError(
                    f"{path} holds a run with other {', '.join(differing)}: give the same options, --overwrite, or another folder"
                )
            return
        elif path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path} is not empty and holds no run: name another folder")
        write_atomic(file, text)

    def _has_answers(self) -> bool:
        """Whether a server has answered anything; a run that failed before that may be overwritten without asking."""
        files = (self.path / name for name in self._journals)
        return any(file.exists() and file.stat().st_size for file in files)

    def borrow(self, name: str, other: Path, alike: Sequence[str]) -> None:
        """Copy one server's responses from another run, if this one has none yet.

        Args:
            name: the server.
            other: that run's folder.
            alike: settings that the responses depend on.

        Raises:
            UsageError: if it is not a run's folder, has no answers, or was made with other settings.
        """
        mine, theirs = (_parse(path / _SETTINGS) for path in (self.path, other))
        differing = [setting for setting in alike if mine.get(setting) != theirs.get(setting)]
        if differing:
            raise UsageError(f"{other} holds a run with other {', '.join(differing)}: name one with the same options")
        target, source = (path / f"{name}.jsonl" for path in (self.path, other))
        if target.exists() and target.stat().st_size:
            return
        if not source.exists():
            raise UsageError(f"{other} has no answers of the {name} server: name a run that is complete")
        refuse_unusual(source)
        write_atomic(target, source.read_bytes())

    def journal(self, name: str) -> AnswerJournal:
        """The responses of one server."""
        return AnswerJournal(self.path / f"{name}.jsonl")


def _parse(file: Path) -> dict[str, Any]:
    refuse_unusual(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({error}): use --overwrite or another folder") from error
    return content if isinstance(content, dict) else {}


class AnswerJournal:
    """JSON lines, each handed to the system before the next is asked for. A line that a kill cut short is dropped when it is opened.

    A line is ``{"server": info}`` (who answers from here on), ``{"id": ..., "answers": [...]}`` or ``{"id": ..., "failure": reason}``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, list[Any]] = {}  # id -> responses as received
        self.failures: list[str] = []
        self.server: dict[str, Any] | None = None
        keep = 0
        for line, end in whole_lines(path):
            keep = end
            if "server" in line:
                self.server = line["server"]
            elif "answers" in line:
                self.done[line["id"]] = line["answers"]
            else:
                self.failures.append(f"{line['id']}: {line['failure']}")
        self._lines = JsonLines(path, keep)

    def identify(self, info: dict[str, Any]) -> None:
        """Keep what the server that answers from here on says of itself."""
        self._lines.write({"server": info})
        self.server = info

    def answer(self, name: str, answers: list[Any]) -> None:
        """Keep the responses to one request, or to the steps of one."""
        self._lines.write({"id": name, "answers": answers})
        self.done[name] = answers

    def failure(self, name: str, reason: str) -> None:
        """Keep that a request failed; it stays to be done."""
        self._lines.write({"id": name, "failure": reason})
        self.failures.append(f"{name}: {reason}")

    def close(self) -> None:
        self._lines.close()
