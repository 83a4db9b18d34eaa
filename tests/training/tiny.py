"""A tiny corpus, the overrides of a tiny model, and ranks that stay alive between tests, so that they start only once."""

from __future__ import annotations

import base64
import collections
import dataclasses
import functools
import io
import json
import os
import pickle
import random
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.load import load
from model.health import damage, skipped
from model.weights import checkpoints
from tests.training import warm

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 590  # seconds after which a process without a response counts as hung
TINY = {
    # Odd sizes: under two ranks the halves of norms, of `ffn.down` and of the whole model do not divide evenly.
    "model.d_model": 33,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 45,
    "tokenizer.vocab_size": 384,
    "sequence_length": 32,
    "global_batch_size": 8,
    "steps": 12,
    "eval_every": 4,
    "save_every": 4,
    "sample_tokens": 4,
    "log_seconds": 0,
    "prompts": "['ab']",
    "model.qk_norm": "false",
    "optim.lr": 0.01,
    "optim.beta2": 0.95,
    "schedule": "cosine",
    "schedule.warmup": 0.2,
    "precision": "fp32",
    "logger": "none",
    "telemetry_every": 5,
    "data.workers": 1,
    "data.held_out": 0.1,
    "data.max_epochs": 1_000_000,  # the corpus is tiny too
}


def write_corpus(folder: Path, files: int = 40, seed: int = 0) -> Path:
    """Write text files of made-up words, with frequencies that can be learned in a few steps."""
    folder.mkdir(parents=True)
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnoprstuvwyz", k=chance.randint(2, 7))) for _ in range(200)]
    for number in range(files):
        lines = [" ".join(chance.choices(words, range(200, 0, -1), k=8)) for _ in range(chance.randint(10, 40))]
        (folder / f"{number:03d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def shared_corpus(factory: pytest.TempPathFactory) -> Path:
    """Return the folder with `corpus/` and `prepared/` that all tests of training share. The first caller creates it."""
    folder = factory.getbasetemp() / "training"
    if not folder.exists():
        write_corpus(folder / "corpus")
    return folder


def overrides(folder: Path, runs: Path | str = "", **changes: Any) -> list[str]:
    """Return the command line of a tiny run; `changes` replace or add keys, with `__` for a dot and None to leave one out."""
    settings: dict[str, Any] = {"data": "text", "data.path": folder / "corpus", "data.prepared": folder / "prepared"}
    settings |= TINY | ({"runs": runs} if runs else {}) | {key.replace("__", "."): v for key, v in changes.items()}
    chosen = sorted((item for item in settings.items() if item[1] is not None), key=lambda item: "." in item[0])
    return [f"{key}={value}" for key, value in chosen]


@functools.cache
def composed(arguments: tuple[str, ...]) -> str:
    """Return the configuration of a command line, pickled. Composing it takes longer than a step, so ranks do not repeat it."""
    return base64.b64encode(pickle.dumps(load(list(arguments)))).decode()


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a subprocess: one thread, no launcher variables, no network."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    kept = {k: v for k, v in kept.items() if not k.startswith(("WANDB_", "MASTER_", "TORCHELASTIC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | warm.USUAL | {"PATH": path, "WANDB_MODE": "offline", "COLUMNS": "200"} | more


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Pool:
    """Processes of `worker.py` that run one job after another: `world` ranks, or a process without a group (world 0)."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder = world, folder
        self._processes: list[warm.Process] = []
        self._responses: list[io.BufferedReader] = []

    def run(self, job: str, **parameters: Any) -> list[Any]:
        """Run a job on all ranks together; return the result of each. A job that raises fails the test."""
        if not self._processes:
            self._start()
        if job != "command":
            parameters["config"] = composed(tuple(parameters.pop("arguments")))
        for process in self._processes:
            process.stdin.write((json.dumps({"job": job} | parameters, default=str) + "\n").encode())
        responses: dict[int, dict[str, Any]] = {}
        streams = {stream: rank for rank, stream in enumerate(self._responses)}
        while streams:
            ready, _, _ = select.select(list(streams), [], [], PATIENCE)
            if not ready:
                self._fail(job, min(streams.values()), "hangs")
            for stream in ready:
                rank, line = streams.pop(stream), stream.readline()
                if not line:
                    self._fail(job, rank, "ended")
                responses[rank] = json.loads(line)
                if "error" in responses[rank]:  # the others may wait for this one forever
                    self.stop()
                    pytest.fail(f"{job} raised on rank {rank}:\n{responses[rank]['error']}", pytrace=False)
        return [responses[rank]["result"] for rank in sorted(responses)]

    def _fail(self, job: str, rank: int, how: str) -> None:
        log = self.folder / f"{self.world}-{rank}.log"
        tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        self.stop()
        pytest.fail(f"in {job} rank {rank} {how}; its log ends with\n{tail}", pytrace=False)

    def _start(self) -> None:
        port = str(free_port())
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank in range(max(1, self.world)):
            variables = {"RANK": rank, "WORLD_SIZE": self.world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.world}
            launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if self.world else {}
            launched |= {name: str(value) for name, value in variables.items()} if self.world else {}
            words = [sys.executable, str(WORKER), str(self.folder / f"{self.world}-{rank}.log")]
            self._processes.append(warm.Process(words, environment(**launched), ROOT, stdin=True))
            self._responses.append(io.BufferedReader(self._processes[-1].stdout))

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(timeout=PATIENCE)
        for stream in (*self._responses, *(s for p in self._processes for s in (p.stdin, p.stderr))):
            stream.close()
        self._processes, self._responses = [], []


Result = collections.namedtuple("Result", "status out err")


def command(*arguments: str, timeout: float = PATIENCE, cwd: Path = ROOT, **variables: str) -> Result:
    """Run a command, in the project's folder unless another is given, and wait for it."""
    words, env = [str(argument) for argument in arguments], environment(**variables)
    if warm.can_fork(words, env):
        process = warm.Process(words, env, cwd)
        out, err = process.communicate(timeout)
        return Result(process.returncode, out.decode(), err.decode())
    ended = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    return Result(ended.returncode, ended.stdout, ended.stderr)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A short training: the results of each rank over 10 steps, the command line, and the checkpoints."""

    results: list[dict[str, Any]]  # per rank
    arguments: list[str]
    middle: Path  # after step 5
    end: Path  # after step 10

    @property
    def losses(self) -> list[float]:
        return self.results[0]["losses"]

    @property
    def norms(self) -> list[float]:
        return self.results[0]["norms"]

    @property
    def order(self) -> int:
        """The hash of all samples, over all ranks."""
        return sum(rank["hash"] for rank in self.results) % 2**64


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is healthy, and a warning for each damaged one that was skipped."""
    warnings = []
    for path in checkpoints(folder):
        problem = damage(path)
        if not problem:
            return path, warnings
        warnings.append(skipped(path, problem))
    return None, warnings
