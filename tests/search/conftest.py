"""What the tests of heavy modules share."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE / "calibration"), str(HERE / "data")]  # for tiny_models, study_worker and words


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random four-layer Qwen2 with key outliers and the reference tokenizer."""
    from tiny_models import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny-qwen2")
