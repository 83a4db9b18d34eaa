"""Worker processes: they tokenize groups of documents; the parent submits, collects and stops them.

Workers are spawned, not forked (the parent may hold threads and a GPU), and import neither the program that started
them nor torch. They end with their parent, however it ends. `prepare.py` forms the groups.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from data.shards import Shard, write_group, write_shard
from data.tokenizer import Tokenizer, load_tokenizer
from kernels.common.errors import UserError


@dataclass(frozen=True)
class Group:
    """Consecutive documents of the corpus, which one worker turns into at most one shard per split."""

    number: int
    texts: dict[str, list[str]]  # split -> documents
    text_bytes: dict[str, int]  # split -> UTF-8 bytes of them
    text_hash: str  # of all documents, in order
    fraction: float  # of the corpus read up to its end, for the progress bar


def encode_group(folder: Path, tokenizer: Tokenizer, group: Group) -> list[Shard]:
    """Tokenize a group, write its shards, then its record; return the shards. UserError as `write_shard`."""
    shards = []
    for split, texts in group.texts.items():
        if texts:
            ids = [tokenizer.encode_document(text) for text in texts]
            size = group.text_bytes[split]
            shard = write_shard(folder, split, group.number, ids, size, tokenizer.eos_id, tokenizer.vocab_size)
            if split == "held_out":
                pairs = zip(ids, texts, strict=True)
                shard = replace(shard, lossy=sum(tokenizer.decode(some.tolist()) != text for some, text in pairs))
            shards.append(shard)
    write_group(folder, group.number, group.text_hash, tokenizer.hash, shards)
    return shards


_worker_tokenizer: Tokenizer | None = None  # of this worker process, loaded once for all of its groups


def _start_worker(tokenizer_path: Path | None) -> None:
    global _worker_tokenizer
    # Ctrl-C ends a worker at once and silently: files are written atomically. One that came while it started, with the
    # signal blocked by `_quiet_start`, ends it here.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism here
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if tokenizer_path is not None:
        _worker_tokenizer = load_tokenizer(tokenizer_path)


def _end_with_parent() -> None:
    # A killed parent cannot stop its workers, and they would wait for it forever.
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a worker
    wait([parent.sentinel])
    os._exit(1)


def _work(folder: Path, group: Group) -> list[Shard]:
    assert _worker_tokenizer is not None
    return encode_group(folder, _worker_tokenizer, group)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    # A spawned process imports its parent's __main__: a training script, and with it torch. Workers need neither.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    # A process spawned in this context inherits a mask that holds SIGINT back until `_start_worker`: Python's own handler,
    # which stands from the interpreter's start on, would print a traceback. Here the signal waits for the end of the context.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _pool(workers: int, tokenizer_path: Path | None, remedy: str) -> Iterator[Callable[..., Future]]:
    """Yield a `submit`; on any failure, Ctrl-C included, terminate the workers at once."""
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    resource_tracker.ensure_running()  # its start unblocks SIGINT, so it must not fall into `_quiet_start`
    executor = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_path,))

    def submit(function: Callable, *arguments: Any) -> Future:
        with _no_main_module(), _quiet_start():  # workers are started by submit, as they are needed
            return executor.submit(function, *arguments)

    try:
        yield submit
    except BaseException as error:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        _shut_down(executor)
        if isinstance(error, BrokenProcessPool):
            raise UserError(f"a worker process died, most likely for lack of memory; {remedy}") from error
        raise
    executor.shutdown(wait=True)


def _shut_down(executor: ProcessPoolExecutor) -> None:
    """Shut down a pool whose workers are gone.

    Up to Python 3.11.5 a pool waits forever for its own thread that writes more than a pipe holds to a worker which no longer
    reads (https://github.com/python/cpython/issues/94777). So what it writes is read here, until it has ended.
    """
    manager, calls = (getattr(executor, name, None) for name in ("_executor_manager_thread", "_call_queue"))
    executor.shutdown(wait=False, cancel_futures=True)
    with contextlib.suppress(OSError):  # the pool has closed the pipe
        while manager is not None and calls is not None and manager.is_alive():
            if calls._reader.poll(0.05):
                os.read(calls._reader.fileno(), 1 << 20)
    if manager is not None:
        manager.join()


def run_in_subprocess(function: Callable, *arguments: Any) -> Any:
    """Run one long call of a C++ library in its own process, so that Ctrl-C ends it at once."""
    with _pool(1, None, "lower tokenizer.train_megabytes") as submit:
        return submit(function, *arguments).result()


def encode_groups(
    groups: Iterable[Group], folder: Path, tokenizer_path: Path, workers: int
) -> Generator[tuple[Group, list[Shard]]]:
    """Tokenize groups in `workers` processes and yield (group, its shards) in order.

    At most `workers` + 1 groups are in memory here. A corpus of one group is tokenized in this process.

    Raises:
        UserError: a worker could not write, or was killed.
    """
    groups = iter(groups)
    first = list(itertools.islice(groups, 2))
    if workers == 1 or len(first) < 2:
        tokenizer = load_tokenizer(tokenizer_path)
        for group in itertools.chain(first, groups):
            yield group, encode_group(folder, tokenizer, group)
        return
    with _pool(workers, tokenizer_path, "lower data.workers or data.shard_megabytes") as submit:
        waiting: deque[tuple[Group, Future]] = deque()
        for group in itertools.chain(first, groups):
            waiting.append((group, submit(_work, folder, group)))
            if len(waiting) > workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
