"""Plans: what each plan of conf/ablation resolves to, its runs and their overrides, and what is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest

from ablation.budget import WARN
from ablation.plan import LONGEST_TAG, RULES_OF_0_2, Plan, plan_of_values, read_plan, values_of_plan
from ablation.resolve import resolve
from ablation.results import why_no_verdict
from conf.ablation_schema import AblationConfig
from conf.keys import choices
from conf.load import load
from kernels.common.errors import UserError
from tests.training.tiny import ROOT

SMALL = {"arms": ["relu", "swiglu"], "baseline": "relu", "name": "small"}


def plan_of(*overrides: str, **keys) -> Plan:
    return resolve(AblationConfig(**(SMALL | keys)), overrides)


@pytest.fixture(scope="module")
def smoke() -> Plan:
    return resolve(*read_plan(["ablation=smoke"]))


def test_a_plan_of_an_earlier_version_begins_arms_as_it_did():
    words = [
        "ablation=glu_variants",
        "ablation.arms={relu: ffn=relu, given: ffn=relu ffn.init_scale=0.3}",
        "ablation.baseline=relu",
    ]
    for match in ("std", "rms"):
        plan = resolve(*read_plan([*words, f"ablation.init_match={match}"]))
        relu, given = plan.arms["nano"].values()
        assert relu.config.ffn.init_match == match
        assert ("ffn.init_match" in relu.learned) == (match == "std")
        assert ("init_match" in values_of_plan(plan.config)) == (match == "std")
        assert (given.config.ffn.init_scale, given.config.ffn.init_match) == (0.3, "std")
        assert plan_of_values(values_of_plan(plan.config)) == plan.config
    with pytest.raises(UserError, match=r"unknown ablation\.init_match 'mean'"):
        resolve(*read_plan([*words, "ablation.init_match=mean"]))


def test_every_run_holds_out_as_many_documents_as_the_plan_says_unless_an_override_decides():
    words = ["ablation=glu_variants", "ablation.arms=[relu,swiglu]"]
    for more, files, fraction in (
        ([], 300, 0.04),
        (["ablation.held_out_files=50"], 50, 0.04),
        (["ablation.held_out_files=0"], 0, 0.04),
        (["data.held_out=0.2"], 0, 0.2),
        (["data.held_out_files=70"], 70, 0.04),
    ):
        plan = resolve(*read_plan([*words, *more]))
        for arm in plan.arms["nano"].values():
            assert (arm.config.data.held_out_files, arm.config.data.held_out) == (files, fraction)
            assert load(list(arm.overrides)).data == arm.config.data
    with pytest.raises(UserError, match="held_out_files=-1 must be a number of documents"):
        resolve(*read_plan([*words, "ablation.held_out_files=-1"]))


def test_a_plan_without_held_out_text_is_refused():
    with pytest.raises(UserError, match=r"relu at nano: data\.held_out=0 leaves no held-out text"):
        plan_of(common=["data.held_out=0"])
    parts = ["data=blend", "data.parts.a.path=a", "data.parts.a.source=text", "data.parts.a.held_out=0"]
    with pytest.raises(UserError, match=r"data\.held_out=0 leaves no held-out text"):
        plan_of(common=parts)


@pytest.mark.parametrize("name", choices("ablation"))
def test_every_plan_resolves_at_equal_parameters(name):
    plan = resolve(*read_plan([f"ablation={name}"]))
    assert plan.config.name == name.rpartition("/")[2]
    assert plan.config.question.endswith("?")
    assert plan.warnings == ()
    for arms in plan.arms.values():
        assert {arm.config.ffn.name for arm in arms.values()} <= set(choices("ffn"))
        assert all(abs(arm.width.mismatch) <= WARN for arm in arms.values())


def test_the_eight_of_glu_variants_and_all_but_the_threshold_in_the_zoo():
    eight = ["relu", "gelu", "silu", "glu", "bilinear", "reglu", "geglu", "swiglu"]
    assert read_plan(["ablation=glu_variants"])[0].arms == eight
    assert sorted(read_plan(["ablation=zoo"])[0].arms) == sorted(set(choices("ffn")) - {"custom", "threshold"})


def test_the_cost_is_arms_times_rates_plus_seeds(smoke):
    assert smoke.count_runs() == 2 * (3 + 5)
    own = smoke.arms["nano"]
    assert smoke.flops() == 8 * own["linear"].flops + 8 * own["swiglu"].flops
    assert own["linear"].flops == own["linear"].flops_per_token * own["linear"].batch.tokens
    assert plan_of(rates=[1.0]).count_runs() == 2 * 5  # one rate: nothing to sweep


def test_the_overrides_of_a_run_set_what_the_plan_decides(smoke):
    [first, second, third, *_] = smoke.final_runs("nano", "swiglu", 4e-3)
    assert (first.seed, second.seed, third.seed) == (0, 1, 2)
    config = load(smoke.overrides(second, "somewhere"))
    assert (config.seed, config.data_seed, config.optim.lr, config.model.d_ff) == (1, 1, 4e-3, 512)
    assert (config.ffn.name, config.runs, config.run) == ("swiglu", "somewhere", "nano-swiglu-lr0.004-seed1")
    assert (config.sequence_length, config.tokens) == (128, 200_000)


def test_a_run_is_tagged_in_wandb_by_plan_arm_size_and_stage(smoke):
    [first, *_] = smoke.final_runs("nano", "swiglu", 4e-3)
    logger = load(smoke.overrides(first, "r")).logger
    assert (logger.group, logger.job_type) == ("smoke", "swiglu")
    assert logger.tags == [f"plan:{smoke.hash}", "size:nano", "stage:final"]
    assert load(smoke.overrides(smoke.sweep_runs("nano", "linear")[0], "r")).logger.tags[-1] == "stage:sweep"


def test_names_reach_wandb_unchanged(tmp_path):
    names = ("1e5", "x" * 80 + "1", "x" * 80 + "2")
    sizes = {name: f"model=nano model.n_layers={layers}" for layers, name in enumerate(names, 1)}
    plan = plan_of(arms={"1e3": "ffn=relu", "null": "ffn=gelu"}, baseline="1e3", sizes=sizes,
                   common=["""logger.tags=["it's a \\\\",b]"""])  # fmt: skip
    loggers = [
        load(plan.overrides(plan.final_runs(*place, 4e-3)[0], str(tmp_path))).logger for place in plan.size_arm_pairs()
    ]
    assert [logger.job_type for logger in loggers[:2]] == ["1e3", "null"]
    assert loggers[0].tags == ["it's a \\", "b", f"plan:{plan.hash}", "size:1e5", "stage:final"]
    assert max(len(tag) for logger in loggers for tag in logger.tags) <= LONGEST_TAG
    assert len({logger.tags[3] for logger in loggers}) == 3


def test_runs_of_one_seed_differ_in_nothing_but_the_arm_and_its_width(smoke):
    from conf.identity import what_is_learned

    one, other = (load(smoke.overrides(smoke.final_runs("nano", arm, 4e-3)[0], "r")) for arm in ("linear", "swiglu"))
    one, other = what_is_learned(one), what_is_learned(other)
    differ = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert differ <= {key for key in one if key.startswith("ffn.")} | {"model.d_ff"}


def test_the_sweep_has_a_seed_of_its_own_and_multiples_of_the_configured_rate(smoke):
    planned_runs = smoke.sweep_runs("nano", "linear")
    assert [planned.seed for planned in planned_runs] == smoke.config.rate_seeds * 3 == [1000] * 3
    assert [planned.lr for planned in planned_runs] == [4e-4, 3e-3, 2.4e-2]
    assert len({planned.name for place in smoke.size_arm_pairs() for planned in smoke.sweep_runs(*place)}) == 6


def test_every_seed_of_a_sweep_tries_every_rate():
    plan = plan_of()
    swept = plan.sweep_runs("nano", "relu")
    assert [(planned.seed, planned.lr) for planned in swept] == [
        (s, lr) for s in (1000, 1001) for lr in (2e-3, 4e-3, 8e-3)
    ]
    assert plan.count_runs() == 2 * (3 * 2 + 5)


def test_a_plan_with_the_sweep_of_earlier_versions_has_the_keys_and_the_hash_it_had_then():
    values = values_of_plan(AblationConfig(**SMALL, rate_seeds=[7], rate_choice="best"))
    assert values["rate_seed"] == 7
    assert {"rate_seeds", "rate_choice"}.isdisjoint(values)
    assert plan_of_values(values) == AblationConfig(**SMALL, rate_seeds=[7], rate_choice="best")
    for keys in ({}, {"rate_seeds": [7]}, {"rate_choice": "best"}):
        config = AblationConfig(**SMALL, **keys)
        own = RULES_OF_0_2.keys() - {
            "held_out_files",
            "init_match",
            "reserve",
        }  # as all of these had them
        assert values_of_plan(config) == {k: v for k, v in dataclasses.asdict(config).items() if k not in own}
        assert plan_of_values(values_of_plan(config)) == config


def test_overrides_change_the_plan_and_every_run():
    config, others = read_plan(["ablation=smoke", "ablation.seeds=[3,4,5]", "tokens=1000000"])
    assert (config.seeds, others) == ([3, 4, 5], ["tokens=1000000"])
    plan = resolve(config, others)
    assert plan.arms["nano"]["linear"].config.tokens == 1_000_000
    assert plan.arms["nano"]["swiglu"].batch.steps == 1_000_000 // (8 * 128)


def test_overrides_add_a_size_or_replace_all():
    config, _ = read_plan(["ablation=smoke", "ablation.sizes.deep=model=nano model.n_layers=8"])
    assert list(config.sizes) == ["nano", "deep"]
    assert config.sizes["deep"] == "model=nano model.n_layers=8"
    config, _ = read_plan(["ablation=smoke", "ablation.sizes={deep: model=nano model.n_layers=8}"])
    assert list(config.sizes) == ["deep"]


@pytest.mark.parametrize("override", ["steps=90", "model.activation_checkpointing=true"])
def test_sizes_may_differ_only_in_length_or_cost(override):
    plan = plan_of(sizes={"one": "model=nano", "other": f"model=nano {override}"})
    assert [override in plan.arms[size]["relu"].overrides for size in ("one", "other")] == [False, True]


def test_an_arm_may_be_a_formula_and_a_size_may_be_anything():
    arms = {"relu": "ffn=relu", "mine": "ffn=custom ffn.formula='sigmoid(1.702*gate) * gate * up'"}
    sizes = {"small": "model=nano", "deep": ["model=nano", "model.n_layers=8"]}
    plan = plan_of(arms=arms, sizes=sizes)
    assert list(plan.size_arm_pairs()) == [("small", "relu"), ("small", "mine"), ("deep", "relu"), ("deep", "mine")]
    assert plan.arms["deep"]["mine"].config.ffn.formula == "sigmoid(1.702*gate) * gate * up"
    assert plan.arms["deep"]["mine"].width.d_ff == 512


def test_the_hash_covers_what_is_learned_and_how_it_is_judged_and_nothing_else():
    own = plan_of().hash
    assert plan_of().hash == own
    for keys in (
        {"seeds": [0, 1]},
        {"budget": "flops"},
        {"rates": [1.0]},
        {"smallest_effect": 0.02},
        {"tile": 64},
        {"rate_seeds": [7]},
    ):
        assert plan_of(**keys).hash != own
    for override in ("optim.beta2=0.95", "tokens=1000000", "ffn.init_scale=0.1"):
        assert plan_of(override).hash != own
    before = plan_of()
    arm = before.arms["nano"]["relu"]
    other = dataclasses.replace(arm.config, ffn=dataclasses.replace(arm.config.ffn, formula="max(x, 0) + 0"))
    changed = {"nano": before.arms["nano"] | {"relu": dataclasses.replace(arm, config=other)}}
    assert dataclasses.replace(before, arms=changed).hash != own  # conf/ffn/relu.yaml has changed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "ablation=NAME is missing: choose a plan from beyond_elementwise, depth, gating"),
        (["ablation=glu_variant"], "unknown plan 'glu_variant': did you mean 'glu_variants'?"),
        (["ablation=smoke", "ablation.seed=[1]"], "unknown key of ablation 'seed': did you mean 'seeds'?"),
        (["ablation=smoke", "ablation.tile=wide"], "plan smoke: "),
    ],
)
def test_arguments_that_are_refused(arguments, sentence):
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        read_plan(arguments)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"arms": ["relu", "swigl"]}, "unknown arm 'swigl': did you mean 'swiglu'?"),
        (
            {"arms": ["relu", "x*atan(x)"]},
            "'x*atan(x)' is a formula, not the name of an arm: write ablation.arms={mine: ",
        ),
        (
            {"arms": {"relu": "ffn=relu", "mine": "x*atan(x)"}},
            "'x*atan(x)' is a formula, not the name of an arm: write",
        ),
        ({"seeds": "0,1,2"}, "ablation.seeds=0,1,2 is no list: write ablation.seeds=[0,1,2]"),
        ({"rates": 1.0}, "ablation.rates=1.0 is no list: write ablation.rates=[1.0]"),
        ({"arms": "relu,swiglu"}, "ablation.arms=relu,swiglu is no list: write ablation.arms=[relu,swiglu]"),
        ({"sizes": "nano"}, "ablation.sizes must map names to overrides, such as {small: model=nano}"),
        ({"seeds": 3}, "ablation.seeds=3 is one number: list the seeds, as ablation.seeds=[0,1,2]"),
        ({"common": ["data.path=notes"]}, "relu at nano: data.path=notes has no effect with data=stdlib"),
        ({"arms": ["relu", "relu"]}, "ablation.arms lists relu twice"),
        ({"arms": ["relu", {"mine": "ffn=gelu"}]}, "ablation.arms: {'mine': 'ffn=gelu'} is no arm of conf/ffn"),
        ({"common": 5}, "ablation.common must be overrides"),
        ({"arms": ["relu"]}, "a plan compares at least two arms"),
        ({"arms": {"a b": "ffn=relu", "relu": "ffn=relu"}}, "ablation.arms: 'a b' must consist of letters"),
        ({"arms": {"a": "ffn='relu", "relu": "ffn=relu"}}, 'ablation.arms.a: "ffn=\'relu" is not a list of overrides'),
        ({"arms": None}, "ablation.arms must map names to overrides"),
        ({"baseline": ""}, "the plan small has no baseline: ablation.baseline=ARM, one of relu, swiglu"),
        ({"baseline": "rleu"}, "the baseline 'rleu' is not an arm of the plan: did you mean 'relu'?"),
        ({"seeds": [0]}, "one seed cannot be told from luck"),
        ({"seeds": [0, 0]}, "ablation.seeds=[0, 0] must be distinct whole numbers"),
        ({"seeds": ["a", 1]}, "ablation.seeds=['a', 1] must be distinct whole numbers"),
        ({"seeds": [0, 1000]}, "ablation.rate_seeds and ablation.seeds share 1000: the sweep needs seeds of its own"),
        ({"rate_seeds": 7}, "ablation.rate_seeds=7 is no list: write ablation.rate_seeds=[7]"),
        ({"rate_seeds": [7, 7]}, "ablation.rate_seeds=[7, 7] must be distinct whole numbers"),
        ({"rate_seeds": []}, "ablation.rate_seeds is empty: a sweep needs at least one seed"),
        ({"rate_choice": "vertx"}, "unknown ablation.rate_choice 'vertx': did you mean 'vertex'?"),
        ({"rates": [0]}, "ablation.rates=[0] must be distinct numbers above 0"),
        ({"rates": []}, "ablation.rates=[] must be distinct numbers above 0"),
        ({"budget": "params"}, "nano: unknown budget 'params': did you mean 'parameters'?"),
        ({"metric": "loss"}, "unknown ablation.metric 'loss'"),
        ({"smallest_effect": 0.0}, "ablation.smallest_effect=0.0 must be above 0, in nats per token"),
        ({"common": ["seed=3"]}, "seed=3 of relu at nano is set by the plan"),
        (
            {"arms": {"relu": "ffn=relu", "wide": "ffn=relu model.d_ff=999"}},
            "model.d_ff=999 of wide: the budget decides the widths",
        ),
        ({"common": ["stepz=3"]}, "relu at nano: "),
        ({"common": ["parallel.tensor=2"]}, "relu at nano: parallel.tensor=2 does not divide the 3 heads"),
        ({"common": ["ffn=relu"]}, "ffn=relu of every run would replace ffn=relu of relu: change ablation.arms"),
        ({"common": ["+ffn=gelu"], "baseline": "swiglu"}, "+ffn=gelu of every run would replace ffn=relu of relu"),
        ({"arms": {"relu": "ffn=relu", "other": "ffn=relu"}}, "nano: the arms relu and other are identical"),
        ({"sizes": {"a": "model=nano", "b": "model=nano"}}, "the sizes a and b are identical"),
    ],
)
def test_plans_that_are_refused(keys, sentence):
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        plan_of(**keys)


def test_what_a_run_is_given_is_no_error_where_it_has_no_effect():
    plan = plan_of(common=["logger=none", "model.d_ff_gated=256"])
    assert load(plan.overrides(plan.final_runs("nano", "relu", 4e-3)[0], "r")).logger.group == plan.config.name


@pytest.mark.parametrize("typed", ["eval_every=0", "data.held_out=0.2", "data=text data.path=notes"])
def test_a_typed_key_may_make_the_plans_own_pointless(typed):
    for path in sorted((ROOT / "conf" / "ablation").rglob("*.yaml")):
        name = str(path.relative_to(ROOT / "conf" / "ablation").with_suffix(""))
        assert resolve(*read_plan([f"ablation={name}", *typed.split()])).arms, name


def test_a_typed_fraction_replaces_what_the_plan_holds_out_of_each_document():
    with pytest.raises(UserError, match=r"data\.held_out_kib=1 has no effect"):
        load(["data.held_out_kib=1", "data.held_out=0.2"])
    data = plan_of("data.held_out=0.2", common=["data.held_out_kib=1"]).arms["nano"]["relu"].config.data
    assert (data.held_out, data.held_out_files) == (0.2, 0)


def test_a_typed_key_that_a_typed_one_makes_pointless_is_refused():
    with pytest.raises(UserError, match=r"^linear at nano: eval_tokens=7 has no effect with eval_every=0"):
        resolve(*read_plan(["ablation=smoke", "eval_every=0", "eval_tokens=7"]))


def test_an_arm_may_be_given_by_its_name_alone():
    assert plan_of(arms={"a": "relu", "b": "swiglu"}, baseline="a").arms["nano"]["b"].config.ffn.name == "swiglu"


@pytest.mark.parametrize(
    ("keys", "reasons"),
    [
        ({"rates": [0.5, 1.0, 2.0], "seeds": [0, 1, 2]}, []),
        ({"rates": [0.5, 1.0], "seeds": [0, 1]}, ["3 learning rates per arm, ablation.rates has 2", "3 seeds"]),
        ({"rates": [0.5, 1.0, 2.0], "seeds": [0, 1, 2], "allowed_mismatch": 0.9,
          "common": ["model.d_ff_gated=7", "parallel.tensor=1"]}, ["swiglu at nano: its parameters differ"]),
    ],
)  # fmt: skip
def test_a_plan_that_can_give_no_verdict_is_told(keys, reasons):
    found = why_no_verdict(plan_of(**keys))
    assert len(found) == len(reasons)
    assert all(reason in sentence for reason, sentence in zip(reasons, found, strict=True))


def test_a_budget_that_cannot_be_met_names_the_size_and_the_arm():
    arms = {"swiglu": "ffn=swiglu", "own": "ffn=prelu ffn.parameters.slope.share=channel"}
    with pytest.raises(
        UserError,
        match=r"^nano: own: d_ff=\d+ differs by .* from the baseline's parameters, more than the 0.00% allowed",
    ):
        plan_of(arms=arms, baseline="swiglu", allowed_mismatch=0.0)


def test_what_all_runs_share_may_be_a_line_or_nothing():
    assert plan_of(common="steps=5 data=stdlib").config.common == ["steps=5", "data=stdlib"]
    assert plan_of(common=None).config.common == []
