"""The catalogue of ``diff`` findings. Ids and their meaning are stable: reviews and configuration refer to them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: Final[tuple[Severity, ...]] = ("error", "warning", "info")


@dataclass(frozen=True)
class Rule:
    """One kind of finding."""

    id: str
    severity: Severity  # default; [tool.kvtuner-search.diff.severity] overrides it
    fires: str  # when it fires, in one line
    fixed: bool = False  # True: the comparison cannot go on, so it can be neither lowered nor ignored


RULES: Final = {
    rule.id: rule
    for rule in (
        Rule("incomparable-model", "error", "the class, shape, kinds of layers or config digest of the models differs", fixed=True),
        Rule("incomparable-layout", "error", "the layout versions differ, so bytes mean different things", fixed=True),
        Rule("profile-added", "warning", "the revision has no profile at this path yet, so there is nothing to compare with"),
        Rule("gate-changed", "warning", "[tool.kvtuner-search.diff] differs from the base's, which --config-from applies"),
        Rule("model-renamed", "warning", "the model's id differs, its shape does not"),
        Rule("model-unverified", "info", "one of the profiles has no config digest, so only the shapes were compared"),
        Rule("weights-changed", "warning", "the revision or the weights digest differs"),
        Rule("layer-bits-lowered", "warning", "a layer stores its keys or its values in fewer bits (bands: on average)"),
        Rule("layer-bits-raised", "info", "a layer stores its keys or its values in more bits (bands: on average), and neither in fewer"),
        Rule("layer-band-narrowed", "warning", "the narrowest band of a layer's keys or values has fewer bits, though the mean did not fall"),
        Rule("layer-banding-changed", "info", "a layer's keys or values move into or out of bands of a fitted basis, which also changes how first tokens are stored"),
        Rule("layer-scheme-changed", "info", "a layer's group size, symmetry, centring, rotation, clip or bands differ at equal bits"),
        Rule("transforms-changed", "info", "the centring vectors or bases were changed, added or removed"),
        Rule("basis-changed", "warning", "the specs are the same, but the file of fitted bases and first-token points differs"),
        Rule("bytes-per-token-increased", "warning", "a token takes more bytes, so fewer tokens fit"),
        Rule("bytes-per-token-decreased", "info", "a token takes fewer bytes, so more tokens fit"),
        Rule("bytes-per-request-increased", "warning", "layers of full attention take more bytes and those with windows fewer, so that a long request takes more though a token does not"),
        Rule("bytes-over-budget", "error", "a token takes more bytes than --max-bytes-per-token"),
        Rule("quality-regressed", "error", "a measure is worse, and the interval of the change excludes zero"),
        Rule("quality-improved", "info", "a measure is better, and the interval of the change excludes zero"),
        Rule("quality-inconclusive", "info", "a measure changed, but the interval of the change includes zero"),
        Rule("quality-unproven", "warning", "the stored format differs and the new profile has no measure on more than one sample"),
        Rule("quality-dropped", "warning", "a measure of the old profile is missing in the new one"),
        Rule("quality-incomparable", "warning", "a measure was taken on other data, samples, tokens or confidence"),
        Rule("loss-over-budget", "error", "kl or nll rose by more than --max-loss-increase"),
        Rule("loss-budget-unproven", "error", "--max-loss-increase is set, the stored format differs and no kl or nll can be compared"),
        Rule("data-changed", "warning", "a data source has another digest or size, or was added or removed"),
        Rule("origin-changed", "warning", "the profile was made in another way, e.g. imported instead of calibrated"),
        Rule("search-changed", "info", "the search's sampler, seed, trials, variables, budget or stages differ"),
        Rule("environment-changed", "info", "the tool, library versions, device or dtype differ"),
        Rule("pareto-changed", "info", "the front differs"),
        Rule("validation-dropped", "warning", "the old profile was validated on a server, the new one was not"),
        Rule("validation-stale", "error", "the validation block names the digest of another profile, e.g. because it was copied"),
        Rule("validation-failed", "error", "a check of the new validation failed, and the old profile's validation did not fail"),
        Rule("validation-regressed", "error", "a figure that both validations measured on a server is worse, and the interval of the change excludes zero"),
        Rule("validation-capacity-regressed", "error", "the server holds over 1 % less of the token capacity that the layout predicts, or it is no longer comparable"),
        Rule("validation-incomparable", "warning", "a figure of the old validation is missing in the new one, or was taken on other data"),
        Rule("validation-server-changed", "info", "the server's version, settings, hardware, libraries or scoring method differ"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One rule that fired at one place."""

    rule: str
    severity: Severity
    where: str  # path inside the profile, e.g. layers.3 or quality.kl.recall.test
    message: str
    old: str
    new: str
    model: str  # id of the new profile's model

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name this change: they depend on rule, model, place and values, and on nothing else."""
        parts = ("kvtuner-diff-1", self.rule, self.model, self.where, self.old, self.new)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def rules_markdown() -> str:
    """The catalogue as a Markdown table; docs/diff.md carries it."""
    rows = ["| rule | severity | fires when |", "| --- | --- | --- |"]
    rows += [
        f"| `{rule.id}` | {rule.severity}{' (fixed)' if rule.fixed else ''} | {rule.fires} |" for rule in RULES.values()
    ]
    return "\n".join(rows) + "\n"
