"""Profiles and comparisons for the terminal. Text from files is never read as markup."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO, Any, Final

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from kvtuner_kernels.layout import LayerSpec, TensorSpec
from kvtuner_kernels.places import BANDS
from kvtuner_search.profile.capacity import capacity, kinds_line, request_rows
from kvtuner_search.profile.compare import ProfileComparison, basis_changed
from kvtuner_search.profile.report import (
    DiffReport,
    group_fingerprint,
    group_message,
    grouped,
    quality_tables,
)
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import (
    banded_sides,
    interval_of,
    percent,
    printable,
    ranges,
    runs,
    shortened,
    signed,
    size,
    specs_by_layer,
)
from kvtuner_search.profile.validation import Validation
from kvtuner_search.profile.validation_text import (
    CHECK_HEADS,
    MEASURE_HEADS,
    check_rows,
    fact_rows,
    measure_rows,
    verdict,
)

_SEVERITY_STYLE: Final = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_VERDICT_STYLE: Final = {"pass": "bold green", "fail": "bold red", "not-comparable": "bold red"}
_QUALITY_STYLE: Final = {"regressed": "red", "improved": "green", "inconclusive": "yellow", "incomparable": "yellow"}
_STRIP: Final = 64  # layers in one line of the strip
_WIDTH: Final = 120  # columns where the output is not a terminal
_TEXT: Final = 1000  # characters of a note; --json has the rest
_ROWS: Final = 100  # of one table; nobody reads more, and laying out thousands takes seconds


def console(file: IO[str] | None = None) -> Console:
    """Standard output; without any escape sequence if NO_COLOR is set or it is not a terminal."""
    stream = sys.stdout if file is None else file
    terminal = stream.isatty()
    plain = bool(os.environ.get("NO_COLOR")) or not (terminal or os.environ.get("FORCE_COLOR"))
    width = None if terminal or "COLUMNS" in os.environ else _WIDTH
    return Console(
        file=stream,
        color_system=None if plain else "auto",
        force_terminal=False if plain else None,
        width=width,
        highlight=False,
        markup=False,
        emoji=False,
    )


def print_report(report: DiffReport) -> None:
    """A comparison: totals, layers that changed, quality, provenance, findings, verdict."""
    out, comparison = console(), report.comparison
    old, new = comparison.old, comparison.new
    out.print(Text(printable(new.model.id), "bold"))
    if comparison.added:
        out.print("  old  none: compared with the 16-bit cache")
    else:
        out.print(f"  old  {printable(old.name)}  {old.digest[:19]}  {printable(report.old_name)}")
    out.print(f"  new  {printable(new.name)}  {new.digest[:19]}  {printable(report.new_name)}\n")
    if comparison.comparable:
        _totals(out, report)
        _changed_layers(out, comparison)
        for title, rows in quality_tables(comparison):
            table = _table(title, "old", "new", "change", "verdict")
            for *cells, outcome in rows:
                table.add_row(*cells, Text(outcome, _QUALITY_STYLE.get(outcome, "")))
            _show(out, table)
        if comparison.provenance:
            table = _table("provenance", "old", "new")
            for row in comparison.provenance:
                table.add_row(*(shortened(printable(cell)) for cell in row))
            _show(out, table)
    _findings(out, report)
    out.print(Text.assemble(("verdict: ", ""), (report.verdict, _VERDICT_STYLE[report.verdict])))


def print_rules(rows: Sequence[tuple[str, str, str]]) -> None:
    """The catalogue of rules."""
    table = _table("rule", "severity", "fires when")
    for rule, severity, fires in rows:
        table.add_row(rule, Text(severity, _SEVERITY_STYLE.get(severity.split()[0], "")), fires)
    console().print(table)


def print_card(profile: Profile, memory: int | None, context: int | None = None) -> None:
    """One profile: figures, also for requests of ``context`` tokens; layers, quality, front, provenance."""
    out, model, storage = console(), profile.model, profile.storage
    quantized = storage.bytes_per_token != storage.bytes_per_token_16bit
    origin = profile.provenance.origin + (", quality not measured" if quantized and not profile.quality else "")
    out.print(Text.assemble((printable(profile.name), "bold"), f"  {origin}"))
    revision = f" at {printable(model.revision)}" if model.revision else ""
    out.print(f"{printable(model.id)}{revision}  {printable(model.architecture)}")
    out.print(f"{model.num_layers} layers x {model.num_kv_heads} KV heads x {model.head_dim} channels")
    if model.layer_kinds is not None:
        out.print(f"attention in {kinds_line(profile)}")
    out.print(f"{profile.digest}\n", style="dim")
    table = _grid()
    table.add_row("effective bits", Text(f"{storage.effective_bits:.3f}", "bold"), "of 16")
    saving = percent(storage.bytes_per_token_16bit, storage.bytes_per_token)
    table.add_row(
        "bytes per token",
        Text(f"{storage.bytes_per_token:,}", "bold"),
        f"of {storage.bytes_per_token_16bit:,} ({saving})",
    )
    if memory is not None:
        table.add_row(f"tokens in {size(memory)}", Text(f"{capacity(memory, profile):,}", "bold"))
    if storage.bytes_per_token_full is not None:
        table.add_row("in full layers", Text(f"{storage.bytes_per_token_full:,}", "bold"), "bytes per token")
        table.add_row("in windows", Text(f"{storage.bytes_per_request_windows:,}", "bold"), "bytes per request at most")
    for tokens, nbytes, fit in request_rows(profile, memory, context):
        fits = "" if fit is None or memory is None else f"{fit:,} such requests in {size(memory)}"
        table.add_row(f"bytes of {tokens:,} tokens", Text(f"{nbytes:,}", "bold"), fits)
    banded = banded_sides(profile.layer_specs())
    _show(out, table, last=True)
    if banded:
        out.print(f"in bands of a fitted basis: {banded}")
    out.print()
    _strip(out, profile.layer_specs())
    _specs(out, profile)
    _measures(out, profile)
    _front(out, profile)
    _provenance(out, profile)
    if profile.validation is not None:
        out.print()
        print_validation(out, profile.validation, verdict(profile))


def print_validation(out: Console, block: Validation, verdict: str) -> None:
    """A validation block: verdict, measures, checks, and the rest."""
    style = _VERDICT_STYLE.get(verdict, "bold red")
    out.print(Text.assemble(("validation on a server: ", "bold"), (verdict, style)))
    for heads, rows, right in (
        (MEASURE_HEADS, measure_rows(block), (1, 2, 3, 5, 6)),
        (CHECK_HEADS, check_rows(block), (1,)),
    ):
        if rows:
            table = _table(*heads, right=right)
            for row in rows:
                table.add_row(*row)
            _show(out, table)
    table = _grid()
    for name, value in fact_rows(block):
        table.add_row(Text(name, "dim"), shortened(value, _TEXT))
    _show(out, table, last=True)


def _totals(out: Console, report: DiffReport) -> None:
    table = _table("total", "old", "new", "change", right=(1, 2, 3))
    for row in report.totals():
        table.add_row(*row)
    _show(out, table)


def _changed_layers(out: Console, comparison: ProfileComparison) -> None:
    if not any(layer.changed for layer in comparison.layers):
        other = basis_changed(comparison.old, comparison.new)
        out.print(
            "all layers have the same specs, in other bases\n"
            if other
            else "all layers are stored in the same format\n"
        )
        return
    table = _table("layers", "old", "new", "effective bits", "bytes per token", right=(3, 4))
    for indices, (old, new) in runs([(layer.old, layer.new) for layer in comparison.layers]):
        if old == new:
            continue
        layer = comparison.layers[indices[0]]
        style = "red" if layer.new_bits < layer.old_bits else "green" if layer.new_bits > layer.old_bits else ""
        bits = Text(f"{layer.old_bits:.3f} → {layer.new_bits:.3f}", style)
        table.add_row(ranges(indices), str(old), str(new), bits, f"{layer.old_bytes} → {layer.new_bytes}")
    alike = [layer.index for layer in comparison.layers if not layer.changed]
    if alike:
        table.add_row(ranges(alike), Text("stored alike", "dim"))
    _show(out, table)


def _findings(out: Console, report: DiffReport) -> None:
    groups = grouped(report.findings)
    for finding, group in groups[:_ROWS]:
        style = _SEVERITY_STYLE[finding.severity]
        head = Text.assemble((f"{finding.severity:7}", style), f"  {finding.rule}  ")
        out.print(head.append(group_fingerprint(group), "dim"))
        out.print(f"         {group_message(group)}", soft_wrap=True)
    if len(groups) > _ROWS:
        out.print(f"and {len(groups) - _ROWS:,} more, which --json has")
    if report.ignored:
        out.print(f"{report.ignored} findings are ignored by configuration")
    if report.findings or report.ignored:
        out.print()


def bits_style(bits: float) -> str:
    """The colour for a number of bits: red up to 2, yellow up to 4, green up to 8, else blue."""
    return next((colour for limit, colour in ((2, "red"), (4, "yellow"), (8, "green")) if bits <= limit), "blue")


def _strip(out: Console, layers: list[LayerSpec]) -> None:
    """One character a layer: its bits, F for 16. A side that is banded somewhere has a line for each band."""
    banded = False
    for start in range(0, len(layers), _STRIP):
        part = layers[start : start + _STRIP]
        for name, sides in (("keys", [x.key for x in part]), ("values", [x.value for x in part])):
            lines = BANDS if any(spec.banded for spec in sides) else 1
            banded |= lines > 1
            for band in range(lines):
                head = f"{name}{start:{12 - len(name)}}  " if band == 0 else " " * 14
                line = Text(head + (f"{band + 1}  " if lines > 1 else ""))
                for spec in sides:
                    line.append(*_mark(spec, band))
                out.print(line)
    out.print("bits of each layer from the first to the last, F is 16", style="dim")
    if banded:
        out.print(
            "lines 1 to 8: bits of the eight bands of channels, the most valuable in 1; dots: stored without bands",
            style="dim",
        )
    out.print()


def _mark(spec: TensorSpec, band: int) -> tuple[str, str]:
    """The character for a side in the line of a band, and its style."""
    if not spec.banded and band > 0:
        return "·", "dim"
    bits = spec.bands[band] if spec.banded else spec.bits
    return "F" if bits == 16 else str(bits), bits_style(bits)


def _specs(out: Console, profile: Profile) -> None:
    model = profile.model
    heads = ["layers", "keys", "values", "effective bits", "bytes per token"]
    table = _table(*heads, *(["attention"] if model.layer_kinds else []), right=(3, 4))
    for layers, spec, kind in specs_by_layer(profile.layer_specs(), model.kinds):
        bits = spec.effective_bits(model.num_kv_heads, model.head_dim)
        nbytes = spec.bytes_per_token(model.num_kv_heads, model.head_dim)
        more = [str(kind)] if model.layer_kinds else []
        table.add_row(layers, str(spec.key), str(spec.value), f"{bits:.3f}", f"{nbytes:,}", *more)
    _show(out, table)


def _measures(out: Console, profile: Profile) -> None:
    if not profile.quality:
        return
    table = _table("quality", "16 bits", "profile", "change", "interval", "samples", "tokens", right=(1, 2, 3, 5, 6))
    for m in profile.quality:
        interval = interval_of(m) + (f" at {m.confidence:.0%}" if m.has_interval else "")
        figures = (f"{m.baseline:.6g}", f"{m.value:.6g}", signed(m.delta), interval, f"{m.samples:,}", f"{m.tokens:,}")
        table.add_row(f"{m.metric} {shortened(printable(m.data))} {m.split}", *figures)
    _show(out, table)


def _front(out: Console, profile: Profile) -> None:
    if not profile.pareto:
        return
    chosen = [str(spec) for spec in profile.layer_specs()]
    raw_bytes = profile.storage.bytes_per_token_16bit
    table = _table("front", "bytes per token", "effective bits", "loss (nats)", "origin", right=(1, 2, 3))
    for point in profile.pareto:
        mark = "this" if point.layers == chosen else ""
        bits = 16 * point.bytes_per_token / raw_bytes if raw_bytes else 0.0
        table.add_row(
            mark, f"{point.bytes_per_token:,}", f"{bits:.3f}", f"{point.loss:.6g}", shortened(printable(point.origin))
        )
    _show(out, table)


def _provenance(out: Console, profile: Profile) -> None:
    origin = profile.provenance
    table = _grid()
    rows: list[tuple[str, object]] = [
        ("source", origin.source),
        ("tool", origin.tool),
        ("computed on", ", ".join(part for part in (origin.device, origin.dtype) if part)),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(origin.versions.items()))),
    ]
    if origin.search:
        found = origin.search.model_dump(exclude_none=True)
        rows.append(("search", ", ".join(f"{name} {value}" for name, value in found.items())))
    rows += [
        ("data", f"{d.name} {d.split}: {d.samples:,} x, {d.tokens:,} tokens, {d.digest[:19]}") for d in origin.data
    ]
    if profile.transforms:
        rows.append(("transforms", f"{profile.transforms.file} {profile.transforms.digest[:19]}"))
    if profile.validation is None:
        rows.append(("validation", "none: not validated on a server"))
    rows += [("note", note) for note in origin.notes]
    for name, value in rows:
        if value:
            table.add_row(Text(name, "dim"), shortened(printable(value), _TEXT))
    _show(out, table, last=True)


class _Table(Table):
    """A table that counts the rows beyond its bound instead of laying them out."""

    left_out = 0

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row, or count it."""
        if self.row_count < _ROWS:
            super().add_row(*cells, **options)
        else:
            self.left_out += 1


def _show(out: Console, table: _Table, *, last: bool = False) -> None:
    """Print a table, how many rows it lacks, and an empty line unless it is the ``last``."""
    out.print(table)
    if table.left_out:
        out.print(f"and {table.left_out:,} more, which --json has")
    if not last:
        out.print()


def _grid() -> _Table:
    """Columns without heads or lines, as rich's ``Table.grid`` makes them."""
    return _Table(box=None, padding=(0, 3), collapse_padding=True, show_header=False, show_edge=False, pad_edge=False)


def _table(*heads: str, right: tuple[int, ...] = ()) -> _Table:
    table = _Table(box=None, header_style="bold", padding=(0, 2, 0, 0), show_edge=False)
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index in right else "left", overflow="fold")
    return table
