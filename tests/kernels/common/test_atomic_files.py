"""Files appear whole or not at all: a write that fails leaves what was there, and nothing beside it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from kernels.common.errors import UserError
from kernels.common.files import atomic_folder, atomic_write, explain_os_errors, problem_of, publish


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_twice(path: Path) -> None:
    """Write through a buffer too small to hold it, so that the disk is met before the end."""
    with atomic_write(path, "wb") as file:
        file.write(b"new" * 100_000)
        file.flush()


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new é")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == "new é".encode()
    with atomic_write(path, "wb") as file:
        file.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("old", ["old", None])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, broken, old):
    path = tmp_path / "summary.json"
    if old:
        path.write_text(old)
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        write_twice(path)
    monkeypatch.undo()
    assert names(tmp_path) == (["summary.json"] if old else [])
    assert not old or path.read_text() == old


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_writer_that_stops_half_way_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def stop_half_way() -> None:
        with atomic_write(path) as file:
            file.write("half")
            raise error

    with pytest.raises(error):
        stop_half_way()
    assert (names(tmp_path), path.read_text()) == (["summary.json"], "old")


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_twice(tmp_path / "missing" / "file")


def test_what_is_renamed_was_synced_before_and_its_folder_after(tmp_path, monkeypatch):
    """The order that a power cut asks for, by the operating system's own calls."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def record_rename(old: object, new: object) -> None:
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    write_twice(tmp_path / "file")
    assert calls == ["sync file", "rename", "sync folder"]
    calls.clear()
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("a")
        (folder / "b").write_text("b")
    assert calls == ["sync file", "sync folder", "sync file", "sync folder", "rename", "sync folder"]


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "step_00000001"
    with atomic_folder(path) as folder:
        (folder / "weights").write_text("w")
        assert not path.exists()
    assert (names(tmp_path), names(path)) == (["step_00000001"], ["weights"])


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_folder_never_replaces_what_is_there(tmp_path, kind):
    path = tmp_path / "step_00000001"
    path.mkdir() if kind == "folder" else path.write_text("old")
    entered = False
    with pytest.raises(FileExistsError):
        with atomic_folder(path):
            entered = True
    assert not entered
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_no_half_folder(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        with atomic_folder(tmp_path / "step_00000001") as folder:
            (folder / "weights").write_text("w")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_a_folder_whose_writer_stops_half_way_is_removed(tmp_path):
    def stop_half_way() -> None:
        with atomic_folder(tmp_path / "step_00000001") as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert names(tmp_path) == []


def test_a_folder_left_by_a_killed_writer_is_written_anew(tmp_path):
    with atomic_folder(tmp_path / "a") as folder:
        name = folder.name.replace("a", "b")
    stale = tmp_path / name
    stale.mkdir()
    (stale / "left").write_text("left")
    with atomic_folder(tmp_path / "b") as folder:
        assert folder == stale
        (folder / "new").write_text("new")
    assert (names(tmp_path), names(tmp_path / "b")) == (["a", "b"], ["new"])


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full; free some space and run the same command again"),
        (errno.EDQUOT, "the disk quota is used up; free some space and run the same command again"),
        (errno.EIO, "the disk reports an error; check the disk (dmesg has its errors) and run the same command again"),
        (errno.ESTALE, "the file server has lost it; check the mount and run the same command again"),
        (errno.EACCES, "permission denied; make the folder writable or name another one"),
        (errno.EROFS, "the file system is read-only; name another folder"),
        (errno.ENOTDIR, "a part of that path is a file, not a folder"),
        (errno.ENOENT, "there is no such file or folder"),
        (errno.EISDIR, "that is a folder, not a file"),
    ],
)
def test_the_systems_refusal_becomes_a_sentence(number, reason):
    with pytest.raises(UserError) as caught:
        with explain_os_errors("write to", Path("runs/a")):
            raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"cannot write to runs/a: {reason}"
    assert caught.value.status == (75 if reason.endswith("run the same command again") else 2)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(errno.ENOSPC, "x"), "runs/a: the disk is full; free some space"),
        (OSError(errno.EIO, "x", "b"), "b: the disk reports an error; check the disk (dmesg has its errors)"),
        (OSError(errno.EROFS, "x"), "runs/a: the file system is read-only; make it writable"),
        (OSError(errno.EFBIG, "File too large"), "runs/a: File too large"),
        (OSError("a library's own"), "runs/a: a library's own"),
    ],
)
def test_a_problem_that_ends_nothing_names_the_path_and_what_to_do(error, problem):
    assert problem_of(error, "runs/a") == problem


def test_a_write_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        with atomic_write(tmp_path / "a") as file:
            file.write("text")
    assert caught.value.filename == str(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="No space left") as caught:
        publish(tmp_path / "b", tmp_path / "c")
    assert caught.value.filename == str(tmp_path / "b")


def test_what_is_no_refusal_passes_through():
    with pytest.raises(OSError, match="Invalid argument") as caught:
        with explain_os_errors("write to", "runs/a"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    assert not isinstance(caught.value, UserError)
    with pytest.raises(ZeroDivisionError):
        with explain_os_errors("write to", "runs/a"):
            raise ZeroDivisionError
