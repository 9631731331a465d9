"""Which program made a record."""

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def program() -> dict[str, str]:
    """The `version` of this program and the git `commit` it runs from, see `commit_of`."""
    return {"version": version("halora-sweep"), "commit": commit_of(Path(__file__))}


def commit_of(file: Path) -> str:
    """The commit checked out where git keeps a file, with `+` after it where any kept file differs from it.

    Empty where git does not keep the file: a program that is installed into another repository's folder is not of its
    commit.
    """

    def git(*arguments: str) -> str:
        asked = ["git", "-C", str(file.parent), *arguments]
        try:
            return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # there is no git
            return ""

    commit = git("rev-parse", "HEAD") if git("ls-files", "--", file.name) else ""
    return commit + ("+" if commit and git("status", "--porcelain", "--untracked-files=no") else "")
