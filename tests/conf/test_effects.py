"""Typed keys without effect: each key of the schema that has a condition, and what is not refused."""

from __future__ import annotations

import re

import pytest

from conf.ablation_schema import AblationConfig
from conf.cluster_schema import ClusterConfig
from conf.group import read_group
from conf.keys import keys
from conf.load import from_yaml, load, to_yaml
from conf.schema import Config
from kernels.common.errors import UserError

# A key with a value, and what makes it have no effect. The list holds every key that has a condition.
IGNORED = {
    "ffn.formula": ("gate*up", "ffn=swiglu"),
    "ffn.from_output": ("h", "ffn=relu"),
    "ffn.init_match": ("rms", "ffn.init_scale=0.5"),
    "ffn.save": ("everything", "model.activation_checkpointing=selective"),
    "model.d_ff_gated": ("64", "model.d_ff=96"),
    "data.path": ("notes/", "data=stdlib"),
    "data.field": ("content", "data=stdlib"),
    "data.subset": ("en", "data=stdlib"),
    "data.split": ("test", "data=stdlib"),
    "data.parts": ("{a: {path: x}}", "data=stdlib"),
    "data.held_out_files": ("300", "data.held_out=0.0"),
    "data.held_out_by": ("folder", "data.held_out=0.0"),
    "optim.base_width": ("64", "optim.scaling=none"),
    "optim.base_layers": ("2", "optim.scaling=none"),
    "optim.momentum": ("0.9", "optim=adamw"),
    "optim.nesterov": ("true", "optim=adamw"),
    "optim.update_scale": ("spectral", "optim=adamw"),
    "optim.ns_steps": ("7", "optim=adamw"),
    "optim.ns_coefficients": ("polar_express", "optim=adamw"),
    "optim.ns_dtype": ("fp32", "optim=adamw"),
    "optim.split_heads": ("true", "optim=adamw"),
    "optim.qk_clip": ("100", "optim=adamw"),
    "optim.adamw_lr": ("0.001", "optim=adamw"),
    "optim.adamw_weight_decay": ("0.2", "optim=adamw"),
    "data.held_out_kib": ("4", "data.held_out_files=0"),
    "tokenizer.vocab_size": ("400", "tokenizer.path=a.model"),
    "tokenizer.train_megabytes": ("1", "tokenizer.path=a.model"),
    "tokenizer.eos": ("</s>", "tokenizer.path=null"),
    "tokenizer.bos": ("<s>", "tokenizer.path=null"),
    "schedule.decay": ("0.3", "schedule=cosine"),
    "zero.bucket_elements": ("1M", "zero=0"),
    "zero.overlap": ("true", "zero=0"),
    "parallel.sequence": ("true", "parallel.tensor=1"),
    "precision.reduce": ("bf16", "precision=fp32"),
    "precision.emulate": ("mxfp8", "precision=fp8"),
    "precision.scaling": ("tensorwise", "precision=bf16"),
    "logger.project": ("p", "logger=none"),
    "logger.entity": ("e", "logger=none"),
    "logger.group": ("g", "logger=tensorboard"),
    "logger.job_type": ("j", "logger=none"),
    "logger.tags": ("[t]", "logger=none"),
    "eval_tokens": ("1k", "eval_every=0"),
    "sample_every": ("5", "prompts=[]"),
    "sample_tokens": ("5", "prompts=[]"),
    "telemetry_window": ("1M", "telemetry_every=0"),
    "watchdog.phase_minutes": ("5", "watchdog.minutes=0.0"),
}
# And what gives it its effect.
EFFECTIVE = {
    "ffn.formula": "ffn=custom",
    "data.path": "data=text",
    "data.parts": "data=blend",
    "data.held_out_kib": "data.held_out_files=300",
    "schedule.decay": "schedule=wsd",
    "optim.base_width": "optim.scaling=mup",
    "optim.base_layers": "optim.scaling=mup",
    "optim.momentum": "optim=muon",
    "optim.ns_steps": "optim=normuon",
    "parallel.sequence": "parallel.tensor=2",
    "zero.overlap": "zero=2",
    "logger.group": "logger=wandb",
}


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load(list(argv))
    return str(caught.value)


def test_every_condition_of_the_schema_is_tried():
    assert set(IGNORED) == {name for name, _, field in keys(Config) if field.metadata["only"]}


@pytest.mark.parametrize("key", IGNORED)
def test_a_key_that_has_no_effect_is_refused_and_its_option_named(key):
    value, option = IGNORED[key]
    sentence = refusal(f"{key}={value}", option)
    named = "logger.wandb=false" if option.startswith("logger=") else option
    if key == "precision.scaling":  # it depends on two
        named += " and precision.emulate=none"
    assert sentence.startswith(f"{key}={value} has no effect with {named}: it belongs to ")


@pytest.mark.parametrize("key", EFFECTIVE)
def test_under_its_option_it_is_taken(key):
    load([f"{key}={IGNORED[key][0]}", EFFECTIVE[key]])


def test_the_sentence_names_every_choice():
    assert refusal("data.path=notes/") == (
        "data.path=notes/ has no effect with data=stdlib: it belongs to data=text, jsonl, parquet or hf"
    )
    assert refusal("ffn.formula='max(x, 0)'").endswith("has no effect with ffn=swiglu: it belongs to ffn=custom")
    assert len(refusal(f"ffn.formula={'x+' * 900}x")) < 200


def test_what_switches_off_and_what_is_forced_is_not_refused():
    load(["data.path=null", "parallel.sequence=false", "zero=0", "zero.overlap=false", "logger=none", "logger.tags=[]"])
    load(["logger=none", "++logger.group=plan", "model.d_ff_gated=64", "++model.d_ff=96"])
    load(["logger.tags=[a]", "++logger=none", "eval_tokens=512", "++eval_every=0"])


def test_presets_and_stored_configurations_are_not_refused(tmp_path):
    config = load(["logger=none", "++logger.group=plan"])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(tmp_path / "config.yaml") == config


def test_the_keys_of_a_part_of_a_blend_fit_its_source():
    load(["data=blend", "data.parts.stdlib.weight=1", "data.parts.a.source=jsonl", "data.parts.a.path=x"])
    load(["data=blend", "data.field=content", "data.parts.jsonl.path=x"])
    assert refusal("data=blend", "data.parts.a={source: text, path: x, field: y}") == (
        "data.parts.a.field=y has no effect with data.parts.a.source=text: "
        "it belongs to data.parts.a.source=jsonl, parquet or hf"
    )


@pytest.mark.parametrize(
    ("typed", "chosen", "right"),
    [("model.name=llama_1b", "model=nano", "model=llama_1b"), ("data.name=text", "data=stdlib", "data=text")],
)
def test_a_choice_that_is_typed_as_a_label_is_refused(typed, chosen, right):
    assert refusal(typed) == f"{typed} would only change the label of {chosen}: write {right}"


def test_a_label_of_ones_own_is_taken():
    assert load(["ffn=custom", "ffn.name=mine", "ffn.formula=x*2"]).ffn.name == "mine"
    assert load(["data.name=mine"]).data.name == "mine"


@pytest.mark.parametrize(
    ("group", "schema", "words", "sentence"),
    [
        ("cluster", ClusterConfig, ["cluster=h100", "cluster.image=a.sif"], "cluster.container=none"),
        ("cluster", ClusterConfig, ["cluster=h100", "cluster.mounts=[a:b]"], "cluster.container=none"),
        ("cluster", ClusterConfig, ["cluster=cpu", "cluster.gpu_request=--gres"], "cluster.gpus_per_node=0"),
        (
            "ablation",
            AblationConfig,
            ["ablation=smoke", "ablation.rates=[1.0]", "ablation.rate_seeds=[7]"],
            "ablation.rates",
        ),
        ("ablation", AblationConfig, ["ablation=smoke", "ablation.rates=[1.0]", "ablation.rate_extensions=1"], "rates"),
        (
            "ablation",
            AblationConfig,
            ["ablation=smoke", "ablation.budget=none", "ablation.allowed_mismatch=1"],
            "budget",
        ),
    ],
)
def test_keys_of_clusters_and_plans_are_checked_too(group, schema, words, sentence):
    with pytest.raises(UserError, match=re.escape(f"{words[-1]} has no effect with ") + f".*{sentence}"):
        read_group(group, schema, words, group)


def test_counts_of_clusters_and_plans_may_be_typed_as_for_a_run():
    plan, _ = read_group("ablation", AblationConfig, ["ablation=smoke", "ablation.rate_extensions=1k"], "plan")
    assert plan.rate_extensions == 1000
