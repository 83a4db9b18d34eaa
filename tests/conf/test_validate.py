"""Every rule by which values must fit together, each shown to refuse what breaks it and to let its neighbour pass."""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from typing import Any

import pytest

from conf.identity import NOT_LEARNED, changed_settings, differences, how_to_go_on, settings_of
from conf.keys import keys
from conf.load import load
from conf.schema import Config
from conf.validate import Batch, validate
from kernels import BACKENDS as KERNEL_BACKENDS
from kernels.common.errors import UserError
from model.attention import BACKENDS as ATTENTION_BACKENDS


def changed(values: dict[str, Any] | None = None, of: Config | None = None) -> Config:
    """Return a copy of a configuration (by default one that validates) with other values of some dotted keys."""
    config = copy.deepcopy(of or Config(run="name", steps=10))
    for name, value in (values or {}).items():
        *groups, last = name.split(".")
        owner = config
        for group in groups:
            owner = getattr(owner, group)
        assert hasattr(owner, last), name
        setattr(owner, last, value)
    return config


def refusal(values: dict[str, Any], world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        validate(changed(values), world_size)
    return str(caught.value)


NUMBERS = {name: kind for name, kind, _ in keys() if kind in (int, float, typing.Optional[int], typing.Optional[float])}
ANY_NUMBER = {"seed", "data_seed"}
MAY_BE_ZERO = {
    "ffn.init_scale",
    *ANY_NUMBER,
    *(
        "eval_every",
        "save_every",
        "sample_every",
        "telemetry_every",
        "log_seconds",
        "model.z_loss",
        "model.logit_softcap",
        "optim.weight_decay",
        "optim.clip",
        "optim.adamw_weight_decay",
        "optim.qk_clip",
        "data.workers",
        "guard.replicas",
        "guard.repeat",
        "watchdog.minutes",
        "data.held_out",
        "data.held_out_files",
    ),
    *("schedule.warmup", "schedule.final", "schedule.decay", "optim.beta1", "optim.beta2", "optim.momentum"),
    "zero.stage",
}
AT_MOST_ONE = {"schedule.warmup", "schedule.final", "schedule.decay", "optim.beta1", "optim.beta2", "optim.momentum"}


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_every_number_has_its_range(name):
    """A key that is new in the schema fails here until it has a rule, or stands in one of the sets above."""
    if name not in ANY_NUMBER:
        assert name in refusal({name: -1})
    if name not in MAY_BE_ZERO:
        assert name in refusal({name: 0})
    elif name != "zero.stage":
        validate(changed({name: 0}), 1)
    if name in AT_MOST_ONE:
        assert f"{name}=1.5 must lie between 0 and 1" in refusal({name: 1.5})
    if NUMBERS[name] in (float, typing.Optional[float]):
        assert f"{name}=nan is not a finite number" in refusal({name: math.nan})
        assert f"{name}=inf is not a finite number" in refusal({name: math.inf})


NAMES = {
    "ffn.backend": KERNEL_BACKENDS,
    "ffn.save": ("packed", "output", "everything", "input"),
    "model.attention": ATTENTION_BACKENDS,
    "optim.name": ("adamw", "muon", "normuon"),
    "schedule.name": ("cosine", "linear", "wsd"),
    "precision.name": ("auto", "bf16", "fp32"),
    "precision.reduce": ("fp32", "bf16"),
    "tokenizer.kind": ("sentencepiece", "huggingface"),
    "data.held_out_by": ("document", "folder"),
    "data.source": ("stdlib", "installed", "text", "jsonl", "parquet", "hf", "blend"),
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_is_one_of_those_that_the_rooms_know(name):
    needs = {
        "ffn.formula": "tanh(x)",
        "ffn.from_output": "1 - h**2",
        "data.path": "x",
        "tokenizer.path": "x",
        "optim.clip": 0.0,
        "data.parts": {"a": {"path": "x"}},
    }
    for choice in NAMES[name]:
        validate(changed(needs | {name: choice}), 1)
    assert f"unknown {name} 'nonsense': " in refusal({name: "nonsense"})
    assert f"did you mean {NAMES[name][-1]!r}?" in refusal({name: NAMES[name][-1] + "x"})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"run": ""}, "run='' cannot name a folder"),
        ({"run": ".."}, "run='..' cannot name a folder"),
        ({"run": "a/b"}, "run='a/b' cannot name a folder"),
        ({"run": "é" * 128}, "has more than 200 bytes"),
        ({"prompts": "abc"}, "prompts=abc must be a list of texts"),
        ({"prompts": [1]}, "prompts=[1] must be a list of texts"),
        ({"logger.tags": "abc"}, "logger.tags=abc must be a list of texts"),
        ({"data.held_out": 0.6}, "data.held_out=0.6 must be a fraction of at most 0.5; 0 trains without evaluation"),
        ({"data.source": "text"}, "data=text needs the location of the text"),
        ({"data.source": "hf"}, "data=hf needs the location of the text"),
        ({"data.source": "blend"}, "data=blend needs its parts"),
        ({"tokenizer.kind": "huggingface"}, "tokenizer=huggingface needs tokenizer.path"),
        ({"ffn.formula": ""}, "ffn=custom needs its formula"),
        ({"model.n_heads": 7}, "model.n_heads=7 does not divide model.d_model=256"),
        ({"model.n_kv_heads": 3}, "model.n_kv_heads=3 does not divide model.n_heads=4"),
        ({"model.n_kv_heads": 8}, "model.n_kv_heads=8 does not divide model.n_heads=4"),
        ({"model.d_model": 12}, "the head dimension (d_model / n_heads) must be even"),
        ({"model.head_dim": 33}, "the head dimension (d_model / n_heads) must be even"),
        (
            {"parallel.tensor": 2},
            "parallel.tensor=2 x parallel.context=1 needs 2 ranks, and this run has 1: start it as deepspeed --num_gpus 2",
        ),
        (
            {"parallel.context": 2},
            "parallel.tensor=1 x parallel.context=2 needs 2 ranks, and this run has 1: start it as deepspeed --num_gpus 2",
        ),
        ({"zero.stage": 4}, "zero.stage=4: ZeRO has the stages 0, 1, 2 and 3"),
        ({"zero.stage": 0, "precision.name": "bf16"}, "zero=0 with precision=bf16 is incorrect in DeepSpeed"),
        ({"zero.offload_parameters": True, "zero.stage": 2}, "zero.offload_parameters=true needs zero=3"),
        ({"zero.offload_optimizer": True, "zero.stage": 0}, "zero.offload_optimizer=true needs zero=1, 2 or 3"),
        ({"schedule.name": "wsd", "schedule.warmup": 0.5, "schedule.decay": 0.6}, "take more than the whole run"),
        ({"steps": None}, "the length of the run is missing"),
        ({"steps": None, "tokens": 4095}, "tokens=4095 is less than one step of 4096 tokens"),
        ({"micro_batch_size": 3}, "8 sequences per rank, which micro_batch_size=3 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused(values, sentence):
    assert sentence in refusal(values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"run": "a" * 200},
        {"data.held_out": 0.5},
        {"model.n_heads": 7, "model.head_dim": 32},
        {"model.n_kv_heads": 1},
        {"zero.stage": 0, "precision.name": "fp32"},
        {"zero.stage": 0, "precision.name": "auto"},
        {"zero.stage": 1, "precision.name": "bf16"},
        {"zero.stage": 3, "zero.offload_parameters": True, "zero.offload_optimizer": True},
        {"zero.stage": 1, "zero.offload_optimizer": True},
        {"schedule.name": "wsd", "schedule.warmup": 0.5, "schedule.decay": 0.5},
        {"schedule.name": "cosine", "schedule.warmup": 0.5, "schedule.decay": 0.6},
        {"steps": None, "tokens": 4096},
    ],
)
def test_what_just_fits_passes(values):
    validate(changed(values), 1)


def test_a_formula_is_refused_with_a_caret_under_the_place():
    sentence, shown, caret = refusal({"ffn.formula": "x * sigmiod(x)"}).split("\n")
    assert sentence.startswith("ffn.formula is refused: unknown function 'sigmiod': did you mean 'sigmoid'?")
    assert shown[caret.index("^") :].startswith("sigmiod")


@pytest.mark.parametrize(
    ("total", "micro", "world", "expected"),
    [
        (8, None, 1, Batch(8, 8, 1, 1, 10, 4096)),
        (8, None, 4, Batch(2, 8, 4, 1, 10, 4096)),
        (8, 1, 4, Batch(1, 8, 4, 2, 10, 4096)),
        (12, 2, 3, Batch(2, 12, 3, 2, 10, 6144)),
    ],
)
def test_the_arithmetic_of_a_batch(total, micro, world, expected):
    batch = validate(changed({"global_batch_size": total, "micro_batch_size": micro}), world)
    assert batch == expected
    assert batch.micro_batch * batch.data_parallel * batch.accumulation == total
    assert batch.tokens == 10 * total * 512


@pytest.mark.parametrize("world", [3, 5, 16])
def test_a_batch_that_ranks_cannot_share_is_refused(world):
    assert f"global_batch_size=8 is not divisible by the {world} data-parallel ranks" in refusal({}, world)


@pytest.mark.parametrize(
    ("values", "world", "sentence"),
    [
        (
            {"parallel.tensor": 4},
            6,
            "parallel.tensor=4 x parallel.context=1 does not divide the 6 rank(s) of this run: "
            "their product must be one of 1, 2, 3, 6",
        ),
        (
            {"parallel.tensor": 2, "parallel.context": 2},
            2,
            "x parallel.context=2 needs 4 ranks, and this run has 2: start it as deepspeed --num_gpus 4",
        ),
        ({"parallel.context": 4, "sequence_length": 30}, 4, "parallel.context=4 does not divide sequence_length=30"),
        (
            {"parallel.tensor": 4, "parallel.sequence": True, "sequence_length": 30},
            4,
            "parallel.sequence=true: parallel.tensor=4 does not divide the 30 tokens of a sequence",
        ),
        ({"parallel.tensor": 2}, 6, "global_batch_size=8 is not divisible by the 3 data-parallel ranks"),
    ],
)
def test_ranks_that_cannot_be_shared_out_are_refused(values, world, sentence):
    assert sentence in refusal(values, world)


GROUPS = {"b": {"init": 1.0, "share": "group", "groups": 6}}


@pytest.mark.parametrize(
    ("values", "world", "sentence"),
    [
        (
            {"model.d_ff": 44},
            1,
            "groups=6 does not divide the d_ff=44 of ffn=mine into equal blocks: 1, 2, 4, 11, 22, 44 would",
        ),
        ({"model.d_ff": 36, "parallel.tensor": 4}, 4, "blocks over parallel.tensor=4 ranks: 4, 12, 36 would do"),
        ({"model.d_ff": 35, "parallel.tensor": 2}, 2, "blocks over parallel.tensor=2 ranks: no number would do"),
        ({"model.d_ff_gated": 44}, 1, "does not divide the d_ff=66 of"),  # an ungated layer is 3/2 as wide
    ],
)
def test_groups_of_channels_that_do_not_come_out_even_are_refused(values, world, sentence):
    arm = {"ffn.name": "mine", "ffn.formula": "b * x", "ffn.parameters": GROUPS}
    if "model.d_ff_gated" in values:
        validate(changed(arm | values), 1)
        arm["ffn.parameters"] = {"b": GROUPS["b"] | {"groups": 7}}
    refused = refusal(arm | values, world)
    assert refused.startswith("ffn.parameters.b.groups=")
    assert sentence in refused


def test_the_data_parallel_size_is_what_tensor_and_context_leave():
    values = {"parallel.tensor": 2, "parallel.context": 2, "parallel.sequence": True, "micro_batch_size": 1}
    assert validate(changed(values), 16) == Batch(1, 8, 4, 2, 10, 4096)


def test_tokens_are_rounded_down_to_whole_steps_and_steps_win():
    assert validate(changed({"steps": None, "tokens": 3 * 4096 + 4095}), 1).steps == 3
    assert validate(changed({"steps": 2, "tokens": 10**6}), 1).steps == 2


FREE = {
    *(
        "run",
        "runs",
        "resume",
        "resume_from",
        "resume_optimizer",
        "profile",
        "steps",
        "tokens",
        "eval_every",
        "eval_tokens",
        "save_every",
        "keep_last",
        "log_every",
    ),
    *("telemetry_every", "telemetry_window", "log_seconds"),
    *("sample_every", "sample_tokens", "prompts", "micro_batch_size", "data.prepared", "data.workers", "ffn.backend"),
    *("data.path", "data.max_epochs"),  # the hash of the text in a checkpoint tells whether another place has the same
    *("model.activation_checkpointing", "model.attention", "ffn.save"),
    "ffn.init_match",  # whatever it was: there are weights already
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind, _ in keys()])
def test_a_run_goes_on_only_with_what_does_not_change_what_is_learned(name, kind):
    before = changed()
    *groups, last = name.split(".")
    old = getattr(getattr(before, groups[0]) if groups else before, last)
    new = not old if kind is bool else (old or 0) + 1 if name in NUMBERS else f"{old}x"
    found = differences(before, changed({name: new}, before))
    free = name in FREE or groups[:1] in (["logger"], ["zero"], ["parallel"], ["guard"], ["watchdog"])
    assert found == ([] if free else [f"{name}: {old} -> {new}"])


def test_the_optimizer_may_be_another_one_only_when_its_state_starts_anew():
    muon = changed({"optim.name": "muon", "optim.lr": 0.5})
    found = differences(changed(), muon)
    assert [each.partition(":")[0] for each in found] == ["optim.lr", "optim.name"]
    assert how_to_go_on(found).endswith("or let its optimizer start anew (resume_optimizer=fresh)")
    assert how_to_go_on([*found, "seed: 0 -> 1"]) == "give this run another name (run=NAME)"
    fresh = dataclasses.replace(muon, resume_optimizer="fresh")
    assert differences(changed(), fresh) == changed_settings(settings_of(changed()), fresh) == []
    assert differences(changed(), dataclasses.replace(fresh, seed=1)) == ["seed: 0 -> 1"]


def test_the_free_keys_exist():
    names = {name for name, _, _ in keys()} | {name.partition(".")[0] for name, _, _ in keys()}
    assert set(NOT_LEARNED) <= names


def test_differences_see_the_parts_of_a_blend():
    one, two = ({"data.parts": {"a": {"path": "x", "weight": weight}}} for weight in (1, 2))
    assert differences(changed(one), changed(two)) == ["data.parts.a.weight: 1 -> 2"]
    assert len(differences(changed(), changed(one))) >= 1
    assert differences(changed(one), changed(one)) == []


@pytest.mark.parametrize("name", [None, "", "..", "a/b", "a\0b"])
def test_what_names_no_folder_is_no_name_of_a_run(name):
    config = dataclasses.replace(load(["data=text", "data.path=corpus"]), run=name)
    with pytest.raises(UserError, match="cannot name a folder inside runs/"):
        validate(config, 1)
    validate(dataclasses.replace(config, run="\ud800"), 1)
