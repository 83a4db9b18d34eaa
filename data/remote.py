"""Text behind URLs: find the files that one means, tell whether they changed, and read them, all through fsspec.

Notable here:
- a `RemoteFile` has what the readers ask of a file: name, suffix, `stamp` and `open`; `files.py` treats it as it treats a Path;
- it is known by its URL, its size and what its store says of its content (an ETag, a checksum, a time): no content is hashed
  over the network;
- whatever a store's library raises becomes one sentence with the URL as it was typed, so a secret that the environment holds
  is never printed (`conf/urls.py`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from conf.urls import expand, hide, refuse_secrets, without_secrets
from data.packages import need
from kernels.common.errors import TryAgain, UserError

# The package that speaks a protocol, where that is not the protocol's name.
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "hdfs": "pyarrow",
}
# What stores say of a file's content, most decisive first: what changes with it, then when it was written.
MARKS = (
    *(
        "ETag",
        "etag",
        "md5Hash",
        "md5",
        "Content-MD5",
        "content_md5",
        "crc32c",
        "sha256",
        "checksum",
        "Digest",
        "blob_id",
    ),
    *("generation", "VersionId", "version_id", "Last-Modified", "LastModified", "last_modified", "updated", "mtime"),
    *("modified", "created"),
)
AT_ONCE = 16  # requests for the sizes of files, where a listing does not have them
READ_AHEAD = 5 << 20  # bytes asked for at once where a file is read from end to end
LONGEST_REASON = 200  # characters of a library's message


class RemoteFile:
    """A file behind a URL, as it was listed."""

    def __init__(self, store: _Store, path: str, info: Mapping[str, Any], name: str, group: str) -> None:
        """Take its store, its path there, what the store says of it, how messages name it, and the folder it belongs to."""
        self._store, self._path = store, path
        self._shown, self.group = name, group
        self.url = hide(str(store.fs.unstrip_protocol(path)), store.values)  # one per file, however it was typed
        size = info.get("size")
        self.size: int | None = None if size is None else int(size)  # bytes; None: the server does not say it
        self.mark = next((f"{key} {info[key]}" for key in MARKS if info.get(key)), "")

    def __str__(self) -> str:
        return self._shown

    __repr__ = __str__

    @property
    def suffix(self) -> str:
        """The ending of its name, such as .gz."""
        return PurePosixPath(_plain(self._path)).suffix

    def stamp(self) -> list[Any]:
        """Return what changes when the file is written: URL, size in bytes or None, and what its store says of its content."""
        return [self.url, self.size, self.mark]

    def open(self, ranges: bool = False) -> io.RawIOBase:
        """Open it for reading from end to end, or, with `ranges`, for reading exactly the bytes that are asked for.

        Raises:
            UserError: it cannot be opened. Reading raises it too, or TryAgain where a transfer breaks.
        """
        return _Reader(self, self._store, self._path, ranges)


class _Store:
    """A file system of fsspec, with the secrets that stand in its URLs."""

    def __init__(self, entry: str) -> None:
        fsspec = need("fsspec", f"reading {entry}")
        refuse_secrets("data.path", entry)
        url, self.values = expand(entry)
        self.protocol = re.split("::|://", entry)[0].lower()
        self.http = self.protocol in ("http", "https")
        with self.explained(entry):
            self.fs, self.path = fsspec.core.url_to_fs(url, **(_http_options(entry) if self.http else {}))
            self.fs.invalidate_cache()  # of listings: a file may have been written since

    @contextmanager
    def explained(self, name: str, lost: type[UserError] = UserError) -> Iterator[None]:
        """Turn what fsspec and the libraries below it raise into one sentence; `lost`: what a failed connection raises."""
        try:
            yield
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:  # every store has a library with exceptions of its own
            raise self._sentence(error, name, lost) from None  # a traceback would show the URL with its secrets

    def _sentence(self, error: Exception, name: str, lost: type[UserError]) -> UserError:
        chain = list(_chain(error))
        if any(isinstance(each, ImportError) for each in chain):
            package = PACKAGES.get(self.protocol, self.protocol)
            return UserError(f"reading {name} needs the package {package}: pip install {package}")
        statuses = (getattr(each, "status", None) for each in chain)  # of HTTP
        status = next((status for status in statuses if isinstance(status, int)), 0)
        if status in (401, 403) or any(isinstance(each, PermissionError) for each in chain):
            return UserError(
                f"no permission to read {name}: set the credentials of {self.protocol}:// for this machine"
            )
        reached = not any(isinstance(each, (ConnectionError, TimeoutError)) or _unreachable(each) for each in chain)
        if isinstance(error, FileNotFoundError) and reached and status in (0, 404, 410):
            return UserError(f"there is no file or folder {name}")
        first = chain[-1] if isinstance(error, FileNotFoundError) else error  # http says so of every failure
        reason = without_secrets(str(first).strip().split("\n")[0] or type(first).__name__, self.values)
        reason = f"HTTP status {status}" if status else reason[:LONGEST_REASON]
        return lost(f"cannot read {name}: {reason}")


def _http_options(entry: str) -> dict[str, Any]:
    aiohttp = need("aiohttp", f"reading {entry}")
    # A whole transfer has no time limit: it may take hours. `trust_env` reads proxies, and passwords of ~/.netrc. A server that
    # compressed what it sends would make its sizes wrong.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=300)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": {"Accept-Encoding": "identity"}}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unreachable(error: BaseException) -> bool:
    # aiohttp's and botocore's failures to connect, without importing either.
    return type(error).__name__ in ("ClientConnectorError", "ClientConnectorDNSError", "EndpointConnectionError")


def _plain(path: str) -> str:
    """Return a path without the query of an address."""
    return re.split(r"[?#]", path)[0] if path.startswith(("http://", "https://")) else path


def find_remote(entry: str, wanted: Callable[[str], bool], kinds: str) -> list[RemoteFile]:
    """List the files that a URL means, in the order in which `find_files` lists local ones.

    Args:
        entry: a file, a glob or a folder.
        wanted: whether a file of this name is read, in a folder. kinds: what these are called, such as ".parquet files".

    Raises:
        UserError: there is none, it cannot be reached or read, or a package is missing.
    """
    store = _Store(entry)
    with store.explained(entry):
        # In the address of a web page "?" begins a query, and brackets stand around a host.
        path = urlsplit(store.path).path if store.http else store.path
        if re.search(r"[*[]" if store.http else r"[*?[]", path):
            return _glob(store, entry)
        info = {"type": "directory"} if entry.endswith("/") else store.fs.info(store.path)
        # Where a server sends one who asks for a folder.
        listing = store.http and _plain(info.get("url", "")).endswith("/")
        if info["type"] == "other":
            raise UserError(
                f"{entry} is a pipe, socket or device, and text is read several times: write it into a file"
            )
        if info["type"] != "directory" and not listing:
            return [RemoteFile(store, store.path, info, entry, PurePosixPath(_plain(store.path)).name)]
        root = store.path.rstrip("/") + "/"
        listed = store.fs.find(root if store.http else store.path, detail=True)
        below = {path: path.removeprefix(root).split("/") for path in listed}
        kept = [p for p, parts in below.items() if not _hidden(parts) and wanted(parts[-1])]
        kept = [p for p in kept if not (listed[p].get("type") == "other" and _is_special(store, p))]
        if not kept:
            if not listed and not store.http and not store.fs.isdir(store.path):
                raise UserError(f"there is no file or folder {entry}")
            raise UserError(f"the folder {entry} holds no {kinds}")
        # The files of a folder come before its folders, as when a local one is walked.
        kept.sort(key=lambda p: [(i < len(below[p]) - 1, part) for i, part in enumerate(below[p])])
        return _files(store, {p: listed[p] for p in kept}, {p: below[p][0] for p in kept})


def _is_special(store: _Store, path: str) -> bool:
    """Return whether a path leads to a pipe, a socket or a device of this machine; a listing says "other" of links as well."""
    return bool(store.fs.exists(path) and store.fs.info(path)["type"] == "other")


def _glob(store: _Store, entry: str) -> list[RemoteFile]:
    fixed = "/".join(re.split(r"[*?[]" if not store.http else r"[*[]", store.path)[0].split("/")[:-1]) + "/"
    listed = {p: info for p, info in store.fs.glob(store.path, detail=True).items() if info.get("type") == "file"}
    below = {path: path.removeprefix(fixed).split("/") for path in listed}
    shown = _hidden(store.path.removeprefix(fixed).split("/"))  # a pattern that names hidden files means them
    kept = sorted((p for p in listed if shown or not _hidden(below[p])), key=lambda p: p.split("/"))
    if not kept:
        raise UserError(f"no file matches {entry}")
    return _files(store, {p: listed[p] for p in kept}, {p: below[p][0] for p in kept})


def _hidden(parts: list[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _files(store: _Store, listed: dict[str, Mapping[str, Any]], groups: dict[str, str]) -> list[RemoteFile]:
    """Return files of a listing, with their sizes where it lacks them."""
    infos = list(listed.values())
    if any(info.get("size") is None for info in infos):
        with ThreadPoolExecutor(AT_ONCE) as threads:
            infos = list(threads.map(store.fs.info, listed))
    pairs = zip(listed, infos, strict=True)
    named = {path: hide(str(store.fs.unstrip_protocol(path)), store.values) for path in listed}
    return [RemoteFile(store, path, info, named[path], groups[path]) for path, info in pairs]


class _Reader(io.RawIOBase):
    """The bytes of a remote file; whatever goes wrong is one sentence."""

    def __init__(self, file: RemoteFile, store: _Store, path: str, ranges: bool) -> None:
        self._file, self._store, self._path, self._ranges = file, store, path, ranges
        self._place = 0
        cache: dict[str, Any] = {"cache_type": "none"}
        if not ranges:
            cache = {"cache_type": "readahead", "block_size": READ_AHEAD}
        if store.http:
            cache["size"] = file.size  # else it is asked for again
        with store.explained(str(file)):
            self._raw = store.fs.open(path, "rb", **cache)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._ranges

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._store.explained(str(self._file), TryAgain):
            if self._ranges and self._file.size is None:
                raise self._no_ranges()
            self._place = self._raw.seek(offset, whence)
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Return `size` bytes, fewer at the end of the file only; -1: all that follow.

        Raises:
            TryAgain: the transfer broke, or the server sent less than the file has.
        """
        parts, left = [], size
        with self._store.explained(str(self._file), TryAgain):
            while left and (part := self._some(left)):
                parts.append(part)
                self._place += len(part)
                left -= len(part) if size >= 0 else 0
        total = self._file.size
        if left and total is not None and self._place < total:
            raise TryAgain(
                f"{self._file} ended after {self._place:,} of {total:,} bytes: the transfer broke, or it was changed"
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _some(self, size: int) -> bytes:
        try:
            return self._raw.read(size)
        except ValueError as error:
            if not self._store.http or "range requests" not in str(error):
                raise
        if self._ranges:
            raise self._no_ranges()
        # This server sends whole files only: start over, and skip what was read.
        self._raw.close()
        self._raw = self._store.fs.open(self._path, "rb", block_size=0)
        left = self._place
        while left and (part := self._raw.read(min(left, READ_AHEAD))):
            left -= len(part)
        return self._raw.read(size)

    def _no_ranges(self) -> UserError:
        return UserError(
            f"the server of {self._file} does not send parts of a file, which data=parquet needs: download it first"
        )

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()
