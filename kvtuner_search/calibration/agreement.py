"""Studies made by this program, and the values that the workers of a study share.

Shared values are kept in a second study, ``NAME-agreed``: a worker publishes a value as one trial, in one operation, and the
first one counts. Storages number trials in one order for all, so all workers see the same first trial, and always
a complete one from a single worker.
"""

from __future__ import annotations

import json
from typing import Any, Final

import optuna
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from kvtuner_search.calibration.storage import Store
from kvtuner_search.errors import DataError

CHUNK: Final = 60_000  # characters of one attribute, which some databases limit to 64 KiB
MARK: Final = ("kvtuner", 4)  # attribute that marks this program's studies, and the version of their layout


def open_study(store: Store, name: str, seed: int) -> optuna.Study:
    """The study with this name; it is created if it does not exist.

    Raises:
        DataError: if it belongs to another program or layout; it is left unchanged.
    """
    directions = [StudyDirection.MINIMIZE]
    sampler = RandomSampler(seed)
    try:
        study = optuna.load_study(study_name=name, storage=store.backend, sampler=sampler)
    except KeyError:
        study = optuna.create_study(
            study_name=name,
            storage=store.backend,
            sampler=sampler,
            directions=directions,
            load_if_exists=True,  # another worker may have made it just now
        )
    (key, mark), attributes = MARK, study.user_attrs
    if study.directions == directions:
        if attributes.get(key) == mark:
            return study
        if not attributes and not study.get_trials(deepcopy=False):
            # Before anything else, so a study without it that holds something is not ours.
            study.set_user_attr(key, mark)
            return study
    raise DataError(
        f"the study {name!r} in {store.name} belongs to another program, or to another version of this one:"
        " choose another --study-name, --storage or --output"
    )


def agree(study: optuna.Study, key: str, content: Any) -> Any:
    """Publish a value for all workers under a key, plain JSON but not None; returns the first published value."""
    found = agreed(study, key)
    if found is None:
        text = json.dumps(content, sort_keys=True)
        chunks = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
        attributes = {"key": key, "chunks": len(chunks), **{str(i): chunk for i, chunk in enumerate(chunks)}}
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attributes))
        found = agreed(study, key)
    return found


def agreed(study: optuna.Study, key: str) -> Any:
    """The first value published under a key, or None."""
    for trial in sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number):
        attributes = trial.user_attrs
        if attributes.get("key") == key:
            return json.loads("".join(attributes[str(index)] for index in range(attributes["chunks"])))
    return None


def difference(name: str, there: Any, here: Any) -> str:
    """What differs, with both values where they are short."""
    if all(value is None or isinstance(value, str | int | float) for value in (there, here)):
        return f"{name} {there}, here {here}"
    if isinstance(there, dict) and isinstance(here, dict):
        return f"{name}: " + ", ".join(sorted(k for k in {*there, *here} if there.get(k) != here.get(k)))
    return name
