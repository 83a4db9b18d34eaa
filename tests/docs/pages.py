"""The pages of the documentation, read with markdown-it: links, anchors, and the blocks of code that they show."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
TESTED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*TESTED, *sorted((ROOT / "bench").rglob("*.md"))]
KINDS = ("run", "slow", "compose", "parse")  # CONTRIBUTING.md says what each means
_COMMANDS = ("bash", "sh", "shell", "console")
_NOT_RUN = ("text", "yaml", "c")


class PageError(Exception):
    """A block that is in no category, or whose categories do not match its commands."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A command or a Python block that a page shows, and how it is tested."""

    page: Path
    line: int
    language: str
    text: str
    kind: str

    @property
    def id(self) -> str:
        first = self.text.strip().splitlines()[0]
        return f"{self.page.relative_to(ROOT)}:{self.line} {first[:60]}"


@functools.cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def _inline(page: Path, kind: str) -> Iterator[Token]:
    for token in tokens(page):
        for child in token.children or ():
            if child.type == kind:
                yield child


def links(page: Path) -> list[str]:
    """Return the targets of all links and images."""
    targets = [str(token.attrs["href"]) for token in _inline(page, "link_open")]
    return targets + [str(token.attrs["src"]) for token in _inline(page, "image")]


def code_spans(page: Path) -> list[str]:
    return [token.content for token in _inline(page, "code_inline")]


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    result = set()
    inside = False
    for token in tokens(page):
        if token.type == "heading_open":
            inside = True
        elif inside and token.type == "inline":
            inside = False
            text = "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            count = found[slug] = found.get(slug, -1) + 1
            result.add(f"{slug}-{count}" if count else slug)
    return frozenset(result)


def commands(script: str) -> list[str]:
    """Split a block of shell into its commands: lines ending in a backslash continue, comments and blank lines go."""
    joined = re.sub(r"\s*\\\n\s*", " ", script)
    return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def shown(page: Path) -> list[Shown]:
    """Return every command and Python block of a page.

    Raises:
        PageError: a block without a category, with an unknown one, or with another number of them than of commands.
    """
    result = []
    for token in tokens(page):
        if token.type == "code_block":
            raise PageError(f"{page}:{token.map[0] + 1}: an indented block has no language; use a fence")
        if token.type != "fence":
            continue
        where = f"{page}:{token.map[0] + 1}"
        language, _, rest = token.info.strip().partition(" ")
        if language in _NOT_RUN:
            continue
        if language not in (*_COMMANDS, "python"):
            raise PageError(f"{where}: a fence of language {language!r} is neither tested nor known to need no test")
        if not rest.startswith("test="):
            raise PageError(f"{where}: the block is in no category; add test= and one of {', '.join(KINDS)}")
        kinds = rest.removeprefix("test=").split(",")
        texts = [token.content] if language == "python" else commands(token.content)
        if len(kinds) == 1:
            kinds *= len(texts)
        if len(kinds) != len(texts):
            raise PageError(f"{where}: {len(texts)} commands, but {len(kinds)} categories")
        if unknown := set(kinds) - set(KINDS):
            raise PageError(f"{where}: unknown categories {sorted(unknown)}")
        if language == "python" and not set(kinds) <= {"run", "slow"}:
            raise PageError(f"{where}: a Python block is run, or slow")
        result += [Shown(page, token.map[0] + 1, language, text, kind) for text, kind in zip(texts, kinds, strict=True)]
    return result
