"""``kvtuner-search show``: one profile, readable."""

from __future__ import annotations

from pathlib import Path

import click

from kvtuner_search.cli.options import context_option, json_option, memory_option
from kvtuner_search.files import write_atomic
from kvtuner_search.profile.canonical import canonical_json
from kvtuner_search.profile.capacity import capacity, request_rows
from kvtuner_search.profile.source import load_from


@click.command("show", epilog="Exit codes: 0 shown, 2 usage, 3 unreadable or invalid profile.")
@click.argument("profile")
@memory_option
@context_option
@click.option("--html", type=click.Path(path_type=Path), help="Write a self-contained page instead.")
@json_option
def command(profile: str, memory: int | None, context: int | None, html: Path | None, as_json: bool) -> None:
    """Show PROFILE (a file, REF:path for a file in git, or - for standard input)."""
    loaded = load_from(profile)
    if html is not None:
        from kvtuner_search.report.profile_html import profile_html

        write_atomic(html, profile_html(loaded, memory, context))
        click.echo(f"wrote {html}", err=True)
    if as_json:
        model = loaded.model
        content = loaded.model_dump(mode="json")
        content["derived"] = {
            "layers": [
                {
                    "spec": str(spec),
                    "kind": str(kind),
                    "bytes_per_token": spec.bytes_per_token(model.num_kv_heads, model.head_dim),
                    "effective_bits": spec.effective_bits(model.num_kv_heads, model.head_dim),
                    "mean_bits": {"key": spec.key.mean_bits, "value": spec.value.mean_bits},
                    "bands": {"key": spec.key.bands or None, "value": spec.value.bands or None},
                }
                for spec, kind in zip(loaded.layer_specs(), model.kinds, strict=True)
            ],
            "memory_bytes": memory,
            "capacity_tokens": None if memory is None else capacity(memory, loaded),
            "requests": [
                {"context_tokens": tokens, "bytes": nbytes, "fit": fit}
                for tokens, nbytes, fit in request_rows(loaded, memory, context)
            ],
        }
        click.echo(canonical_json(content), nl=False)
    elif html is None:
        from kvtuner_search.profile.terminal import print_card

        print_card(loaded, memory, context)
