"""``kvtuner-search check``: is a profile sound, and does it belong to this model?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvtuner_search.cli.options import json_option
from kvtuner_search.errors import ExitCode, KVTunerError, UsageError
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.canonical import canonical_json, dumps, loads, read_limited
from kvtuner_search.profile.checks import check_model, strict_remarks
from kvtuner_search.profile.model_support import read_supported
from kvtuner_search.profile.schema import ModelInfo
from kvtuner_search.profile.text import one_line, printable
from kvtuner_search.transforms import folder_of, verify_transforms

_GRAVEST_FIRST = (ExitCode.USAGE, ExitCode.DATA, ExitCode.NOT_COMPARABLE, ExitCode.GATE_FAILED, ExitCode.OK)


@click.command(
    "check",
    epilog="Exit codes: 0 all sound, 1 a remark with --strict, 2 usage, or a file cannot be written, 3 unreadable or invalid, 4 for another model."
    " With several profiles the most severe wins: 2, then 3, then 4, then 1.",
)
@click.argument("profiles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model", type=click.Path(path_type=Path),
    help="Folder of the model, or its config.json: the profile must belong to it.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Fail on remarks too, e.g. nothing was measured.")
@click.option(
    "--rewrite", is_flag=True,
    help="Rewrite each sound profile that has an older schema version or is not in canonical form. Its content stays.",
)  # fmt: skip
@click.option("--hook", is_flag=True, hidden=True, allow_from_autoenv=False)
@json_option
def command(
    profiles: tuple[Path, ...], model: Path | None, strict: bool, rewrite: bool, hook: bool, as_json: bool
) -> int:
    """Check each of PROFILES: schema, digest, bytes, effective bits, front, and the transforms file beside it."""
    if hook and profiles[0] == Path("--strict"):  # pre-commit puts `args` behind the entry, and so behind its `--`
        profiles, strict = profiles[1:], True
        if not profiles:
            raise UsageError("no profile is given: name at least one")
    info = None if model is None else read_supported(model)
    results = [_check(path, info, str(model), strict, rewrite) for path in profiles]
    code = next(code for code in _GRAVEST_FIRST if any(result["exit_code"] == code for result in results))
    for result in results:
        if result["error"]:
            click.echo(f"kvtuner-search: {result['error']}", err=True)
    if as_json:
        click.echo(canonical_json({"exit_code": int(code), "profiles": results}), nl=False)
    else:
        _print([result for result in results if not result["error"]], strict)
    return code


def _print(results: list[dict[str, Any]], strict: bool) -> None:
    for result in results:
        figures = f"{result['effective_bits']:.3f} effective bits, {result['bytes_per_token']} bytes per token"
        if result["bytes_per_token_full"] is not None:
            figures += f", {result['bytes_per_token_full']} of them in full layers; windows take at most {result['bytes_per_request_windows']} per request"
        click.echo(f"{printable(result['path'])}: sound, {figures}")
        if result["rewritten"]:
            click.echo(f"  rewritten, its digest is {result['digest']}")
        for remark in result["remarks"]:
            click.echo(f"  {'error' if strict else 'remark'} {remark['id']}: {remark['message']}")


def _check(path: Path, model: ModelInfo | None, model_name: str, strict: bool, rewrite: bool) -> dict[str, Any]:
    shown = str(path).encode(errors="replace").decode()
    result: dict[str, Any] = {"path": shown, "error": None, "rewritten": False, "remarks": []}
    try:
        data = read_limited(path)
        profile = loads(data, str(path))
        result |= {
            "name": profile.name,
            "digest": profile.digest,
            "bytes_per_token": profile.storage.bytes_per_token,
            "bytes_per_token_full": profile.storage.bytes_per_token_full,
            "bytes_per_request_windows": profile.storage.bytes_per_request_windows,
            "effective_bits": profile.storage.effective_bits,
        }
        verify_transforms(profile, folder_of(path, profile))
        if model is not None:
            check_model(profile, model, model_name)
        text = dumps(profile).encode()
        if rewrite and text != data:
            write_atomic(path.resolve(), text)  # what a link names, not the link
            data = text
            result["rewritten"] = True
    except KVTunerError as error:
        return result | {"error": one_line(error), "exit_code": int(error.exit_code)}
    remarks = [{"id": remark.id, "message": printable(remark.message)} for remark in strict_remarks(profile, data)]
    code = ExitCode.GATE_FAILED if remarks and strict else ExitCode.OK
    return result | {"remarks": remarks, "exit_code": int(code)}
