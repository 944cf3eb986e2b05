"""Passwords and keys are masked wherever text leaves this program: messages, logs, records, pages, profiles.

It works in two ways. :func:`mask` knows what secrets look like: credentials in URLs, options and fields with the name of a secret, bearer tokens, keys of
known shape. :func:`remember` is given a secret, and every later text is searched for that very value, however it is quoted or cut out of
its place: a server may send a key back, a driver may quote a password alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from urllib.parse import quote, quote_plus, unquote

MASK: Final = "***"
_SHORTEST: Final = 4  # characters of a secret that is searched for by its value; less would blank out ordinary text
_LONG: Final = 12  # characters from which on it is also found within a word

# Names with these endings are secrets: api_key, HF_TOKEN, sslpassword, --admin-api-key. "token" and "key" alone are not: here they are units and tensors.
_NAME: Final = (
    r"(?:[\w.-]*(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|(?:private|account|subscription)[_-]?key|access[_-]?signature|secret(?:[_-]?key)?|passw(?:or)?d|passphrase|pwd|credentials?"
    r"|(?:hf|hub|hugging[_-]?face|auth|access|bearer|api|admin|session|refresh|security|git(?:hub|lab)|id)[_-]?token)|authorization)"
)
_EMPTY: Final = re.compile(r"(?:None|null|True|False|true|false)\b|\*\*\*")
# A quotation mark as Python and JSON write it, as either is escaped within a string, and as web pages and URLs escape it
_MARK: Final = r"\\*(?:[\"']|u002[27])|&(?:quot|apos|\#0*3[49]|\#[xX]0*2[27]);|%2[27]"
_TYPE: Final = r"[\w.]*(?:Optional|Union)\[[\w., |]+\]|[\w.]*Secret\w*(?:\[\w+\])?|str|bytes"  # of an annotated field
_FIELD: Final = re.compile(
    rf"(?<![\w.-])(?:b?(?:{_MARK}))?(?P<name>{_NAME})(?:{_MARK})?\s*"
    rf"(?:=>|=(?!=)|:(?:\s*(?:{_TYPE})(?:\s*\|\s*None)?\s*=(?!=))?|(?<=[\"']),(?=\s*b?[\"']))\s*",
    re.IGNORECASE,
)
_SCHEME: Final = re.compile(r"(?:Bearer|Basic|Digest|Token)\s+", re.IGNORECASE)
_OPENING: Final = re.compile(rf"(?P<prefix>[A-Za-z]{{0,2}})(?P<mark>\"\"\"|\'\'\'|{_MARK})")  # r'', b"", f'', \"
_CALL: Final = re.compile(r"(?:[A-Za-z_][\w.]*)?(?=[(\[{])|<(?=[A-Za-z_])")  # SecretStr(..., [..., <Secret ...
_STRING: Final = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'")
_BARE: Final = re.compile(r"[^\s,;&)\]}\"']+(?:[\"'](?=\w)[^\s,;&)\]}\"']*)*")
_WORD: Final = re.compile(r"[^\s\"']+")
_LINE: Final = re.compile(r"[^\r\n]*")
_OPTION: Final = re.compile(
    rf"(?<![\w-])--{_NAME}\s+(?!(?:or|and|if|where|when|is|was|that|in|for|to)\s)", re.IGNORECASE
)
_QUERY: Final = re.compile(
    r"([?&#](?:[\w.%-]{0,40}(?:key|token(?!s=)|secret|sig|auth|passw|pwd|credential|session|jwt)[\w.%-]{0,40}|code|sas|x-amz-[\w-]+)=)"
    r"(?P<value>[^\s&#\"')]+)",
    re.IGNORECASE,
)
_BEARER: Final = re.compile(r"\b(Bearer|Basic|Digest)\s+(?=[^\s\"']*[\d_=-])[^\s\"',;)]{4,}")
_SHAPES: Final = re.compile(
    r"\b(?:sk-[\w-]{8,}|nvapi-[\w-]{16,}|hf_(?:oauth_)?[A-Za-z0-9]{16,}|dckr_pat_[\w-]{16,}|pypi-AgE[\w-]{16,}|AIza[\w-]{35}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{8,}|AKIA[A-Z0-9]{16})\b"
)
_URL: Final = re.compile(r"(?P<scheme>(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*:(?://|\\/\\/))(?P<rest>[^\s\"'<>`]+)")
_ABBREVIATED: Final = (
    "--api-key",
    "--admin-api-key",
    "--ssl-keyfile-password",
)  # argparse takes their unique beginnings
_SHORTEST_ABBREVIATION: Final = ("--ap", "--adm", "--ssl-keyfile-")

_ADDRESS: Final = re.compile(
    r"url|storage", re.IGNORECASE
)  # in names of options and variables whose values are addresses

_known: dict[str, re.Pattern[str]] = {}  # secret, in one of its spellings -> what finds it


def remember(secret: str | None) -> None:
    """Mask this very value from now on, as it is, percent-encoded, decoded, and as JSON or Python write it. Too short a value is left to :func:`mask`'s rules."""
    if not secret:
        return
    plain = unquote(secret)
    for text in {
        secret,
        plain,
        *(quote(plain, safe=safe, errors="replace") for safe in ("", "/")),
        quote_plus(plain, errors="replace"),
        repr(plain)[1:-1],
        json.dumps(plain)[1:-1],
        secret.encode("unicode_escape").decode(),
    }:
        if len(text) >= _SHORTEST and text.strip("*"):
            within = len(text) >= _LONG
            edges = ("", "") if within else (r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])")
            _known[text] = re.compile(edges[0] + re.escape(text) + edges[1])


def remember_all(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Start anew with the secrets of one command: its arguments', and those of the variables that it reads."""
    _known.clear()
    values = [value for name, value in environment.items() if name.startswith("KVTUNER_")]
    for name, value in environment.items():
        if name.startswith(("KVTUNER_", "SGLANG_", "HF_", "HUGGING_FACE_")) and re.fullmatch(
            _NAME, name, re.IGNORECASE
        ):
            remember(value)
    for text in (*arguments, *values):
        for secret in _found_in(text):
            remember(secret)
    for secret in _secret_values(arguments):
        remember(secret)
    for address in _addresses(arguments, environment):
        remember(_password(address))


def mask(text: object) -> str:
    """The text with ``***`` in place of passwords, keys and tokens.

    >>> mask("mysql://user:secret@host/db cannot be reached")
    'mysql://user:***@host/db cannot be reached'
    >>> mask("--api-key sk-1 --port 30000")
    '--api-key *** --port 30000'
    """
    content = str(text)
    for known, pattern in sorted(_known.items(), key=lambda item: -len(item[0])):
        if known in content:
            content = pattern.sub(MASK, content)
    content = _URL.sub(lambda match: match["scheme"] + _mask_authority(match["scheme"], match["rest"]), content)
    content = _mask_values(content, _OPTION)
    content = _mask_values(content, _FIELD)
    content = _QUERY.sub(rf"\1{MASK}", content)
    content = _BEARER.sub(rf"\1 {MASK}", content)
    return _SHAPES.sub(MASK, content)


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of secret options masked, also where a value is an argument of its own."""
    shown, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide and not argument.startswith("--"):
            shown.append(MASK)
            hide = False
            continue
        hide = not equals and is_secret_option(name)
        shown.append(f"{name}={MASK}" if equals and is_secret_option(name) else mask(argument))
    return shown


def is_secret_option(name: str) -> bool:
    """Whether an option's value is a secret; beginnings of SGLang's own, which argparse completes, count too."""
    if not name.startswith("--"):
        return False
    short = any(
        full.startswith(name) and name.startswith(least)
        for full, least in zip(_ABBREVIATED, _SHORTEST_ABBREVIATION, strict=True)
    )
    return short or re.fullmatch(_NAME, name[2:], re.IGNORECASE) is not None


def _secret_values(arguments: Sequence[str]) -> Iterable[str]:
    """The values of secret options, behind their = or as the next argument."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if is_secret_option(name):
            yield value if equals else "".join(arguments[index + 1 : index + 2])


def _addresses(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterable[str]:
    """Values of options and variables that hold an address, URL or not."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and _ADDRESS.search(name):
            yield value if equals else "".join(arguments[index + 1 : index + 2])
    yield from (value for name, value in environment.items() if name.startswith("KVTUNER_") and _ADDRESS.search(name))


def _password(address: str) -> str:
    """The part before the last @ of an address, however it is written: the password, or the lone name of a web address, often a token."""
    before = address.rpartition("@")[0]
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:/)", before)
    credentials = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*:/+|^//", "", before)
    user, colon, password = credentials.partition(":")
    if colon:
        return "" if "/" in user else password
    return user if scheme is not None and scheme[0].lower().startswith("http") else ""


def _found_in(text: str) -> Iterable[str]:
    """The secrets that a text shows by their place: passwords in URLs, values of secret fields."""
    for match in _URL.finditer(text):
        yield _credentials(match["scheme"], match["rest"]).partition(":")[2]
    for match in _QUERY.finditer(text):
        if (
            len(match["value"]) >= _LONG
        ):  # a shorter value of such a name may be a word: target_session_attrs=read-write
            yield match["value"]
    for start, end, _ in _values(text, _FIELD):
        value = text[start:end]
        yield value
        for match in _STRING.finditer(value):
            yield match[1] or match[2]


def _mask_values(text: str, pattern: re.Pattern[str]) -> str:
    parts, last = [], 0
    for start, end, shown in _values(text, pattern):
        parts += [text[last:start], shown]
        last = end
    return "".join([*parts, text[last:]])


def _values(text: str, pattern: re.Pattern[str]) -> Iterable[tuple[int, int, str]]:
    """Where the values of secret fields or options begin and end, and what is shown in place of each."""
    end, bare = 0, _BARE if pattern is _FIELD else _WORD
    for match in pattern.finditer(text):
        if match.start() < end or match.end() == len(text) or _EMPTY.match(text, match.end()):
            continue
        start = match.end()
        scheme = _SCHEME.match(text, start)
        if scheme is not None and scheme[0].lower().startswith("digest"):  # a list of fields of its own
            found: tuple[int, str] | None = (_end_of_line(text, start), MASK)
        else:
            found = _value(text, start if scheme is None else scheme.end(), scheme is not None, bare)
        if found is not None:
            end = found[0]
            yield start, end, found[1]


def _value(text: str, start: int, whole: bool, bare: re.Pattern[str]) -> tuple[int, str] | None:
    """Where a value ends that is written as Python, JSON, a shell or a person would, and what is shown for it; None if it is empty.

    What is cut off before it ends reaches to the end of its line: rather too much is masked than a part left.

    Args:
        text: all of it.
        start: where the value begins.
        whole: show nothing but the mask, as for what follows ``Bearer``.
        bare: what belongs to a value that is neither quoted nor in brackets.
    """
    opening = _OPENING.match(text, start)
    if opening is not None:
        end, closed = _closing(text, opening.end(), opening["mark"])
        empty = not text[opening.end() : end - len(opening["mark"]) if closed else end]
        end, more = _adjoining(text, end)
        if empty and not more:
            return None
        return end, MASK if whole else opening[0] + MASK + (opening["mark"] if closed else "")
    call = _CALL.match(text, start)
    if call is not None:
        end = _balanced(text, call.end() if text[start] != "<" else start)
        while end < len(text) and text[end] in "([{":  # Secret[str](...)
            end = _balanced(text, end)
        return None if not text[call.end() : end].strip("()[]{} ") else (end, MASK)
    word = bare.match(text, start)
    return None if word is None else (_adjoining(text, word.end())[0], MASK)


def _adjoining(text: str, start: int) -> tuple[int, bool]:
    """Where strings end that follow without a space, as a shell's 'it'"'"'s', and whether there are any."""
    end = start
    while start > 0 and end < len(text) and text[end] in "\"'" and (opening := _OPENING.match(text, end)) is not None:
        stop, closed = _closing(text, opening.end(), opening["mark"])
        if not closed:
            break
        end = stop
        word = re.compile(r"\w+").match(text, end)
        end = end if word is None else word.end()
    return end, end > start


def _closing(text: str, start: int, mark: str) -> tuple[int, bool]:
    """Where a string that was opened by ``mark`` ends, and whether it is closed; of an escaped mark only the same one closes it."""
    if mark in ("'", '"'):
        pattern = rf"(?:[^{mark}\\]|\\.)*{mark}"
        found = re.compile(pattern, re.DOTALL).match(text, start)
    else:
        found = re.compile(rf"(?<!\\){re.escape(mark)}").search(text, start)
    return (_end_of_line(text, start), False) if found is None else (found.end(), True)


def _balanced(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` is closed, brackets in strings not counted."""
    depth, place = 0, start
    while place < len(text):
        char = text[place]
        opening = _OPENING.match(text, place) if char in "\"'\\&%" else None
        if opening is not None:
            place, closed = _closing(text, opening.end(), opening["mark"])
            if not closed:
                return place
            continue
        depth += (char in "([{<") - (char in ")]}>")
        place += 1
        if depth == 0:
            return place
    return _end_of_line(text, start)


def _end_of_line(text: str, start: int) -> int:
    match = _LINE.match(text, start)
    assert match is not None
    return match.end()


def _credentials(scheme: str, rest: str) -> str:
    """``user:password`` in what follows ``scheme``; empty if it has none.

    In a web address it ends before the path, unless the port is not a number: then a password has an unescaped /. Elsewhere
    (databases) drivers take everything up to the last @ for it.
    """
    end = rest.rfind("@")
    if end < 0:
        return ""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if scheme.lower().rstrip("\\/") in ("http:", "https:"):
        if "@" in authority:
            return authority[: authority.rfind("@")]
        host, colon, port = authority.rpartition(":")
        if not colon or not host or port == "" or port.isdigit() or host.startswith("["):
            return ""
    elif ":" not in rest[:end] and "@" not in authority:
        return ""
    return rest[:end]


def _mask_authority(scheme: str, rest: str) -> str:
    credentials = _credentials(scheme, rest)
    if not credentials:
        return rest
    user, colon, _ = credentials.partition(":")
    alone = (
        MASK if scheme.lower().startswith("http") else user
    )  # without a password, a web address's user is often a token
    return (f"{user}:{MASK}" if colon else alone) + rest[len(credentials) :]
