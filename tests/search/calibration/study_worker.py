"""A search with a quick made-up objective. As a program it is started and killed again and again: STORAGE SAMPLER TRIALS SECONDS KILLS."""

import hashlib
import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence

from test_space import CLASSES, make_space

from kvtuner_search.calibration.anchors import anchors, uniform_pairs
from kvtuner_search.calibration.objective import TrialOutcome
from kvtuner_search.calibration.proxy import proxy_front
from kvtuner_search.calibration.space import Choices
from kvtuner_search.calibration.study import Study, open_storage


def main(storage: str, sampler: str, trials: int, seconds: float) -> None:
    space = make_space(12)
    middle = space.nbytes([len(v.pairs) // 2 for v in space.variables])
    budgets = [int(middle * share) for share in (1, 0.9, 0.8, 0.7, 0.6, 0.5)]  # one has few optima in so small a space

    def objective(choices: Choices, outcomes: Sequence[TrialOutcome], screen: bool) -> TrialOutcome:
        time.sleep(seconds)
        noise = int(hashlib.sha256(repr(choices).encode()).hexdigest()[:6], 16) / 2**24
        loss = float(space.features(choices).sum()) * (1 + noise)
        if screen and noise > 0.6:  # stopped early, at a rung whose loss is not that of all rungs
            return TrialOutcome(space.cost(choices), (1.5 * loss,), False)
        return TrialOutcome(space.cost(choices), (1.4 * loss, loss), True)

    study = Study(open_storage(storage), "test", sampler, 7)
    study.fail_abandoned()
    study.enqueue(space, anchors(space, proxy_front(space), uniform_pairs(CLASSES), [], budgets))
    study.run(space, objective, trials, budgets)


def kill_again_and_again(storage: str, sampler: str, trials: int, seconds: float, kills: int) -> None:
    """Fork a worker, kill it at a random moment, and print how many trials were finished by then; each kill."""
    rng = random.Random(5)
    importlib.import_module("torch")  # what children would import each for itself, for seconds
    for _ in range(kills):
        child = os.fork()  # nothing has used torch's threads yet, and importing everything anew would take seconds
        if child == 0:
            main(storage, sampler, trials, seconds)
            os._exit(0)
        time.sleep(rng.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(len(Study(open_storage(storage), "test", sampler, 7).finished()), flush=True)


if __name__ == "__main__":
    where, name = sys.argv[1:3]
    if len(sys.argv) == 5:
        main(where, name, int(sys.argv[3]), float(sys.argv[4]))
    else:
        kill_again_and_again(where, name, int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
