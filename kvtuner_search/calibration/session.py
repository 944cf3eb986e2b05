"""One run of ``calibrate``: its folder, its study, its workers, and what it writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvtuner_search.calibration.choosing import Target, choose
from kvtuner_search.calibration.options import CalibrationOptions
from kvtuner_search.calibration.outputs import profile_content, record, without_interval
from kvtuner_search.calibration.pipeline import Run, analyse, make_space, prepare, search
from kvtuner_search.calibration.study import Study, open_storage
from kvtuner_search.errors import UsageError
from kvtuner_search.evaluation.stored import centres_file
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.canonical import save, seal
from kvtuner_search.progress import Reporter


@dataclass(frozen=True)
class Session:
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


def calibrate(options: CalibrationOptions, session: Session) -> None:
    """Run a calibration and write ``NAME-BITS.json``, ``.safetensors``, ``report.html`` and ``record.json``.

    Raises:
        UsageError, DataError: if something cannot be used; nothing that was finished is lost.
    """
    reporter = Reporter(session.quiet)
    _claim_folder(session)
    run = prepare(options, reporter)
    if run.loaded.info.id == "reference":
        reporter.say("model: the embedded reference model, a test instrument (give --model for your own)")
    if unproven := without_interval(run.data.test):
        reporter.say(f"warning: {unproven}; give more --samples")
    storage = open_storage(session.storage or str(session.journal))
    study = Study(storage, session.study_name, options.sampler, options.seed)
    rival = Study(storage, f"{session.study_name}-random", "random", options.seed) if options.random_baseline else None
    plan = analyse(run, study)
    space = make_space(run, plan)
    with _helpers(session, reporter) as wait:
        found, random = search(run, plan, space, study, rival)
        if session.join:
            return
        wait()
    found, random = study.finished(), rival.finished() if rival is not None else random
    targets, test = choose(run, plan, space, found, random)
    paths = []
    for target in targets:
        content = profile_content(run, plan, space, target, test, found, _profile_name(run, session, target))
        paths.append(_write_profile(session.output, content, target, plan.centres))
    content = record(run, plan, space, found, random, targets, test)
    _write_report(session, content, paths, reporter)


def _claim_folder(session: Session) -> None:
    """Make the output folder and decide what happens to a study that is there.

    Raises:
        UsageError: if there is one and neither --resume nor --overwrite was given, or the folder cannot be written.
    """
    write_atomic(session.output / ".writable", "")
    (session.output / ".writable").unlink(missing_ok=True)
    if session.storage is not None or session.join or not session.journal.exists():
        if session.resume and session.storage is None and not session.journal.exists():
            raise UsageError(
                f"{session.output} holds no study to resume: leave --resume out, or name the folder of the first run"
            )
        return
    if session.overwrite:
        session.journal.unlink()
    elif not session.resume:
        raise UsageError(
            f"{session.output} already holds a study: go on with --resume, start again with --overwrite, or choose another --output"
        )


@contextmanager
def _helpers(session: Session, reporter: Reporter) -> Iterator[Any]:
    """Start the other workers; yields a function that waits for them."""
    count = 0 if session.join else session.workers - 1
    processes = []
    for index in range(1, count + 1):
        environment = dict(os.environ)
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // session.workers))
        if torch.cuda.is_available() and "CUDA_VISIBLE_DEVICES" not in environment:
            environment["CUDA_VISIBLE_DEVICES"] = str(index % torch.cuda.device_count())
        command = [sys.executable, "-m", "kvtuner_search", *session.arguments, "--join", "--quiet"]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
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
                process.wait()


def _profile_name(run: Run, session: Session, target: Target) -> str:
    stem = session.name or run.loaded.info.id.rsplit("/", 1)[-1]
    label = f"{target.bits:.2f}bit" if target.bits is not None else f"loss{run.options.max_loss:g}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{stem}-{label}").lstrip("._-")[:128]


def _write_profile(folder: Path, content: dict[str, Any], target: Target, centres: Any) -> Path:
    """Write the transforms, then the profile that names them; returns the profile's path."""
    setting = target.chosen.candidate.setting
    if any(side.fitted for layer in setting for side in (layer.key, layer.value)):
        data = centres_file(setting, centres)
        file = f"{content['name']}.safetensors"
        write_atomic(folder / file, data)
        content["transforms"] = {"file": file, "digest": "sha256:" + hashlib.sha256(data).hexdigest()}
    path = folder / f"{content['name']}.json"
    save(seal(content), path)
    return path


def _write_report(session: Session, content: dict[str, Any], paths: list[Path], reporter: Reporter) -> None:
    from kvtuner_search.report.calibration_html import render
    from kvtuner_search.report.terminal import summary

    write_atomic(session.output / "record.json", json.dumps(content, sort_keys=True, allow_nan=False) + "\n")
    write_atomic(session.output / "report.html", render(content))
    console = Console()
    summary(content, console if console.is_terminal else Console(width=100))
    for path in [*paths, session.output / "report.html", session.output / "record.json"]:
        reporter.say(f"wrote {path}")
