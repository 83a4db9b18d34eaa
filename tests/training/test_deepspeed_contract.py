"""Undocumented behaviour of DeepSpeed that training relies on. A test that fails after an upgrade is named for what changed."""

from __future__ import annotations

import inspect

import deepspeed
import deepspeed.ops
import deepspeed.ops.op_builder.cpu
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.launcher import launch
from deepspeed.runtime.config import get_gradient_clipping
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import timer
from deepspeed.utils.config import get_timers_config
from packaging.version import Version

from conf.load import load
from conf.validate import validate
from tests.training.tiny import overrides
from training.engine import deepspeed_config


def test_the_version_is_in_the_tested_range():
    assert Version("0.19.8") <= Version(deepspeed.__version__.partition("+")[0]) < Version("0.20")


def inspect_engine(pool, corpus, expressions: list[str], before: tuple = (), **changes) -> list:
    steps = [*before, *(["inspect", expression] for expression in expressions)]
    return pool.run("script", arguments=overrides(corpus, **changes), steps=steps)[0]["values"]


def test_the_op_that_is_built_at_startup_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    assert deepspeed.ops.op_builder.cpu.ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    assert build_shm_op() is None  # with True it would start a compiler


def test_clipping_is_on_if_unset_and_off_if_0():
    assert get_gradient_clipping({}) == 1.0
    assert get_gradient_clipping({"gradient_clipping": 0.0}) == 0.0


def test_every_default_that_would_change_training_is_overridden(corpus):
    for zero, precision in (("1", "bf16"), ("0", "fp32")):
        config = load(overrides(corpus, zero=zero, precision=precision, optim__clip=0.7))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        settings = deepspeed_config(config, validate(config, 2), dtype)
        assert settings["gradient_clipping"] == (0.7 if zero == "1" else 0.0)  # stage 0 is clipped by the engine
        assert settings["communication_data_type"] == "fp32"
        assert settings["bf16"] == {"enabled": precision == "bf16", "immediate_grad_update": False}
        assert settings["zero_force_ds_cpu_optimizer"] is False
    config = load(overrides(corpus, zero="1", precision="bf16", micro_batch_size=2))
    assert deepspeed_config(config, validate(config, 2), torch.bfloat16)["bf16"]["immediate_grad_update"] is True


def test_no_timer_waits_for_the_device(corpus, monkeypatch):
    config = load(overrides(corpus))
    settings = deepspeed_config(config, validate(config, 2), torch.bfloat16)
    monkeypatch.setattr(timer, "get_accelerator", lambda: pytest.fail("the host waits for the device"))
    measures = timer.ThroughputTimer(get_timers_config(settings), batch_size=1, start_step=0)
    measures.start()
    measures.stop(global_step=True)
    assert not measures.started


@pytest.mark.parametrize(("zero", "on_gpu", "expected"), [("3", True, True), ("3", False, False), ("2", True, False)])
def test_stage_3_overlaps_on_gpus_unless_the_user_decides(corpus, zero, on_gpu, expected):
    for given, result in ((None, expected), ("true", True), ("false", False)):
        more = {} if given is None else {"zero__overlap": given}
        config = load(overrides(corpus, zero=zero, **more))
        settings = deepspeed_config(config, validate(config, 2), torch.bfloat16, on_gpu)
        assert settings["zero_optimization"]["overlap_comm"] is result


def test_the_settings_arrive(corpus, one_rank):
    values = inspect_engine(
        one_rank, corpus,
        ["deepspeed.gradient_clipping()", "str(deepspeed.communication_data_type)", "deepspeed.zero_optimization_stage()",
         "deepspeed.gradient_accumulation_steps()", "deepspeed.steps_per_print()"],
        zero=2, precision="bf16", micro_batch_size=4, optim__clip=0.7,
    )  # fmt: skip
    assert values == [0.7, "torch.float32", 2, 2, 10**9]


WRAPPER = "type(optimizer).__name__"


@pytest.mark.parametrize(
    ("zero", "precision", "wrapper", "wrapper_of_one_rank"),
    [
        ("0", "fp32", "AdamW", "AdamW"),
        ("1", "fp32", "DeepSpeedZeroOptimizer", "AdamW"),  # a single rank uses stage 0
        ("1", "bf16", "DeepSpeedZeroOptimizer", "BF16_Optimizer"),
        ("2", "bf16", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer"),
        ("3", "bf16", "DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_the_optimizer_that_wraps_ours(corpus, one_rank, two_ranks, zero, precision, wrapper, wrapper_of_one_rank):
    kept = "inner is (optimizer if engine.stage == 0 else optimizer.optimizer), type(inner).__name__"
    for pool, expected in ((two_ranks, wrapper), (one_rank, wrapper_of_one_rank)):
        values = inspect_engine(pool, corpus, [WRAPPER, kept], zero=zero, precision=precision)
        assert values == [expected, [True, "AdamW"]]


def test_bf16_with_fp32_accumulation_at_stage_1_is_another_wrapper(corpus, two_ranks):
    values = inspect_engine(two_ranks, corpus, [WRAPPER], zero=1, precision="bf16", micro_batch_size=2)
    assert values == ["BF16_Optimizer"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_can_skip_the_gradient_reduction(corpus, one_rank, precision):
    """The losses are the same with and without it: over one rank a sum has one term. Both paths are DeepSpeed's."""
    arguments = overrides(corpus, zero=1, precision=precision, micro_batch_size=4)
    losses = []
    for expression in ("deepspeed.enable_backward_allreduce", "setattr(deepspeed, 'enable_backward_allreduce', True)"):
        results = one_rank.run("script", arguments=arguments, steps=[["inspect", expression], ["train", 4]])[0]
        losses.append(results["losses"])
    assert results["values"] == [None]
    assert losses[0] == losses[1]
    values = inspect_engine(one_rank, corpus, ["deepspeed.enable_backward_allreduce"], zero=1, precision=precision)
    assert values == [False]


@pytest.mark.parametrize(("zero", "accumulation"), [("1", 1), ("2", 1), ("1", 2)])
def test_optimizer_states_of_later_groups_are_linked_only_on_request(corpus, one_rank, zero, accumulation):
    """Stages 1 and 2: the first step sets the flag. Clearing it and calling again links every group."""
    unlinked = "[k for k in ('exp_avg',) for p in engine.module.parameters() if k not in p._hp_mapping.optim_fragment]"
    values = inspect_engine(
        one_rank, corpus,
        ["optimizer._hp_optimizer_states_linked", f"len({unlinked})",
         "[setattr(optimizer, '_hp_optimizer_states_linked', False), optimizer._lazy_init_hp_params_optimizer_state()]",
         "optimizer._hp_optimizer_states_linked", f"len({unlinked})"],
        before=(["train", 1],), zero=zero, precision="bf16", micro_batch_size=8 // accumulation,
    )  # fmt: skip
    assert values[0] is True
    assert values[3:] == [True, 0]


def test_stage_3_keeps_flat_masters_and_partitions_with_padding(corpus, two_ranks):
    name = "dict(engine.module.named_parameters())"
    values = inspect_engine(
        two_ranks, corpus,
        ["[flat.dtype is torch.float32 for flat in optimizer.fp32_partitioned_groups_flat]",
         f"list({name}['layers.0.ffn.down'].ds_shape)", f"{name}['layers.0.ffn.down'].ds_tensor.numel()",
         f"[p.ds_tensor.numel() - -(-p.ds_numel // 2) for p in {name}.values()]"],
        zero=3, precision="bf16",
    )  # fmt: skip
    assert values[0] == [True, True]
    assert values[1:3] == [[33, 45], 743]  # 1485 elements in two partitions: the second has one element of padding
    assert set(values[3]) == {0}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_rank_finds_its_fragment_of_a_gradient(corpus, two_ranks, accumulation):
    """Stage 1 in bf16 keeps the fragment, or with accumulation the whole gradient, where the address locates it."""
    held = "p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).numel()"
    sizes = f"[{held}, p._hp_mapping.lp_fragment_address.numel, p.numel()]"
    values = two_ranks.run(
        "script",
        arguments=overrides(corpus, zero=1, precision="bf16", micro_batch_size=4 // accumulation),
        steps=[["observe", f"[{sizes} for p in engine.module.parameters() if p._hp_mapping is not None]"]],
    )
    sizes_of_all = [size for each in values for size in each["values"][0]]
    assert any(fragment < numel for _, fragment, numel in sizes_of_all)
    assert all(held == (fragment if accumulation == 1 else numel) for held, fragment, numel in sizes_of_all)


def test_a_skipped_step_is_counted_and_the_norm_reported(corpus, one_rank, two_ranks):
    poison = ["poison", "norm.weight", 0, float("nan")]
    for pool, zero, precision in (
        (two_ranks, "1", "fp32"),
        (one_rank, "1", "bf16"),
        (one_rank, "2", "fp32"),
        (one_rank, "3", "fp32"),
    ):
        values = inspect_engine(
            pool, corpus, ["deepspeed.skipped_steps", "float(deepspeed.get_global_grad_norm()) > 0"],
            before=(["train", 1], poison, ["train", 1]), zero=zero, precision=precision,
        )  # fmt: skip
        assert values == [1, True]


def test_stage_0_in_fp32_neither_skips_nor_reports(corpus, one_rank):
    values = inspect_engine(
        one_rank, corpus, ["deepspeed.skipped_steps", "deepspeed.get_global_grad_norm()"],
        before=(["train", 1], ["poison", "norm.weight", 0, float("nan")]), zero=0,
    )  # fmt: skip
    assert values == [0, None]  # otherwise the engine need not do both itself


@pytest.mark.parametrize(
    ("zero", "precision"), [("0", "fp32"), ("1", "bf16"), ("2", "fp32"), ("3", "fp32"), ("offload", "fp32")]
)
def test_every_fragment_is_found_in_what_the_optimizer_updates(corpus, two_ranks, zero, precision):
    """Muon takes its matrices from there."""
    same = "torch.equal(f.read('').flatten(), room.flat_parameters(engine)[i][0].view(-1)[o : o + f.size])"
    each = f"[{same} for f in room.fragments(engine) if f.size for i, o in [room.places(engine)[f.name]]]"
    expression = f"(lambda room: {each})(__import__('training.fragments').fragments)"
    found = inspect_engine(two_ranks, corpus, [expression], before=(["train", 2],), zero=zero, precision=precision)[0]
    assert found
    assert all(found)


def test_the_documented_accessors_exist():
    names = ("get_local_fp32_param", "get_local_optimizer_state", "get_local_grad")
    names += ("set_local_fp32_param", "set_local_optimizer_state")
    assert all(callable(getattr(deepspeed.utils, f"safe_{name}")) for name in names)


def test_the_fragments_of_stages_1_and_2_are_views_of_what_the_optimizer_steps(corpus, two_ranks, tmp_path):
    fragment = "[p._hp_mapping for p in engine.module.parameters() if p._hp_mapping is not None][0]"
    flats = "[flat.untyped_storage().data_ptr() for flat in optimizer.single_partition_of_fp32_groups]"
    states = "[s['exp_avg'].untyped_storage().data_ptr() for s in inner.state.values()]"
    expressions = [
        f"{fragment}.get_hp_fragment().untyped_storage().data_ptr() in {flats}",
        f"{fragment}.get_hp_fragment('exp_avg').untyped_storage().data_ptr() in {states}",
        f"{fragment}.get_hp_fragment().numel() == {fragment}.lp_fragment_address.numel",
    ]
    for zero in ("1", "2"):
        before = (["train", 1], ["save", str(tmp_path / zero)])  # saving links the later groups
        assert inspect_engine(two_ranks, corpus, expressions, before=before, zero=zero) == [True, True, True]


@pytest.mark.parametrize("zero", ["1", "3"])
def test_inductor_is_not_loaded(corpus, two_ranks, zero):
    """Importing it takes longer than importing DeepSpeed; the decorators of DeepSpeed's Muon ask for it."""
    loaded = "sorted(__import__('sys').modules)"
    [modules] = inspect_engine(two_ranks, corpus, [loaded], before=(["train", 1],), zero=zero)
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in modules
    assert "torch._inductor.compile_fx" not in modules


def test_the_launcher_appends_its_local_rank():
    assert "--local_rank=" in inspect.getsource(launch.main)  # launch/ranks.py removes it


def test_private_names_of_the_wrappers():
    for wrapper in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert issubclass(wrapper, deepspeed.runtime.base_optimizer.ZeROOptimizer)
    assert callable(DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state)
