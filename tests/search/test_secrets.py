"""No password and no key leaves the program, in whatever form it was given, and ordinary text stays as it is."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtuner_search.bench import files
from kvtuner_search.cli.main import run
from kvtuner_search.errors import DataError, ServingError
from kvtuner_search.profile.canonical import save
from kvtuner_search.secrets import mask, mask_arguments, remember, remember_all
from kvtuner_search.servers.host import public_command
from kvtuner_search.serving.sglang.info import read_info
from tests.search.bench import record_factory
from tests.search.profile_factory import validated

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-S3cret"
SHOWN = [
    ("mysql://u:hunter2-S3cret@127.0.0.1:3999/db", "mysql://u:***@127.0.0.1:3999/db"),
    ("postgresql+psycopg2://u:a@b/hunter2-S3cret@h/db cannot", "postgresql+psycopg2://u:***@h/db cannot"),
    ("redis://:hunter2-S3cret@h:1/0", "redis://:***@h:1/0"),
    ("'mysql://h/db?user=u&password=hunter2-S3cret&x=1'", "'mysql://h/db?user=u&password=***&x=1'"),
    ("http://u:hunter2-S3cret@host:30000/v1", "http://u:***@host:30000/v1"),
    ("https://hunter2-S3cret@github.com/a/b", "https://***@github.com/a/b"),
    ("http://u:12/hunter2-S3cret@host", "http://u:12/hunter2-S3cret@host"),  # a port and a path, as every client reads it
    ("http://u:1a/hunter2-S3cret@host", "http://u:***@host"),
    ("https://h/x?token=hunter2-S3cret#y", "https://h/x?token=***#y"),
    ("--api-key hunter2-S3cret --tp 2", "--api-key *** --tp 2"),
    ("--admin-api-key=hunter2-S3cret --tp 2", "--admin-api-key=*** --tp 2"),
    ("--ssl-keyfile-password 'hunter2-S3cret x' --ssl-keyfile f", "--ssl-keyfile-password '***' --ssl-keyfile f"),
    ("ServerArgs(api_key='hunter2-S3cret', admin_api_key=None, port=1)", "ServerArgs(api_key='***', admin_api_key=None, port=1)"),
    ('{"api_key": "hunter2-S3cret", "hf_token":"hunter2-S3cret"}', '{"api_key": "***", "hf_token":"***"}'),
    ("Authorization: Bearer hunter2-S3cret", "Authorization: ***"),
    ("sent Bearer hunter2-S3cret to it", "sent Bearer *** to it"),
    ("HF_TOKEN=hunter2-S3cret AWS_SECRET_ACCESS_KEY=hunter2-S3cret", "HF_TOKEN=*** AWS_SECRET_ACCESS_KEY=***"),
    ("sslpassword=hunter2-S3cret", "sslpassword=***"),
    ("key sk-abcdefgh12 and hf_abcdefghijklmnopqrst", "key *** and ***"),
    ("nvapi-abcdefghijklmnop1, hf_oauth_abcdefghijklmnopq, dckr_pat_abcdefghijklmnop", "***, ***, ***"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefgh-12 and AIza" + "b" * 35, "*** and ***"),
    ("AccountName=x;AccountKey=hunter2-S3cret==;x=1", "AccountName=x;AccountKey=***;x=1"),
    ("AZURE_STORAGE_ACCOUNT_KEY=hunter2-S3cret SharedAccessSignature=hunter2-S3cret", "AZURE_STORAGE_ACCOUNT_KEY=*** SharedAccessSignature=***"),
    ("https://h/x?subscription-key=hunter2-S3cret&code=hunter2-S3cret", "https://h/x?subscription-key=***&code=***"),
    ("azure://b/m?sv=1&sig=hunter2-S3cret&x-ms-session=hunter2-S3cret", "azure://b/m?sv=1&sig=***&x-ms-session=***"),
    (r'{"url": "http:\/\/u:hunter2-S3cret@h\/p"}', r'{"url": "http:\/\/u:***@h\/p"}'),
]  # fmt: skip
PLAIN = [
    "http://127.0.0.1:30000/server_info answered 404: Not Found; the first node answers",
    "http://[::1]:30000/path?email=a@b.c",
    "git+https://github.com/a/b@v1 and sqlite:////tmp/a@b.db",
    "--kvtuner-nbits-key 4 --kvtuner-axis-key 0 --max-total-tokens 1000 --tokenizer t",
    "no-tokens: the answer has no tokens: its latency is not that of a generation",
    "a token: 5 bytes, tokens=1000, per token: 0.5 ms, keys: 4 bits, key=4",
    "it requires an API key: --api-key, or KVTUNER_API_KEY; give --api-key or the variable",
    "Basic authentication and Bearer tokens",
    "sha256:5ccfaac7b979 of profile qwen2.5-7b-kv4",
    "gsm8k:data#chat#tokens=400 or http://h/generate?max_new_tokens=64",
    "https://h/docs?page=2&encoding=utf8 and eyJust.eyJust.words, pypi-packages, AIzawa",
    "",
]


@pytest.fixture(autouse=True)
def _forget() -> None:
    remember_all([], {})


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_what_looks_like_a_secret_is_masked(text: str, shown: str) -> None:
    assert mask(text) == shown
    assert mask(shown) == shown


FORMS = [  # @ is the secret, which has a space
    ("ServerArgs(api_key=SecretStr('@'), port=1)", "ServerArgs(api_key=***, port=1)"),
    ("api_key=pydantic.SecretStr(\"@\") x", "api_key=*** x"),
    ("api_key=Secret[str]('@') x", "api_key=*** x"),
    ("api_key: SecretStr | None = SecretStr('@'), x", "api_key: SecretStr | None = ***, x"),
    ("api_key: str = '@', x: int = 1", "api_key: str = '***', x: int = 1"),
    ("password=<Secret value='@'> x", "password=*** x"),
    ("password=Login(user='(', codes=[b'@', ')']) x", "password=*** x"),
    ("api_key=b'@', port=1", "api_key=b'***', port=1"),
    ("{'api_key': rb\"@\", 'x': 1}", "{'api_key': rb\"***\", 'x': 1}"),
    ("password=f'@' x", "password=f'***' x"),
    ("password=\"\"\"a'\"@\"\"\" x", "password=\"\"\"***\"\"\" x"),
    ("{'a': [{'password': ['y', '@']}, {'x': 1}]}", "{'a': [{'password': ***}, {'x': 1}]}"),
    ('{"login": [{"password": {"value": "@", "x": [1]}}], "x": 1}', '{"login": [{"password": ***}], "x": 1}'),
    (json.dumps({"a": json.dumps({"api_key": "@", "x": 1})}), '{"a": "{\\"api_key\\": \\"***\\", \\"x\\": 1}"}'),
    (json.dumps(json.dumps(json.dumps({"api_key": '@"y', "x": 1}))), json.dumps(json.dumps(json.dumps({"api_key": "***", "x": 1})))),
    ('{\\u0022api_key\\u0022: \\u0022@\\u0022}', '{\\u0022api_key\\u0022: \\u0022***\\u0022}'),
    ("{&quot;api_key&quot;: &quot;@&quot;, 1}", "{&quot;api_key&quot;: &quot;***&quot;, 1}"),
    ("%7B%22api_key%22:%22@%22%7D", "%7B%22api_key%22:%22***%22%7D"),
    ("headers=[('Authorization', 'Bearer @'), ('x', 'y')]", "headers=[('Authorization', '***'), ('x', 'y')]"),
    ("[(b'authorization', b'Bearer @'), (b'x', b'y')]", "[(b'authorization', b'***'), (b'x', b'y')]"),
    ("Authorization: Bearer '@' x", "Authorization: *** x"),
    ("Authorization: Digest username=\"x\", response=\"@\"\nnext", "Authorization: ***\nnext"),
    ("password=" + shlex.quote("a'@") + " x", "password='***' x"),
    ("--api-key " + shlex.quote("a'@") + " --tp 2", "--api-key '***' --tp 2"),
    ("--admin-api-key SecretStr('@') --tp 2", "--admin-api-key *** --tp 2"),
    ("api_key=SecretStr('@", "api_key=***"),  # cut off, as messages are
    ("{'api_key': '@\nnext", "{'api_key': '***\nnext"),
    ('{"password": ["y", "@\nnext', '{"password": ***\nnext'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), FORMS)
@pytest.mark.parametrize("secret", ["hunter2 S3cret", "a,b;c &S3cret", "(S3cret [", "S3cret"])
def test_the_whole_value_is_masked_in_whatever_form_it_is_written(text: str, shown: str, secret: str) -> None:
    assert mask(text.replace("@", secret)) == shown
    assert mask(shown) == shown


@pytest.mark.parametrize(
    "text", ["{'password': '', 'x': ''}", '{"api_key":"","x":[""]}', "password=b'' x", "api_key=[], x", "api_key=(), x={}", "api_key == 'x'"]
)  # fmt: skip
def test_an_empty_value_and_a_comparison_are_none(text: str) -> None:
    assert mask(text) == text


def test_a_secret_in_any_form_of_an_argument_is_known_by_its_value() -> None:
    remember_all(["bench", "--", "--config-json", "{'api_key': ['first-S3cret', b'second-S3cret'], 'x': 1}"], {})
    assert mask("first-S3cret and second-S3cret") == "*** and ***"


def test_a_key_in_the_query_of_an_address_is_known_by_its_value() -> None:
    remember_all(["bench", "--url", "http://h:1/x?subscription-key=first-S3cret&auth=true"], {})
    assert mask("first-S3cret is true") == "*** is true"


@pytest.mark.parametrize(
    "end", ["?k=hunter2-S3cret", "/x?a=1&b=hunter2-S3cret", "#hunter2-S3cret", "/?hunter2-S3cret\n"]
)
@pytest.mark.parametrize("command", ["bench", "validate"])
def test_an_address_that_is_refused_for_its_query_is_said_without_it(
    command: str, end: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    profile = tmp_path / "p.json"
    save(validated(), profile)
    more = {"bench": ["run"], "validate": ["--baseline-url", "http://h:2"]}[command]
    folder = ["--folder", str(tmp_path / "f")]
    arguments = [
        command,
        *more,
        "--url",
        f"http://h:1{end}",
        "--model-path",
        "reference",
        "--profile",
        str(profile),
        *folder,
    ]
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert "is not a URL of a server" in err
    assert SECRET not in err


@pytest.mark.parametrize("field", ["model_path", "revision", "dtype", "version", "load_format"])
@pytest.mark.parametrize(
    "text", ["s3://key:hunter2-S3cret@bucket/m", "azure://b/m?sig=hunter2-S3cret", "m --hf-token hunter2-S3cret"]
)
def test_what_a_server_says_of_itself_is_read_without_the_secrets_in_it(field: str, text: str) -> None:
    """A server names the model as it was started with, and records, pages and messages repeat that."""
    info = {
        "version": "0.5.14", "model_path": "m", "dtype": "auto", "attention_backend": "triton", "tp_size": 1, "pp_size": 1,
        "page_size": 1, "max_total_num_tokens": 1000,
    }  # fmt: skip
    read = str(read_info(info | {field: text}, "http://h:1"))
    assert SECRET not in read
    assert ("***" in read) is (field != "load_format"), "of which only is kept whether it is dummy"


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert mask(text) == text


@given(st.text())
def test_masking_twice_is_masking_once(text: str) -> None:
    once = mask(text)
    assert mask(once) == once


def test_a_long_text_is_no_trap() -> None:
    """Each of these is quadratic, or worse, for a pattern that begins anywhere."""
    for piece in (
        "a.",
        "a-",
        "api-",
        "--api",
        "http://",
        "x@",
        "password",
        '"',
        "Bearer ",
        ":",
        "password=(",
        "password='",
        "password=[b'",
        'password=\\"',
        "api_key: str = ",
    ):
        assert isinstance(mask(piece * 20_000), str)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--api-key", SECRET],
        ["bench", f"--api-key={SECRET}"],
        ["bench", "--", "--api-k", SECRET],
        ["bench", "--", f"--adm={SECRET}"],
        ["validate", "--url", f"http://u:{SECRET}@h:1"],
        ["calibrate", f"--storage=mysql://u:{SECRET}@h/d"],
        ["bench", "--", "--hicache-storage-backend-extra-config", json.dumps({"password": SECRET})],
        ["bench", "--", "--ssl-keyfile-password", SECRET, "--ssl-keyfile", "f"],
    ],
)
def test_a_command_line_is_shown_without_its_secrets(arguments: list[str]) -> None:
    command = public_command(arguments)
    assert SECRET not in command
    assert "***" in command
    assert command.startswith(f"kvtuner-search {arguments[0]}")
    assert mask_arguments(["--tp", "2", "--model-path", "m"]) == ["--tp", "2", "--model-path", "m"]
    remember_all(arguments, {})
    assert SECRET not in mask(f"the driver quotes {SECRET!r} alone"), "what was given is known by its value"


def test_a_remembered_secret_is_found_in_every_spelling() -> None:
    remember("p@ss/w%rd'x\\y")
    for text in ("p@ss/w%rd'x\\y", "p%40ss%2Fw%25rd%27x%5Cy", repr("p@ss/w%rd'x\\y"), json.dumps("p@ss/w%rd'x\\y")):
        shown = mask(f"a {text} b")
        assert "ss" not in shown.replace("***", ""), text
        assert (shown[0], shown[-1]) == ("a", "b")
    remember("p%40ssw0rd")
    assert mask("decoded p@ssw0rd") == "decoded ***"
    remember("test")
    assert mask("test of the latest tests") == "*** of the latest tests", "a short one is not a part of another word"
    remember("ab")
    assert mask("ab") == "ab"
    remember("\udcff\udcfe bytes that are not text")
    remember(None)
    remember("")


def test_a_new_command_knows_its_own_secrets_alone() -> None:
    remember("of-an-earlier-command")
    remember_all(["show"], {"KVTUNER_API_KEY": SECRET, "KVTUNER_BENCH_URL": "http://u:of-the-url@h", "PATH": "/bin"})
    assert mask(f"{SECRET} of-the-url of-an-earlier-command /bin") == "*** *** of-an-earlier-command /bin"


def test_errors_mask_themselves() -> None:
    remember("echoed-by-a-server")
    for kind in (DataError, ServingError):
        assert str(kind("mysql://u:pw@h/d: echoed-by-a-server")) == "mysql://u:***@h/d: ***"


def test_the_last_line_of_defence_is_the_commands_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", f"mysql://u:{SECRET}@h/d"]) == 3
    assert run(["show", "--storage", f"mysql://u:{SECRET}@h/d"]) == 2
    assert run(["bench", "--url", f"ftp://u:{SECRET}@h/d", "--quiet"]) == 2
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert "***" in shown.err


@pytest.mark.parametrize("more", [[], ["--debug"]])
def test_a_traceback_has_no_secret(more: list[str], tmp_path: Path) -> None:
    """Also of an error that nobody foresaw."""
    broken = "" if more else "def fails(given, **_): raise ValueError(given)\nm.cli.main = fails\n"
    arguments = [*more, "show", f"mysql://u:{SECRET}@h/d"]
    code = f"import kvtuner_search.cli.main as m\n{broken}m.main({arguments!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" in done.stderr
    assert "mysql://u:***@h/d" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert done.returncode == 1


def test_what_libraries_log_and_warn_of_has_no_secret(tmp_path: Path) -> None:
    """Database drivers quote the address that they were given, and the password alone."""
    code = (
        "import logging, warnings\nimport kvtuner_search.cli.main as m\n"
        "def says(given, **_):\n    logging.getLogger('x').warning('%s of 100%%: %r', given[-1], 'hunter2-S3cret')\n"
        "    logging.getLogger('x').warning('does not fit %d', 'x')\n    warnings.warn(f'slow: {given[-1]}')\n"
        f"m.cli.main = says\nm.main(['show', 'mysql://u:{SECRET}@h/d'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert "mysql://u:***@h/d of 100%: '***'" in done.stderr
    assert "slow: mysql://u:***@h/d" in done.stderr
    assert SECRET not in done.stderr.replace(code, "")


def test_what_an_older_version_wrote_is_shown_without_its_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"kvtuner-search validate --api-key {SECRET} --url http://u:{SECRET}@h:1"
    save(validated(command=command), tmp_path / "p.json")
    record = record_factory.record(small=True)
    served = record.served.model_copy(update={"arguments": ["--api-key", SECRET, f"--hf-token={SECRET}"]})
    files.write(record.model_copy(update={"command": command, "served": served}), tmp_path / "record.json")
    assert run(["show", str(tmp_path / "p.json")]) == 0
    assert run(["show", str(tmp_path / "p.json"), "--html", str(tmp_path / "p.html")]) == 0
    assert run(["bench", "report", str(tmp_path / "record.json"), "--html", str(tmp_path / "r.html")]) == 0
    shown = capsys.readouterr()
    for text in (shown.out + shown.err, *((tmp_path / name).read_text() for name in ("p.html", "r.html"))):
        assert SECRET not in text
    assert "--api-key ***" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    "address",
    [
        "http://u:{}@127.0.0.1:1",
        "u:{}@127.0.0.1:30000",
        "//u:{}@127.0.0.1:30000",
        "http:/u:{}@127.0.0.1:30000",
        "https://{}@host",
        "mysql://u:{}@h/db",
    ],
)
@pytest.mark.parametrize("secret", [SECRET, 'hunter2"pw', "hunter2'pw", "hunter2 pw", "hunter2<pw>"])
def test_an_address_that_an_option_is_given_is_known_however_it_is_written(address: str, secret: str) -> None:
    text = address.format(secret)
    for arguments, environment in (
        (["--url", text], {}),
        ([f"--storage={text}"], {}),
        ([], {"KVTUNER_BENCH_URL": text}),
    ):
        remember_all(arguments, environment)
        for said in (f"{text!r} is not a URL", json.dumps({"url": text}), f"bad password {secret}."):
            assert secret not in mask(said)
            assert secret.replace('"', '\\"') not in mask(said)


def test_what_only_looks_like_an_address_is_not_hidden() -> None:
    for text in ("sqlite:////srv/a@b/study.db", "/srv/runs@home/study.journal", "http://127.0.0.1:30000"):
        remember_all(["--storage", text], {})
        assert mask(f"{text} is locked") == f"{text} is locked"
    remember_all(["--data", "hub:gsm8k:main@1"], {})
    assert mask("hub:gsm8k:main@1") == "hub:gsm8k:main@1"
    for text in ("SGLang's --api-key, or --admin-api-key if it has one", "give --api-key where the server wants one"):
        assert mask(text) == text
