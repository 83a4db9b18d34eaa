"""Preparation in parts: what several machines write together is, byte for byte, what one writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

import data.documents
import data.pool
import data.prepare
from conf.schema import DataConfig, TokenizerConfig
from data.documents import documents
from data.folder import folder_of
from data.groups import Facts, groups, read_groups
from data.held_out import Selection
from data.plan import Share, read_share
from data.prepare import prepare, prepare_part
from data.shards import INDEX, PLAN, read_index
from kernels.common.errors import UserError
from tests.data.conftest import ROOT
from tests.data.test_prepare import content, script

pytestmark = pytest.mark.usefixtures("small_shards")
TOKENIZER = TokenizerConfig(vocab_size=400, train_megabytes=1000)


def as_text(config: DataConfig, _: Path) -> DataConfig:
    return config


def as_jsonl(config: DataConfig, folder: Path) -> DataConfig:
    """The documents in three files, one of them with a record without text."""
    folder.mkdir()
    texts = [path.read_text() for path in sorted(Path(config.path).iterdir())]
    for number, some in enumerate((texts[:7], ["", *texts[7:50]], texts[50:])):
        lines = [json.dumps({"text": text}) + "\n" for text in some]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return replace(config, source="jsonl", path=str(folder))


def as_parquet(config: DataConfig, folder: Path) -> DataConfig:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir()
    texts = [path.read_text() for path in sorted(Path(config.path).iterdir())]
    for number, some in enumerate((texts[:20], texts[20:])):
        parquet.write_table(pyarrow.table({"text": some}), folder / f"{number}.parquet")
    return replace(config, source="parquet", path=str(folder))


def as_one_document(config: DataConfig, folder: Path) -> DataConfig:
    """All text in a file after an empty one: it is cut into pieces."""
    folder.mkdir()
    (folder / "a.txt").write_text("")
    (folder / "b.txt").write_text("".join(path.read_text() for path in sorted(Path(config.path).iterdir())))
    return replace(config, path=str(folder))


def as_pieces(config: DataConfig, _: Path) -> DataConfig:
    """Pieces of a number of documents are held out, and documents that repeat one are left out."""
    for path in sorted(Path(config.path).iterdir()):
        (path.parent / f"{path.stem}-copy.txt").write_text("copied from:\n" + path.read_text())
    return replace(config, held_out_files=10, held_out_kib=1)


def as_folders(config: DataConfig, folder: Path) -> DataConfig:
    for number, path in enumerate(sorted(Path(config.path).iterdir())):
        (folder / str(number // 7)).mkdir(parents=True, exist_ok=True)
        path.rename(folder / str(number // 7) / path.name)
    return replace(config, path=str(folder), held_out_by="folder")


def as_blend(config: DataConfig, folder: Path) -> DataConfig:
    second = as_jsonl(config, folder)
    keys = {
        "text": {"weight": 3, "path": config.path},
        "more": {"source": "jsonl", "path": second.path, "held_out": 0.3},
    }
    return replace(config, name="blend", source="blend", path=None, parts=keys)


def as_overlapping_blend(config: DataConfig, folder: Path) -> DataConfig:
    """Two parts with documents in common, of which each holds others out."""
    second = as_jsonl(config, folder)
    keys = {"text": {"path": config.path}, "more": {"source": "jsonl", "path": second.path, "held_out": 0.4}}
    keys["text"] |= {"held_out_files": 10, "held_out_kib": 1}
    return replace(config, name="blend", source="blend", path=None, parts=keys)


def everything(prepared: str) -> dict[str, bytes]:
    """Return all files of prepared folders, by their paths."""
    root = Path(prepared)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "convert",
    [as_text, as_jsonl, as_parquet, as_one_document, as_pieces, as_folders, as_blend, as_overlapping_blend],
    ids=lambda f: f.__name__,
)
def test_parts_and_a_last_call_write_what_one_call_writes(corpus, tmp_path, monkeypatch, convert):
    config = convert(corpus[0], tmp_path / "converted")
    whole = prepare(config, TOKENIZER)
    other = replace(config, prepared=str(tmp_path / "in parts"))
    for number in (3, 0, 2, 1):  # in any order
        folder = prepare_part(other, TOKENIZER, Share(number, 4))
        assert not (folder / INDEX).exists()
    monkeypatch.setattr(data.pool, "encode_group", None)  # would fail if it were called: nothing is left to tokenize
    assert prepare(other, TOKENIZER) == folder
    assert folder.name == whole.name
    assert everything(other.prepared) == everything(config.prepared)
    groups_of = [len(list(path.glob("group-*"))) for path in Path(config.prepared).iterdir()]
    assert all(count % 4 for count in groups_of if count)
    assert max(groups_of) > 4
    if convert is as_pieces:
        assert read_index(folder)["near_duplicates"] > 0


def test_the_last_call_does_what_parts_have_left(corpus, tmp_path):
    config, tokenizer = corpus
    whole = content(prepare(config, tokenizer))
    other = replace(config, prepared=str(tmp_path / "other"))
    prepare_part(other, tokenizer, Share(1, 3))
    assert content(prepare(other, tokenizer)) == whole
    third = replace(config, prepared=str(tmp_path / "third"), shard_megabytes=4)
    prepare_part(third, tokenizer, Share(0, 2))
    # Shards of another size have another plan.
    assert content(prepare(replace(third, shard_megabytes=1), tokenizer)) == whole


def test_a_part_tokenizes_its_own_groups_and_opens_only_their_files(corpus, monkeypatch):
    config, tokenizer = corpus
    folder = prepare_part(config, tokenizer, Share(-1, 1))
    assert not list(folder.glob("group-*"))
    count = len(json.loads((folder / PLAN).read_text())["spans"])
    opened = set()
    read = data.documents.read_chunks
    monkeypatch.setattr(data.documents, "read_chunks", lambda path: opened.add(path.name) or read(path))
    prepare_part(config, tokenizer, Share(2, 5))
    first, last = 2 * count // 5, 3 * count // 5
    assert sorted(folder.glob("group-*")) == [folder / f"group-{number:05d}.json" for number in range(first, last)]
    assert len(opened) < 60 / 5 + 5
    opened.clear()
    prepare_part(config, tokenizer, Share(2, 5))
    assert not opened


def test_any_groups_are_read_again_as_they_were(corpus, tmp_path):
    config = as_jsonl(corpus[0], tmp_path / "jsonl")
    selection, facts = Selection(config), Facts()
    all_groups = list(groups(config, selection, facts))
    known = Selection(config, json.loads(json.dumps(selection.record())))
    for numbers in (range(len(all_groups)), range(0, len(all_groups), 3), [len(all_groups) - 1], []):
        assert list(read_groups(config, known, [facts.spans[i] for i in numbers])) == [all_groups[i] for i in numbers]


def test_rows_of_a_data_set_are_read_from_the_middle(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(600)]}).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(source="hf", path=str(tmp_path / "saved"))
    found = list(documents(config))
    assert [document.file for document in found[255:257]] == [0, 1]
    assert list(documents(config, first_file=1)) == found[256:]


def test_a_killed_part_goes_on_and_what_it_left_is_removed_at_the_end(corpus, tmp_path, python):
    config, tokenizer = corpus
    kill = """
        write, count = data.pool.write_group, []
        def write_and_die(*arguments):
            if len(count) == 2:
                open(os.path.join(arguments[0], ".train-00002.bin.99.tmp"), "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            count.append(1)
            write(*arguments)
        data.pool.write_group = write_and_die
    """
    process = python(script(corpus, textwrap.dedent(kill) + textwrap.dedent(PART.format(part="0, 2"))))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    folder = folder_of(config, tokenizer)
    finished = {path: path.stat().st_ino for path in folder.glob("group-*")}
    assert len(finished) == 2
    prepare_part(config, tokenizer, Share(0, 2))
    assert {path: path.stat().st_ino for path in finished} == finished
    assert len(list(folder.glob("group-*"))) > 3
    prepare_part(config, tokenizer, Share(1, 2))
    assert content(prepare(config, tokenizer)) == content(
        prepare(replace(config, prepared=str(tmp_path / "whole")), tokenizer)
    )


# Instead of all of the corpus.
PART = """
    from data.plan import Share
    data.prepare.prepare = lambda *_, show: data.prepare.prepare_part(config, tokenizer, Share({part}), show)
"""
# Waits in the middle of a group, with a temporary file open, until it is told to go on.
HOLD = """
    replace = os.replace
    def hold(source, target):
        if "/train-" in str(target) and not held:
            held.append(1)
            print("holds", source, flush=True)
            input()
        replace(source, target)
    held = []
    os.replace = hold
"""


def start_and_hold(corpus, number: int) -> tuple[subprocess.Popen, Path]:
    """Start a part that stops in the middle of writing; return it and its temporary file."""
    code = script(corpus, textwrap.dedent(HOLD) + textwrap.dedent(PART.format(part=f"{number}, 2")))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("holds "), process.communicate()
    return process, Path(line.removeprefix("holds ").strip())


def test_parts_do_not_wait_for_each_other_and_a_whole_preparation_waits_for_them(corpus, tmp_path, python):
    config, tokenizer = corpus
    first, temporary = start_and_hold(corpus, 0)
    second = python(script(corpus, PART.format(part="1, 2"), show=True))
    _, said = second.communicate(timeout=60)  # it ends while the first one holds
    assert (second.returncode, "waiting" in said) == (0, False), said
    assert temporary.exists()
    whole = python(script(corpus, show=True))
    assert whole.stderr.readline() == f"waiting for the process that prepares {folder_of(config, tokenizer)}\n"
    assert temporary.exists()
    _, complaint = first.communicate("\n", timeout=60)
    assert first.returncode == 0, complaint
    assert whole.communicate(timeout=60)[0] == f"{folder_of(config, tokenizer)}\n"
    assert content(folder_of(config, tokenizer)) == content(
        prepare(replace(config, prepared=str(tmp_path / "whole")), tokenizer)
    )


def test_parts_that_start_together_plan_once(corpus, python):
    started = [python(script(corpus, PART.format(part=f"{number}, 3"), show=True)) for number in range(3)]
    done = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], done
    assert sum("planning the parts" in err for _, err in done) == 1
    assert sum("training a tokenizer" in err for _, err in done) == 1


def test_a_corpus_that_changes_under_its_plan_is_refused(corpus):
    config, tokenizer = corpus
    prepare_part(config, tokenizer, Share(-1, 1))
    folder = folder_of(config, tokenizer)
    plan = json.loads((folder / PLAN).read_text())
    plan["spans"][1][4] = "0" * 32
    (folder / PLAN).write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"was changed since its parts were planned; delete plan\.json"):
        prepare_part(config, tokenizer, Share(0, 2))
    (folder / PLAN).write_text("{")
    prepare_part(config, tokenizer, Share(0, 2))  # a damaged plan is made again


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3", "part=3 is no part: part=3/64 is number 3 of 64, counted from 0, and part=plan comes first"),
        ("3/", "part=3/ is no part"),
        ("-1/4", "part=-1/4 is no part"),
        ("0/0", "part=0/0 is no part"),
        ("1.5/4", "part=1.5/4 is no part"),
        ("4/4", "part=4/4 is none of 4: parts are part=0/4 to part=3/4"),
    ],
)
def test_a_part_that_is_none_is_refused(text, sentence):
    with pytest.raises(UserError) as refused:
        data.prepare.main(["data=stdlib", f"part={text}"])
    assert str(refused.value).startswith(sentence)


def test_a_part_is_here_or_on_a_cluster():
    assert read_share("3/64") == Share(3, 64)
    with pytest.raises(UserError, match="leave one out"):
        data.prepare.main(["data=stdlib", "part=0/4", "cluster=cpu", "jobs=4"])


def test_the_command_prepares_parts_and_then_finishes(corpus, capsys):
    config, _ = corpus
    words = ["data=text", f"data.path={config.path}", f"data.prepared={config.prepared}", "data.workers=1"]
    words += ["tokenizer.vocab_size=400", "data.shard_megabytes=1"]
    for number in range(2):
        assert data.prepare.main([*words, f"part={number}/2"]) == 0
        assert capsys.readouterr().out.startswith(f"part={number}/2 is done: {config.prepared}/text-")
    assert data.prepare.main(words) == 0
    finished = capsys.readouterr().out
    assert "  documents  60, " in finished
    # Of a complete folder a part, and jobs on a cluster, print the same.
    for more in (["part=0/2"], ["cluster=cpu", "jobs=2"]):
        assert data.prepare.main([*words, *more]) == 0
        assert capsys.readouterr().out == finished
