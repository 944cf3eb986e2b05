"""Windows, sinks and masks mean to our kernels what they mean to SGLang's."""

import os
import subprocess
import sys
from pathlib import Path


def test_extend_and_decode_give_what_sglangs_kernels_give() -> None:
    command = [sys.executable, "-m", "tests.serving.sglang.beside_sglang"]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * 2 * (2 + 1)
    for line in lines:
        assert float(line.split()[-1]) < 4e-3, line  # two roundings to fp16
