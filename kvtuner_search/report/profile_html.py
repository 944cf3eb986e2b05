"""One profile as a self-contained page: inline style and SVG, no script, nothing fetched, all text escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from kvtuner_kernels.layout import BITS, TensorSpec
from kvtuner_search.profile.capacity import capacity, kinds_line, request_rows
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import banded_sides, interval_of, percent, printable, signed, size, specs_by_layer
from kvtuner_search.profile.validation_text import (
    CHECK_HEADS,
    MEASURE_HEADS,
    check_rows,
    fact_rows,
    measure_rows,
    verdict,
)
from kvtuner_search.report.band_figures import bits_by_band
from kvtuner_search.report.page import mixed_colours

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5d6b7c; --line: #d8dee6; --page: #fbfcfd; --card: #fff;
  --b2: #d1495b; --b4: #e0a030; --b8: #3f9b73; --b16: #4a7fc1; --band: #6a4fb3; --accent: #2f6fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --dim: #98a5b5; --line: #2f3945; --page: #12171d; --card: #1a2129;
  --b2: #e0697a; --b4: #e8b454; --b8: #57b88d; --b16: #6d9fdb; --band: #b8a3f5; --accent: #7fb2ec; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
p { margin: .2rem 0; } .dim, figcaption, th { color: var(--dim); } code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.figures b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 500; text-align: left; } th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.pairs td:first-child { white-space: nowrap; } td.n, th.n { text-align: right; white-space: nowrap; } figure { margin: 0; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; } .axis { stroke: var(--line); }
.band { fill: var(--band); } .window { fill: var(--accent); }
svg text.ink, svg text.strong { fill: var(--ink); } svg text.onheat { fill: var(--page); } svg text.small { font-size: 10px; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin: 0 .3em 0 .9em; }
.warn { border-left: 4px solid var(--b4); padding: .4rem .8rem; background: var(--card); margin: 1rem 0; }
"""
_COLOURS = mixed_colours(_STYLE) + " ".join(f".b{bits} {{ fill: var(--b{bits}); }}" for bits in BITS)
_WIDTH = 960  # SVG units


def profile_html(profile: Profile, memory: int | None = None, context: int | None = None) -> str:
    """The page for a valid profile; ``memory`` in bytes adds the number of tokens that fit, ``context`` the bytes of such a request."""
    model, storage = profile.model, profile.storage
    saving = percent(storage.bytes_per_token_16bit, storage.bytes_per_token)
    figures = [
        (f"{storage.effective_bits:.3f}", "effective bits of 16"),
        (f"{storage.bytes_per_token:,}", f"bytes per token, {saving} of {storage.bytes_per_token_16bit:,}"),
    ]
    if memory is not None:
        figures.append((f"{capacity(memory, profile):,}", f"tokens in {size(memory)}"))
    for tokens, nbytes, fit in request_rows(profile, memory, context):
        figures.append((f"{nbytes:,}", f"bytes of a request of {tokens:,} tokens"))
        if fit is not None and memory is not None:
            figures.append((f"{fit:,}", f"such requests in {size(memory)}"))
    revision = f" at {model.revision}" if model.revision else ""
    kinds = kinds_line(profile)
    shape = f"{model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_dim} channels"
    body = [
        f"<h1>{_text(profile.name)}</h1>",
        f"<p>{_text(model.id + revision)} <span class=dim>{_text(model.architecture)}, {shape}</span></p>",
        *([f"<p>Attention in {kinds}</p>"] if kinds else []),
        f"<p class=dim><code>{profile.digest}</code></p>",
        '<div class="figures">'
        + "".join(f"<div><b>{value}</b><span class=dim>{label}</span></div>" for value, label in figures)
        + "</div>",
        *_warnings(profile),
        "<h2>Bits per layer</h2>",
        _bits_svg(profile),
        *_bands(profile),
        _specs(profile),
        *_quality(profile),
        *_front(profile),
        "<h2>Provenance</h2>",
        _provenance(profile),
        *_validation(profile),
    ]
    title = f"<title>{_text(profile.name)}</title>"
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">{viewport}{title}<style>{_STYLE}{_COLOURS}</style></head>'
    return head + "\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"


def _text(value: object) -> str:
    return html.escape(printable(value), quote=True)


def _warnings(profile: Profile) -> list[str]:
    lines = []
    if not profile.quality and profile.storage.bytes_per_token != profile.storage.bytes_per_token_16bit:
        lines.append("No quality was measured for this profile.")
    if profile.validation is None:
        lines.append("This profile was not validated on a server.")
    elif verdict(profile) != "pass":
        lines.append(f"Validation on a server: {_text(verdict(profile))}.")
    return [f'<p class="warn">{" ".join(lines)}</p>'] if lines else []


def _bits_svg(profile: Profile) -> str:
    """Two rows of columns, keys up and values down, whose height is the bits on a logarithmic scale."""
    layers, height, middle = profile.layer_specs(), 190, 84
    step = (_WIDTH - 60) / len(layers)
    bars, gap = [], min(2.0, step / 6)
    for index, (layer, attention) in enumerate(zip(layers, profile.model.kinds, strict=True)):
        x = 50 + index * step
        if attention.window:
            note = f"<title>layer {index}: {attention}</title>"
            bars.append(
                f'<rect class="window" x="{x:.2f}" y="{middle + 1}" width="{step - gap:.2f}" height="4">{note}</rect>'
            )
        for spec, up in ((layer.key, True), (layer.value, False)):
            tall = _tall(spec)
            y = middle - tall if up else middle + 6
            what = f"layer {index} {'keys' if up else 'values'}: {spec}"
            what += f", {spec.mean_bits:g} bits on average" if spec.banded else ""
            kind = "band" if spec.banded else f"b{spec.bits}"
            bars.append(
                f'<rect class="{kind}" x="{x:.2f}" y="{y:g}" width="{step - gap:.2f}" height="{tall:g}"><title>{what}</title></rect>'
            )
        if index % max(1, -(-len(layers) // 16)) == 0:
            bars.append(f'<text x="{x + step / 2:.2f}" y="{height - 8}" text-anchor="middle">{index}</text>')
    bars.append(f'<text x="0" y="{middle - 20}">keys</text><text x="0" y="{middle + 34}">values</text>')
    legend = "".join(
        f'<span class="key" style="background: var(--b{bits})"></span>{bits}{" (raw)" if bits == 16 else ""}'
        for bits in BITS
    )
    if banded_sides(layers):
        legend += '<span class="key" style="background: var(--band)"></span>in bands, on average'
    if profile.model.layer_kinds is not None:
        legend += '<span class="key" style="background: var(--accent)"></span>line between keys and values: a window or chunks'
    label = "Bits of keys and values in each layer"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(bars)}</svg>'
        f"<figcaption>Bits of the codes in each layer:{legend}</figcaption></figure>"
    )


def _tall(spec: TensorSpec) -> float:
    """Height of a column: 16 for 2 bits and for each doubling."""
    return max(3.0, round(16 * math.log2(spec.mean_bits), 2))


def _bands(profile: Profile) -> list[str]:
    """The sides stored in bands, and the bits of each band; empty if there are none."""
    sides = banded_sides(profile.layer_specs())
    if not sides:
        return []
    caption = f"In bands of a fitted basis: {sides}. Band 1 has the most valuable channels; a block in one colour is stored without bands."
    return [
        "<h2>Bits by band of channels</h2>",
        f"<figure>{bits_by_band(profile.layer_specs())}<figcaption>{caption}</figcaption></figure>",
    ]


def _specs(profile: Profile) -> str:
    model = profile.model
    kinds, rows = model.layer_kinds is not None, []
    for layers, spec, kind in specs_by_layer(profile.layer_specs(), model.kinds):
        bits = spec.effective_bits(model.num_kv_heads, model.head_dim)
        nbytes = spec.bytes_per_token(model.num_kv_heads, model.head_dim)
        row = [layers, str(spec.key), str(spec.value), f"{bits:.3f}", f"{nbytes:,}", str(kind)]
        rows.append(row if kinds else row[:-1])
    heads = ["layers", "keys", "values", "effective bits", "bytes per token", "attention"]
    return _table(heads if kinds else heads[:-1], rows, right=(3, 4))


def _quality(profile: Profile) -> list[str]:
    if not profile.quality:
        return []
    heads = ("measure", "16 bits", "this profile", "change", "interval", "samples", "tokens")
    rows = [
        (
            f"{m.metric}, {m.data}, {m.split} split",
            f"{m.baseline:.6g}",
            f"{m.value:.6g}",
            signed(m.delta),
            interval_of(m) + (f" at {m.confidence:.0%}" if m.has_interval else ""),
            f"{m.samples:,}",
            f"{m.tokens:,}",
        )
        for m in profile.quality
    ]
    return ["<h2>Quality against the 16-bit cache</h2>", _table(heads, rows, right=(1, 2, 3, 4, 5, 6))]


def _front(profile: Profile) -> list[str]:
    """The front: loss over bytes, with this profile's point marked."""
    points = profile.pareto
    if not points:
        return []
    chosen = [str(spec) for spec in profile.layer_specs()]
    low, high = points[0].bytes_per_token, points[-1].bytes_per_token
    best, worst = points[-1].loss, points[0].loss
    left, top, wide, tall = 70, 14, _WIDTH - 90, 220
    spots = []
    for point in points:
        x = left + wide * ((point.bytes_per_token - low) / (high - low) if high > low else 0.5)
        y = top + tall * ((worst - point.loss) / (worst - best) if worst > best else 0.5)
        spots.append((x, y, point, point.layers == chosen))
    parts = [
        f'<line class="axis" x1="{left}" y1="{top + tall}" x2="{left + wide}" y2="{top + tall}"/>',
        f'<line class="axis" x1="{left}" y1="{top}" x2="{left}" y2="{top + tall}"/>',
        '<polyline fill="none" stroke="var(--accent)" stroke-opacity=".5" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in spots)
        + '"/>',
    ]
    for x, y, point, mine in spots:
        note = f"{point.bytes_per_token:,} bytes, {point.loss:.6g} nats, {_text(point.origin)}"
        colour, radius = ("var(--b2)", 7) if mine else ("var(--accent)", 4)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{note}</title></circle>')
    parts += [
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{worst:.3g}</text>',
        f'<text x="{left - 6}" y="{top + tall}" text-anchor="end">{best:.3g}</text>',
        f'<text x="{left}" y="{top + tall + 18}">{low:,}</text>',
        f'<text x="{left + wide}" y="{top + tall + 18}" text-anchor="end">{high:,}</text>',
        f'<text x="{left + wide / 2:.0f}" y="{top + tall + 18}" text-anchor="middle">bytes per token</text>',
    ]
    label = "Loss over bytes per token"
    caption = "Loss in nats over bytes per token"
    marked = any(mine for *_, mine in spots)
    caption += "; the large point is this profile" if marked else "; this profile is not among these points"
    svg = f'<svg viewBox="0 0 {_WIDTH} {top + tall + 28}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return ["<h2>Front</h2>", f"<figure>{svg}<figcaption>{caption}.</figcaption></figure>"]


def _provenance(profile: Profile) -> str:
    origin = profile.provenance
    rows: list[tuple[str, object]] = [("origin", origin.origin), ("source", origin.source), ("tool", origin.tool)]
    rows.append(("computed on", ", ".join(part for part in (origin.device, origin.dtype) if part)))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in sorted(origin.versions.items()))))
    if origin.search:
        found = origin.search.model_dump(exclude_none=True)
        rows.append(("search", ", ".join(f"{name} {value}" for name, value in found.items())))
    rows += [
        ("data", f"{d.name}, {d.split} split: {d.samples:,} samples, {d.tokens:,} tokens, {d.digest}")
        for d in origin.data
    ]
    if profile.transforms:
        rows.append(("transforms", f"{profile.transforms.file}, {profile.transforms.digest}"))
    rows += [("note", note) for note in origin.notes]
    return _table(("", ""), [(name, str(value)) for name, value in rows if value])


def _validation(profile: Profile) -> list[str]:
    block = profile.validation
    if block is None:
        return []
    return [
        f"<h2>Validation on a server: {_text(verdict(profile))}</h2>",
        _table(MEASURE_HEADS, measure_rows(block), right=(1, 2, 3, 4, 5, 6)),
        _table(CHECK_HEADS, check_rows(block), right=(1,)),
        _table(("", ""), fact_rows(block)),
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: tuple[int, ...] = ()) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if index in right else ''}>{_text(cell)}</{tag}>" for index, cell in enumerate(row)
        )

    head = f"<thead><tr>{cells('th', heads)}</tr></thead>" if any(heads) else ""
    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    kind = "" if any(heads) else ' class="pairs"'
    return f'<div class="scroll"><table{kind}>{head}<tbody>{lines}</tbody></table></div>'
