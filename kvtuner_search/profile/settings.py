"""``[tool.kvtuner-search.diff]`` in pyproject.toml: severities, ignores, budgets and the gate of ``diff``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, get_args

from kvtuner_search.errors import ProfileError, UsageError
from kvtuner_search.profile import git
from kvtuner_search.profile.canonical import read_limited
from kvtuner_search.profile.rules import RULES, SEVERITIES, Finding, Severity
from kvtuner_search.profile.text import quoted, shortened

FailOn = Literal["error", "warning", "none"]
FAIL_ON: Final[tuple[FailOn, ...]] = get_args(FailOn)

_MAX_BYTES: Final = 2**18
_MAX_DOTS: Final = 300  # in a line: the time to read a dotted key grows with their square
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{16}")
_SIZE: Final = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)?", re.ASCII)
_UNITS: Final = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


@dataclass(frozen=True)
class Settings:
    """The configuration of ``diff``; command-line options override the file."""

    fail_on: FailOn = "error"
    max_bytes_per_token: int | None = None  # bytes
    max_loss_increase: float | None = None  # nats
    memory: int | None = None  # bytes for which the capacity is shown
    severity: dict[str, Severity | Literal["ignore"]] = field(default_factory=dict)  # rule -> severity
    ignore: frozenset[str] = frozenset()  # rule ids and fingerprints

    def apply(self, findings: list[Finding]) -> tuple[list[Finding], int]:
        """Findings with overridden severities, most severe first, and how many were ignored."""
        kept = []
        for finding in findings:
            severity = self.severity.get(finding.rule, finding.severity)
            if not RULES[finding.rule].fixed and (
                severity == "ignore" or finding.rule in self.ignore or finding.fingerprint in self.ignore
            ):
                continue
            kept.append(finding if severity == "ignore" else replace(finding, severity=severity))
        kept.sort(key=lambda finding: SEVERITIES.index(finding.severity))
        return kept, len(findings) - len(kept)

    def passes(self, findings: list[Finding]) -> bool:
        """False if a finding is at least as severe as ``fail_on``."""
        if self.fail_on == "none":
            return True
        return all(SEVERITIES.index(f.severity) > SEVERITIES.index(self.fail_on) for f in findings)


def load_settings(explicit: Path | None, start: Path) -> Settings:
    """The settings in ``explicit``, or in the nearest pyproject.toml at or above ``start`` that has the table.

    Raises:
        UsageError: if the file is not TOML, or has an unknown key or invalid value.
    """
    if explicit is not None:
        return _parse(_table(explicit), explicit)
    found = _nearest_table(start)
    return Settings() if found is None else _parse(found[1], found[0])


def _nearest_table(start: Path) -> tuple[Path, dict[str, Any]] | None:
    for folder in (start, *start.parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            table = _table(file)
            if table:
                return file, table
    return None


@dataclass(frozen=True)
class GateChange:
    """How the working tree's table differs from that of the revision that applies."""

    message: str
    old: str  # the tables as JSON, shortened
    new: str


def settings_of(ref: str, start: Path) -> tuple[Settings, GateChange | None]:
    """The settings that a revision has for the folder ``start``, and how the working tree changes them.

    The nearest pyproject.toml at or above the folder counts in both. The working tree's table has no effect except to report the change.

    Raises:
        UsageError: if the revision's own table is invalid.
        ProfileError: if there is no such revision, or it cannot be read.
    """
    file, table = _table_of(ref)
    settings = _parse(table, file) if table else Settings()
    try:
        found = _nearest_table(start)
        now: Any = {} if found is None else _checked(*found)
    except (UsageError, OSError) as error:
        return settings, GateChange(f"{file}: {shortened(error, 300)}", _as_text(table), "unreadable")
    if now == table:
        return settings, None
    names = sorted(key for key in {*table, *now} if table.get(key) != now.get(key))
    return settings, GateChange(
        f"{', '.join(map(str, names))} of [tool.kvtuner-search.diff] differ from those of {ref}, which apply here",
        _as_text(table),
        _as_text(now),
    )


def _table_of(ref: str) -> tuple[Path, dict[str, Any]]:
    """The nearest table in a revision, and the name of its file; an empty table if there is none."""
    place = git.GitPath(ref, "pyproject.toml")
    git.check_name(place)
    if not git.ref_exists(place):
        raise ProfileError(
            f"there is no revision {ref} here: check --config-from, or fetch it (in CI with fetch-depth: 0)"
        )
    folder = PurePosixPath(git.prefix_of(place))
    for above in (folder, *folder.parents):
        place = git.GitPath(ref, str(above / "pyproject.toml"))
        data = git.read(place, "a pyproject.toml", _MAX_BYTES)
        table = {} if data is None else _parse_table(data, Path(str(place)))
        if table:
            return Path(str(place)), table
    return Path(str(place)), {}


def _checked(file: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The table, if it is valid.

    Raises:
        UsageError: if it is not.
    """
    _parse(table, file)
    return table


def _as_text(table: dict[str, Any]) -> str:
    try:
        return shortened(json.dumps(table, sort_keys=True, default=str), 2000)
    except ValueError:  # a number with more digits than Python writes
        return "unreadable"


def parse_size(text: str) -> int:
    """Bytes of a size such as ``40GiB``, ``24 GB`` or ``1000000``.

    Raises:
        ValueError: if it is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    nbytes = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    if nbytes < 1:
        raise ValueError(f"{quoted(text)} is not a size: write a number and one of {', '.join(_UNITS)}, e.g. 40GiB")
    return nbytes


def _table(file: Path) -> dict[str, Any]:
    try:
        data = read_limited(file, "a pyproject.toml", _MAX_BYTES)
    except ProfileError as error:
        raise UsageError(str(error)) from error
    return _parse_table(data, file)


def _parse_table(data: bytes, file: Path) -> dict[str, Any]:
    import tomllib

    if max(line.count(b".") for line in data.split(b"\n")) > _MAX_DOTS:
        raise UsageError(
            f"{file} has a line with more than {_MAX_DOTS} dots, too many for one key: shorten it, or name another file with --config"
        )
    try:
        content: Any = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # also a number with more digits than Python reads
        raise UsageError(f"{file} is not valid TOML: {error}: fix it, or name another file with --config") from error
    for name in ("tool", "kvtuner-search", "diff"):
        content = content.get(name, {})
        if not isinstance(content, dict):
            raise UsageError(f"{file}: {name} is not a table: write [tool.kvtuner-search.diff]")
    return dict(content)


def _parse(table: dict[str, Any], file: Path) -> Settings:
    where = f"{file}: [tool.kvtuner-search.diff]"
    known = ("fail-on", "max-bytes-per-token", "max-loss-increase", "memory", "severity", "ignore")
    for key in table:
        if key not in known:
            raise UsageError(f"{where} has no key {quoted(key)}{_nearest(key, known)}: use {', '.join(known)}")
    fail_on = table.get("fail-on", "error")
    if fail_on not in FAIL_ON:
        raise UsageError(f"{where}: fail-on={quoted(fail_on)}: use one of {', '.join(FAIL_ON)}")
    severity = table.get("severity", {})
    ignore = table.get("ignore", [])
    if not isinstance(severity, dict) or not isinstance(ignore, list):
        raise UsageError(f"{where}: severity is a table of rules, ignore a list of rules and fingerprints")
    for rule, value in severity.items():
        _changeable(rule, where)
        if value not in (*SEVERITIES, "ignore"):
            raise UsageError(f"{where}: severity.{rule}={quoted(value)}: use one of {', '.join(SEVERITIES)}, ignore")
    for entry in ignore:
        if not isinstance(entry, str):
            raise UsageError(f"{where}: ignore holds {quoted(entry)}: give rule ids or fingerprints as strings")
        if not _FINGERPRINT.fullmatch(entry):
            _changeable(entry, where)
    max_bytes = _number(table, "max-bytes-per-token", where)
    if isinstance(max_bytes, float):
        raise UsageError(f"{where}: max-bytes-per-token={quoted(max_bytes)}: give whole bytes")
    return Settings(
        fail_on,
        max_bytes,
        _number(table, "max-loss-increase", where),
        _memory(table.get("memory"), where),
        severity,
        frozenset(ignore),
    )


def _changeable(rule: str, where: str) -> None:
    if rule not in RULES:
        raise UsageError(f"{where}: there is no rule {quoted(rule)}{_nearest(rule, RULES)}: see diff --rules")
    if RULES[rule].fixed:
        raise UsageError(f"{where}: {rule} ends the comparison and cannot be changed: remove it")


def _number(table: dict[str, Any], key: str, where: str) -> int | float | None:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise UsageError(f"{where}: {key}={quoted(value)}: give a number that is not negative")
    return value


def _memory(value: Any, where: str) -> int | None:
    if value is None:
        return None
    try:
        return parse_size(str(value))
    except ValueError as error:
        raise UsageError(f"{where}: memory: {error}") from error


def _nearest(word: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
