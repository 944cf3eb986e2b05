"""Everything that must not start a server: it says why in one line on stderr, and ends with a documented exit code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from servers import COMMON, Server, command, environment, still_alive

from kvtuner_search.errors import ExitCode
from kvtuner_search.models.reference_model import reference_model_path
from kvtuner_search.profile.canonical import load
from kvtuner_search.serving.sglang.plugin import ADAPTERS

HERE = Path(__file__).parent
USAGE, DATA, OTHER_MODEL, SERVER = map(int, (ExitCode.USAGE, ExitCode.DATA, ExitCode.NOT_COMPARABLE, ExitCode.SERVER))
# further arguments, exit code, what the line says
STATIC: list[tuple[list[str], int, str]] = [
    (["--enable-hierarchical-cache"], USAGE, r"--enable-hierarchical-cache True: HiCache cannot"),
    (["--disaggregation-mode", "prefill"], USAGE, r"--disaggregation-mode prefill: PD disaggregation cannot"),
    (["--kv-cache-dtype", "fp8_e5m2"], USAGE, r"--kv-cache-dtype fp8_e5m2: another KV-cache dtype cannot"),
    (["--enable-lmcache"], USAGE, r"--enable-lmcache True: LMCache cannot"),
    (["--enable-memory-saver"], USAGE, r"--enable-memory-saver True: the memory saver cannot"),
    (["--dp-size", "2"], USAGE, r"--dp-size 2: data parallelism within a server cannot"),
    (["--attention-backend", "flex_attention"], USAGE, r"--attention-backend flex_attention: only torch_native reads"),
    (["--enable-kvtuner-quant"], USAGE, r"--kvtuner-profile and --enable-kvtuner-quant both"),
]


def config_of(folder: Path, **changes: Any) -> Path:
    """A model folder that differs from the reference model in its config.json."""
    shutil.copytree(reference_model_path(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def damaged(profile: Path, folder: Path) -> Path:
    """The profile with one letter of its name changed."""
    folder.mkdir()
    shutil.copy(profile.with_suffix(".safetensors"), folder)
    target = folder / profile.name
    target.write_text(profile.read_text().replace('"name": "ref', '"name": "rEf'))
    return target


def parse(lines: list[list[str]]) -> list[list[Any]]:
    done = subprocess.run(
        [sys.executable, str(HERE / "parse_many.py")], input=json.dumps(lines), env=environment(), capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_cannot_be_served_is_refused_before_a_process_starts(mixed_profile: Path, tmp_path: Path) -> None:
    model = ["--model-path", str(reference_model_path()), *COMMON]
    wanted = ["--kvtuner-profile", str(mixed_profile)]
    lines, expected = [], []
    for more, code, text in STATIC:
        lines.append([*model, *wanted, *more])
        expected.append((code, text))
    # Another model, by its shape and by its rotary embedding alone; latent attention; layers with a state; windows that SGLang's Qwen2 lacks.
    for name, changes, code, text in (
        ("deeper", {"num_hidden_layers": 15}, OTHER_MODEL, r"num_layers=16, .+ has 15"),
        ("rope", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, OTHER_MODEL, "config_digest="),
        ("latent", {"kv_lora_rank": 512}, USAGE, r"multi-head latent attention, MLA \(kv_lora_rank=512\)"),
        ("linear", {"layer_types": ["linear_attention", "full_attention"] * 8}, USAGE, "layers of several kinds"),
        ("window", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 8}, USAGE,
         "layer 0 is sliding:64 by its config.json, but SGLang's Qwen2ForCausalLM attends to all tokens there"),
    ):  # fmt: skip
        lines.append(["--model-path", str(config_of(tmp_path / name, **changes)), *COMMON, *wanted])
        expected.append((code, text))
    copy = damaged(mixed_profile, tmp_path / "damaged")
    alone = tmp_path / "alone" / mixed_profile.name
    alone.parent.mkdir()
    shutil.copy(mixed_profile, alone)
    for path, text in (
        (copy, "it was edited or damaged"),
        (alone, r"safetensors does not exist"),
        (tmp_path / "no.json", "does not exist"),
    ):
        lines.append([*model, "--kvtuner-profile", str(path)])
        expected.append((DATA, text))
    good = [[*model, *wanted], [*model, "--attention-backend", "torch_native", *wanted]]

    unasked, *found = parse([model, *lines, *good])  # unasked first: a process that was asked once stays asked
    assert unasked[:2] == [None, []]
    assert found[len(lines) :] == [[None, [], "torch_native"]] * 2  # chosen for the device where nobody did
    for (code, said, _), (wanted_code, text), line in zip(found, expected, lines, strict=False):
        assert (code, len(said)) == (wanted_code, 1), (line, said)
        assert re.search(text, said[0]), (text, said[0])


def test_another_sglang_is_refused_when_asked_and_left_alone_otherwise(mixed_profile: Path, tmp_path: Path) -> None:
    info = tmp_path / "sglang-0.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.9.9\n")
    variables = environment(PYTHONPATH=str(tmp_path))
    asked = subprocess.run(
        command("--kvtuner-profile", str(mixed_profile)), env=variables, capture_output=True, text=True, timeout=240
    )
    assert asked.returncode == USAGE
    assert f"kvtuner-search: SGLang 0.9.9 is installed, but a profile needs {' or '.join(ADAPTERS)}:" in asked.stderr
    silent = subprocess.run(
        [sys.executable, "-c", "from sglang.srt.plugins import load_plugins; load_plugins()"], env=variables,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (silent.returncode, "kvtuner-search: " in silent.stderr) == (0, False)


def refused(server: Server, code: int, text: str, timeout: float = 240) -> None:
    """All launchers end with the code, one log says why, and nothing is left."""
    processes: list[psutil.Process] = []
    try:
        for launcher in server.launchers:
            while launcher.poll() is None:
                processes += [process for process in server.processes() if process not in processes]
                try:
                    launcher.wait(1)
                except subprocess.TimeoutExpired:
                    timeout -= 1
                    assert timeout > 0, server.log()[-4000:]
        logs = "\n".join(server.log(node) for node in range(server.nodes))
        assert re.search(f"^kvtuner-search: .*{text}", logs, re.MULTILINE), logs[-6000:]
        assert code in server.exit_codes(1), logs[-4000:]
        assert "The server is fired up" not in logs
        assert still_alive(processes, 30) == []
    finally:
        server.kill()


def test_a_child_without_the_plugin(mixed_profile: Path, tmp_path: Path) -> None:
    """As on a node whose environment lacks kvtuner-search, or filters plugins."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'multiprocessing.spawn' in ' '.join(sys.orig_argv): os.environ['SGLANG_PLUGINS'] = 'none'\n"
    )
    server = Server(
        tmp_path / "logs", ["--kvtuner-profile", str(mixed_profile)], variables={"PYTHONPATH": str(tmp_path)}
    )
    refused(server, SERVER, "scheduler 0 came up without the plugin")


def test_a_pool_that_is_not_ours(mixed_profile: Path, tmp_path: Path) -> None:
    """Another plugin puts SGLang's own pool back."""
    info = tmp_path / "intruder-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: intruder\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nintruder = intruder:register\n")
    (tmp_path / "intruder.py").write_text(
        "from sglang.srt.plugins.hook_registry import HookRegistry, HookType\n"
        "from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool\n"
        "def after(result, runner):\n"
        "    runner.token_to_kv_pool = MHATokenToKVPool(1024, 1, runner.dtype, 2, 64, 16, runner.device, False)\n"
        "def register():\n"
        "    HookRegistry.register('sglang.srt.model_executor.model_runner_kv_cache_mixin.ModelRunnerKVCacheMixin._init_pools',"
        " after, HookType.AFTER)\n"
    )
    server = Server(
        tmp_path / "logs", ["--kvtuner-profile", str(mixed_profile)], variables={"PYTHONPATH": str(tmp_path)}
    )
    refused(server, SERVER, "a rank has SGLang's MHATokenToKVPool for its cache")


def test_nodes_with_different_profiles(mixed_profile: Path, tmp_path: Path) -> None:
    other = mixed_profile.with_name("reference-4.50bit.json")
    assert load(other).digest != load(mixed_profile).digest
    server = Server(
        tmp_path / "logs",
        ["--pp-size", "2", "--dtype", "float32"],
        nodes=2,
        per_node=[["--kvtuner-profile", str(path)] for path in (mixed_profile, other)],
        variables={"SGLANG_CPU_OMP_THREADS_BIND": "0-1", "SGLANG_PP_LAYER_PARTITION": "8,8"},
    )
    refused(
        server, SERVER, "rank 0 has profile_digest=sha256:.+, rank 1 has sha256:.+: put the same profile on every node"
    )
