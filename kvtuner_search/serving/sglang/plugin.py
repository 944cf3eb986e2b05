"""SGLang's entry point (group ``sglang.srt.plugins``): called at the start of the launcher and of each scheduler process.

It does nothing unless requested by our flags on the launcher's command line, or by ``KVTUNER_SERVING`` in the environment. The
flags are always added to a supported SGLang's parser, so that ``--help`` lists them.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module, metadata
from pathlib import Path
from pkgutil import iter_modules
from typing import Final, Protocol, cast

from kvtuner_search.errors import UsageError
from kvtuner_search.serving.configuration import ServingConfiguration
from kvtuner_search.serving.sglang.launcher import asked, refusing


def _adapters() -> dict[str, str]:
    """SGLang's version -> the module that knows it, oldest first: every ``vX_Y_Z.py`` in this folder."""
    found = [module.name for module in iter_modules([str(Path(__file__).parent)])]
    versions = [tuple(map(int, name[1:].split("_"))) for name in found if re.fullmatch(r"v\d+(_\d+)+", name)]
    return {".".join(map(str, v)): f"v{'_'.join(map(str, v))}" for v in sorted(versions)}


ADAPTERS: Final = _adapters()


class Adapter(Protocol):
    """The interface of a version's module."""

    def register_flags(self) -> None:
        """Let SGLang's command line know our flags."""

    def activate(self, configuration: ServingConfiguration) -> None:
        """Let this process serve a profile."""


def register() -> None:
    """SGLang calls this in each process, and only logs exceptions; only an exit stops a server."""
    with refusing():
        version = metadata.version("sglang")
        wanted = asked(sys.argv[1:])
        if version not in ADAPTERS:
            if wanted:
                raise UsageError(
                    f"SGLang {version} is installed, but a profile needs {' or '.join(ADAPTERS)}: install one of them, or"
                    " leave the profile out"
                )
            return
        adapter = cast(Adapter, import_module(f"kvtuner_search.serving.sglang.{ADAPTERS[version]}"))
        adapter.register_flags()
        configuration = ServingConfiguration.from_environment()
        if configuration is not None:
            adapter.activate(configuration)
