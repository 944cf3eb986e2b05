"""Give SGLang's launcher several command lines in turn, up to where it would start its first process.

Reads a JSON list of argument lists; prints a JSON list of [exit code or null, what stood on stderr, attention backend].
"""

import contextlib
import io
import json
import os
import sys

from sglang.srt.plugins import load_plugins


def main() -> None:
    lines = json.load(sys.stdin)
    sys.argv[1:] = []
    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    from kvtuner_search.serving.sglang import hooks

    results = []
    for line in lines:
        os.environ.pop("KVTUNER_SERVING", None)
        hooks._active.clear()
        stderr, code, backend = io.StringIO(), None, None
        with contextlib.redirect_stderr(stderr):
            try:
                arguments = prepare_server_args(line)
                backend = arguments.attention_backend
                if hasattr(arguments, "resolve_once"):  # 0.5.23 resolves its arguments later
                    arguments.resolve_once()
                arguments.check_server_args()
            except SystemExit as stop:
                code = stop.code
        own = [text for text in stderr.getvalue().splitlines() if text.startswith("kvtuner-search: ")]
        results.append([code, own, backend])
    print(json.dumps(results))


main()
