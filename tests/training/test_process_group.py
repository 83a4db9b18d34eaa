"""Every process group has the timeout of the configuration, whoever creates it."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from launch.launchers import Launchers
from launch.ranks import Ranks
from tests.training.tiny import overrides
from training import process_group
from training.signals import StopRequest

TIMEOUTS = (
    "[str(group._get_backend(torch.device('cpu')).options._timeout) "
    "for group in torch.distributed.distributed_c10d._world.pg_map]"
)


@pytest.mark.parametrize(
    "changes", [{"zero": "1"}, {"zero": "3"}, {"parallel__tensor": 2, "model__d_model": 32, "model__d_ff": 48}], ids=str
)
def test_groups_of_the_mesh_of_deepspeed_and_of_the_saver(corpus, two_ranks, tmp_path, changes):
    steps = [["train", 1], ["save", str(tmp_path)], ["inspect", TIMEOUTS]]
    for rank in two_ranks.run("script", arguments=overrides(corpus, **changes), steps=steps):
        (timeouts,) = rank["values"]
        assert len(timeouts) > 2
        assert set(timeouts) == {"0:02:00"}  # what tests/training/worker.py starts its group with


def test_the_group_of_the_stop_agreement(monkeypatch):
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))  # restored afterwards
    process_group.start_process_group(Ranks(), torch.device("cpu"), 7.0)
    try:
        monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
        group = StopRequest(Launchers())._group
        assert group is not None
        assert group._get_backend(torch.device("cpu")).options._timeout == datetime.timedelta(minutes=7)
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


def test_the_flight_recorder_writes_into_the_run_unless_the_user_decides(tmp_path):
    variables: dict[str, str] = {}
    process_group.record_collectives(tmp_path, variables)
    assert variables == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "stacks" / "nccl_rank_"),
    }
    assert (tmp_path / "stacks").is_dir()
    own = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    own["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = str(tmp_path / "own_")
    variables = dict(own)
    process_group.record_collectives(tmp_path, variables)
    assert variables["TORCH_FR_BUFFER_SIZE"] == "0"
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "own_")
    assert {name: variables[name] for name in own} == own
