"""A calibration run as a self-contained page: inline style and SVG, no script, nothing fetched, all text escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from kvtuner_kernels.layout import BITS
from kvtuner_search.calibration.record import SIDES, CalibrationRecord, Compared, TargetRecord
from kvtuner_search.profile.text import printable, ranges
from kvtuner_search.report import reading
from kvtuner_search.report.band_figures import bits_by_band, head_figure, worth_figure
from kvtuner_search.report.layer_figures import VARIANTS, bits_figure, heat_map, output_error
from kvtuner_search.report.page import figure, figures, fold, legend, page, table
from kvtuner_search.report.reading import change, number
from kvtuner_search.report.search_figures import history_figure, key, origins, pareto_figure
from kvtuner_search.report.svg import escaped, mark, svg

GLOSSARY: Final = (
    (
        "effective bits",
        "Everything stored for a token (codes, scales, minima, padding), divided by the cached numbers.",
    ),
    ("K4V2", "Keys in 4-bit codes, values in 2-bit codes; K3.5V2.75: mean bits over the bands."),
    (
        "b65443322",
        "Stored in a fitted basis whose channels form eight equal bands; each digit is the bits of a band, the most valuable channels first.",
    ),
    (
        "worth of a band",
        "Expected loss, in nats a token, if the band were stored in no bits: the sum of its eigenvalues.",
    ),
    (
        "4-g64-asym, 4-g64-sym",
        "4-bit codes, asymmetric (scale and minimum) or symmetric (scale), one group per 64 channels.",
    ),
    ("3.5-bands", "A class of every pattern of bands whose bits are at most 3.5 a channel in the mean."),
    ("-c, -r, -x0.9", "Centred, rotated by a Hadamard transform, and the grid clipped to 0.9 of the group's range."),
    (
        "KL",
        "Kullback-Leibler divergence of the model's next-token distribution from that of the 16-bit cache, in nats a token; the loss is its mean over sources.",
    ),
    ("NLL", "Negative log-likelihood of the text, in nats a token."),
    (
        "accuracy",
        "Share of samples whose answer tokens are all the most likely ones, given the right tokens before them.",
    ),
    ("layer-alone KL", "KL with one side of one layer stored in a class and everything else at 16 bits."),
    (
        "e_k, e_v, e_o",
        "Relative Frobenius error of keys, values and attention output; e_a: mean total-variation distance of the attention probabilities.",
    ),
    (
        "proxy",
        "Sum of layer-alone KLs; its exact optimum at every size is found by dynamic programming. Refined: the same with weights learnt from finished trials.",
    ),
    ("fisher", "Bits allocated by the worth of bands, from one backward pass and without a trial."),
    ("interval", "Percentile bootstrap over samples; differences are paired, on the same samples."),
    ("undecided", "The interval of the difference includes zero: more samples might decide."),
    ("hypervolume", "Area between a front and the corner, in effective bits times decades of loss. Larger is better."),
    (
        "rung",
        "A trial is scored on a part of the samples first, and ends there if it is over the budget or looks poor.",
    ),
)


def render(record: CalibrationRecord) -> str:
    """The page for one calibration record (see ``calibration.record``)."""
    sections = [
        ("chosen", "What was chosen", _chosen(record)),
        ("bits", "Bits per layer", _bits(record)),
        ("why", "Why: the sensitivity of each layer", _why(record)),
        *([("worth", "The worth of bands of channels", _worth(record))] if _has_worth(record) else []),
        ("front", "Front", _front(record)),
        ("comparison", "Comparison on the test split", _comparison(record)),
        ("history", "Search history", _history(record)),
        ("hypervolume", "Hypervolume", _hypervolume(record)),
        ("space", "Search space", _space(record)),
        ("data", "Data", _data(record)),
        ("cost", "What it cost", _cost(record)),
        ("reading", "How to read this", [fold("Glossary", table(("term", "meaning"), GLOSSARY))]),
    ]
    model = record.model
    return page(f"Calibration of {model.id}", list(_header(record)), sections)


def _header(record: CalibrationRecord) -> Iterator[str]:
    model, options = record.model, record.options
    revision = f" at {model.revision}" if model.revision else ""
    yield f"<h1>KV-cache calibration of {escaped(model.id + revision)}</h1>"
    yield f"<p>{escaped(model.architecture)}, {reading.shape(model)} <span class=dim>· {escaped(record.tool)}</span></p>"
    trials = len([t for t in record.trials if not t.duplicate])
    samples, tokens = reading.test_samples(record)
    yield (
        f"<p class=dim>{trials} distinct trials ({escaped(options.sampler)}, seed {escaped(options.seed)}) chose how many bits"
        f" each layer's keys and values get; {samples:,} held-out samples ({tokens:,} tokens) judge the choice.</p>"
    )
    labels = [reading.REFERENCE_LABEL] if model.id == "reference" else []
    yield f'<p class="warn">{" ".join([*labels, reading.OFFLINE_LABEL])}</p>'


def _chosen(record: CalibrationRecord) -> Iterator[str]:
    full = reading.raw_bytes(record.model)
    for target in record.targets:
        row = target.chosen
        bits, loss = row.effective_bits, reading.loss_interval(row)
        cards = [
            (f"{bits:.3f}", "effective bits of 16"),
            (f"×{16 / bits:.2f}", "tokens in the same memory as at 16 bits"),
            (f"{row.bytes_per_token:,}", f"bytes per token, of {full:,}"),
            (
                number(loss.value),
                f"nats KL, {reading.confidence(record)} interval {number(loss.low)} to {number(loss.high)}",
            ),
        ]
        for name, found in reading.measures(row, "accuracy").items():
            base = next(m.baseline for m in row.measures if (m.metric, m.data) == ("accuracy", name))
            samples = next(m.samples for m in row.measures if (m.metric, m.data) == ("accuracy", name))
            cards.append((f"{found.value:.0%}", f"accuracy, {name}; 16 bits: {base:.0%} ({samples:,} samples)"))
        said = "".join(f"<li>{escaped(sentence)}</li>" for sentence in reading.findings(record, target))
        yield f"<h3>{escaped(target.label)}: {escaped(row.name)} <span class=dim>({escaped(row.origin)})</span></h3>"
        yield f"{figures(cards)}<ul>{said}</ul>"


def _bits(record: CalibrationRecord) -> Iterator[str]:
    swatches = [(f'<span class="key b{bits}"></span>', f"{bits}{' (raw)' if bits == 16 else ''}") for bits in BITS]
    banded = any(reading.has_bands(target.chosen) for target in record.targets)
    yield legend("bits of the codes", [*swatches, ('<span class="key bb"></span>', "in bands")] if banded else swatches)
    for target in record.targets:
        row = target.chosen
        yield f"<h3>{escaped(target.label)}</h3>"
        yield figure(bits_figure(record, row), "")
        if reading.has_bands(row):
            yield figure(
                bits_by_band(reading.specs(row)),
                "Bits of each band of channels, the most valuable in band 1; a block in one colour is stored without bands.",
            )
        yield fold("Every layer, with its errors", _layers(record, row))
    mean = ", for bands their mean" if banded else ""
    yield (
        "<p class=dim>A bar's height is the effective bits on a logarithmic scale; figures on the bars are the bits of the"
        f" codes{mean}.</p>"
    )


def _layers(record: CalibrationRecord, row: Compared) -> str:
    """Spec, errors and layer-alone KLs of every layer in a setting."""
    model, rows = record.model, []
    classes = {side: reading.chosen_class(record, row, side) for side in SIDES}
    for index, (spec, layer) in enumerate(zip(reading.specs(row), record.sensitivity, strict=True)):
        errors: Sequence[float | None] = next((e[1:] for e in layer.errors if e[0] == str(spec)), (None,) * 4)
        alone = [layer.side(side)[name].loss if (name := classes[side][index]) else None for side in SIDES]
        bits = spec.effective_bits(model.num_kv_heads, model.head_dim)
        rows.append((index, spec.key, spec.value, f"{bits:.3f}", *map(number, [*alone, *errors])))
    heads = (
        "layer",
        "keys",
        "values",
        "effective bits",
        "KL, keys alone",
        "KL, values alone",
        "e_k",
        "e_v",
        "e_a",
        "e_o",
    )
    return table(heads, rows, right=range(3, 10))


def _smallest(record: CalibrationRecord) -> TargetRecord:
    """The target whose chosen setting has the fewest effective bits."""
    return min(record.targets, key=lambda target: target.chosen.effective_bits)


def _why(record: CalibrationRecord) -> Iterator[str]:
    shown = _smallest(record)
    kept = "keeps 16 bits there, or has bands of its own" if reading.has_bands(shown.chosen) else "keeps 16 bits there"
    yield figure(
        heat_map(record, shown),
        f"KL of the model's output when only that side of that layer is stored in that class. A dot marks what the profile for"
        f" {escaped(shown.label)} stores; a layer without a dot {kept}.",
    )
    drawn = output_error(record)
    if drawn:
        marks = [
            (svg(14, 14, name, [mark(shape, 7, 7, 4, class_)]), f"keys {name}") for _, class_, shape, name in VARIANTS
        ]
        yield legend("", marks)
        yield figure(drawn, "Values at 16 bits. Where the lines differ, that transform makes few bits possible.")


def _has_worth(record: CalibrationRecord) -> bool:
    return any(rows for side in SIDES for rows in reading.band_worth(record, side))


def _worth(record: CalibrationRecord) -> Iterator[str]:
    shown = _smallest(record)
    digits = (
        f" Digits are the bits that the profile for {escaped(shown.label)} gives."
        if reading.has_bands(shown.chosen)
        else ""
    )
    yield figure(
        worth_figure(record, shown),
        "Expected rise of the loss, in nats a token, if a band were stored in no bits: the spectrum of each layer,"
        f" summed by band.{digits}",
    )
    drawn = head_figure(record)
    if drawn:
        lines = figure(
            drawn, "A line for each KV head, from band 1 to band 8, on the same logarithmic scale in every panel."
        )
        yield fold("Head by head", lines)


def _front(record: CalibrationRecord) -> Iterator[str]:
    marks = [(key(origin), origin) for origin in origins(record)]
    marks.append((svg(14, 14, "chosen", [mark("star", 7, 7, 4, "o-chosen")]), "chosen, for each target"))
    lines = [
        ('<span class="rule searched"></span>', "front of the study"),
        ('<span class="rule random"></span>', "front of the random search"),
        ('<span class="rule predicted"></span>', "prediction of the proxy"),
    ]
    yield legend("", [*marks, *lines])
    stopped = [t for t in [*record.trials, *record.random_trials] if not t.complete]
    yield figure(
        pareto_figure(record),
        f"Whiskers: {reading.confidence(record)} intervals. Losses of zero or less lie on the lower edge."
        f" Trials that were stopped early, {len(stopped):,} in all, have no loss on the whole split and are not drawn.",
    )


def _comparison(record: CalibrationRecord) -> Iterator[str]:
    level = reading.confidence(record)
    for target in record.targets:
        chosen = target.chosen
        rows = [chosen, *sorted(target.rivals, key=lambda row: (row.effective_bits, row.loss))]
        tasks = list(reading.measures(chosen, "accuracy"))
        heads = ["setting", "from", "effective bits", "KL, nats", *(f"{name}, accuracy" for name in tasks)]
        heads += [f"KL, chosen minus this [{level}]", "chosen is", "in bytes"]
        body = []
        for row in rows:
            accuracy = reading.measures(row, "accuracy")
            cells = [row.name, row.origin, f"{row.effective_bits:.3f}", number(row.loss)]
            cells += [f"{accuracy[name].value:.0%}" if name in accuracy else "–" for name in tasks]
            against = [change(reading.paired(row)), reading.verdict_words(row), reading.bytes_change(row, chosen)]
            cells += against if row is not chosen else ["", "", ""]
            body.append(cells)
        yield f"<h3>{escaped(target.label)}</h3>"
        yield table(heads, body, right={*range(2, len(heads) - 2), len(heads) - 1}, strong=0)
        yield fold(f"By source, as change from 16 bits [{level}]", _by_source(rows))
    yield (
        "<p class=dim>The last columns compare the chosen setting with the one in the row: better means a lower KL. Settings that take"
        " more bytes, or far fewer, are shown for scale. Trials of the random search have their own numbers.</p>"
    )


def _by_source(rows: Sequence[Compared]) -> str:
    """Every measure of every compared setting, with its interval."""
    columns = list(dict.fromkeys((m.metric, m.data) for row in rows for m in row.measures))
    body = []
    for row in rows:
        found = {(m.metric, m.data): m for m in row.measures}
        cells = []
        for column in columns:
            m = found.get(column)
            cells.append(change(reading.measured_change(m)) if m else "–")
        body.append([f"{row.name} ({row.origin})", f"{row.effective_bits:.3f}", *cells])
    names = {"kl": "KL", "nll": "NLL"}
    heads = ["setting", "bits", *(f"{names.get(metric, metric)}, {data}" for metric, data in columns)]
    return table(heads, body, right=range(1, len(heads)), strong=0)


def _history(record: CalibrationRecord) -> Iterator[str]:
    goal = "meet the budget" if record.options.max_loss is None else "meet the loss"
    yield figure(
        history_figure(record),
        f"Complete trials that {goal} on the search split; the line is the best so far, of the study and, dashed, of the random search."
        " Marks as in the front.",
    )
    rows = [
        (c.origin, f"{c.complete:,}", f"{c.stopped:,}", f"{c.repeated:,}", number(c.seconds))
        for c in reading.trial_counts(record)
    ]
    heads = (
        "origin",
        "ran to the end",
        "stopped at an early rung",
        "repeated proposals",
        "seconds, complete trial (median)",
    )
    yield table(heads, rows, right=range(1, 5))


def _hypervolume(record: CalibrationRecord) -> Iterator[str]:
    bits, loss = record.hypervolume_corner
    counts = {count.origin: count for count in reading.trial_counts(record)}
    whole = record.hypervolume.get("searched")
    rows = []
    for name, area in record.hypervolume.items():
        tried = name == "searched" or name in counts
        share = f"{area / whole:.1%}" if tried and whole else "–"
        rows.append(("the whole study" if name == "searched" else name, number(area) if tried else "none tried", share))
    yield table(("of", "bit-decades", "of the whole study"), rows, right=(1, 2))
    yield (
        f"<p class=dim>On the search split, against the corner {bits:g} effective bits and {number(loss)} nats; a trial that was"
        " stopped early counts with its loss scaled to the whole split. The whole study includes the uniform settings, presets and proxy optima that it starts from.</p>"
    )


def _space(record: CalibrationRecord) -> Iterator[str]:
    space, layers = record.space, record.model.num_layers
    variables = space.variables
    counts = sorted(len(v.pairs) for v in variables)
    if len(variables) == layers:
        why = "Layers are not grouped: each has its own variable."
        if (space.rejected_quality or -1) > -1:  # -1: too few layers to group
            why += f" The best grouping has a silhouette of {space.rejected_quality:.2f}, too poor to be used."
    else:
        why = f"{layers} layers share {len(variables)} variables"
        quality = space.grouping_quality
        why += f"; the silhouette of the groups is {quality:.2f}." if quality is not None else "."
    yield f"<p>{why} After pruning, a variable chooses among {counts[0]} to {counts[-1]} pairs of storage classes.</p>"
    stages = record.options.stages
    if stages > 1:
        yield (
            f"<p>The budget holds for {stages} times the bytes of the heaviest of {stages} pipeline stages, because every stage must hold"
            " every token.</p>"
        )
    rows = [(v.name, ranges(v.layers), len(v.pairs), " ".join(v.pairs)) for v in variables]
    yield fold(
        "Variables", table(("variable", "layers", "pairs", "key/value classes, cheapest first"), rows, right=(2,))
    )


def _data(record: CalibrationRecord) -> Iterator[str]:
    rows = [(d.name, d.split, f"{d.samples:,}", f"{d.tokens:,}", d.digest) for d in record.data]
    yield table(("source", "split", "samples", "tokens", "digest"), rows, right=(2, 3), code=(4,))
    yield "<p class=dim>The search split guides the search, search and selection split together pick among finalists, the test split is used once.</p>"


def _cost(record: CalibrationRecord) -> Iterator[str]:
    environment = record.environment
    yield f"<p>{escaped(reading.cost(record))}</p>"
    most = max(record.seconds.values(), default=0.0) or 1.0
    rows = [(name, f"{seconds:.1f}", seconds / most) for name, seconds in record.seconds.items()]
    yield table(("stage", "seconds", ""), rows, right=(1,), bars=2)
    shown = {
        name: value
        for name, value in environment.model_dump().items()
        if value is not None and not name.startswith("peak_")
    }
    yield fold("Environment", table(("", ""), [(name, printable(value)) for name, value in shown.items()]))
    options = [(name, _plain(value)) for name, value in record.options.model_dump().items()]
    digests = [(name, getattr(record.model, name)) for name in ("config_digest", "weights_digest")]
    yield fold("Options and digests", table(("", ""), [*options, *((n, d) for n, d in digests if d)]))


def _plain(value: Any) -> str:
    """An option as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
