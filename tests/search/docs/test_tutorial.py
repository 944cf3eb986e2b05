"""The commands of docs/tutorial.md, as they stand there, with less data, and with stand-ins where SGLang would serve."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from kvtuner_search.profile.canonical import load
from tests.search.servers.fake_base import interpreter
from tests.tutorial import FEW, ROOT, blocks, calibrated, needs_server, run, workplace

LITTLE = {
    "KVTUNER_CALIBRATE_DATA": "list",
    "KVTUNER_CALIBRATE_SAMPLES": "1",
    "KVTUNER_CALIBRATE_LENGTH": "170",
    "KVTUNER_CALIBRATE_TRIALS": "2",
    "KVTUNER_CALIBRATE_BITS": "4,16",
    "KVTUNER_EVALUATE_SAMPLES": "2",
}


def fixed_words(summary: str) -> list[str]:
    """The sentences that every calibration of the reference model prints, without figures and without the findings ("- ...")."""
    text = re.sub(r"^- .*?\n\n", "", summary, flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"[.:;\d]", " ".join(text.split()))
    return [words for part in parts if len(words := part.strip()) >= 40 and "[" not in words]


def test_the_tutorial_runs_as_it_stands(tmp_path: Path, tiny_model: Path) -> None:
    folder = workplace(tmp_path / "checkout")
    (folder / "models").mkdir()
    (folder / "models/my-model").symlink_to(tiny_model)
    commands = [block for found in blocks().values() for block in found if not needs_server(block)]
    done = run(commands, folder, **LITTLE)
    assert done.returncode == 0, done.stderr + done.stdout

    assert load(folder / "profiles/mine/reference-4.00bit.json").storage.effective_bits <= 4
    assert (folder / "demo-output/report.html").is_file()
    files = [line for line in (done.stderr + done.stdout).splitlines() if line.endswith("demo-output/report.html")]
    assert [line.split()[0] for line in files] == ["wrote"], "each file is named once"
    assert not [
        line for line in done.stdout.splitlines() if line.startswith("Calibration of") and line != line.rstrip()
    ]
    assert "--kvtuner-profile" in done.stdout, "the plan of the server"
    for bits in ("5.00", "6.00"):
        assert load(folder / f"my-output/my-model-{bits}bit.json").model.id == "my-model"
    shown = " ".join((ROOT / "docs/tutorial.md").read_text().split())
    summary = done.stdout[done.stdout.index("Calibration of reference") : done.stdout.index("Seconds by stage")]
    assert len(fixed_words(summary)) > 4
    assert [words for words in fixed_words(summary) if words not in shown] == [], "the demo's output is pasted anew"
    record = json.loads((folder / "my-output/record.json").read_text())
    assert record["options"]["trials"] == 2


def test_the_tutorial_validates_and_reviews_with_stand_in_servers(tmp_path: Path) -> None:
    """The commands as they stand there; tests/serving/docs has the real SGLang, and the comparison with the offline evaluation."""
    (tmp_path / "environment").mkdir()
    python = interpreter(tmp_path / "environment", "tests.search.servers.fake_sglang")
    folder, found = calibrated(tmp_path / "checkout"), blocks()
    (folder / "scripts/serving_environment").write_text(f"SERVING_PYTHON={shlex.quote(python)}\n")
    settings = [block for block in found["Serve it"] if not needs_server(block)]
    commands = [
        ". .venv/bin/activate\n",
        *found["Keep it like code"],
        *settings,
        *found["Validate it"],
        *found["Review it"],
    ]
    # The stand-ins' answers are arbitrary, so no task can be lost on them.
    few = FEW | {"KVTUNER_VALIDATE_OFFLINE": "0", "KVTUNER_VALIDATE_MAX_ACCURACY_DROP": "none"}
    done = run(commands, folder, **few)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "validation on a server: pass" in done.stdout
    profile = load(folder / "profiles/mine/reference-4.00bit.json")
    assert profile.validation is not None
    assert profile.validation.verdict == "pass"


def test_every_command_is_run_by_a_test() -> None:
    found = blocks()
    served = {heading for heading, each in found.items() if any(needs_server(block) for block in each)}
    assert served == {"Serve it", "Validate it", "Review it"}, "the sections that tests/serving/docs runs"
    assert sum(map(len, found.values())) > 8
