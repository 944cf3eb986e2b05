"""A comparison as JSON, Markdown, GitHub annotations or JUnit; the terminal's form is in ``terminal``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvtuner_search.errors import ExitCode, UsageError
from kvtuner_search.profile import git
from kvtuner_search.profile.canonical import canonical_json
from kvtuner_search.profile.capacity import CONTEXTS, capacity
from kvtuner_search.profile.changes import QualityChange
from kvtuner_search.profile.compare import LayerChange, ProfileComparison
from kvtuner_search.profile.rules import RULES, Finding
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.settings import Settings
from kvtuner_search.profile.text import interval_of, percent, printable, ranges, runs, shortened, signed, size
from kvtuner_search.profile.validation_text import verdict

ANNOTATIONS: Final = 10  # GitHub shows that many of each level for a step and silently drops the rest
SUMMARY_BYTES: Final = 1024 * 1024  # GitHub refuses a larger step summary
_LEVELS: Final = {"error": "error", "warning": "warning", "info": "notice"}
_ILLEGAL_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]#|~@])")


@dataclass(frozen=True)
class DiffReport:
    """What every format shows."""

    comparison: ProfileComparison
    findings: list[Finding]  # after overrides and ignores, gravest first
    ignored: int
    settings: Settings
    old_name: str  # as given on the command line
    new_name: str

    @property
    def exit_code(self) -> ExitCode:
        if not self.comparison.comparable:
            return ExitCode.NOT_COMPARABLE
        return ExitCode.OK if self.settings.passes(self.findings) else ExitCode.GATE_FAILED

    @property
    def verdict(self) -> str:
        """``pass``, ``fail`` or ``not-comparable``."""
        return {ExitCode.OK: "pass", ExitCode.GATE_FAILED: "fail"}.get(self.exit_code, "not-comparable")

    def totals(self) -> list[tuple[str, str, str, str]]:
        """Rows of (figure, old, new, change)."""
        a, b = self.comparison.old.storage, self.comparison.new.storage
        rows = [
            ("effective bits", f"{a.effective_bits:.3f}", f"{b.effective_bits:.3f}", percent(a.effective_bits, b.effective_bits)),
            ("bytes per token", f"{a.bytes_per_token:,}", f"{b.bytes_per_token:,}", percent(a.bytes_per_token, b.bytes_per_token)),
        ]  # fmt: skip
        memory = self.settings.memory
        if memory is not None:
            before, after = (capacity(memory, profile) for profile in (self.comparison.old, self.comparison.new))
            rows.append((f"tokens in {size(memory)}", f"{before:,}", f"{after:,}", percent(before, after)))
        return rows + self._requests()

    def _requests(self) -> list[tuple[str, str, str, str]]:
        """The same rows for whole requests, where layers with windows keep less of them than their length."""
        old, new = self.comparison.old, self.comparison.new
        if new.model.layer_kinds is None:
            return []
        rows = []
        for context in CONTEXTS:
            before, after = old.bytes_per_request(context), new.bytes_per_request(context)
            rows.append((f"bytes of {context:,} tokens", f"{before:,}", f"{after:,}", percent(before, after)))
        return rows


def grouped(findings: list[Finding]) -> list[tuple[Finding, list[Finding]]]:
    """Findings of one rule that say the same about several layers, grouped under the first of them.

    Nearly every layer has bands of its own, so findings of one rule about bands count as the same.
    """
    groups = runs([_group(finding) for finding in findings])
    return [(findings[indices[0]], [findings[i] for i in indices]) for indices, _ in groups]


def _group(finding: Finding) -> tuple[str, ...]:
    if not finding.where.startswith("layers."):
        return finding.rule, finding.where
    sides = f"{finding.old}/{finding.new}".split("/")
    banded = any(side.startswith("b") for side in sides)
    return (finding.rule, "banded") if banded else (finding.rule, finding.old, finding.new)


def group_message(group: list[Finding]) -> str:
    """The message of findings that ``grouped`` put together."""
    first = group[0]
    if len(group) == 1:
        return printable(first.message)
    layers = ranges([int(finding.where.partition(".")[2]) for finding in group])
    if all((finding.old, finding.new) == (first.old, first.new) for finding in group):
        return f"layers {layers}: {first.old} becomes {first.new}"
    return f"layers {layers}: each has its own bands, first {first.old} becomes {first.new}; the table of layers lists them all"


def group_fingerprint(group: list[Finding]) -> str:
    """The fingerprint of a single finding, otherwise their number: each has its own, and JSON lists them."""
    return group[0].fingerprint if len(group) == 1 else f"{len(group)} findings"


def to_json(report: DiffReport) -> str:
    """Everything, for scripts."""
    comparison = report.comparison
    return canonical_json(
        {
            "verdict": report.verdict,
            "exit_code": int(report.exit_code),
            "fail_on": report.settings.fail_on,
            "ignored": report.ignored,
            "old": None if comparison.added else _side(comparison.old, report.old_name, report.settings.memory),
            "new": _side(comparison.new, report.new_name, report.settings.memory),
            "findings": [
                {
                    "rule": f.rule,
                    "severity": f.severity,
                    "where": f.where,
                    "message": f.message,
                    "old": f.old,
                    "new": f.new,
                    "fingerprint": f.fingerprint,
                }
                for f in report.findings
            ],
            "layers": [_layer(layer) for layer in comparison.layers],
            "quality": [_quality(change) for change in comparison.quality],
            "validation": [_quality(change) for change in comparison.validation],
            "provenance": [{"field": n, "old": a, "new": b} for n, a, b in comparison.provenance],
        }
    )


def _side(profile: Profile, name: str, memory: int | None) -> dict[str, Any]:
    side = {
        "source": name.encode(errors="replace").decode(),
        "name": profile.name,
        "digest": profile.digest,
        "model": profile.model.id,
        "bytes_per_token": profile.storage.bytes_per_token,
        "effective_bits": profile.storage.effective_bits,
        "origin": profile.provenance.origin,
        "validation": None if profile.validation is None else verdict(profile),
    }
    if profile.model.layer_kinds is not None:
        side["layer_kinds"] = profile.model.layer_kinds
        side["bytes_per_request"] = {str(context): profile.bytes_per_request(context) for context in CONTEXTS}
    return side if memory is None else side | {"capacity_tokens": capacity(memory, profile), "memory_bytes": memory}


def _layer(layer: LayerChange) -> dict[str, Any]:
    return {
        "index": layer.index,
        "changed": layer.changed,
        "old": str(layer.old),
        "new": str(layer.new),
        "old_bytes_per_token": layer.old_bytes,
        "new_bytes_per_token": layer.new_bytes,
        "old_effective_bits": layer.old_bits,
        "new_effective_bits": layer.new_bits,
    }


def _quality(change: QualityChange) -> dict[str, Any]:
    return {
        "metric": change.metric,
        "data": change.data,
        "split": change.split,
        "verdict": change.verdict,
        "reason": change.reason,
        "old": change.old.model_dump() if change.old else None,
        "new": change.new.model_dump() if change.new else None,
        "difference": change.difference,
        "ci_low": change.low,
        "ci_high": change.high,
    }


def quality_tables(comparison: ProfileComparison) -> list[tuple[str, list[tuple[str, str, str, str, str]]]]:
    """Tables that are not empty, with their titles."""
    tables = (
        ("quality against 16 bits", quality_rows(comparison.quality)),
        ("through a server, against a stock one", quality_rows(comparison.validation)),
    )
    return [(title, rows) for title, rows in tables if rows]


def quality_rows(changes: list[QualityChange]) -> list[tuple[str, str, str, str, str]]:
    """Rows of (measure, old, new, change with interval, verdict); old and new are changes against the 16-bit cache."""
    rows: list[tuple[str, str, str, str, str]] = []
    for change in changes:
        sides = [f"{signed(m.delta)} {interval_of(m)}" if m else "-" for m in (change.old, change.new)]
        moved = "-" if change.difference is None else signed(change.difference)
        if change.low is not None and change.high is not None:
            moved += f" [{signed(change.low)}, {signed(change.high)}]"
        name = f"{change.metric} {shortened(printable(change.data))} {change.split}"
        rows.append((name, sides[0], sides[1], moved, change.verdict))
    return rows


def to_markdown(report: DiffReport) -> str:
    """For a pull request: verdict, totals, findings, layers."""
    comparison = report.comparison
    icon = {"pass": "✅", "fail": "❌"}.get(report.verdict, "⛔")
    lines = [f"### {icon} KV-cache profile: {report.verdict}", ""]
    names = (comparison.old.name, comparison.new.name)
    lines += [f"{_escape(comparison.new.model.id)}: {_escape(names[0])} → {_escape(names[1])}", ""]
    if comparison.comparable:
        lines += _table(("", "old", "new", "change"), report.totals())
        for title, measures in quality_tables(comparison):
            lines += _table((title, "old", "new", "change", "verdict"), measures)
    if report.findings:
        rows = [
            (f.severity, f"`{f.rule}`", _escape(group_message(group)), f"`{group_fingerprint(group)}`")
            for f, group in grouped(report.findings)
        ]
        lines += _table(("severity", "rule", "finding", "fingerprint"), rows, escaped=True)
    changed = [layer for layer in comparison.layers if layer.changed]
    if changed:
        rows5 = [
            (
                str(x.index),
                f"{x.old}",
                f"{x.new}",
                f"{x.old_bits:.2f} → {x.new_bits:.2f}",
                f"{x.old_bytes} → {x.new_bytes}",
            )
            for x in changed
        ]
        lines += ["<details><summary>Layers that changed</summary>", ""]
        lines += [*_table(("layer", "old", "new", "effective bits", "bytes per token"), rows5), "</details>", ""]
    if report.ignored:
        lines += [f"{report.ignored} findings are ignored by configuration.", ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[Any], *, escaped: bool = False) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell if escaped else _escape(cell) for cell in row) + " |" for row in rows]
    return [*lines, ""]


def _escape(text: str) -> str:
    """Escape Markdown, HTML and @mentions."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", plain).replace("\\@", "@\u200b")


def to_github(report: DiffReport) -> str:
    """Workflow commands, at most ANNOTATIONS a level; also appends the Markdown to ``GITHUB_STEP_SUMMARY``.

    Raises:
        UsageError: if the step summary cannot be written.
    """
    lines = []
    name = report.new_name
    place = None if git.is_file_name(name) or os.path.lexists(name) else git.parse(name)
    file = name if place is None else place.path
    for severity, level in _LEVELS.items():
        groups = [(f, group) for f, group in grouped(report.findings) if f.severity == severity]
        shown = groups if len(groups) <= ANNOTATIONS else groups[: ANNOTATIONS - 1]
        for finding, group in shown:
            message = f"{group_message(group)} ({group_fingerprint(group)})"
            lines.append(_annotation(level, file, finding.rule, message))
        if len(shown) < len(groups):
            rest = (
                f"{len(groups) - len(shown)} more findings of this level are in the step summary and in --format json"
            )
            lines.append(_annotation(level, file, "more findings", rest))
    lines.append(f"kvtuner-search diff: {report.verdict}")
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        _append_summary(Path(summary), to_markdown(report))
    return "\n".join(lines) + "\n"


def _annotation(level: str, file: str, title: str, message: str) -> str:
    head = ",".join(
        f"{key}={_property(value)}" for key, value in (("file", file), ("title", f"kvtuner-search {title}"))
    )
    return f"::{level} {head}::{_data(message)}"


def _data(text: str) -> str:
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _append_summary(path: Path, text: str) -> None:
    try:
        room = SUMMARY_BYTES - (path.stat().st_size if path.exists() else 0)
        data = text.encode()
        if len(data) > room:
            note = b"\n\n*The rest did not fit into GitHub's limit; see `--format json`.*\n"
            data = data[: max(0, room - len(note))].decode(errors="ignore").encode() + note
            data = data if len(data) <= room else b""
        # O_NONBLOCK: opening a pipe that nobody reads must not wait.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        with os.fdopen(handle, "ab") as stream:
            stream.write(data)
    except OSError as error:
        raise UsageError(f"cannot write GITHUB_STEP_SUMMARY={path}: {error.strerror}: unset it") from error


def to_junit(report: DiffReport) -> str:
    """One test case a rule: failed if a finding fails the gate, with the other findings as its output."""
    from xml.etree import ElementTree

    suite = ElementTree.Element("testsuite", name="kvtuner-search diff")
    failures = 0
    for rule in RULES:
        found = [finding for finding in report.findings if finding.rule == rule]
        case = ElementTree.SubElement(suite, "testcase", classname="kvtuner-search.diff", name=rule)
        text = _ILLEGAL_XML.sub(
            "�", "\n".join(f"{f.severity}: {printable(f.message)} ({f.fingerprint})" for f in found)
        )
        if found and (RULES[rule].fixed or not report.settings.passes(found)):
            failures += 1
            ElementTree.SubElement(case, "failure", message=text.splitlines()[0], type=found[0].severity).text = text
        elif found:
            ElementTree.SubElement(case, "system-out").text = text
    suite.attrib |= {"tests": str(len(RULES)), "failures": str(failures), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
