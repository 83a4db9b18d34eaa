"""Damage run folders in every way that a disk, a copy or a hand can, and resume: a campaign of `python -m bench.faults`.

A run of 12 steps stops after step 9, with checkpoints of steps 3, 6 and 9. Each case damages a copy of its folder and types the
same command. Required: the run goes on from the newest checkpoint that is healthy and its own, and ends with the loss of the
undisturbed run to the last bit; or one sentence refuses it, where none is left or a file that no checkpoint replaces is wrong.
Never a traceback, nor a wait.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kernels.common.json_files import digest
from model.manifest import file_hash, file_of

STEPS = (9, 6, 3)  # of the checkpoints, newest first
_CHECKPOINT_FILES = ("manifest.json", "index.json", "state.json", file_of(0))
_RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "run_id", "provenance.json")


class Folders(NamedTuple):
    """The folder to damage, and stopped runs whose files may be taken."""

    run: Path
    others: tuple[Path, ...]  # another seed, another arm, another length


@dataclasses.dataclass(frozen=True)
class Case:
    """A corruption, and what may follow from it."""

    kind: str
    what: str
    step: int | None  # of the checkpoint that the run must go on from; None: there is none
    may_refuse: bool  # whether a refusal is right although there is such a checkpoint


@dataclasses.dataclass(frozen=True)
class Ending:
    """What became of a command: its status, its output, the step after which it resumed, and what it led to."""

    status: int | None  # None: it did not end
    output: str
    step: int | None
    result: Any  # the final loss, or whatever tells the right weights from others


def checkpoint_of(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint."""
    return run / "checkpoints" / f"step_{step:08d}"


def verdict(case: Case, ending: Ending, expected: Callable[[int], Any]) -> str:
    """Return what is wrong with the end of a case; "": nothing.

    Args:
        expected: the result of a run that goes on from the checkpoint of a step.
    """
    if ending.status is None:
        return "it waits"
    if "Traceback" in ending.output or ending.status not in (0, 2):
        return f"status {ending.status}: {ending.output.strip().splitlines()[-1:]}"
    if ending.status == 2:
        sentences = [line for line in ending.output.splitlines() if line.startswith("error: ")]
        if len(sentences) != 1:
            return f"{len(sentences)} sentences refuse it"
        return "" if case.step is None or case.may_refuse else f"refused: {sentences[0]}"
    if case.step is None:
        return f"it went on from {ending.step}, and should have been refused"
    if ending.step != case.step:
        return f"it went on from {ending.step}, not from {case.step}"
    return "" if ending.result == expected(case.step) else f"it led to {ending.result}, not to {expected(case.step)}"


def corrupt(folders: Folders, generator: random.Random) -> Case:
    """Damage a run folder in a way that the generator chooses; return the case."""
    kind = generator.choice(list(KINDS))
    return KINDS[kind](kind, folders, generator)


def _newest(generator: random.Random) -> tuple[int, ...]:
    """Return the steps of the checkpoints to damage: most often the newest, at times more or all of them."""
    return STEPS[: generator.choice((1, 1, 1, 2, 2, 3))]


def _case(kind: str, what: str, damaged: tuple[int, ...]) -> Case:
    return Case(kind, what, next((step for step in STEPS if step not in damaged), None), may_refuse=False)


def _damage_of_checkpoints(kind: str, folders: Folders, generator: random.Random) -> Case:
    name, how = generator.choice(_CHECKPOINT_FILES), generator.choice(list(_DAMAGE))
    damaged = _newest(generator)
    for step in damaged:
        _DAMAGE[how](checkpoint_of(folders.run, step) / name, generator)
    return _case(kind, f"{name} {how}", damaged)


def _swap_within_run(kind: str, folders: Folders, generator: random.Random) -> Case:
    """Give the newest checkpoint files of an older one, perhaps with a manifest that fits them."""
    names = generator.sample(("state.json", file_of(0)), generator.choice((1, 2)))
    older, newest = checkpoint_of(folders.run, generator.choice(STEPS[1:])), checkpoint_of(folders.run, STEPS[0])
    fitting = generator.random() < 0.7
    if not fitting and generator.random() < 0.3:
        names = ["manifest.json"]
    for name in names:
        shutil.copyfile(older / name, newest / name)
    if fitting:
        fit_manifest(newest)
    return _case(kind, f"{' '.join(names)}{' that fit' if fitting else ''}", STEPS[:1])


def _swap_between_runs(kind: str, folders: Folders, generator: random.Random) -> Case:
    """Give checkpoints files of the same step of another run, perhaps with a manifest that fits them."""
    other, fitting, damaged = generator.choice(folders.others), generator.random() < 0.7, _newest(generator)
    names = generator.sample(("state.json", file_of(0)), generator.choice((1, 2)))
    for step in damaged:
        for name in names:
            shutil.copyfile(checkpoint_of(other, step) / name, checkpoint_of(folders.run, step) / name)
        if fitting:
            fit_manifest(checkpoint_of(folders.run, step))
    return _case(kind, f"{' '.join(names)} of {other.name}{' that fit' if fitting else ''}", damaged)


def _whole_checkpoints(kind: str, folders: Folders, generator: random.Random) -> Case:
    """Put whole checkpoints of another run, or of another step, in the place of the newest ones."""
    other, damaged = generator.choice((*folders.others, folders.run)), _newest(generator)
    for step in damaged:
        source = checkpoint_of(other, step if other != folders.run else STEPS[-1])
        target = checkpoint_of(folders.run, step)
        if source != target:
            shutil.rmtree(target)
            shutil.copytree(source, target)
    damaged = damaged if other != folders.run else tuple(step for step in damaged if step != STEPS[-1])
    if alone := generator.random() < 0.3:
        (folders.run / "run_id").unlink()
    return _case(kind, f"of {other.name}{', no run_id' if alone else ''}", damaged)


def _rewritten_manifest(kind: str, folders: Folders, generator: random.Random) -> Case:
    """Change what a manifest lists or says, with a digest that fits or as an earlier version wrote it."""
    path = checkpoint_of(folders.run, STEPS[0]) / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    how = generator.choice(("earlier version", "unlisted", "outside", "step", "run", "sizes", "world", "no digest"))
    if how == "earlier version":
        content = {"files": content["files"]}
    elif how == "unlisted":
        del content["files"][generator.choice(list(content["files"]))]
    elif how == "outside":
        content["files"]["../../config.yaml"] = content["files"]["state.json"]
    elif how == "sizes":
        content["files"][file_of(0)] = generator.choice((None, {}, {"bytes": -1, "blake2b": ""}, {"bytes": 1e300}))
    elif how == "no digest":
        content.pop("digest")
    else:
        content[how] = generator.choice((None, 10**30, "x", [], {"a": 1}))
    if "digest" in content:
        _sign(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return _case(kind, how, STEPS[:1])


def _rewritten_index(kind: str, folders: Folders, generator: random.Random) -> Case:
    """Change places or shapes in an index, with hashes that fit."""
    path = checkpoint_of(folders.run, STEPS[0]) / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    name = generator.choice(list(index))
    how = generator.choice(("start", "size", "rank", "shape", "shards", "no pieces", "gone", "swapped", "no object"))
    piece = index[name]["pieces"][0]
    if how in ("start", "size", "rank"):
        piece[{"start": 1, "size": 2, "rank": 3}[how]] += generator.choice((-1, 1, 10**12))
    elif how == "shape":
        index[name]["shape"] = generator.choice(([10**9, 10**9], [], "x", [-1], [1.5]))
    elif how == "shards":
        index[name]["tensor"] = generator.choice((0, 2, 10**15, None))
    elif how == "no pieces":
        index[name]["pieces"] = generator.choice(([], None, [[0, 0]], [[0, 0, 1, 0]] * 3))
    elif how == "gone":
        del index[name]
    elif how == "swapped":
        names = generator.sample(list(index), 2)
        index = {**index, names[0]: index[names[1]], names[1]: index[names[0]]}
        if index[names[0]] == index[names[1]]:
            del index[name]
    else:
        index = generator.choice(([], 5, {name: 3}, {}))
    path.write_text(json.dumps(index) + "\n", encoding="utf-8")
    fit_manifest(path.parent)
    return _case(kind, how, STEPS[:1])


def _run_file(kind: str, folders: Folders, generator: random.Random) -> Case:
    """Damage a file of the run itself, take it from another run, or delete it."""
    name = generator.choice(_RUN_FILES)
    path, how = folders.run / name, generator.choice((*_DAMAGE, "of another run"))
    path.touch()
    if how == "of another run":
        other = generator.choice(folders.others)
        (other / name).touch()
        shutil.copyfile(other / name, path)
    else:
        _DAMAGE[how](path, generator)
    return Case(kind, f"{name} {how}", STEPS[0], may_refuse=True)


def _lost(kind: str, folders: Folders, generator: random.Random) -> Case:
    """Delete all checkpoints, and perhaps files beside them."""
    shutil.rmtree(folders.run / "checkpoints")
    also = generator.sample(_RUN_FILES, generator.choice((0, 1, 2)))
    for name in also:
        (folders.run / name).unlink(missing_ok=True)
    return Case(kind, f"all checkpoints{', ' if also else ''}{' '.join(also)}", None, may_refuse=True)


def _leftovers(kind: str, folders: Folders, generator: random.Random) -> Case:
    """Leave what killed processes and other programs leave beside checkpoints."""
    place = folders.run / "checkpoints"
    for name in generator.sample((".step_00000012.tmp", ".step_00000009.old", "step_x", "step_00000099", "step_-1"), 3):
        (place / name).mkdir()
    (place / "step_00000010").write_bytes(b"a file")
    (checkpoint_of(folders.run, STEPS[0]) / "notes.txt").write_text("a note", encoding="utf-8")
    return _case(kind, "folders and files of other names", ())


KINDS: dict[str, Callable[[str, Folders, random.Random], Case]] = {
    "damage": _damage_of_checkpoints,
    "files of another step": _swap_within_run,
    "files of another run": _swap_between_runs,
    "whole checkpoints": _whole_checkpoints,
    "rewritten manifest": _rewritten_manifest,
    "rewritten index": _rewritten_index,
    "files of the run": _run_file,
    "lost checkpoints": _lost,
    "leftovers": _leftovers,
}


def fit_manifest(checkpoint: Path) -> None:
    """Rewrite the sizes, hashes and digest of a manifest for the files that are there now."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in content["files"]:
        file = checkpoint / name
        content["files"][name] = {"bytes": file.stat().st_size, "blake2b": file_hash(file)}
    _sign(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sign(content: dict[str, Any]) -> None:
    content.pop("digest", None)
    content["digest"] = digest(content, 16)


def _flip(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes() or b" ")
    text = not path.name.endswith(".safetensors")
    places = [at for at, byte in enumerate(data) if not text or not chr(byte).isspace()] or [0]  # a space means nothing
    data[generator.choice(places)] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def _zero(path: Path, generator: random.Random) -> None:
    data = bytearray(path.read_bytes() or b" ")
    start = generator.randrange(len(data))
    if not any(data[start : start + 4096]):
        start, data[0] = 0, data[0] ^ 1
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def _replace(make: Callable[[Path], Any]) -> Callable[[Path, random.Random], None]:
    def apply(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return apply


_DAMAGE: dict[str, Callable[[Path, random.Random], Any]] = {
    "with a bit flipped": _flip,
    "with a page of zeros": _zero,
    "cut short": lambda path, generator: os.truncate(path, generator.randrange(max(1, path.stat().st_size))),
    "longer": lambda path, _: path.write_bytes(path.read_bytes() + b"\x00{"),
    "of random bytes": lambda path, generator: path.write_bytes(generator.randbytes(path.stat().st_size or 10)),
    "missing": _replace(lambda _: None),
    "a folder": _replace(Path.mkdir),
    "a pipe": _replace(os.mkfifo),
    "a dangling link": _replace(lambda path: path.symlink_to("nowhere")),
    "of deep brackets": _replace(lambda path: path.write_text("[" * 200_000)),
    "of deep objects": _replace(lambda path: path.write_text('{"a":' * 200_000)),
    "not UTF-8": _replace(lambda path: path.write_bytes(b'{"kind": "\xff\xfe"}\n')),
    "of another type": _replace(lambda path: path.write_text("[1, 2]\n")),
}


def campaign(
    prepared: Folders,
    cases: int,
    seed: int,
    command: Callable[[Path], Ending],
    expected: Callable[[int], Any],
) -> Iterator[tuple[Case, Ending, str]]:
    """Yield each case, how it ended, and what is wrong with that; "": nothing.

    Args:
        prepared: folders that are left as they are, beside which the damaged copies are made.
        command: types the same command for the run in a folder.
        expected: the result of a run that goes on from the checkpoint of a step.
    """
    for number in range(cases):
        generator = random.Random(f"{seed} {number}")
        copy = prepared.run.with_name("damaged")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(prepared.run, copy)
        case = corrupt(Folders(copy, prepared.others), generator)
        ending = command(copy)
        yield case, ending, verdict(case, ending, expected)
    shutil.rmtree(prepared.run.with_name("damaged"), ignore_errors=True)
