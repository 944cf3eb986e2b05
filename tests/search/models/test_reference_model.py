"""The embedded reference model: whole, in the wheel, and with the tokenizer that it was trained with."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvtuner_search.errors import DataError
from kvtuner_search.models import reference_model
from kvtuner_search.models.reference_model import REFERENCE_NAME, reference_model_path

ROOT = Path(__file__).parents[3]
# sha256 of the weights as they were handed over; quality figures in the documents belong to exactly these.
WEIGHTS = {
    "model-00001-of-00003.safetensors": "26310ba1e2054ad248e770ba4b53e380a593f9ed9ef5f40881436d914ba3e755",
    "model-00002-of-00003.safetensors": "cff239a6231afe7d6e6061d3e52e22a3cc4e491a3097748fedef62020e9538ce",
    "model-00003-of-00003.safetensors": "34d2b7f0e3ebb1320faa9b5d82db49398eaeb91389d1f9b63c4daa764c2c61f4",
}


def test_path_needs_no_torch() -> None:
    code = (
        "import sys; from kvtuner_search.models.reference_model import reference_model_path as path; print(path());"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": "kernels:."}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()) == reference_model_path()


def test_weights_are_the_ones_of_the_card() -> None:
    folder = reference_model_path()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(WEIGHTS)
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in WEIGHTS} == WEIGHTS
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_tokenizer_gives_the_ids_that_the_model_was_trained_on() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference_model_path())
    text = "The code of the wren kite is 14009.\nÉté 中文 naïve<|endoftext|>\n\n  x"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [
        *(472, 1382, 280, 260, 264, 976, 430, 607, 322, 220, 16, 19, 15, 15, 24, 431, 127, 231),
        *(83, 2915, 220, 160, 116, 255, 162, 244, 229, 295, 64, 127, 107, 313, 8189, 294, 220, 1057),
    ]
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (8192, "<|endoftext|>", "<|endoftext|>")


def test_missing_package_data_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_model, "REFERENCE_NAME", "absent")
    with pytest.raises(DataError, match=r"reference model is not in .*absent: install"):
        reference_model_path()


def test_wheel_holds_both_packages_and_the_model(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    folder = reference_model_path()
    for path in folder.iterdir():
        assert sizes[f"kvtuner_search/models/{REFERENCE_NAME}/{path.name}"] == path.stat().st_size
    for name in ("kvtuner_search/py.typed", "kvtuner_kernels/py.typed", "kvtuner_kernels/layout.py"):
        assert name in sizes
    assert not [name for name in sizes if name.startswith(("kernels/", "tests/"))]
