"""One ablation from beginning to end: quality row by row, then servers row by row, each saved as soon as it is finished."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from kvtuner_kernels.reference import Centres
from kvtuner_search import __version__
from kvtuner_search.bench.ablate.quality import NOT_SERVED, QualityBench
from kvtuner_search.bench.ablate.rows import Ablation, AblationRow, AblationSpeed
from kvtuner_search.bench.ablate.variants import BASELINE, StorageVariant, catalogue
from kvtuner_search.errors import UsageError
from kvtuner_search.evaluation.offline import open_profile
from kvtuner_search.files import write_atomic
from kvtuner_search.json_lines import JsonLines, whole_lines
from kvtuner_search.models.load import ModelOptions, load_model
from kvtuner_search.models.reference_model import REFERENCE_NAME
from kvtuner_search.profile.canonical import canonical_json
from kvtuner_search.profile.checks import check_model
from kvtuner_search.profile.schema import ModelInfo
from kvtuner_search.progress import Reporter
from kvtuner_search.servers.folder import RunFolder
from kvtuner_search.servers.host import tool

ROWS: Final = "rows.jsonl"
RESULT: Final = "ablation.json"


@dataclass(frozen=True)
class AblationServerOptions:
    """How rows are served."""

    python: str  # interpreter of the environment that has SGLang
    arguments: tuple[str, ...]  # of SGLang
    prompt: int  # tokens of each prompt
    output: int  # tokens of each answer of the throughput cell
    concurrency: int  # requests in flight in the throughput cell
    requests: int  # least of each cell
    timeout: float  # seconds for one request
    start_timeout: float  # seconds until a server is ready


@dataclass(frozen=True)
class AblationOptions:
    """One ablation."""

    model: ModelOptions
    families: tuple[str, ...]
    profiles: tuple[Path, ...]
    sources: tuple[str, ...]
    centring: tuple[str, ...]
    samples: int
    length: int
    seed: int
    batch_tokens: int
    context: int | None  # tokens for which bits are counted; None: `length`
    server: AblationServerOptions | None
    folder: Path
    resume: bool
    overwrite: bool
    command: str


class FinishedRows:
    """The finished rows in the folder: JSON lines ``{"row": AblationRow}`` and ``{"name": ..., "server": [...], "speed": AblationSpeed}``."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[str, AblationRow] = {}
        self.speeds: dict[str, AblationSpeed] = {}
        self.servers: dict[str, list[str]] = {}  # how each of the speeds was measured
        end = 0
        for line, end in whole_lines(path):  # noqa: B007  # the end of the last whole line is needed below
            if "row" in line:
                self.rows[line["row"]["name"]] = AblationRow.model_validate(line["row"])
            else:
                self.speeds[line["name"]] = AblationSpeed.model_validate(line["speed"])
                self.servers[line["name"]] = line["server"]
        self._lines = JsonLines(path, end)

    def row(self, row: AblationRow) -> None:
        """Keep a row's quality."""
        self.rows[row.name] = row
        self._lines.write({"row": row.model_dump(mode="json")})

    def speed(self, name: str, server: list[str], speed: AblationSpeed) -> None:
        """Keep a row's speed."""
        self.speeds[name], self.servers[name] = speed, server
        self._lines.write({"name": name, "server": server, "speed": speed.model_dump(mode="json")})

    def close(self) -> None:
        self._lines.close()


def ablate(options: AblationOptions, reporter: Reporter) -> Ablation:
    """Measure every row that the folder does not have yet, and write ``ablation.json`` there.

    Raises:
        UsageError, DataError: if an option, the model or the data cannot be used; finished rows are kept.
        NotComparableError: if a profile is of another model.
    """
    with reporter.stage("load the model"):
        loaded = load_model(options.model, options.length)
    info = loaded.info
    variants = catalogue(info, options.families)
    own: dict[str, dict[int, Centres]] = {}
    for path in options.profiles:
        profile, centres = open_profile(path)
        check_model(profile, info, info.id)
        if profile.name in own or profile.name in {variant.name for variant in variants}:
            raise UsageError(f"two rows are named {profile.name}: give each profile once")
        own[profile.name] = centres
        variants.append(StorageVariant(profile.name, "profile", tuple(profile.layer_specs()), profile=path))
    with reporter.stage("read the data"):
        bench = QualityBench(
            loaded,
            options.sources,
            options.centring if any(variant.centred and variant.profile is None for variant in variants) else None,
            samples=options.samples,
            length=options.length,
            seed=options.seed,
            batch_tokens=options.batch_tokens,
            reporter=reporter,
        )
    context = options.context or options.length
    settings = {
        "tool": tool(),
        "model": info.model_dump(mode="json"),
        "dtype": str(loaded.dtype),
        "data": bench.split.digest,
        "centring": list(options.centring),
        "context": context,
        "profiles": {path.stem: open_profile(path)[0].digest for path in options.profiles},
    }
    folder = RunFolder(
        options.folder,
        settings,
        resume=options.resume,
        overwrite=options.overwrite,
        journals=(ROWS,),
        results=(RESULT,),
    )
    head: dict[str, Any] = {
        "model": info.id,
        "head_dim": info.head_dim,
        "data": {name: part.digest for name, part in bench.split.by_source().items()},
        "centring": {name: part.digest for name, part in bench.centring.by_source().items()},
        "device": torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "cpu",
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    kept = FinishedRows(folder.path / ROWS)
    try:
        for number, variant in enumerate(variants, 1):
            if variant.name not in kept.rows:
                title = f"{number}/{len(variants)} {variant.name}"
                kept.row(bench.row(variant, context, title, own.get(variant.name)))
        if options.server is not None:
            vectors = {v.name: own.get(v.name) or (bench.centres() if v.centred else {}) for v in variants}
            del bench, loaded  # the servers need the GPU's memory
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            _serve(options, options.server, variants, info, vectors, kept, reporter)
    finally:
        kept.close()
    rows = [kept.rows[v.name].model_copy(update={"speed": kept.speeds.get(v.name)}) for v in variants]
    result = Ablation(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=options.command,
        samples=options.samples,
        length=options.length,
        versions={"kvtuner-search": __version__} | {name: metadata.version(name) for name in ("torch", "transformers")},
        rows=rows,
        notes=_notes(options, info.id, context, rows, head["dtype"]),
        **head,
    )
    write_atomic(folder.path / RESULT, canonical_json(result.model_dump(mode="json")))
    return result


def _serve(
    options: AblationOptions,
    server: AblationServerOptions,
    variants: Sequence[StorageVariant],
    model: ModelInfo,
    centres: Mapping[str, dict[int, Centres]],
    kept: FinishedRows,
    reporter: Reporter,
) -> None:
    """Measure the speed of every row that packed rows can hold, and that is not measured yet or failed."""
    from kvtuner_search.bench.ablate import speed

    cells = speed.steps(server.prompt, server.output, server.concurrency, server.requests)
    how = [
        *server.arguments,
        f"{server.prompt} in, {server.output} out, {server.concurrency} at a time, {server.requests}",
    ]
    profiles = options.folder / "profiles"
    for variant in variants:
        done = kept.speeds.get(variant.name)
        if variant.setting is None or (done is not None and done.cells and kept.servers[variant.name] == how):
            continue
        profile = None
        if variant.name != BASELINE:
            profile = speed.write_profile(variant, model, centres[variant.name], profiles)
        found = speed.measure(
            variant,
            profile,
            model=options.model.source,
            server_python=server.python,
            server_arguments=server.arguments,
            cells=cells,
            folder=options.folder,
            overwrite=options.overwrite,
            seed=options.seed,
            timeout=server.timeout,
            start_timeout=server.start_timeout,
            command=options.command,
            reporter=reporter,
        )
        kept.speed(variant.name, how, found)


def _notes(options: AblationOptions, model: str, context: int, rows: Sequence[AblationRow], dtype: str) -> list[str]:
    notes = [
        "Quality is offline: teacher-forced, attention reading every key and value as stored. Intervals are 95 %, paired with the 16-bit cache.",
        "NLL is over all text sources together, KL over all sources; accuracy is the share of task prompts with every answer token ranked first, flips are prompts lost and gained.",
    ]
    if any(row.context for row in rows):
        notes.append(
            f"Rows marked * are simulated offline; their bits are counted with {context} tokens in the cache, and quality was measured on"
            f" samples of at most {options.length}. {NOT_SERVED[0].upper() + NOT_SERVED[1:]}."
        )
    if dtype == "float32":
        notes.append(
            "The model computed in float32, so the 16-bit row holds 32-bit numbers; bits and capacity are those of 16."
        )
    if model == REFERENCE_NAME:
        notes.append(
            "Measured on the embedded reference model, a 13.9 M-parameter test instrument: no figure carries over."
        )
    return notes
