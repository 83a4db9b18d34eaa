"""Ranks that `torchrun --max-restarts` starts again do not find the addresses of those that failed."""

from __future__ import annotations

import datetime

import torch.distributed as dist

from launch.ranks import Ranks
from training.process_group import restart_store

TIMEOUT = datetime.timedelta(seconds=60)


def test_a_restart_has_a_store_of_its_own(monkeypatch):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    agent.set("rank_0", "an address that nobody answers")
    stores = []
    for restarts in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        stores.append(restart_store(Ranks(0, 2, 0, 2), TIMEOUT))
    assert stores[0] is None
    assert not stores[1].check(["rank_0"])
    stores[1].set("rank_0", "first")
    assert not stores[2].check(["rank_0"])
    assert restart_store(Ranks(0, 4, 0, 2), TIMEOUT) is None  # the count differs between nodes
