"""One run of ``calibrate``: its folder, its study, its workers, and what it writes."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.calibration.choosing import TargetResult, choose
from kvtuner_search.calibration.options import CalibrationOptions
from kvtuner_search.calibration.outputs import profile_content, record, sealed, without_interval
from kvtuner_search.calibration.pipeline import CalibrationRun, analyse, make_space, prepare, search
from kvtuner_search.calibration.proxy import proxy_front
from kvtuner_search.calibration.record import CalibrationRecord, dumps
from kvtuner_search.calibration.samplers import RANDOM
from kvtuner_search.calibration.storage import check_resumed
from kvtuner_search.calibration.study import Study, open_storage
from kvtuner_search.calibration.workers import at_work
from kvtuner_search.errors import DataError, UsageError
from kvtuner_search.files import check_writable, refuse_unusual, write_atomic
from kvtuner_search.profile.build import write
from kvtuner_search.progress import Reporter
from kvtuner_search.transforms import centres_file

WAIT: Final = 5.0  # seconds for the helpers of a run that was killed to end
PATIENCE: Final = 30.0  # seconds for a helper that was told to end; one that is stopped does not hear it


@dataclass(frozen=True)
class CalibrationSession:
    """Where a run works and what it shares."""

    output: Path
    name: str | None  # start of the profiles' names
    resume: bool
    overwrite: bool
    storage: str | None  # Optuna storage URL
    study_name: str
    workers: int
    join: bool  # a helper process: trials only
    quiet: bool
    arguments: tuple[str, ...]  # of the command, for the helpers

    @property
    def journal(self) -> Path:
        """The study's file, unless a storage URL is given."""
        return self.output / "study.journal"


def calibrate(
    options: CalibrationOptions,
    session: CalibrationSession,
    publish: Callable[[CalibrationRecord, Path], Sequence[Path]],
) -> list[Path]:
    """Run a calibration and write ``NAME-BITS.json``, ``.safetensors`` and ``record.json``.

    Args:
        publish: called with the final record and the output folder; shows the result and returns the files that it wrote.

    Returns:
        the profiles' files, in the order of the targets; none for a helper process.

    Raises:
        UsageError, DataError: if something cannot be used; finished work is kept.
    """
    reporter = Reporter(session.quiet)
    with ExitStack() as stack:
        lock = stack.enter_context(_claimed_folder(session))
        resumed = session.resume and not session.join
        store = open_storage(session.storage, resumed) if session.storage is not None else None
        if resumed:
            store = store or open_storage(str(session.journal))
            check_resumed(store, session.study_name, none_will_do=session.storage is None)
        run = prepare(options, reporter)
        if run.loaded.info.id == "reference":
            reporter.say("model: the embedded reference model, a test instrument (give --model for your own)")
        if unproven := without_interval(run.data.test):
            reporter.say(f"warning: {unproven}; give more --samples")
        store = store or open_storage(str(session.journal))
        study = Study(store, session.study_name, options.sampler, options.seed)
        stack.callback(study.close)
        rival = None
        if options.random_baseline and options.sampler != RANDOM:  # it would be compared with itself
            rival = Study(store, f"{session.study_name}-random", RANDOM, options.seed)
            stack.callback(rival.close)
            rival.claim({**run.facts, "sampler": RANDOM})
        plan = analyse(run, study)
        if lock is not None:  # the folder belongs to this process alone: earlier workers of its study are gone
            for each in (study, rival):
                if each is not None:
                    each.fail_abandoned(everyone=True)
        space = make_space(run, plan)
        front = proxy_front(space)
        with _helpers(session, reporter, lock) as wait:
            search(run, plan, space, front, study, rival)
            if session.join:
                return []
            wait()
        ends = options.trials, options.patience
        found, random = study.settled(*ends), rival.settled(*ends) if rival is not None else []
        targets, test = choose(run, plan, space, found, random)
        made = [
            [profile_content(run, space, t, test, found), [str(s) for s in t.chosen.candidate.setting]] for t in targets
        ]
        # The last digits may differ between machines: all workers write the first one's measurements.
        # Not of workers that search longer, have other rivals, or choose by another rule.
        key = (
            f"profiles {options.trials} with patience {options.patience}"
            f"{', a random search' * (rival is not None)}{', robust' * options.robust}"
        )
        agreed = study.agree(key, made)
        with _keeping():
            paths = []
            for target, (content, layers) in zip(targets, agreed, strict=True):
                setting = tuple(map(LayerSpec.parse, layers))
                fitted = any(side.fitted for layer in setting for side in (layer.key, layer.value))
                data = centres_file(setting, plan.centres) if fitted else None
                profile = sealed(_profile_name(run, session, target), setting, content, data)
                paths.append(write(profile, session.output, data))
            made_record = record(run, plan, space, front, found, random, targets, test)
            written = session.output / "record.json"
            write_atomic(written, dumps(made_record))
            for path in [*paths, *publish(made_record, session.output), written]:
                reporter.say(f"wrote {path}")
        return paths


@contextmanager
def _keeping() -> Iterator[None]:
    """A failure to write the final results ends in one line that says how to continue."""
    try:
        yield
    except (UsageError, DataError) as error:
        raise DataError(f"{error}; the trials are kept: continue with --resume") from error


@contextmanager
def _claimed_folder(session: CalibrationSession) -> Iterator[int | None]:
    """Make the output folder and decide what happens to a study in it; yields the lock on the folder if the study is in it.

    Raises:
        UsageError: if it has a study and neither --resume nor --overwrite was given, another run is using it, or it cannot be
            written to.
    """
    if session.join:
        yield None
        return
    check_writable(session.output / "record.json")
    if session.storage is not None:
        yield None
        return
    for name in ("study.lock", "study.journal"):
        refuse_unusual(session.output / name)
    try:
        lock = os.open(session.output / "study.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(
            f"cannot write {session.output / 'study.lock'}: {error.strerror}: choose a folder that can be written to"
        ) from error
    try:
        alone = _lock(lock, session.output)
        if session.journal.exists():
            if session.overwrite:
                if at_work(session.journal):
                    raise UsageError(
                        f"another calibration is at work on {session.journal}: wait for it, or choose another --output"
                    )
                session.journal.unlink()
            elif not session.resume:
                raise UsageError(
                    f"{session.output} already holds a study: continue with --resume, start again with --overwrite, or choose another --output"
                )
        elif session.resume:
            raise UsageError(
                f"{session.output} holds no study to resume: leave --resume out, or name the folder of the first run"
            )
        yield lock if alone else None
    finally:
        os.close(lock)


def _lock(handle: int, folder: Path) -> bool:
    """Take the lock of a folder; False where the file system has no locks.

    Raises:
        UsageError: if another run has it.
    """
    deadline = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"another calibration is using {folder}: wait for it, choose another --output,"
                    " or share the trials with --workers or --storage"
                ) from error
            time.sleep(0.1)  # helpers of a run that was killed end by themselves
        except OSError:
            return False


@contextmanager
def _helpers(session: CalibrationSession, reporter: Reporter, lock: int | None) -> Iterator[Any]:
    """Start the other workers; yields a function that waits for them.

    Each holds one end of a pipe that nobody writes to, and so notices when this process ends for any reason; and the folder's lock, so
    that no other run takes the folder while a helper is still working.
    """
    count = 0 if session.join else session.workers - 1
    processes = []
    watched, held = os.pipe()
    inherited = (watched,) if lock is None else (watched, lock)
    for index in range(1, count + 1):
        environment = dict(os.environ)
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // session.workers))
        if torch.cuda.is_available() and "CUDA_VISIBLE_DEVICES" not in environment:
            environment["CUDA_VISIBLE_DEVICES"] = str(index % torch.cuda.device_count())
        command = [sys.executable, "-m", "kvtuner_search", *session.arguments, "--join", "--quiet"]
        command += ["--parent", str(watched)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, pass_fds=inherited))
    if count:
        reporter.say(f"{count} more worker{'s' if count > 1 else ''} started")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // session.workers))

    def wait() -> None:
        for process in processes:
            if process.wait() != 0:
                reporter.say(f"a worker ended with exit code {process.returncode}; its finished trials are kept")

    try:
        yield wait
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.close(watched)
        os.close(held)


def _profile_name(run: CalibrationRun, session: CalibrationSession, target: TargetResult) -> str:
    stem = session.name or run.loaded.info.id.rsplit("/", 1)[-1]
    label = f"{target.bits:.2f}bit" if target.bits is not None else f"loss{run.options.max_loss:g}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{stem}-{label}").lstrip("._-")[:128]
