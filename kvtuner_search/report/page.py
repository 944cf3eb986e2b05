"""Parts of a self-contained HTML page: style, sections, tables, figures. All cells and names are escaped here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from kvtuner_kernels.layout import BITS
from kvtuner_search.report.svg import escaped

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5d6b7c; --line: #d8dee6; --page: #fbfcfd; --card: #fff; --onbar: #fff;
  --b2: #c23b4e; --b4: #b97510; --b8: #2f8a63; --b16: #3f74b8; --band: #6a4fb3; --accent: #2f6fb5; --heat: #b5381c;
  --searched: #2f6fb5; --refined: #7a3fb0; --uniform: #2f8a63; --proxy: #b97510; --preset: #0f8a94; --plain: #5d6b7c; --fisher: #a8378c;
  --random: #9aa5b1; --chosen: #c2274a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --dim: #98a5b5; --line: #2f3945; --page: #12171d; --card: #1a2129;
  --onbar: #12171d; --b2: #ec7c8b; --b4: #e8b454; --b8: #5fc496; --b16: #7badea; --band: #b8a3f5; --accent: #7fb2ec; --heat: #ff9a66;
  --searched: #7fb2ec; --refined: #c39af0; --uniform: #5fc496; --proxy: #e8b454; --preset: #5fcad3; --plain: #98a5b5; --fisher: #ef93d5;
  --random: #7d8a98; --chosen: #ff7a95; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.55rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .6rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.3rem 0 .4rem; overflow-wrap: anywhere; }
p, ul { margin: .3rem 0; } ul { padding-left: 1.2rem; } a { color: var(--accent); } nav { margin: .8rem 0; } nav a { margin-right: 1rem; white-space: nowrap; }
.dim, figcaption, th { color: var(--dim); } code { font: 12px ui-monospace, monospace; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 .8rem; }
.figures div { flex: 1 1 8.1rem; max-width: 16rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .45rem .7rem; font-size: .8rem; line-height: 1.35; }
.figures b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th { font-weight: 500; text-align: left; vertical-align: bottom; } th, td { padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; overflow-wrap: break-word; max-width: 34rem; } td:first-child { min-width: 8.6rem; } td.n, th.n { text-align: right; } td.n { white-space: nowrap; } tr.strong { font-weight: 650; }
td i { display: block; height: .7rem; margin-top: .35rem; background: var(--accent); opacity: .55; border-radius: .15rem; } td.bar { width: 24rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); }
figure { margin: .4rem 0; } figure svg { display: block; width: 100%; min-width: 720px; height: auto; } figcaption { font-size: .87rem; margin-top: .2rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; align-items: center; font-size: .87rem; margin: .4rem 0; }
.legend > span { display: inline-flex; align-items: center; gap: .35rem; } .legend svg { width: 14px; height: 14px; }
.key { width: .85rem; height: .85rem; border-radius: .15rem; } .rule { width: 1.6rem; border-top: 2px solid; }
.warn { border-left: 4px solid var(--b4); padding: .4rem .8rem; background: var(--card); margin: .8rem 0; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; } svg text.ink { fill: var(--ink); } svg text.small { font-size: 10px; }
svg text.strong { fill: var(--ink); font-weight: 650; } svg text.onbar { fill: var(--onbar); font-weight: 650; } svg text.onheat { fill: var(--page); }
.axis { stroke: var(--dim); } .grid { stroke: var(--line); } .cover { fill: transparent; } .frame { stroke: var(--line); } .heat { fill: var(--heat); } .band { fill: var(--band); }
.dot.ink { fill: var(--ink); } .dot.onheat { fill: var(--page); }
.line { fill: none; stroke-width: 1.5; } .stroke { fill: none; stroke-width: 1.7; }
.line.accent { stroke: var(--accent); } .line.head { stroke-width: 1.1; stroke-opacity: .7; } .line.front { stroke-width: 1.8; stroke-opacity: .75; }
.line.searched { stroke: var(--searched); } .line.random { stroke: var(--random); stroke-dasharray: 6 4; }
.line.predicted { stroke: var(--proxy); stroke-dasharray: 1.5 4; stroke-linecap: round; stroke-width: 2; }
.rule.searched { border-color: var(--searched); } .rule.random { border-color: var(--random); border-top-style: dashed; }
.rule.predicted { border-color: var(--proxy); border-top-style: dotted; }
"""
_FILLS: Final = {
    **{f"b{bits}": f"b{bits}" for bits in BITS},
    "bb": "band",
    **{
        f"o-{o}": o
        for o in ("searched", "refined", "uniform", "proxy", "fisher", "preset", "plain", "random", "chosen")
    },
    "v0": "b2",
    "v1": "b4",
    "v2": "b16",
}
_COLOURS: Final = "".join(
    f".{name} {{ fill: var(--{colour}); background: var(--{colour}); }}"
    f" .stroke.{name}, .line.{name} {{ fill: none; stroke: var(--{colour}); }}\n"
    for name, colour in _FILLS.items()
)


def mixed_colours(style: str) -> str:
    """CSS for the bit-widths to which a style gives no colour of their own: the mix of their neighbours'."""
    known = [bits for bits in BITS if f"--b{bits}:" in style]
    rules = ""
    for bits in sorted(set(BITS) - set(known)):
        below = max((width for width in known if width < bits), default=known[0])
        above = min((width for width in known if width > bits), default=known[-1])
        rules += f"  --b{bits}: color-mix(in oklab, var(--b{below}), var(--b{above}));\n"
    return f":root {{\n{rules}}}\n" if rules else ""


def page(title: str, header: Sequence[str], sections: Sequence[tuple[str, str, Iterable[str]]], style: str = "") -> str:
    """A document; sections are (id, heading, markup); header, markup and further ``style`` are trusted, the rest is escaped."""
    links = "".join(f'<a href="#{name}">{escaped(heading)}</a> ' for name, heading, _ in sections)
    body = [*header, f"<nav>{links}</nav>"]
    for name, heading, parts in sections:
        body += [f'<section id="{name}"><h2>{escaped(heading)}</h2>', *parts, "</section>"]
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{escaped(title)}</title><style>{STYLE}{mixed_colours(STYLE)}{_COLOURS}{style}</style>'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body>\n</html>\n"
    )


def table(
    heads: Sequence[object],
    rows: Iterable[Sequence[object]],
    right: Collection[int] = (),
    code: Collection[int] = (),
    strong: int | None = None,
    bars: int | None = None,
    kinds: Mapping[int, str] | None = None,
) -> str:
    """A table of escaped cells.

    Args:
        heads: names of the columns; none is shown if all are empty.
        rows: cells of each row.
        right: columns of figures.
        code: columns of digests.
        strong: a row to stand out.
        bars: a column whose cells are fractions in [0, 1], drawn as bars.
        kinds: CSS classes of rows that have one.
    """

    def cell(name: str, column: int, content: object) -> str:
        if name == "td" and column == bars:
            return f'<td class="bar"><i style="width: {100 * float(str(content)):.1f}%"></i></td>'
        inner = escaped(content)
        if name == "td" and column in code:
            inner = f"<code>{inner}</code>"
        kind = " class=n" if column in right else ""
        return f"<{name}{kind}>{inner}</{name}>"

    head = "".join(cell("th", column, name) for column, name in enumerate(heads)) if any(heads) else ""
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(cell("td", column, content) for column, content in enumerate(row))
        classes = [*(["strong"] if index == strong else []), *((kinds or {}).get(index, "").split())]
        kind = f' class="{" ".join(classes)}"' if classes else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def figures(cards: Iterable[tuple[str, str]]) -> str:
    """Cards, each with a large figure and its meaning."""
    inner = "".join(
        f"<div><b>{escaped(value)}</b><span class=dim>{escaped(name)}</span></div>" for value, name in cards
    )
    return f'<div class="figures">{inner}</div>'


def figure(drawing: str, caption: str) -> str:
    """A drawing that scrolls on narrow screens, with a caption (both trusted)."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{drawing}</div>{below}</figure>'


def legend(name: str, entries: Iterable[tuple[str, str]]) -> str:
    """Marks (trusted markup) and their meaning."""
    inner = "".join(f"<span>{drawn}{escaped(text)}</span>" for drawn, text in entries)
    first = f"<span class=dim>{escaped(name)}:</span>" if name else ""
    return f'<div class="legend">{first}{inner}</div>'


def fold(summary: str, content: str) -> str:
    """Content (trusted) that opens on a click."""
    return f"<details><summary>{escaped(summary)}</summary>{content}</details>"
