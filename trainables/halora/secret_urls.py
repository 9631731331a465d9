"""What is secret in a URL: one reading of it, for whatever takes a URL and whatever prints one.

Libraries disagree on where a URL's parts end (`http://u:a#b@host` has the host `u` for one and `host` for another), so
nothing here rests on one of them: an `@` that may end a password counts, wherever it stands, and so does a parameter
that is not known to be harmless.
"""

import re
from urllib.parse import unquote

_BEGIN = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{0,40}):(?=[/\\]{2})")
_PASSWORD_WITHOUT_URL = re.compile(r"[^/\\@\s]*:[^@\s]*@")
_USER_NAME = re.compile(r"[\w.+-]+")
_ASSIGNED = re.compile(
    r"(?i)(pass(word|wd|phrase)?|pwd|secret|token|sig(nature)?|sas|jwt|auth|(api|access|account|shared|private)[_-]?key"
    r"(id)?|credentials?)\s*="
)
_KEYS = re.compile(
    r"\b((AKIA|ASIA)[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|sk-[\w-]{20,}|xox[abpr]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.)"
)
_NAMED_USERS = ("postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle", "sftp", "ssh", "hdfs", "abfs", "abfss")
"""Schemes whose user is a name, or a container; of any other a user alone is a token or a key."""
_PATHS_WITH_AT = ("file", "local", "sqlite", "s3", "s3a", "gs", "gcs", "az", "adl", "abfs", "abfss", "hdfs", "memory")
"""Schemes whose paths may hold an `@`."""
_HARMLESS = {
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "ssl", "ssl_ca", "ssl_cert", "ssl_key", "gssencmode"),
    *("host", "hostaddr", "port", "user", "dbname", "service", "passfile", "charset", "driver", "application_name"),
    *("connect_timeout", "timeout", "target_session_attrs", "keepalives", "mode", "cache", "uri", "check_same_thread"),
}
"""Parameters that hold no secret."""
HIDDEN = "[hidden]"


def secrets_in(url: str) -> list[str]:
    """What of a URL is secret or may be, a few words each that do not repeat it; of plain paths and names nothing.

    A chained URL (`simplecache::s3://...`) is read in all its parts.
    """
    found = [each for part in _parts(url) for each in _secrets_of(part)]
    return sorted(set(found))


def hidden(text: str) -> str:
    """A text with everything after the scheme left out of URLs that hold a secret."""
    parts = []
    for part in _parts(text):
        url, rest = (re.match(r"(\S*)(.*)", part, re.DOTALL) or part).groups()  # type: ignore[union-attr]
        scheme = _BEGIN.match(url)
        parts.append(f"{scheme[1]}://{HIDDEN}{rest}" if scheme and _secrets_of(url) else part)
    return "".join(parts)


def _parts(text: str) -> list[str]:
    """The text, cut before each URL in it."""
    begins = [0, *(found.start() for found in _BEGIN.finditer(text))]
    return [text[begin:end] for begin, end in zip(begins, [*begins[1:], None], strict=True)]


def _secrets_of(part: str) -> list[str]:
    part = unquote(part).replace("\\", "/").strip()
    found = []
    if _KEYS.search(part):
        found.append("an access key or a token")
    if not (begin := _BEGIN.match(part)):
        return [*found, *(["a user or a password"] if _PASSWORD_WITHOUT_URL.match(part) else [])]
    scheme, rest = begin[1].lower().partition("+")[0], part[begin.end() :].lstrip("/")
    if _user_is_secret(scheme, rest, local=part[begin.end() :].startswith("///")):
        found.append("a user or a password")
    address, _, query = rest.partition("?")
    names = {pair.partition("=")[0].lower() for pair in re.split("[&;]", query) if pair}
    if names - _HARMLESS or _ASSIGNED.search(address):
        found.append("a parameter that may be a password or a token")
    return found


def _user_is_secret(scheme: str, rest: str, *, local: bool) -> bool:
    """Whether an `@` ends what may be a password or a token, or a part of a path or a user's name."""
    before, at, _ = rest.rpartition("@")
    if not at:
        return False
    if "/" not in before and not local:
        return scheme not in _NAMED_USERS or not _USER_NAME.fullmatch(before)
    inside = before.partition("@")[2] if scheme in _NAMED_USERS and _USER_NAME.match(before) else before
    return scheme not in _PATHS_WITH_AT or re.search("[:#?]", inside) is not None
