"""A validation block as rows of text, which the terminal and the HTML page both show."""

from __future__ import annotations

from kvtuner_search.profile.canonical import digest_without_validation
from kvtuner_search.profile.fields import Measure
from kvtuner_search.profile.schema import Profile
from kvtuner_search.profile.text import interval_of, printable, shortened, signed
from kvtuner_search.profile.validation import Semantics, Validation
from kvtuner_search.secrets import mask

_LIBRARIES = ("kvtuner-search", "torch", "transformers", "triton")  # beside the engine, in a block's versions
MEASURE_HEADS = ("measure", "stock server", "with the profile", "change", "interval", "samples", "tokens")
CHECK_HEADS = ("check", "value", "limit", "result")
_METHODS = {
    "as-stored-extend": "the server reads a prompt's own keys and values as stored",
    "token-by-token": "each token was a request on top of cached rows; only its own key and value were read unquantized",
    "decode": "the cache stores 16 bits exactly as attention reads them",
}


def engine_of(block: Validation) -> str:
    """The package that served, e.g. sglang; empty for a block that does not name it."""
    return next((n for n in sorted(block.versions) if n not in _LIBRARIES and not n.startswith("offline ")), "")


def is_stale(profile: Profile) -> bool:
    """Whether the validation block was made for another profile."""
    block = profile.validation
    return block is not None and block.profile_digest != digest_without_validation(profile)


def verdict(profile: Profile) -> str:
    """``pass``, ``fail``, or why the block does not apply to this profile."""
    assert profile.validation is not None
    if is_stale(profile):
        return f"stale: it belongs to a profile with digest {profile.validation.profile_digest[:19]}…"
    return profile.validation.verdict


def measure_rows(block: Validation) -> list[tuple[str, ...]]:
    """Likelihood and accuracy, a row each."""
    return [_measure_row(measure) for measure in (*block.likelihood, *block.tasks)]


def _measure_row(m: Measure) -> tuple[str, ...]:
    interval = interval_of(m) + (f" at {m.confidence:.0%}" if m.has_interval else "")
    figures = (f"{m.baseline:.6g}", f"{m.value:.6g}", signed(m.delta), interval, f"{m.samples:,}", f"{m.tokens:,}")
    return (f"{m.metric} {shortened(printable(m.data))}", *figures)


def check_rows(block: Validation) -> list[tuple[str, ...]]:
    """The thresholds, a row each."""
    return [
        (
            shortened(printable(check.name)),
            "not measured" if check.value is None else f"{check.value:.6g}",
            f"{check.relation} {check.limit:g}",
            "pass" if check.passed else f"FAIL{': ' if check.reason else ''}{shortened(printable(check.reason), 200)}",
        )
        for check in block.checks
    ]


def fact_rows(block: Validation) -> list[tuple[str, str]]:
    """Everything else, as pairs of a name and a text."""
    server = block.server
    rows = [
        ("measured", f"{block.date} by {printable(block.tool)}"),
        (
            "server",
            f"{engine_of(block)} {printable(server.version)}, {'started by validate' if server.started else 'already running'},"
            f" {printable(server.attention_backend)}, {printable(server.dtype)}, TP {server.tensor_parallel}, PP"
            f" {server.pipeline_parallel}, page {server.page_size}, {printable(block.hardware)}",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(block.versions.items()))),
        ("decode semantics", _semantics(block.semantics)),
    ]
    tasks = [f"{task.data}: {task.lost} lost, {task.gained} gained of {task.samples}" for task in block.tasks]
    rows.append(("flips", "; ".join(tasks)))
    if block.greedy is not None:
        g = block.greedy
        first = sorted(g.first_divergence)[len(g.first_divergence) // 2]
        median = "never" if first == g.tokens else f"at token {first}"
        rows.append(
            (
                "greedy agreement",
                f"{g.agreement:.3f} [{g.ci_low:.3f}, {g.ci_high:.3f}] of {g.tokens} tokens, {g.identical} of {g.prompts}"
                f" prompts identical, median first divergence {median}",
            )
        )
    if block.capacity is not None:
        c = block.capacity
        text = f"{c.tokens:,} tokens against {c.baseline_tokens:,}: {c.ratio:.4f}x, predicted {c.predicted:.4f}x"
        rows.append(("token capacity", text if c.comparable else f"{text}; not comparable: {c.reason}"))
    for row in block.offline:
        name = "offline" if row.cache == "profile" else "offline, 16 bits"
        rows.append(
            (
                name,
                f"NLL of the server minus offline {signed(row.nll_difference)} [{signed(row.ci_low)}, {signed(row.ci_high)}]"
                f" on {row.tokens:,} tokens; of {row.generated:,} greedy tokens {row.token_agreement:.2%} agree, NLL"
                f" {signed(row.decode_difference)} [{signed(row.decode_low)}, {signed(row.decode_high)}]",
            )
        )
    rows += [("data", f"{d.name}: {d.samples:,} x, {d.tokens:,} tokens, {d.digest[:19]}") for d in block.data]
    rows.append(("command", mask(block.command)))
    rows += [("note", note) for note in block.notes]
    return [(name, printable(text.strip())) for name, text in rows if text]


def _semantics(found: Semantics) -> str:
    text = _METHODS[found.method]
    if found.difference is None:
        return text
    text += f"; decode and extend differ by {found.difference:.2g} nats a token on {found.tokens:,} tokens"
    return (
        text if found.baseline_difference is None else f"{text} ({found.baseline_difference:.2g} on the stock server)"
    )
