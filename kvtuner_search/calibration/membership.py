"""A worker's part in a study: it registers, gives signs of life, and tells which trials are of workers that have ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from kvtuner_search.calibration.journal import LOST
from kvtuner_search.calibration.storage import Store
from kvtuner_search.calibration.workers import BEAT, Worker
from kvtuner_search.errors import DataError

MARK: Final = "worker:"  # what a worker's attribute of the study begins with; its id follows


class Membership:
    """This process among the workers of a study.

    Args:
        store: where the study lives.
        study: whose attributes tell of workers.
        name: what messages call the study.
    """

    def __init__(self, store: Store, study: optuna.Study, name: str) -> None:
        self.store, self.study, self.name = store, study, name
        self.worker = Worker(store.file)
        self.leaving = threading.Event()
        self._beating: threading.Thread | None = None  # while this worker is registered

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """The storage's guard, in a study that still knows this worker.

        Raises:
            DataError: if it does not, or the storage cannot be used.
        """
        with self.store.guard():
            self.workers()
            yield

    def register(self) -> None:
        """Tell the others of this worker, once."""
        if self._beating is None:
            self._write(self.worker.begin())
            self._beating = threading.Thread(target=self._beat, daemon=True)
            self._beating.start()

    def leave(self) -> None:
        """Say that this worker has ended, unless the study cannot be used any more."""
        self.leaving.set()
        if self._beating is not None:
            self._beating.join(BEAT)  # a sign of life after the last word would contradict it
            with contextlib.suppress(DataError), self.guard():
                self._write(None)
            self._beating = None
        self.worker.end()

    def workers(self) -> dict[str, Any]:
        """What the study has of each worker, by id.

        Raises:
            DataError: if it has nothing of this one any more.
        """
        found = {n.removeprefix(MARK): w for n, w in self.study.user_attrs.items() if n.startswith(MARK)}
        if self._beating is not None and found.get(self.worker.id) is None:
            raise DataError(
                f"the study {self.name!r} in {self.store.name} does not know this run any more:"
                f" it was replaced, or an older copy was put in its place: {LOST}"
            )
        return found

    def others(self, everyone: bool = False) -> list[str]:
        """Ids of other workers that may be at work; with ``everyone`` of those only that are seen to be."""
        return [
            name
            for name, worker in self.workers().items()
            if name != self.worker.id and (self.worker.holds(worker) if everyone else not self.worker.ended(worker))
        ]

    def fail_abandoned(self, everyone: bool = False) -> int:
        """Mark the trials of workers that have ended as failed; returns how many.

        Args:
            everyone: nobody else is at work who is not seen to be.
        """
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if not running:
            return 0
        others, workers = self.others(everyone), self.workers()
        names = [trial.user_attrs.get("worker") for trial in running]
        # A worker signs a trial right after taking it, and has one at a time: one without a signature is of somebody who has signed none.
        idle = [name for name in others if name not in names]
        count = 0
        for trial, name in zip(running, names, strict=True):
            signed = name is not None
            known = everyone or name in workers
            if (known and name not in (*others, self.worker.id)) if signed else not idle:
                with contextlib.suppress(UpdateFinishedTrialError):  # another worker was faster
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                count += 1
        return count

    def _beat(self) -> None:
        while not self.leaving.wait(BEAT):
            # A storage that is locked for a while is for the run itself to say.
            with contextlib.suppress(DataError), self.guard():
                self.worker.listen(self.workers().values())
                self._write(self.worker.beat())

    def _write(self, content: dict[str, Any] | None) -> None:
        self.study.set_user_attr(f"{MARK}{self.worker.id}", content)
