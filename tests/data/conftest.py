"""Small corpora, and a prepared one that the tests of this room share."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data.groups
import data.prepare
import data.ready
from conf.schema import DataConfig, TokenizerConfig
from kernels.common.errors import UserError

ROOT = Path(__file__).parents[2]


def write_corpus(folder: Path, files: int = 60, seed: int = 0) -> Path:
    """Write text files of 0.2 to 3 kB of made-up words, indentation and a few characters beyond ASCII."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnoprstuvwyz", k=chance.randint(2, 8))) for _ in range(300)]
    words += ["été", "漢字", "🙂", "naïve"]
    for i in range(files):
        lines = [
            " " * 4 * chance.randrange(3) + " ".join(chance.choices(words, k=chance.randint(2, 9)))
            for _ in range(chance.randint(8, 80))
        ]
        (folder / f"{i:03d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def look_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Let `launch.corpus.unprepared` look at corpora in this process, not in one that it starts (test_sbatch.py has that)."""

    def run(words: list[str], **_: object) -> SimpleNamespace:
        before = capsys.readouterr()
        try:
            status, error = data.ready.main(words[3:]), ""
        except UserError as caught:
            status, error = 2, f"error: {caught}"
        out = capsys.readouterr().out
        print(before.out, end="")
        print(before.err, end="", file=sys.stderr)
        return SimpleNamespace(returncode=status, stdout=out, stderr=error)

    monkeypatch.setattr("launch.corpus.subprocess", SimpleNamespace(run=run))


@pytest.fixture(autouse=True)
def _trained_here(monkeypatch):
    """Train tokenizers in this process: one more takes four times as long (test_prepare_stopped.py starts the real ones)."""
    monkeypatch.setattr(data.prepare, "run_in_subprocess", lambda function, *arguments: function(*arguments))


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 8 kB instead of 1 MB, so that a small corpus has many."""
    monkeypatch.setattr(data.groups, "MEGABYTE", 8 << 10)


@pytest.fixture
def corpus(tmp_path):
    """Configurations of a small text corpus and of its tokenizer."""
    path = write_corpus(tmp_path / "corpus")
    prepared = str(tmp_path / "prepared")
    config = DataConfig(name="small", source="text", path=str(path), prepared=prepared, workers=1, shard_megabytes=1)
    config.held_out = 0.2
    return config, TokenizerConfig(vocab_size=400, train_megabytes=1000)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A prepared corpus of many shards, to read only."""
    folder = tmp_path_factory.mktemp("shared")
    path = write_corpus(folder / "corpus")
    config = DataConfig(name="shared", source="text", path=str(path), prepared=str(folder / "p"), workers=1)
    config.held_out, config.shard_megabytes = 0.2, 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.groups, "MEGABYTE", 8 << 10)
        return data.prepare.prepare(config, TokenizerConfig(vocab_size=400, train_megabytes=1000))


class _Bounded(subprocess.Popen):
    """A process that leads a session. One that outlasts the timeout of `communicate` says where, and ends with its session."""

    def communicate(self, input=None, timeout=None):
        try:
            return super().communicate(input, timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGABRT)  # faulthandler prints the stacks of all threads
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(5)
            os.killpg(self.pid, signal.SIGKILL)
            _, complaint = super().communicate()
            raise AssertionError(f"it was still running after {timeout} seconds:\n{complaint}") from None


@pytest.fixture
def python():
    """Start `python -c CODE` in this project, in a session of its own, with its output in pipes."""

    def start(code: str) -> subprocess.Popen:
        return _Bounded(
            [sys.executable, "-X", "faulthandler", "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    return start


@pytest.fixture
def more_corpus():
    """The function that writes a corpus, for tests that need several."""
    return write_corpus
