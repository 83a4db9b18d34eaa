"""Heartbeats are read as they were written, and tell which rank keeps the others waiting."""

from __future__ import annotations

import dataclasses
import time

import pytest

from launch import heartbeats
from launch.heartbeats import Activity, Diagnosis, Heartbeat, diagnose

NOON = time.mktime((2024, 5, 6, 12, 0, 0, 0, 0, -1))


def beat(
    rank: int, step: int = 7, collective: str = "all_reduce", count: int = 3, since: float = 0.0, **more
) -> Heartbeat:
    place = "training/loop.py:251 in _train_step"
    main = Activity(more.pop("phase", "step"), step, NOON + since, more.pop("place", place), collective)
    return Heartbeat(rank, 4, f"node{rank}", 100 + rank, 5.0, 1.0, count, main, **more)


def looks(*second: Heartbeat) -> tuple[dict[int, Heartbeat], dict[int, Heartbeat]]:
    """Return two looks at ranks that are alive and make no progress."""
    first = {each.rank: dataclasses.replace(each, count=each.count - 2) for each in second}
    return first, {each.rank: each for each in second}


def saver(collective: str, since: float = 0.0) -> Activity:
    return Activity("save", 6, NOON + since, "model/weights.py:106 in write_tensors", collective)


def test_a_heartbeat_and_a_verdict_are_read_as_they_were_written(tmp_path):
    written = beat(2, saver=saver("all_gather"))
    heartbeats.write(tmp_path, written)
    assert heartbeats.read(tmp_path, 2) == written
    assert heartbeats.read_all(tmp_path, 4) == {2: written}
    verdict = heartbeats.publish_verdict(tmp_path, Diagnosis(2, NOON, "waiting", (2, 3), 7))
    assert heartbeats.read_verdict(tmp_path) == verdict
    assert heartbeats.publish_verdict(tmp_path, Diagnosis(1, NOON, "too late")) == verdict  # the first one counts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_2.json", "verdict.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"rank": 2}', '{"name": "x"}'])
def test_a_file_of_anything_else_is_no_heartbeat(tmp_path, text):
    for name in ("rank_2.json", "verdict.json", "request.json"):
        (tmp_path / name).write_text(text)
    assert heartbeats.read(tmp_path, 2) is None
    assert heartbeats.read_verdict(tmp_path) is None
    assert heartbeats.read_request(tmp_path) == ("x" if "name" in text else "")


def test_a_heartbeat_of_wrong_types_is_none(tmp_path):
    heartbeats.write(tmp_path, dataclasses.replace(beat(2), pid="1; kill"))
    assert heartbeats.read(tmp_path, 2) is None


def test_nothing_is_written_into_a_folder_that_rank_0_has_not_made(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        heartbeats.write(tmp_path / "heartbeats", beat(1))
    assert not list(tmp_path.iterdir())


def test_a_rank_without_new_heartbeats_is_the_one():
    first, second = looks(beat(0), beat(1), beat(2), beat(3, collective="", since=9.0))
    second[2] = first[2]
    verdict = diagnose(first, second, 4)
    assert (verdict.rank, verdict.silent, verdict.step) == (2, (2,), 7)
    assert verdict.sentence == (
        "waiting for rank 2 since 2024-05-06 12:00:00: its process on node2 writes no heartbeat any more; it was in step 8 "
        "(all_reduce, training/loop.py:251 in _train_step)"
    )


def test_of_several_the_first_that_stood_still_is_the_one():
    first, second = looks(beat(0), beat(1, since=5.0), beat(2, since=4.0), beat(3))
    second |= {1: first[1], 2: first[2]}
    assert diagnose(first, second, 4).rank == 2


def test_a_rank_that_never_had_a_heartbeat_is_the_one():
    verdict = diagnose(*looks(beat(0), beat(1), beat(3)), 4)
    assert (verdict.rank, verdict.silent) == (2, (2,))
    assert verdict.sentence == "waiting for rank 2: it has written no heartbeat"


def test_a_rank_that_has_just_begun_is_alive():
    first, second = looks(beat(0), beat(1), beat(2), beat(3, collective=""))
    del first[1]
    assert diagnose(first, second, 4).silent == ()


def test_a_rank_outside_of_the_collective_is_the_one():
    loader = beat(3, collective="", since=2.0, place="data/batches.py:88 in samples")
    verdict = diagnose(*looks(beat(0), beat(1), beat(2), loader), 4)
    assert verdict.rank == 3
    assert verdict.sentence == (
        "waiting for rank 3 since 2024-05-06 12:00:02: it is in step 8 (data/batches.py:88 in samples)"
    )


def test_a_rank_that_moves_is_not_the_one():
    first, second = looks(beat(0, collective="", since=5.0), beat(1), beat(2), beat(3, collective="", since=2.0))
    first[3] = dataclasses.replace(first[3], main=dataclasses.replace(first[3].main, since=NOON))
    assert diagnose(first, second, 4).rank == 0


def test_where_all_wait_the_one_furthest_behind_is_the_one():
    ranks = (beat(0), beat(1), beat(2, step=6, since=9.0), beat(3))
    assert diagnose(*looks(*ranks), 4).rank == 2
    elsewhere = (beat(0), beat(1), beat(2), beat(3, since=9.0, place="training/evaluation.py:55 in evaluate"))
    verdict = diagnose(*looks(*elsewhere), 4)
    assert verdict.rank == 3
    assert verdict.sentence.startswith("all ranks wait in collectives; waiting for rank 3 since ")


def test_a_saver_that_writes_while_others_wait_is_the_one():
    ranks = [beat(rank, saver=saver("all_gather")) for rank in range(4)]
    ranks[1] = beat(1, saver=saver("", since=1.0))
    verdict = diagnose(*looks(*ranks), 4, "saver")
    assert (verdict.rank, verdict.step) == (1, 6)
    assert verdict.sentence.endswith("it is saving the checkpoint of step 6 (model/weights.py:106 in write_tensors)")


def test_savers_wait_for_the_rank_that_has_not_begun_to_save():
    ranks = [beat(rank, saver=saver("all_gather")) for rank in range(3)]
    assert diagnose(*looks(*ranks, beat(3, step=5)), 4, "saver").rank == 3


def test_a_rank_that_has_failed_is_the_one():
    first, second = looks(beat(0), beat(1), beat(2), beat(3, phase="failed", place="", collective=""))
    second[3] = first[3]
    verdict = diagnose(first, second, 4)
    assert (verdict.rank, verdict.silent) == (3, ())
    assert verdict.sentence.endswith(": it has failed after step 7")


def test_where_no_rank_can_write_it_is_the_disk():
    first, _ = looks(beat(0), beat(1), beat(2), beat(3))
    assert diagnose(first, first, 4).sentence == "no rank can write to the run folder"
    assert diagnose({}, {}, 1).sentence == "no rank can write to the run folder"
