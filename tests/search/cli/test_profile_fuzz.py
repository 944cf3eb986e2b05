"""10,000 damaged inputs: never a traceback, never an exit code outside the documented table.

The counts of the tests below add up to the figure; ``test_the_counts_add_up`` holds them to it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtuner_kernels.layout import LayerSpec
from kvtuner_search.cli.main import run
from kvtuner_search.profile.canonical import canonical_json, digest_of
from kvtuner_search.profile.kinds import LayerKind
from kvtuner_search.profile.storage import storage_of
from tests.search.profile_factory import (
    HEAD_DIM,
    KV_HEADS,
    digest,
    fitted,
    front,
    measure,
    profile,
    safetensors,
    transforms,
    validation,
    write,
)

BYTES, STRUCTURES, SEALED, OLD, IMPORTS, CONFIGS, TRANSFORMS = 5500, 1200, 2000, 600, 900, 300, 400
WINDOWED: Final = 300
SOUND_KINDS: Final = ("full", "sliding:1", "sliding:999999999", "chunked:64")
ALLOWED: Final = {0, 1, 2, 3, 4}
NASTY: Final = [
    b"NaN", b"Infinity", b"1e999", b"-0", b"9" * 400, b"9" * 5000, b"[" * 60, b"{" * 60, b'{"a":' * 40, b"]", b"}", b'"', b"\\ud800",
    b"\\u0000", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"null", b"true", b"1.5", b"-1", b'"\\', b"//", b",", b":", b"&a *a",
    b"!!python/name:os.system", b"<<: x\n", b"\t", b"\r", b"\x1b[31m", "\u202e😀".encode(), b"%0A::error::", b'"name": "x", "name": "y",',
]  # fmt: skip

PLAIN: Final = ["8-g64-asym/4-g64-asym", "16/16", "4-g32-sym-r-x0.9/2-g64-asym", "8-g64-asym/8-g64-asym"]
BANDED: Final = [*PLAIN[:3], "b65443322/b44333222"]
PARTS: Final[dict[str, Any]] = {
    "quality": [measure(), measure("accuracy", 0.8, 0.03, 0.83)],
    "validation": validation(digest("another profile")),
}
RICH: Final = fitted(
    BANDED, pareto=front(("b44333222/b33222110", 0.1), ("8-g64-asym/8-g64-asym", 0.01)), **PARTS
).model_dump(mode="json")
KINDED: Final = profile(PLAIN, kinds=["sliding:16", "full", "chunked:128", "full"], **PARTS).model_dump(mode="json")
COMMANDS: Final = (
    ["check", "x.json"],
    ["diff", "good.json", "x.json", "--json"],
    ["check", "x.json", "--strict", "--json"],
    ["diff", "x.json", "good.json", "--format", "github"],
    ["show", "x.json", "--json"],
    ["export", "x.json", "--to", "kvtuner"],
)
ALL_COMMANDS: Final = (
    *COMMANDS,
    ["diff", "good.json", "x.json", "--memory", "1GiB", "--max-loss-increase", "0"],
    ["diff", "x.json", "good.json", "--format", "markdown"],
    ["diff", "good.json", "x.json", "--format", "junit"],
    ["show", "x.json", "--memory", "1GiB", "--context", "100"],
    ["show", "x.json", "--html", "x.html"],
    ["check", "x.json", "--rewrite"],
    *(
        ["export", "x.json", "--to", name, "--allow-lossy"]
        for name in ("transformers", "vllm", "sglang", "compressed-tensors")
    ),
)


@pytest.fixture(autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with a sound profile to compare with; the variables of a CI service do not reach the commands."""
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder / "good.json")
    (folder / "t.safetensors").write_bytes(safetensors(transforms(BANDED)))
    before, environment = Path.cwd(), dict(os.environ)
    for name in [name for name in os.environ if name.startswith(("KVTUNER_", "GITHUB_"))]:
        del os.environ[name]
    os.chdir(folder)
    yield
    os.chdir(before)
    os.environ.update(environment)


def try_out(arguments: list[str]) -> int:
    """Run a command in this process; an exception that escapes it fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    assert code in ALLOWED, (code, arguments)
    assert "Traceback" not in err.getvalue()
    assert not {"\x1b", "\x00"} & set(out.getvalue() + err.getvalue()), "control characters reached the terminal"
    if code in (2, 3):
        assert err.getvalue().splitlines()[-1].startswith("kvtuner-search: ")
    return int(code)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to four random edits."""
    body = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(body) + 1)
        to = min(len(body), at + chance.randint(0, 40))
        edit = chance.randrange(6)
        if edit == 0:
            del body[at:]
        elif edit == 1:
            del body[at:to]
        elif edit == 2:
            body[at:at] = body[at:to]
        elif edit == 3:
            body[at:to] = chance.choice(NASTY)
        elif edit == 4:
            body[at:at] = chance.choice(NASTY)
        elif body:
            body[at % len(body)] = chance.randrange(256)
    return bytes(body)


def fuzz(
    count: int, seed: bytes, write_input: Callable[[bytes], object], commands: list[list[str]], start: int
) -> Counter[int]:
    """How often each exit code came up over ``count`` mutated inputs."""
    codes: Counter[int] = Counter()
    for number in range(count):
        write_input(mutate(seed, random.Random(start + number)))
        codes[try_out(commands[number % len(commands)])] += 1
    return codes


def test_the_counts_add_up() -> None:
    assert BYTES + STRUCTURES + SEALED + OLD + IMPORTS + CONFIGS + TRANSFORMS >= 10_000


def test_bytes_of_a_real_profile() -> None:
    text = canonical_json(RICH).encode()
    codes = fuzz(BYTES, text, Path("x.json").write_bytes, list(COMMANDS), 0)
    assert codes[3] > 0.95 * BYTES, "nearly every edit must be noticed"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([2**63, 10**400, -1, 0, "", "\x1b[2J"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(FUZZ, max_examples=STRUCTURES)
@given(value=JSON, which=st.integers(0, len(COMMANDS) - 1))
def test_any_json(value: Any, which: int) -> None:
    Path("x.json").write_text(json.dumps(value), encoding="utf-8")
    assert try_out(list(COMMANDS[which])) == 3


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*prefix, key)
        yield from paths(item, (*prefix, key))


def version_1() -> dict[str, Any]:
    """A profile as schema version 1 had it, with a validation block of its own."""
    body = profile(PLAIN, pareto=front(("4-g64-asym/4-g64-asym", 0.1)), **PARTS).model_dump(mode="json")
    for layer in body["layers"]:
        for entry in layer.values():
            del entry["bands"]
    body |= {"schema_version": 1, "layout_version": 1}
    body["validation"]["profile_digest"] = digest_of(body | {"validation": None})
    return body


def plausible(old: Any) -> st.SearchStrategy[Any]:
    """Values near the old one, which validation may well let through, and values of any kind."""
    if isinstance(old, bool):
        near: st.SearchStrategy[Any] = st.booleans()
    elif isinstance(old, int):
        near = st.integers(-2, 20) | st.sampled_from([64, 128, 1024, 2**31, 2**53])
    elif isinstance(old, float):
        near = st.floats(0, 1) | st.floats()
    elif isinstance(old, str):
        near = st.text(min_size=1, max_size=40)
    elif isinstance(old, list):
        near = st.sampled_from([[], old + old, old[:1]])
    else:
        near = st.none() | st.just({})
    return near | near | JSON


def odd_values(seed: dict[str, Any], count: int) -> Counter[int]:
    """How often each exit code came up over profiles with one or two odd values and a digest that fits."""
    codes: Counter[int] = Counter()
    places = [path for path in paths(seed) if path != ("digest",)]

    @settings(FUZZ, max_examples=count)
    @given(data=st.data(), which=st.integers(0, len(ALL_COMMANDS) - 1))
    def one(data: st.DataObject, which: int) -> None:
        body = copy.deepcopy(seed)
        for _ in range(data.draw(st.integers(1, 2))):
            target: Any = body
            *parents, last = data.draw(st.sampled_from(places))
            with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier edit may have removed the place
                for parent in parents:
                    target = target[parent]
                target[last] = data.draw(plausible(target[last]))
        with contextlib.suppress(ValueError):  # NaN has no canonical form: the old digest stays
            body["digest"] = digest_of(body)
        Path("x.json").write_bytes(json.dumps(body).encode())
        codes[try_out(list(ALL_COMMANDS[which]))] += 1

    one()
    return codes


def test_profiles_with_odd_values_and_a_digest_that_fits() -> None:
    codes = odd_values(RICH, SEALED)
    assert codes[0] + codes[1] > 0.2 * SEALED, "many must get past validation, so that what prints them is tried too"


def test_profiles_of_models_with_windows_with_odd_values() -> None:
    codes = odd_values(KINDED, WINDOWED)
    assert codes[0] + codes[1] > 0.1 * WINDOWED, "many must get past validation"
    assert codes[3] > 0.1 * WINDOWED, "and many must not"


def test_kinds_at_random() -> None:
    """Kinds of any sort, with storage that fits if they are kinds: what is read is shown and compared, and the rest is refused."""
    sound = st.sampled_from(SOUND_KINDS)
    odd = st.sampled_from(["sliding:0", "chunked", "", "full:1", "linear:8", "sliding:9999999999"]) | st.text(
        max_size=12
    )
    texts = st.lists(sound, min_size=4, max_size=4) | st.lists(sound | odd, max_size=6)
    codes: Counter[int] = Counter()

    @settings(FUZZ, max_examples=WINDOWED)
    @given(kinds=texts, which=st.integers(0, len(ALL_COMMANDS) - 1))
    def one(kinds: list[str], which: int) -> None:
        body = copy.deepcopy(KINDED)
        body["model"]["layer_kinds"] = kinds
        with contextlib.suppress(ValueError):
            specs = [LayerSpec.parse(text) for text in PLAIN]
            storage = storage_of(specs, KV_HEADS, HEAD_DIM, [LayerKind.parse(text) for text in kinds])
            body["storage"] = storage.model_dump()
        body["digest"] = digest_of(body)
        Path("x.json").write_bytes(json.dumps(body).encode())
        code = try_out(list(ALL_COMMANDS[which]))
        codes[code] += 1
        is_sound = len(kinds) == 4 and any(":" in kind for kind in kinds) and all(kind in SOUND_KINDS for kind in kinds)
        assert (code == 3) is not is_sound

    one()
    assert codes[3] > 0.1 * WINDOWED
    assert sum(codes.values()) - codes[3] > 0.1 * WINDOWED


def test_profiles_of_schema_version_1_with_odd_values() -> None:
    codes = odd_values(version_1(), OLD)
    assert codes[0] + codes[1] > 0.1 * OLD, "many must be migrated"


CONFIG: Final = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 4, "rope_theta": 1e6, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "sliding_window": 16,
}  # fmt: skip
SOURCES: Final = {
    "kvtuner": b"".join(b"%d:\n  nbits_key: 4\n  nbits_value: 2\n" % index for index in range(4)),
    "transformers": json.dumps({"cache_implementation": "quantized", "cache_config": {"nbits": 4, "residual_length": 1}}).encode(),
    "vllm": b'kv-cache-dtype: int8_per_token_head\nkv-cache-dtype-skip-layers: ["0", "3"]\n',
    "sglang": json.dumps({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": dict.fromkeys("0123", 1.0)}}}).encode(),
    "compressed-tensors": json.dumps({"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 64}}).encode(),
}  # fmt: skip


def importing(name: str) -> list[str]:
    scheme = ["--scheme", "pertoken"] if name == "kvtuner" else []
    return ["import", "x", "--from", name, "--model", "config.json", "--allow-lossy", *scheme]


@pytest.mark.parametrize("name", SOURCES)
def test_files_to_import(name: str) -> None:
    Path("config.json").write_text(json.dumps(CONFIG))
    Path("x").write_bytes(SOURCES[name])
    assert try_out(importing(name)) == 0
    codes = fuzz(IMPORTS // len(SOURCES), SOURCES[name], Path("x").write_bytes, [importing(name)], 10_000)
    assert set(codes) <= {0, 1, 3}


def test_configurations_of_models() -> None:
    Path("x").write_bytes(SOURCES["vllm"])
    fuzz(CONFIGS // 2, json.dumps(CONFIG).encode(), Path("config.json").write_bytes, [importing("vllm")], 20_000)
    text = b'[tool.kvtuner-search.diff]\nfail-on = "error"\nignore = ["pareto-changed"]\nseverity = { model-renamed = "info" }\n'
    arguments = ["diff", "good.json", "good.json", "--json"]
    fuzz(CONFIGS // 2, text, Path("pyproject.toml").write_bytes, [arguments], 30_000)


@pytest.mark.parametrize("spec", ["4-g64-asym-c/4-g64-asym", "b65443322/4-g64-asym"])
def test_transforms(spec: str) -> None:
    good = safetensors(transforms([spec] * 4))
    for number in range(TRANSFORMS // 2):
        data = mutate(good, random.Random(40_000 + number))
        Path("t.safetensors").write_bytes(data)
        Path("x.json").write_text(canonical_json(fitted([spec] * 4, data).model_dump(mode="json")))
        try_out(["check", "x.json"])


def test_what_is_no_ordinary_file() -> None:
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("gone").symlink_to("nowhere")
    Path("zero").symlink_to("/dev/zero")
    Path("link").symlink_to("good.json")
    with Path("huge").open("wb") as stream:
        stream.truncate(2**30)
    Path("secret").touch(mode=0)
    odd = os.fsdecode(b"\xff\xfe.json")
    Path(odd).write_bytes(b"\xff")
    names = [
        "pipe",
        "folder",
        "loop",
        "gone",
        "zero",
        "huge",
        "secret",
        odd,
        "x" * 5000,
        "/dev/null",
        "",
        "a:b",
        "\x1b[2J",
        "\n",
    ]
    for name in names:
        for command in (
            ["check", name],
            ["show", name],
            ["diff", name, "good.json"],
            ["diff", "good.json", name],
            ["export", name, "--to", "vllm"],
        ):
            assert try_out(command) in (2, 3), command
        for option in ("--memory", "--fail-on", "--max-loss-increase", "--max-bytes-per-token"):
            assert try_out(["diff", "good.json", "good.json", option, name]) == 2, option
        if name != "secret":  # an empty file is a valid configuration where the tests run as root
            assert try_out(["diff", "good.json", "good.json", "--config", name]) == 2
        assert try_out(["check", "good.json", "--model", name]) == 3
        assert try_out(["import", name, "--from", "vllm", "--model", name]) == 3
    assert try_out(["check", "link"]) == 0
