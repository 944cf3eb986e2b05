"""The samplers that ``--sampler`` offers: one table. Neither torch nor optuna is imported before a sampler is made.

A new sampler is a row of :data:`SAMPLERS`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from kvtuner_search.errors import UsageError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

DEFAULT: Final = "gp"
RANDOM: Final = "random"
PATIENCE: Final = 16  # proposals in a row that gain less than the samples tell apart, after which a search ends: 8 draws, and 8 that learnt
PRIOR_WEIGHT: Final = (
    0.05  # TPE's over pairs: with a weight of 1, 16 variables of 20 choices are drawn almost at random
)


def _good(finished: int) -> int:
    """How many of the finished trials TPE takes for good ones."""
    return min(math.ceil(finished / 5), 25)


@dataclass(frozen=True)
class Sampler:
    """What makes proposals."""

    help: str  # one line, without a full stop
    optuna: str | None  # a class of optuna.samplers; None: the corrected proxy makes all proposals
    options: Mapping[str, Any] = field(default_factory=dict)  # its arguments besides the seed
    # What it searches: weights along a few directions, weights of each side of each layer, or pairs of storage classes. Over pairs there are
    # two objectives, loss and bytes, and a constraint; over weights the loss alone, as each setting spends the budget.
    over: Literal["directions", "layers", "pairs"] = "directions"
    every: int = 1  # every n-th proposal is the sampler's, the others are optima of the corrected proxy


SAMPLERS: Final[Mapping[str, Sampler]] = {
    "cmaes": Sampler("CMA-ES", "CmaEsSampler", {"warn_independent_sampling": False}),
    "sepcma": Sampler(
        "CMA-ES without covariances, over each side of each layer",
        "CmaEsSampler",
        {"warn_independent_sampling": False, "use_separable_cma": True},
        "layers",
    ),
    "gp": Sampler(
        "a Gaussian process",
        "GPSampler",
        {"warn_independent_sampling": False, "n_startup_trials": 8},
    ),
    "tpe": Sampler(
        "TPE, which learns all variables together", "TPESampler", {"multivariate": True, "n_startup_trials": 8}
    ),
    "nsga2": Sampler("NSGA-II, a genetic algorithm", "NSGAIISampler", {"population_size": 10}),
    "refined": Sampler("optima of the proxy as corrected by finished trials", None),
    "pairs": Sampler(
        "multi-objective TPE over one pair of storage classes a layer, and optima of the corrected proxy",
        "TPESampler",
        {"multivariate": True, "n_startup_trials": 10, "gamma": _good, "prior_weight": PRIOR_WEIGHT},
        "pairs",
        every=3,
    ),
    RANDOM: Sampler("random weights, which learns nothing", "RandomSampler"),
}


def sampler(name: str) -> Sampler:
    """The row of that name.

    Raises:
        UsageError: if there is none.
    """
    if name not in SAMPLERS:
        raise UsageError(f"{name!r} is not a sampler: choose from {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def make(name: str, seed: int) -> BaseSampler:
    """Optuna's sampler of that name; a random one for a row without any.

    Args:
        name: a key of SAMPLERS.
        seed: of its draws.

    Raises:
        UsageError: if there is none of that name.
    """
    chosen = sampler(name)
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        # TPE's gamma and prior_weight are deprecated and have no successor yet; pyproject holds Optuna below 6, where they go.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)  # CMA-ES without covariances, for years
        made: BaseSampler = getattr(samplers, chosen.optuna or "RandomSampler")(seed=seed, **chosen.options)
    return made


def described() -> str:
    """All samplers in one line, for ``--help``."""
    return "; ".join(f"{name}: {sampler.help}" for name, sampler in SAMPLERS.items())
