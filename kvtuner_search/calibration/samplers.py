"""The samplers that ``--sampler`` offers: one table. Neither torch nor optuna is imported before a sampler is made.

A new sampler is a row of :data:`SAMPLERS`. It must work with categorical variables, several objectives and a constraint (Optuna's CMA-ES
has none of these).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kvtuner_search.errors import UsageError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

DEFAULT: Final = "tpe"
RANDOM: Final = "random"  # draws that keep to the budget: Study makes them itself, and repeats none
PRIOR_WEIGHT: Final = 0.05  # TPE's: with a weight of 1, 16 variables of 20 choices are drawn almost at random


def _good(finished: int) -> int:
    """How many of the finished trials TPE takes for good ones."""
    return min(math.ceil(finished / 5), 25)


@dataclass(frozen=True)
class Sampler:
    """What makes the proposals that the proxy does not."""

    help: str  # one line, without a full stop
    optuna: str  # a class of optuna.samplers
    options: Mapping[str, Any] = field(default_factory=dict)  # its arguments besides the seed


SAMPLERS: Final[Mapping[str, Sampler]] = {
    DEFAULT: Sampler(
        "multi-objective TPE, which learns all variables together",
        "TPESampler",
        {"multivariate": True, "n_startup_trials": 10, "gamma": _good, "prior_weight": PRIOR_WEIGHT},
    ),
    "nsga2": Sampler("NSGA-II, a genetic algorithm", "NSGAIISampler", {"population_size": 20}),
    RANDOM: Sampler("uniform draws, made cheaper until the budget holds; the proxy proposes nothing", "RandomSampler"),
}


def make(name: str, seed: int) -> BaseSampler:
    """Optuna's sampler of that name.

    Args:
        name: a key of SAMPLERS.
        seed: of its draws.

    Raises:
        UsageError: if there is none of that name.
    """
    if name not in SAMPLERS:
        raise UsageError(f"{name!r} is not a sampler: choose from {', '.join(SAMPLERS)}")
    from optuna import samplers

    chosen = SAMPLERS[name]
    with warnings.catch_warnings():
        # TPE's gamma and prior_weight are deprecated and have no successor yet; pyproject holds Optuna below 6, where they go.
        warnings.simplefilter("ignore", FutureWarning)
        made: BaseSampler = getattr(samplers, chosen.optuna)(seed=seed, **chosen.options)
    return made


def described() -> str:
    """All samplers in one line, for ``--help``."""
    return "; ".join(f"{name}: {sampler.help}" for name, sampler in SAMPLERS.items())
