"""``kvtuner-search diff``: compare two profiles as a review gate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from kvtuner_search.cli.options import json_option, memory_option
from kvtuner_search.errors import UsageError
from kvtuner_search.files import current_folder
from kvtuner_search.output import write_commands
from kvtuner_search.profile.canonical import canonical_json
from kvtuner_search.profile.changes import make_finding
from kvtuner_search.profile.compare import Budgets, added, compare
from kvtuner_search.profile.report import DiffReport, to_github, to_json, to_junit, to_markdown
from kvtuner_search.profile.rules import RULES, rules_markdown
from kvtuner_search.profile.settings import FAIL_ON, load_settings, settings_of
from kvtuner_search.profile.source import load_from, load_old

FORMATS = ("text", "json", "markdown", "github", "junit")


@click.command(
    "diff",
    epilog="Exit codes: 0 pass, 1 a finding reaches --fail-on, 2 usage, 3 unreadable or invalid profile, 4 not comparable.",
)
@click.argument("old", required=False)
@click.argument("new", required=False)
@click.option("--fail-on", type=click.Choice(FAIL_ON), help="Lowest severity that fails.", show_default="error")
@click.option("--max-bytes-per-token", type=click.IntRange(min=0), help="Most bytes per token of NEW that pass.")
@click.option(
    "--max-loss-increase", type=click.FloatRange(min=0), help="Largest increase of kl and nll that passes, in nats."
)
@memory_option
@click.option(
    "--format", "style", type=click.Choice(FORMATS), default="text",
    help="github writes annotations and the step summary.",
)  # fmt: skip
@json_option
@click.option(
    "--config", type=click.Path(path_type=Path),
    help="TOML file with [tool.kvtuner-search.diff].", show_default="the nearest pyproject.toml that has it",
)  # fmt: skip
@click.option(
    "--config-from", metavar="REF",
    help="Take that file from a revision in git; what the working tree changes in it is a finding.",
)  # fmt: skip
@click.option("--rules", is_flag=True, allow_from_autoenv=False, help="List the rules and exit.")
def command(
    old: str | None,
    new: str | None,
    fail_on: str | None,
    max_bytes_per_token: int | None,
    max_loss_increase: float | None,
    memory: int | None,
    style: str,
    as_json: bool,
    config: Path | None,
    config_from: str | None,
    rules: bool,
) -> int:
    """Report what changed from profile OLD to profile NEW, and whether the gate allows it.

    Each is a file, REF:path for a file in git, or - for standard input. Write ./REF:path for a file that has such a name.
    """
    style = "json" if as_json else style
    if rules:
        _print_rules(style)
        return 0
    if old is None or new is None:
        raise UsageError("two profiles are needed: kvtuner-search diff OLD NEW")
    if old == new == "-":
        raise UsageError("only one of the two profiles can come from standard input: name a file for the other")
    if max_loss_increase is not None and not math.isfinite(max_loss_increase):
        raise UsageError(f"--max-loss-increase {max_loss_increase} is not a number: give a finite number of nats")
    if config is not None and config_from is not None:
        raise UsageError("--config and --config-from name two configurations: give one of them")
    change = None
    if config_from is None:
        settings = load_settings(config, current_folder())
    else:
        settings, change = settings_of(config_from, current_folder())
    given: dict[str, Any] = {
        "fail_on": fail_on,
        "max_bytes_per_token": max_bytes_per_token,
        "max_loss_increase": max_loss_increase,
        "memory": memory,
    }
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    budgets = Budgets(settings.max_bytes_per_token, settings.max_loss_increase)
    before, after = load_old(old, new), load_from(new, any_layout=True)
    comparison = added(after, budgets) if before is None else compare(before, after, budgets)
    found = comparison.findings
    if change is not None:
        found = [make_finding("gate-changed", after, "pyproject.toml", change.message, change.old, change.new), *found]
    findings, ignored = settings.apply(found)
    report = DiffReport(comparison, findings, ignored, settings, old, new)
    if style == "text":
        from kvtuner_search.profile.terminal import print_report

        print_report(report)
    else:
        write = {"json": to_json, "markdown": to_markdown, "github": to_github, "junit": to_junit}[style]
        text = write(report)
        if style == "github":
            write_commands(text)
        else:
            click.echo(text, nl=False)
    return report.exit_code


def _print_rules(style: str) -> None:
    if style == "json":
        rows = [{"id": r.id, "severity": r.severity, "fires": r.fires, "fixed": r.fixed} for r in RULES.values()]
        click.echo(canonical_json(rows), nl=False)
    elif style == "markdown":
        click.echo(rules_markdown(), nl=False)
    else:
        from kvtuner_search.profile.terminal import print_rules

        print_rules([(r.id, r.severity + (" (fixed)" if r.fixed else ""), r.fires) for r in RULES.values()])
