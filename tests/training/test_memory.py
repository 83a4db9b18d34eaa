"""Out of memory is one sentence, before the engine is built where it is certain; a failed command leaves no run folder."""

from __future__ import annotations

import resource

import pytest
import torch

from conf.load import load
from conf.shape import shape_of
from conf.validate import validate
from kernels.common.errors import UserError
from launch.ranks import Ranks
from tests.training.tiny import overrides
from training.memory import MemoryBudget


def budget(*arguments: str, world: int = 1) -> MemoryBudget:
    config = load(["model=llama_3b", "sequence_length=512", "precision=fp32", *arguments])
    batch = validate(config, world)
    ranks = Ranks(0, world, 0, world)
    return MemoryBudget(config, batch, shape_of(config), ranks, torch.device("cpu"), bf16=False)


def there(monkeypatch, gib: float) -> None:
    monkeypatch.setattr(MemoryBudget, "available", lambda _: (gib * 2**30, "a limit"))


def test_weights_that_do_not_fit_are_refused_before_anything_is_built(monkeypatch):
    there(monkeypatch, 30)
    with pytest.raises(UserError) as caught:
        budget().check()
    assert str(caught.value) == (
        "not enough memory to train: optimizer 23.9 GiB + weights 12.0 GiB + gradients 12.0 GiB take 47.9 GiB per rank, "
        "and there are 30.0 GiB (a limit): take a smaller model, or more ranks with zero=3 or parallel.tensor "
        "(python -m launch.estimate finds a layout)"
    )
    there(monkeypatch, 50)
    budget().check()


@pytest.mark.parametrize(
    ("gib", "world", "remedy"),
    [
        (180, 1, "set micro_batch_size=16$"),
        (53, 1, "set micro_batch_size=1 model.activation_checkpointing=attention$"),
        (51.5, 1, "set micro_batch_size=1 model.activation_checkpointing=selective$"),
        (51, 1, "set micro_batch_size=1 model.activation_checkpointing=true$"),
        (25, 4, "set micro_batch_size=1 model.activation_checkpointing=true zero=3$"),
        (5, 1, "take a smaller model"),
    ],
)
def test_the_mildest_change_that_fits_is_named(monkeypatch, gib, world, remedy):
    there(monkeypatch, gib)
    with pytest.raises(UserError, match=remedy):
        with budget("micro_batch_size=32", "global_batch_size=128", world=world).explained():
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("can't start new thread"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_every_failed_allocation_is_explained(monkeypatch, error):
    there(monkeypatch, 30)
    with pytest.raises(
        UserError, match=r"^out of memory: this run needs about [0-9.]+ GiB per rank \(.*there were 30.0 GiB"
    ):
        with budget().explained():
            raise error


def test_other_errors_are_not(monkeypatch):
    there(monkeypatch, 30)
    with pytest.raises(RuntimeError, match="the run has diverged"):
        with budget().explained():
            raise RuntimeError("the run has diverged")


def test_the_limit_on_address_space_counts(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**40, 2**40))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 2**50}))
    size, what = budget().available()
    assert 2**39 < size < 2**40
    assert what == f"left of the limit on address space, ulimit -v {2**30}"


def test_memory_that_runs_out_at_the_first_step_is_one_sentence_and_leaves_no_folder(corpus, no_group, tmp_path):
    arguments = overrides(corpus, tmp_path / "runs", run="new")
    (result,) = no_group.run("command", module="train", arguments=arguments, fault="no memory")
    assert result["status"] == 2
    assert "\nerror: out of memory: this run needs about " in "\n" + result["err"]
    assert "Traceback" not in result["err"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"sequence_length": 100_000},
        {"data__path": "/nowhere"},
        {"model__attention": "flash"},
        {"model__d_model": 10**7},
    ],
)
def test_a_refused_command_leaves_no_folder(corpus, no_group, tmp_path, wrong):
    arguments = overrides(corpus, tmp_path / "runs", run="new", **wrong)
    assert no_group.run("command", module="train", arguments=arguments)[0]["status"] == 2
    assert not (tmp_path / "runs").exists()


def test_a_command_that_fails_restores_the_configuration_of_an_existing_run(corpus, no_group, tmp_path):
    run = tmp_path / "runs" / "imported"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 7\n")
    arguments = overrides(corpus, tmp_path / "runs", run="imported", sequence_length=100_000)
    assert no_group.run("command", module="train", arguments=arguments)[0]["status"] == 2
    assert (run / "config.yaml").read_text() == "steps: 7\n"
