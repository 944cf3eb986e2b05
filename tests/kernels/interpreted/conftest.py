"""These tests run in Triton's interpreter, which is chosen when the kernels are imported: test_triton_interpreter.py starts
a process for them. A plain collection leaves them out."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
