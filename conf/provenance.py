"""Where a result comes from: date, commit, machine, versions and command. No torch, no network."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from kernels.common.text import command_text

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "deepspeed", "triton", "numpy", "tokenizers", "sentencepiece")
_CODE = (".py", ".yaml", ".c", ".h", ".jinja", ".lock", ".toml")  # what a run reads of the source tree


def provenance(device: str = "", root: Path = _ROOT) -> dict[str, Any]:
    """Return the provenance of what this process computes, as JSON.

    Args:
        device: description of what it computes on.
        root: of the source tree.

    Returns:
        `date` (UTC), `commit` and `dirty` (None outside of a clone of the repository: whether the code differs from the
        commit), `host`, `machine`, `device`, `python`, `versions` by package, and `command`.
    """
    commit, dirty = commit_of(root)
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "host": platform.node(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "device": device,
        "python": platform.python_version(),
        "versions": versions,
        "command": command_line(),
    }


def command_line() -> str:
    """Return the command of this process as it can be typed again, without what a launcher added and without secrets."""
    arguments = [
        text for text in sys.orig_argv if not text.startswith(("--local_rank", "--local-rank")) and text != "-u"
    ]
    return command_text([Path(arguments[0]).name, *arguments[1:]]) if arguments else ""


def commit_of(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a source tree, and whether its code differs from that; (None, None) if it is no clone."""
    top_and_commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
    if len(top_and_commit) != 2 or Path(top_and_commit[0]).resolve() != root.resolve():
        return None, None  # also a copy of the source inside of another repository
    changes = _git(root, "status", "--porcelain").splitlines()
    return top_and_commit[1], any(line[:2] != "??" or line.strip('"').endswith((*_CODE, "/")) for line in changes)


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints; "" if it fails, or there is none."""
    try:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def summarise(content: dict[str, Any]) -> str:
    """Return a provenance as one line: commit, date, machine."""
    commit = str(content.get("commit") or "")[:12] or "not a clone of the repository"
    changed = " with uncommitted changes" if content.get("dirty") else ""
    versions = ", ".join(f"{name} {version}" for name, version in (content.get("versions") or {}).items())
    place = ", ".join(filter(None, (content.get("device") or content.get("machine"), content.get("host"))))
    return (
        f"commit {commit}{changed}; {content.get('date', '')}; {place}; Python {content.get('python', '')}, {versions}"
    )
