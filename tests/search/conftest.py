"""What the tests of heavy modules share."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.search.servers.fake_base import in_threads, interpreter
from tests.search.servers.fake_sglang import Fake

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE / "calibration"), str(HERE / "data")]  # for tiny_models, study_worker and words

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: commands would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random four-layer Qwen2 with key outliers and the reference tokenizer."""
    from tiny_models import write_model

    return write_model(tmp_path_factory.mktemp("models") / "tiny-qwen2")


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    """Start servers that answer as SGLang does, in threads; they end with the test."""
    with in_threads() as serve:
        yield lambda **arguments: serve(Fake(**arguments))


@pytest.fixture(scope="session")
def server_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter whose ``-m sglang.launch_server`` is that server, and whose SGLang says it is 0.5.14."""
    return interpreter(tmp_path_factory.mktemp("environment"), "tests.search.servers.fake_sglang")
