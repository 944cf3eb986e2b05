"""Run a command that dies with the process that started it: ``python -m kvtuner_search.servers.tied PARENT COMMAND...``

SGLang's own children end when their parent does; this does the same for the first process, so that a ``validate`` that was
killed with SIGKILL leaves no server behind. Linux keeps the setting over ``execvp``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    """Tie this process to its parent, then become the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the parent is gone")  # it died before prctl, whose signal then never comes
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
