"""What stands both in the documents (or in --help) and in the code is compared here: exit codes, options, constants."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kvtuner_search import api
from kvtuner_search.calibration import candidates, objective, options, pipeline, sensitivity, space
from kvtuner_search.calibration.banded import MEASURED
from kvtuner_search.calibration.samplers import PATIENCE, SAMPLERS
from kvtuner_search.cli.main import cli
from kvtuner_search.data import DEFAULT_SOURCES, sources
from kvtuner_search.data.rows import READERS
from kvtuner_search.data.sources import HUB, PLAIN
from kvtuner_search.data.tasks import TASKS
from kvtuner_search.errors import ExitCode
from kvtuner_search.evaluation import statistics
from kvtuner_search.serving.sglang.flags import FLAGS

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted(
    path
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    if path.name not in ("log.md", "decisions.md")  # dated entries, which stay as they were written
)


def commands(command: click.Command = cli, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command by its words, subcommands included; the program itself is ''."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            found = command.get_command(context, word)
            assert found is not None
            yield from commands(found, f"{name} {word}".strip())


COMMANDS = dict(commands())


def codes(epilog: str | None) -> set[int]:
    """The exit codes that a command's help lists; SGLang's own, 128 + N, are no codes of this program."""
    return set(map(int, re.findall(r"\b\d+\b", re.sub(r"128 \+ N", "", epilog or ""))))


def table() -> dict[int, str]:
    """Exit code -> its row in docs/cli.md."""
    text = (ROOT / "docs" / "cli.md").read_text()
    return {int(code): row for code, row in re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)}


def test_the_documented_exit_codes_are_those_of_the_code() -> None:
    assert set(table()) == set(ExitCode)
    assert codes(cli.epilog) == set(ExitCode)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "completion"])
def test_each_help_lists_exit_codes_that_exist(name: str) -> None:
    epilog = COMMANDS[name].epilog
    assert epilog is not None
    assert epilog.startswith("Exit codes")
    assert {ExitCode.USAGE, ExitCode.DATA} <= codes(epilog) <= set(ExitCode)


@pytest.mark.parametrize("code", table())
def test_a_command_that_the_table_names_lists_the_code(code: int) -> None:
    named = {word for word in re.findall(r"`((?:bench )?\w+)\b[^`]*`", table()[code]) if word in COMMANDS}
    assert not {word for word in named if code not in codes(COMMANDS[word].epilog)}


def test_the_bench_commands_agree_on_what_a_run_ends_with() -> None:
    assert COMMANDS["bench"].epilog == COMMANDS["bench run"].epilog


@pytest.mark.parametrize(
    "name", ["calibrate", "sensitivity", "evaluate", "serve", "validate", "bench run", "bench ablate"]
)
def test_a_command_that_works_for_minutes_says_how_it_ends_when_interrupted(name: str) -> None:
    assert ExitCode.INTERRUPTED in codes(COMMANDS[name].epilog)


@pytest.mark.parametrize("name", ["evaluate", "serve", "validate", "bench run", "bench ablate"])
def test_a_profile_of_another_model_has_one_exit_code(name: str) -> None:
    assert "4 a profile of another model" in " ".join((COMMANDS[name].epilog or "").split())


def help_of(name: str, spelling: str) -> str:
    found = (p.help for p in COMMANDS[name].params if isinstance(p, click.Option) and spelling in p.opts)
    return next(found) or ""


@pytest.mark.parametrize("name", ["sensitivity", "evaluate", "bench ablate"])
def test_shared_options_speak_of_what_the_command_does(name: str) -> None:
    assert help_of(name, "--seed") == "Seed of the data."
    assert help_of(name, "--samples") == "Sequences of each source."
    assert help_of("calibrate", "--seed") == "Seed of data, splits and search."
    assert "in each split" in help_of("calibrate", "--samples")
    assert "speed" not in help_of(name, "--random-weights")


@pytest.mark.parametrize(
    ("name", "spelling", "words"),
    [
        ("calibrate", "--bits", "separated by commas"),
        ("calibrate", "--group-size", "head, 32, 64 or 128, or several of them, separated by commas"),
        ("bench run", "--slo", "times in ms"),
    ],
)
def test_help_says_how_a_value_is_written(name: str, spelling: str, words: str) -> None:
    assert words in help_of(name, spelling)


def test_limits_of_time_name_their_unit() -> None:
    limits = [option for _, option in OPTIONS if option.opts[0] in ("--timeout", "--start-timeout", "--stall")]
    assert {option.metavar for option in limits} == {"SECONDS"}


OPTIONS = [
    (name, option)
    for name, command in COMMANDS.items()
    if name not in ("", "bench")  # of the options of `bench` itself see `bench run`
    for option in command.params
    if isinstance(option, click.Option) and not option.hidden
]
OF_ALL_COMMANDS = {"--json": "KVTUNER_JSON", "--api-key": "KVTUNER_API_KEY"}
WITHOUT_VARIABLE = [("diff", "--rules")]  # a variable cannot switch the gate off


def variable(name: str, option: click.Option) -> str:
    """The variable of an option by the rule of docs/cli.md."""
    spelling = next(name for name in option.opts if name.startswith("--"))
    words = f"kvtuner {name.replace('bench run', 'bench')} {spelling.removeprefix('--')}"
    return OF_ALL_COMMANDS.get(spelling, re.sub("[ -]", "_", words).upper())


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda value: str(getattr(value, "name", value)))
def test_each_option_has_the_variable_that_the_rule_says_and_help_shows_it(name: str, option: click.Option) -> None:
    context = click.Context(COMMANDS[name])
    shown = option.get_help_extra(context).get("envvars", ())
    if (name, option.opts[0]) in WITHOUT_VARIABLE:
        assert not shown
        assert not option.allow_from_autoenv
        return
    assert shown == (variable(name, option),)
    record = option.get_help_record(context)
    assert record is not None
    assert f"env var: {variable(name, option)}" in record[1]


def test_no_two_options_share_a_variable() -> None:
    named = [variable(*one) for one in OPTIONS if variable(*one) not in OF_ALL_COMMANDS.values()]
    assert len(named) == len(set(named))


def test_a_variable_named_by_the_rule_sets_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTUNER_EVALUATE_PROFILE", "a.json:b.json")
    monkeypatch.setenv("KVTUNER_EVALUATE_DATA", "recall list")
    with COMMANDS["evaluate"].make_context("evaluate", []) as context:
        assert context.params["profiles"] == (Path("a.json"), Path("b.json"))
        assert context.params["sources"] == ("recall", "list")


def test_the_documents_name_the_commands_that_print_json() -> None:
    row = next(line for line in (ROOT / "docs" / "cli.md").read_text().splitlines() if "| `KVTUNER_JSON` |" in line)
    printing = {name.split()[0] for name, option in OPTIONS if option.opts[0] == "--json"}
    assert printing == {word for word in re.findall(r"`(\w+)`", row) if word in COMMANDS}


def example_lines(text: str) -> Iterator[list[str]]:
    """The words after ``kvtuner-search`` in each command of a document's code blocks."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language not in ("", "sh", "bash", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"\bkvtuner-search ([a-z].*)", line)
            if found is not None:
                yield re.split(r"[|>#;)]", found[1])[0].split()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documents_have_the_options(path: Path) -> None:
    for words in example_lines(path.read_text()):
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
        assert name is not None, words
        command = COMMANDS["bench run" if name == "bench" else name]
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        ours = words[: words.index("--")] if "--" in words else words
        given = {word.partition("=")[0] for word in ours if re.match(r"--?[a-z]", word)}
        if name == "serve":  # what it does not know goes to SGLang
            given = {option for option in given if option.startswith("--kvtuner")}
            known = {flag.name for flag in FLAGS}
        assert given <= known, words


STATED = [
    ("calibration.md", f"on the same samples, by a {objective.STOP:.0%}".replace("%", " %")),
    ("calibration.md", f"After {PATIENCE} proposals in a row"),
    ("calibration.md", f"mean silhouette is at least {space.MIN_SILHOUETTE:g}"),
    ("calibration.md", f"e_o is under {pipeline.LEAST_ERROR:.0%}".replace("%", " %")),
    ("calibration.md", f"{sensitivity.CLIP_TOKENS:,} tokens favour"),
    ("calibration.md", f"at {sensitivity.QUERIES} query positions"),
    ("calibration.md", "two fifths of the search split" if options.TIERS[1] == 2 / 5 else "another share"),
    (
        "calibration.md",
        f"the grid spans {min(min(c) for c in candidates._CLIPS.values()):g} to {max(max(c) for c in candidates._CLIPS.values()):.1f} of",
    ),
    ("calibration.md", f"Classes are {candidates.GRAIN} bits apart"),
    ("calibration.md", f"({', '.join(f'`{candidates.StorageClass(0, total=total)}`' for total in MEASURED)})"),
    ("calibration.md", "{:g}, {:g}, {:g}, {:g} or {:g} times as much as values".format(*space.TILTS)),
    ("calibration.md", "of whose proposals two of three are" if SAMPLERS["pairs"].every == 3 else "another share"),
    ("calibration.md", f"{100 * statistics.CONFIDENCE:g} % intervals"),
    ("data.md", "the default is `{}`, `{}`, `{}` and `{}`".format(*DEFAULT_SOURCES)),
]


@pytest.mark.parametrize(("document", "words"), STATED, ids=[words[:40] for _, words in STATED])
def test_constants_in_the_documents_are_those_of_the_code(document: str, words: str) -> None:
    text = " ".join((ROOT / "docs" / document).read_text().split())
    assert words in text


DEFAULT_DATA = ", ".join(DEFAULT_SOURCES)
SOURCE_HELPS = [
    (name, option)
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option) and option.metavar == "SOURCE"
]


@pytest.mark.parametrize(("name", "option"), SOURCE_HELPS, ids=[f"{n} {o.opts[0]}" for n, o in SOURCE_HELPS])
def test_help_names_the_sources(name: str, option: click.Option) -> None:
    """Help is written out, since importing the sources would slow it down."""
    assert option.help is not None
    assert option.show_default == DEFAULT_DATA
    if name in ("calibrate", "evaluate", "sensitivity"):
        assert set(HUB) <= set(re.findall(r"\w+", option.help))
        assert {*PLAIN, *READERS} <= set(re.findall(r"\.\w+", option.help))


def test_the_task_option_names_the_tasks() -> None:
    [option] = [option for option in COMMANDS["validate"].params if option.name == "tasks"]
    assert f"answer by generation: {', '.join(TASKS)}, rows#exact=FIELD" in option.help
    named = ", ".join(f"`{task}`" for task in TASKS)
    assert f"(`--task`): {named}, rows with" in (ROOT / "docs" / "validate.md").read_text()


def test_documents_and_docstrings_name_the_sources() -> None:
    names = [*TASKS, "chat", "text", *HUB]
    text = (ROOT / "docs" / "data.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text.split("### Prompts")[0], re.MULTILINE) == names
    assert {*PLAIN, *READERS} <= set(re.findall(r"`FILE(\.\w+)`", text))
    assert set(names) <= set(re.findall(r"``(\w+)``", sources.__doc__ or ""))
    *first, last = DEFAULT_SOURCES
    for function in (api.calibrate, api.evaluate):
        assert f"none: {', '.join(first)} and {last}." in (function.__doc__ or "")
