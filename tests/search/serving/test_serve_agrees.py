"""The plan and the server agree: where it listens, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.profile_factory import write
from tests.search.serving import serve_command
from tests.search.serving.serve_command import Run, plan

command, small = serve_command.command, serve_command.small  # fixtures


@pytest.mark.parametrize(
    "arguments",
    [["--host="], ["--host", ""], ["--host", " "], ["--host", "[::1]"], ["--host", "http://x"], ["--host", "127.0.0.1", "--host="], ["--host", "a b"]],
    ids=" ".join,
)  # fmt: skip
def test_a_host_that_is_none_is_refused(command: Run, small: tuple[Path, Path], arguments: list[str]) -> None:
    code, out, err = command("--profile", small[0], "--model-path", small[1], *arguments, "--dry-run")
    assert (code, out) == (2, "")
    assert "is not an address: give 127.0.0.1 for this machine alone, 0.0.0.0 for every interface" in err


@pytest.mark.parametrize("text", ['host: ""\n', "host:\n", "host: null\n", "host: true\n"])
def test_nor_can_a_file_of_options_open_every_interface(
    command: Run, small: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    (tmp_path / "options.yaml").write_text(text)
    code, out, _ = command("--profile", small[0], "--model-path", small[1], "--config", "options.yaml", "--dry-run")
    assert (code, out) == (2, "")
    code, out, _ = command(
        "--profile", small[0], "--model-path", small[1], "--config", "options.yaml", "--host", "::1", "--dry-run"
    )
    if "true" in text:  # a switch, which --host is none of
        assert (code, out) == (2, "")
    else:
        assert (code, out.endswith("http://[::1]:30000\n")) == (0, True)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        (None, "http://127.0.0.1:30000\n"),
        ("localhost", "http://localhost:30000\n"),
        ("127.0.0.2", "http://127.0.0.2:30000\n"),
        ("::1", "http://[::1]:30000\n"),
        ("0.0.0.0", "http://0.0.0.0:30000, which other machines can reach\n"),
        ("::", "http://[::]:30000, which other machines can reach\n"),
        ("0", "http://0:30000, which other machines can reach\n"),
        ("10.0.0.1", "http://10.0.0.1:30000, which other machines can reach\n"),
        ("node-1.local", "http://node-1.local:30000, which other machines can reach\n"),
    ],
)
def test_plan_and_server_agree_on_the_address(
    command: Run, small: tuple[Path, Path], tmp_path: Path, host: str | None, address: str
) -> None:
    common = ["--profile", small[0], "--model-path", small[1]]
    forms: list[list[str]] = [[]]
    if host is not None:
        (tmp_path / "options.yml").write_text(f"host: '{host}'\n")
        forms = [
            ["--host", host],
            [f"--host={host}"],
            ["--host", "1.2.3.4", "--host", host],
            ["--config", "options.yml"],
        ]
    for form in forms:
        code, out, _ = command(*common, *form, "--dry-run")
        assert (code, out.endswith(address)) == (0, True), out
        added = plan(command, *common, *form)["added_arguments"]
        assert ("--host" in added) == (host is None), "what the user gave is the server's last word"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "0"], "--port 0: give a number from 1 to 65535"),
        (["--port", "65536"], "--port 65536"),
        (["--port", "-1"], "--port -1"),
        (["--speculative-algorithm", "EAGLE"], "--speculative-algorithm EAGLE: with a profile only STANDALONE, NGRAM"),
        (["--speculative-algorithm", "NGRAM", "--device", "cpu"], "--speculative-algorithm NGRAM"),
        (
            ["--speculative-algorithm", "NGRAM", "--pp-size", "2"],
            "SGLang cannot combine pipeline stages with speculation",
        ),
        (["--dtype", "float32"], "--dtype float32: on a GPU, and if a side is stored raw"),
        (["--dtype", "float"], "--dtype float"),
        (["--enable-unified-memory"], "unified memory cannot be combined with a profile"),
        (["--enable-kv-cache-sharding"], "sharding of the cache by pages cannot"),
        (["--dcp-size", "2"], "decode context parallelism cannot"),
        (["--flexkv-config-file", "f"], "FlexKV cannot"),
        (["--config", "a.yaml", "--config", "a.yaml"], "--config is given twice"),
        (["--config", "a.json"], "a.json is not a YAML file by its name"),
    ],
)
def test_a_dry_run_refuses_what_the_server_refuses(
    command: Run, small: tuple[Path, Path], tmp_path: Path, arguments: list[str], said: str
) -> None:
    for name in ("a.yaml", "a.json"):
        (tmp_path / name).write_text("{}\n")
    code, out, err = command("--profile", small[0], "--model-path", small[1], *arguments, "--dry-run")
    assert (code, out) == (2, "")
    assert said in err


def test_what_the_server_takes_is_planned(command: Run, small: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("cuda-graph-bs: []\nhicache-storage-backend-extra-config: {a: 1}\ntp-size: 2\n")
    common = ["--profile", small[0], "--model-path", small[1]]
    assert plan(command, *common, "--config", "a.yaml")["parallel"]["tp_size"] == 2
    for arguments in (["--dtype", "float32", "--device", "cpu"], ["--dcp-size", "1"], ["--speculative-algorithm", "NGRAM"], ["--port", "65535"], ["--dtype", "half"]):  # fmt: skip
        assert plan(command, *common, *arguments)["profile"]["name"]
    raw = write(tmp_path / "raw.json", "16/4-g64-asym", model__config_digest=None)
    code, _, err = command(
        "--profile", raw, "--model-path", small[1], "--dtype", "float32", "--device", "cpu", "--dry-run"
    )
    assert (code, "if a side is stored raw" in err) == (2, True)
