"""What is printed steers neither a CI service nor a terminal, and standard output that is closed, full or unread ends as documented."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtuner_search.cli.main import run
from kvtuner_search.output import Guard, OutputError, write_commands
from kvtuner_search.profile.canonical import canonical_json, digest_without_validation, dumps, load, loads, seal
from kvtuner_search.profile.text import MAX_MESSAGE
from tests.search.profile_factory import content, front, measure, validation, write

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
STEERING = "::error::x\n  ::warning::y\r::notice::z\u2028::debug::q ##[error]a ##vso[task.x]b \x1b[31m\x1b]0;t\x07\x9b31m\u202ec\u2066d\u200f"
HARMLESS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|##\w*\[|^\s*::", re.MULTILINE
)


class Pipe(io.StringIO):
    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def printed(*parts: str, terminal: bool = False) -> str:
    stream = Pipe(terminal)
    guard = Guard(stream, required=True)
    for part in parts:
        assert guard.write(part) == len(part)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("KVTUNER_", "GITHUB_")) or name == "FORCE_COLOR"]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        (["::error::x"], "�:error::x"),
        (["a::b\n \t::c"], "a::b\n \t�:c"),
        (["a\r::c"], "a\r�:c"),
        (["a\n", "\n::c"], "a\n\n�:c"),
        ([":", ":c"], ":�c"),
        (["a\n ", " ", ":", ":c"], "a\n  :�c"),
        (["a", "::c"], "a::c"),
        ([":x\n", ":y"], ":x\n:y"),
        (["##[x]", "#", "#", "[y]"], "##�x]##�y]"),
        (["##vs", "o[x]"], "##vso�x]"),
        (["#[x] ## [y]"], "#[x] ## [y]"),
        (["a\x00\x1b[31mb\x9bc\x7f"], "a��[31mb�c�"),
        (["a\u202eb\u2069c\u200fd\u2028e"], "a�b�c�d�e"),
        (["é 字 😀 \u200d\n\t"], "é 字 😀 \u200d\n\t"),
    ],
)
def test_the_guard_replaces_what_steers(parts: list[str], shown: str) -> None:
    assert printed(*parts) == shown


def test_any_cut_of_a_text_is_as_harmless() -> None:
    for at in range(len(STEERING)):
        for text in (printed(STEERING[:at], STEERING[at:]), printed("x\n", *STEERING)):
            assert not HARMLESS.search(text.replace("\r", "\n")), (at, text)


def test_a_terminal_gets_colours_and_no_other_sequence() -> None:
    text = printed("\x1b[1;31mred\x1b[0m\x1b[2K\x1b[?25l \x1b]0;title\x07\x1bP1\x1b[6n::x", terminal=True)
    assert text == "\x1b[1;31mred\x1b[0m\x1b[2K\x1b[?25l �]0;title��P1�[6n::x"


def test_own_commands_pass_and_start_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Pipe()
    monkeypatch.setattr(sys, "stdout", Guard(stream, required=True))
    write_commands("::error::a\n")
    sys.stdout.write("x")
    write_commands("::error::b\n")
    sys.stdout.write("::error::c")
    assert stream.getvalue() == "::error::a\nx\n::error::b\n�:error::c"


def test_bytes_are_guarded_too() -> None:
    stream = Pipe()
    Guard(stream, required=True).buffer.write(b"::x\n##[y]\x1b")
    assert stream.getvalue() == "�:x\n##�y]�"


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_lost_message_does_not_lose_the_result_but_a_lost_result_is_an_error() -> None:
    assert Guard(Broken(), required=False).write("x") == 1
    with pytest.raises(OutputError, match="No space left") as error:
        Guard(Broken(), required=True).write("x")
    assert not error.value.gone


# profiles that are full of it


def hostile() -> dict[str, Any]:
    """A sound profile whose every free text holds what must not get through."""
    text = STEERING
    body = content(
        "8-g64-asym/8-g64-asym",
        model__id=text,
        model__revision=text,
        model__architecture=text,
        quality=[measure(value=0.1, data=text)],
        pareto=[{**point, "origin": text} for point in front(("8-g64-asym/8-g64-asym", 0.1))],
        provenance={
            "origin": "calibrated", "source": text, "tool": text, "versions": {text: text}, "device": text, "dtype": text,
            "search": {"sampler": text, "seed": 0, "trials": 6, "variables": 4},
            "data": [{"name": text, "split": "test", "samples": 2, "tokens": 5, "digest": "sha256:" + "1" * 64}],
            "notes": [text],
        },
    )  # fmt: skip
    more = dict.fromkeys(("tool", "command", "hardware"), text) | {"notes": [text], "versions": {text: text}}
    block = validation(digest_without_validation(seal(body)), failing=True) | more
    block["server"] |= {"version": text, "attention_backend": text, "dtype": text}
    block["checks"] = [{**block["checks"][0], "name": text, "reason": text}]
    block["likelihood"][0]["data"] = block["tasks"][0]["data"] = text
    block["capacity"] |= {"comparable": False, "reason": text}
    return body | {"validation": block}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text(dumps(seal(hostile())))
    (tmp_path / "good.json").write_text(dumps(seal(content(model__architecture=STEERING))))
    (tmp_path / "::error::name\n##[x]\u202e.json").write_text("{}")
    return tmp_path


COMMANDS = [
    ["show", "bad.json"],
    ["show", "bad.json", "--json"],
    ["show", "bad.json", "--html", "::debug::x.html"],
    ["check", "bad.json"],
    ["check", "--strict", "bad.json"],
    ["check", "--strict", "--json", "bad.json"],
    ["check", "::error::name\n##[x]\u202e.json", "::error::missing", "bad.json"],
    *(["diff", old, new, "--format", style] for style in ("text", "json", "markdown", "junit") for old, new in (("good.json", "bad.json"), ("bad.json", "good.json"))),
    ["diff", "::error::x\n::y", "bad.json"],
    ["diff", "bad.json", "good.json", "--fail-on", "::error::x"],
    ["diff", "bad.json", "good.json", "--config", "::error::\n::x"],
    ["diff", "bad.json", "good.json", "--config-from", "::error::\n::x"],
    ["export", "bad.json", "--to", "vllm", "--allow-lossy"],
    ["import", "::error::name\n##[x]\u202e.json", "--from", "vllm", "--model", "bad.json"],
    ["::error::x", "##[x]"],
    ["show", "--::error::x\n::y"],
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", COMMANDS, ids=lambda arguments: " ".join(arguments[:4]).encode("unicode_escape").decode()
)
def test_no_text_steers_who_reads_it(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(arguments)
    assert code in (0, 1, 2, 3, 4)
    out, err = capsys.readouterr()
    assert out or err
    for text in (out, err):
        found = HARMLESS.search(text.replace("\r", "\n"))
        assert found is None, (found, text[max(0, found.start() - 100) : found.end() + 100] if found else "")


def test_annotations_are_the_only_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", "good.json", "bad.json", "--format", "github"]) == 1
    lines = re.split(r"[\r\n]+", capsys.readouterr().out.rstrip("\n"))
    assert len(lines) > 3
    own = re.compile(r"::(error|warning|notice) file=bad\.json,title=kvtuner-search [a-z -]+::")
    assert all(own.match(line) for line in lines[:-1])
    assert lines[-1].startswith("kvtuner-search diff: ")
    assert not any(HARMLESS.search(own.sub("", line)) for line in lines)


def test_json_says_what_the_profile_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["show", "bad.json", "--json"])
    assert json.loads(capsys.readouterr().out)["model"]["id"] == STEERING


def test_a_file_in_canonical_form_has_nothing_that_steers(folder: Path) -> None:
    text = (folder / "bad.json").read_text()
    assert not HARMLESS.search(text)
    assert load(folder / "bad.json").model.id == STEERING
    assert canonical_json(["é字😀", "# #[", "##"]) == '[\n  "é字😀",\n  "# #[",\n  "##"\n]\n', "the rest stays readable"


def test_how_a_file_spells_a_character_does_not_change_its_digest(folder: Path) -> None:
    data = json.loads((folder / "bad.json").read_text())
    assert loads(json.dumps(data, ensure_ascii=False).encode(), "x").digest == data["digest"]


LONG = "k" * 100_000


@pytest.mark.parametrize(
    "text",
    [
        f'{{"{LONG}": 1, "{LONG}": 2}}',
        f'{{"schema_version": 2, "{LONG}": 1}}',
        f'{{"schema_version": 2, "name": "{LONG}"}}',
        f'{{"schema_version": "{LONG}"}}',
        f'{{"schema_version": 1, "digest": "{LONG}"}}',
        f'{{"a": 1{"0" * 5000}}}',
        f'{{"a": 1.5e{"9" * 5000}}}',
    ],
    ids=["twice", "extra", "name", "version", "digest", "integer", "float"],
)
def test_quoted_texts_are_short(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    assert run(["check", str(tmp_path / "x.json")]) == 3
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert len(err) < 600 + len(str(tmp_path))


@pytest.mark.parametrize(
    "line", [f"{LONG} = 1", f'severity = {{ {LONG} = "info" }}', f'ignore = ["{LONG}"]', f'fail-on = "{LONG}"', f'memory = "{LONG}"']
)  # fmt: skip
def test_quoted_settings_are_short(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json")
    (tmp_path / "pyproject.toml").write_text(f"[tool.kvtuner-search.diff]\n{line}\n")
    assert run(["diff", "a.json", "a.json"]) == 2
    assert len(capsys.readouterr().err) < 600 + len(str(tmp_path))


def test_any_error_is_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "x" * 100_000]) == 3
    assert len(capsys.readouterr().err) <= MAX_MESSAGE + 20


# standard output that nobody reads

FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two profiles that differ by more than the gate allows."""
    folder = tmp_path_factory.mktemp("pair")
    return write(folder / "a.json", "8-g64-asym/8-g64-asym"), write(folder / "b.json", quality=[measure(value=0.5)])


def shell(line: str, pair: tuple[Path, Path]) -> tuple[int, str]:
    """The exit code of the first command of a pipe, and what stands on standard error."""
    program = f'k() {{ "{sys.executable}" -m kvtuner_search "$@"; }}; a={pair[0]}; b={pair[1]}; {line}; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("k show $b >&-", 0),
        ("k show $b --json >&-", 0),
        ("k check $b >&-", 0),
        ("k diff $a $b >&-", 1),
        ("k diff $a $b --format github >&-", 1),
        ("k diff $a $b >&- 2>&-", 1),
        ("k diff $a $b <&- >&- 2>&-", 1),
        ("k --help >&-", 0),
        ("k show $b | true", 141),
        ("k check $b | true", 141),
        ("k diff $a $b | true", 141),
        ("k diff $a $b --json | true", 141),
        ("k diff $a $b --format github | true", 141),
        ("k diff $a $b 2> /dev/full > /dev/null", 1),
        ("k check /missing 2> /dev/full", 3),
        ("k check /missing 2>&-", 3),
        ("k check /missing 2>&1 >&- | true", 3),
    ],
)
def test_closed_and_unread(line: str, code: int, pair: tuple[Path, Path]) -> None:
    assert shell(line, pair) == (code, "")


@pytest.mark.parametrize(
    "command", ["show $b", "show $b --json", "check $b", "diff $a $b", "diff $a $b --format github", "--help"]
)
def test_a_full_disk_is_one_line(command: str, pair: tuple[Path, Path]) -> None:
    code, err = shell(f"k {command} > {FULL}", pair)
    assert code == 2
    assert re.fullmatch(r"kvtuner-search: cannot write standard output: No space left on device: .+\n", err)


def test_no_file_gets_the_number_of_a_closed_stream(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "x.html"
    assert shell(f"k show $b --html {page} <&- >&- 2>&-", pair) == (0, "")
    assert page.read_text().startswith("<!doctype html>")
    assert page.read_text().rstrip().endswith("</html>")


def test_a_traceback_is_guarded(pair: tuple[Path, Path]) -> None:
    name = "::error::x\n::y ##[z]"
    program = [sys.executable, "-m", "kvtuner_search", "--debug", "check", name]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, cwd=pair[0].parent)
    assert done.returncode == 3
    program[4:] = ["show", name]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, cwd=pair[0].parent)
    assert "Traceback" in done.stderr
    assert not re.search(r"^\s*::|##\w*\[", done.stderr, re.MULTILINE)


def test_a_profile_that_is_named_like_a_command_still_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("::a.json"))
    assert run(["check", "::a.json"]) == 0
    assert capsys.readouterr().out.startswith("�:a.json: sound")
