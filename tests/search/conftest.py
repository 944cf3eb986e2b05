"""What the tests of heavy modules share."""

import signal
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE / "calibration"), str(HERE / "data")]  # for tiny_models, study_worker and words

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: commands would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random four-layer Qwen2 with key outliers and the reference tokenizer."""
    from tiny_models import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny-qwen2")
