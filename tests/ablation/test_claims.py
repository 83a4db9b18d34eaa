"""Claims: runs can support and contradict each, and no verdict goes beyond what they show."""

from __future__ import annotations

import functools
import inspect
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from ablation.claims import Answer, judge, main, markdown, read_claims
from ablation.criteria import CONTRADICTED, OPEN, SUPPORTED
from ablation.manifest import read_manifest
from ablation.multipliers import multipliers, series
from ablation.outcomes import read_metrics, read_outcome
from ablation.plan import Plan, PlannedRun
from ablation.results import Results, Run, read_results
from conf.keys import choices
from kernels.activations.telemetry import figures as telemetry_figures
from kernels.activations.telemetry import sums_of
from kernels.common.errors import UserError
from kernels.formula import parse
from kernels.formula.compiled import compile_formula
from tests.ablation.made import all_planned, losses, make, plan_of
from training import telemetry

CLAIMS = {claim.claim: claim for claim in read_claims()}
NOT_OF_TELEMETRY = {"final_eval_loss", "tokens_per_second", "recovered", "multiplier", "ffn_parameters", "spread", "edge",
                    "deviation", "gap", "max_over_rms"}  # fmt: skip


@functools.cache
def plan(*arms: str, words: tuple[str, ...] = (), seeds: str = "[0,1,2]") -> Plan:
    named = [f"ablation.arms=[{','.join(arms)}]", f"ablation.baseline={arms[0]}"]
    return plan_of("ablation=glu_variants", *named, f"ablation.seeds={seeds}", "tokens=600000", *words)


def answer(
    text: str, folder: Path, of_plan: Plan, effects: dict | None = None, figures: dict | None = None, **more
) -> Answer:
    """Make runs and judge a claim by them.

    Args:
        effects: on the loss, by arm, or by size and arm.
        figures: by arm, of metrics.jsonl; a seed changes them by about 1%.
    """
    sizes = {size: (effects or {}).get(size, effects or {}) for size in of_plan.arms}
    rules = {size: losses(of_size, noise=0.001) for size, of_size in sizes.items()}

    def rule(planned: PlannedRun) -> float:
        return more.get("loss", lambda _: None)(planned) or rules[planned.size](planned)

    def of_metrics(planned: PlannedRun) -> dict[str, float]:
        chance = random.Random(f"{planned.arm} {planned.seed}")
        return {name: value * chance.gauss(1, 0.01) for name, value in (figures or {}).get(planned.arm, {}).items()}

    shutil.rmtree(folder, ignore_errors=True)
    made = make(of_plan, folder, rule, more.get("planned_runs"), figures=of_metrics)
    manifest = read_manifest(made)  # and the runs without the checks of `read_results`, which take the longest
    paths = sorted((made / "runs").glob("*"))
    lines = {path: read_metrics(path)[0] for path in paths}
    runs = {p.name: Run(manifest.planned_run(p.name), p, read_outcome(p, lines[p]), lines[p]) for p in paths}
    [found] = judge([CLAIMS[text]], [Results(made, manifest, runs, ())])
    return found


GATED = ("glu", "sigmoid", "reglu", "relu", "geglu", "gelu", "swiglu", "silu")
TWO_WIDTHS = ("ablation.sizes={narrow: model=nano, wide: model=nano model.d_model=384}",)
HORIZONS = ("ablation.horizons=[0.5,1]",)
SPREAD = {"relu": 0.0, "gelu": -0.1, "swiglu": -0.3}
TENTH = {arm: effect / 10 for arm, effect in SPREAD.items()}
DEAD = {"relu": {"dead": 0.2}, "leaky_relu": {"dead": 0.0}, "prelu": {"dead": 0.0}}
SAFE = {
    "relu": {"gradient_first_over_last": 3.0, "max": 20.0, "rms": 1.0},
    "swiglu": {"gradient_first_over_last": 1.0, "max": 10.0, "rms": 1.0},
}

R, T = "gradient_first_over_last", "tokens_per_second"
CASES = {  # claim: (arms, what supports it, what contradicts it): each (effects on the loss, figures)
    "SwiGLU beats ReLU": (("relu", "swiglu"), ({"swiglu": -0.05}, {}), [({"swiglu": 0.05}, {}), ({}, {})]),
    "Swish improves upon GELU": (("gelu", "silu"), ({"silu": -0.05}, {}), [({"silu": 0.05}, {})]),
    "GLU variants almost always beat the same curve without a gate": (
        GATED,
        ({"glu": -0.05, "reglu": -0.05, "geglu": -0.05, "swiglu": 0.05}, {}),
        [({"glu": -0.05, "reglu": -0.05, "geglu": 0.05, "swiglu": 0.05}, {})],
    ),
    "Squared ReLU has comparable quality and is more efficient": (
        ("swiglu", "relu2"),
        ({}, {"relu2": {"tokens_per_second": 20e3}, "swiglu": {"tokens_per_second": 17e3}}),
        [
            ({"relu2": 0.05}, {"relu2": {"tokens_per_second": 20e3}, "swiglu": {"tokens_per_second": 17e3}}),
            ({}, {"relu2": {"tokens_per_second": 17e3}, "swiglu": {"tokens_per_second": 20e3}}),
        ],
    ),
    "ReLU units die and never recover": (
        ("relu", "gelu"),
        ({}, {"relu": {"dead": 0.2, "revived": 0.0}}),
        [({}, {"relu": {"dead": 0.2, "revived": 0.1}}), ({}, {"relu": {"dead": 0.001, "revived": 0.0}})],
    ),
    "ReLU's unboundedness explodes gradients, and SwiGLU is safer": (
        ("relu", "swiglu"),
        ({}, SAFE),
        [
            ({}, SAFE | {"swiglu": SAFE["swiglu"] | {"max": 40.0}}),
            ({}, SAFE | {"swiglu": SAFE["swiglu"] | {"gradient_first_over_last": 9.0}}),
        ],
    ),
    "Where ReLU's units die, LeakyReLU and PReLU are the cure": (
        ("relu", "leaky_relu", "prelu"),
        ({"prelu": -0.05, "leaky_relu": 0.05}, DEAD),
        [
            ({"prelu": 0.05, "leaky_relu": 0.05}, DEAD),
            ({"prelu": -0.05, "leaky_relu": -0.05}, DEAD | {"leaky_relu": {"dead": 0.2}}),
        ],
    ),
    "Sigmoid zigzags, tanh does not": (
        ("sigmoid", "tanh"),
        ({}, {"sigmoid": {"sign_agreement": 0.76}, "tanh": {"sign_agreement": 0.05}}),
        [
            ({}, {"sigmoid": {"sign_agreement": 0.76}, "tanh": {"sign_agreement": 0.7}}),
            ({}, {"sigmoid": {"sign_agreement": 0.05}, "tanh": {"sign_agreement": 0.05}}),
        ],
    ),
    "SwiGLU converges in fewer steps": (("relu", "swiglu"), ({"swiglu": -0.05}, {}), [({"swiglu": 0.05}, {})]),
    "Gradients of sigmoid and tanh vanish with depth, ReLU's do not": (
        ("relu", "sigmoid", "tanh"),
        ({}, {"relu": {R: 1.0}, "sigmoid": {R: 0.2}, "tanh": {R: 0.3}}),
        [({}, {"relu": {R: 1.0}, "sigmoid": {R: 1.0}, "tanh": {R: 0.3}})],
    ),
    "Zero-centred outputs help": (("sigmoid", "tanh"), ({"tanh": -0.05}, {}), [({"tanh": 0.05}, {})]),
    "GELU beats ReLU": (("relu", "gelu"), ({"gelu": -0.05}, {}), [({"gelu": 0.05}, {})]),
    "Smooth activations beat kinked ones": (
        ("relu", "softplus", "relu2", "smooth_relu2"),
        ({"softplus": -0.05, "smooth_relu2": -0.05}, {}),
        [({"softplus": 0.05, "smooth_relu2": -0.05}, {})],
    ),
    "Non-monotonic activations help": (("softplus", "silu"), ({"silu": -0.05}, {}), [({"silu": 0.05}, {})]),
    "ReLU brings sparsity": (
        ("relu", "gelu"),
        ({}, {"relu": {"zeros": 0.9}, "gelu": {"zeros": 0.01}}),
        [
            ({}, {"relu": {"zeros": 0.4}, "gelu": {"zeros": 0.01}}),
            ({}, {"relu": {"zeros": 0.9}, "gelu": {"zeros": 0.9}}),
        ],
    ),
    "ReLU is faster; GELU and Swish cost more": (
        ("relu", "gelu", "silu"),
        ({}, {"relu": {T: 1000.0}, "gelu": {T: 900.0}, "silu": {T: 900.0}}),
        [({}, {"relu": {T: 1000.0}, "gelu": {T: 1100.0}, "silu": {T: 900.0}})],
    ),
    "LeakyReLU is a good default": (
        ("gelu", "relu", "prelu", "leaky_relu"),
        ({"leaky_relu": -0.005}, {}),
        [({"leaky_relu": 0.05}, {}), ({"gelu": -0.05}, {})],
    ),
    "SwiGLU's edge grows with size": (
        ("relu", "swiglu"),
        ({"narrow": {"swiglu": -0.1}, "wide": {"swiglu": -0.3}}, {}),
        [({"narrow": {"swiglu": -0.3}, "wide": {"swiglu": -0.1}}, {})],
    ),
    "GELU suits small models": (
        ("relu", "gelu", "silu", "swiglu"),
        ({"gelu": -0.1}, {}),
        [({"gelu": -0.1, "swiglu": -0.2}, {})],
    ),
    "x sigmoid(x) + relu(x), printed as SwiGLU, is as good as the gated one": (
        ("swiglu", "silu_plus_relu"),
        ({"silu_plus_relu": 0.001}, {}),
        [({"silu_plus_relu": 0.1}, {})],
    ),
    "SwiGLU generalises better": (
        ("relu", "swiglu"),
        ({}, {"relu": {"loss": 3.0}, "swiglu": {"loss": 3.5}}),
        [({}, {"relu": {"loss": 3.5}, "swiglu": {"loss": 3.0}})],
    ),
    "A threshold cannot learn": (
        ("relu", "threshold"),
        ({"threshold": 0.2}, {"threshold": {"slope": 0.0}}),
        [({"threshold": -0.2}, {"threshold": {"slope": 0.0}}), ({"threshold": 0.2}, {"threshold": {"slope": 0.1}})],
    ),
    "Multi-input constructions help as such": (
        ("relu", "sigmoid", "glu", "silu", "swiglu", "maxout"),
        ({"glu": -0.05, "swiglu": -0.05, "maxout": -0.05}, {}),
        [({"glu": 0.05, "swiglu": -0.05, "maxout": -0.05}, {})],
    ),
    "The wider the model, the less the choice matters": (
        ("relu", "gelu", "swiglu"),
        ({"narrow": SPREAD, "wide": TENTH}, {}),
        [({"narrow": TENTH, "wide": SPREAD}, {}), ({"narrow": SPREAD, "wide": SPREAD}, {})],
    ),
}


@pytest.mark.parametrize("text", CASES)
def test_runs_can_support_and_contradict_a_claim(text, tmp_path):
    arms, (effects, figures), contradictions = CASES[text]
    words = TWO_WIDTHS if "narrow" in effects else HORIZONS if text == "SwiGLU converges in fewer steps" else ()
    of_plan = plan(*arms, words=words)
    found = answer(text, tmp_path, of_plan, effects, figures)
    assert (found.state, found.findings[0].why) == (SUPPORTED, "")
    assert found.verdict.startswith("supported at ")
    assert found.findings[0].details
    for effects, figures in contradictions:
        found = answer(text, tmp_path, of_plan, effects, figures)
        assert found.state == CONTRADICTED, found.verdict


def test_parameters_are_settled_by_the_manifest_alone(tmp_path):
    text = "SwiGLU costs more parameters"
    matched = answer(text, tmp_path / "matched", plan("relu", "swiglu"), planned_runs=[])
    assert matched.verdict == "contradicted at nano only"
    assert matched.findings[0].details == ["ffn_parameters: swiglu x1.0000 relative to relu, at d_ff 512 and 768"]
    unmatched = answer(
        text, tmp_path / "unmatched", plan("relu", "swiglu", words=("ablation.budget=none",)), planned_runs=[]
    )
    assert unmatched.verdict == "supported at nano only"
    assert unmatched.findings[0].details == ["ffn_parameters: swiglu x1.5000 relative to relu, at d_ff 768 and 768"]
    both = Answer(CLAIMS[text], [*matched.findings, *unmatched.findings], True)
    assert both.verdict == "not settled: contradicted at nano of glu_variants, supported at nano of glu_variants"


OTHERWISE = {"SwiGLU costs more parameters", "Runs with ReLU are noisier"}  # tested below


def test_every_claim_has_a_case():
    untestable = {claim.claim for claim in CLAIMS.values() if claim.untestable}
    assert {*CASES, *OTHERWISE, *untestable} == CLAIMS.keys()
    assert untestable == {"SwiGLU gives 4% more accuracy", "SwiGLU is more interpretable"}
    for text in untestable:
        assert not CLAIMS[text].test
        assert Answer(CLAIMS[text], [], True).verdict == f"not settled: {CLAIMS[text].untestable}"


def test_scatter_over_seeds_is_compared_by_brown_and_forsythes_test(tmp_path):
    text, of_plan = "Runs with ReLU are noisier", plan("relu", "gelu", seeds="[0,1,2,3,4,5]")
    apart = lambda noisy: lambda p: 3.0 + 0.02 * math.log2(p.lr / 4e-3) ** 2 + (p.arm == noisy) * 0.1 * (-1) ** p.seed  # noqa: E731
    assert answer(text, tmp_path, of_plan, loss=apart("relu")).state == SUPPORTED
    assert answer(text, tmp_path, of_plan, loss=apart("gelu")).state == CONTRADICTED


def test_units_that_were_watched_for_too_short_a_time_are_not_seen_to_die(tmp_path):
    text = "ReLU units die and never recover"
    figures = {"relu": {"dead": 0.2, "revived": 0.0, "window_tokens": 20_480}}
    found = answer(text, tmp_path, plan("relu", "gelu"), {}, figures)
    assert found.verdict == (
        "not settled: not seen: activity was sampled over fewer than 1,000,000 tokens (telemetry_every, telemetry_window)"
    )


def test_claims_name_existing_metrics_and_arms():
    formula = compile_formula(parse("silu(gate) * up"))
    names = set(telemetry_figures(sums_of(formula), 2, [1.0] * 99, 1.0))
    names |= telemetry.ActivityWindow(1).update([torch.ones(1)], 1).keys()
    names |= set(re.findall(r'"(\w+)":', inspect.getsource(telemetry.ReducedSample.figures)))
    for claim in CLAIMS.values():
        assert claim.literature
        for test in (*claim.given, *claim.test):
            assert test.metric in names | NOT_OF_TELEMETRY
            assert bool(test.less) != bool(test.more)
            assert test.scale in ("linear", "log")
            assert test.required <= len(test.pairs)
            if test.metric != "spread":
                assert set(test.arms) <= set(choices("ffn"))


# ---------------------------------------------------------------------------------------------- limits of a verdict


def test_two_sizes_make_it_general_and_two_that_disagree_do_not_settle_it(tmp_path):
    text, of_plan = "SwiGLU beats ReLU", plan("relu", "swiglu", words=TWO_WIDTHS)
    found = answer(text, tmp_path, of_plan, {"swiglu": -0.05})
    assert found.verdict == "supported at narrow and wide"
    found = answer(text, tmp_path, of_plan, {"narrow": {"swiglu": -0.05}, "wide": {"swiglu": 0.05}})
    assert found.state == OPEN
    assert found.verdict == ("not settled: supported at narrow of glu_variants, contradicted at wide of glu_variants")


def test_one_model_under_two_names_is_one_size(tmp_path):
    words = ("ablation.sizes={fp32: model=nano precision=fp32, bf16: model=nano precision=bf16}",)
    found = answer("SwiGLU beats ReLU", tmp_path, plan("relu", "swiglu", words=words), {"swiglu": -0.05})
    assert found.verdict == "supported at fp32 and bf16 only"


def test_noise_does_not_settle_a_claim(tmp_path):
    noise = lambda planned: 3.0 + 0.1 * random.Random(f"{planned.arm} {planned.seed}").random()  # noqa: E731
    found = answer("SwiGLU beats ReLU", tmp_path, plan("relu", "swiglu"), loss=noise)
    assert found.state == OPEN
    assert re.fullmatch(r"not settled: (blocked|undecided): .*", found.verdict)


def test_two_seeds_do_not_settle_a_claim(tmp_path):
    found = answer("SwiGLU beats ReLU", tmp_path, plan("relu", "swiglu", seeds="[0,1]"), {"swiglu": -0.5})
    assert found.verdict == "not settled: undecided: final_eval_loss of swiglu and relu, 2 seed(s)"
    text, figures = "Sigmoid zigzags, tanh does not", CASES["Sigmoid zigzags, tanh does not"][1][1]
    found = answer(text, tmp_path, plan("sigmoid", "tanh", seeds="[0,1]"), {}, figures)
    assert found.verdict == "not settled: undecided: sign_agreement of sigmoid and tanh, 2 seed(s)"


def test_what_blocks_a_verdict_blocks_a_claim(tmp_path):
    text, effects = "SwiGLU beats ReLU", {"swiglu": -0.05}

    def verdict(*words: str, **more) -> str:
        return answer(text, tmp_path, plan("relu", "swiglu", words=words), effects, **more).verdict

    edge = losses(effects, noise=0.001, best=4.0)
    assert "blocked: swiglu: its best learning rate, 0.008, is the highest" in verdict(loss=edge)
    assert "blocked: swiglu: a verdict needs 3 learning rates" in verdict("ablation.rates=[1.0]")
    assert "blocked: swiglu has +50.0% parameters in its feed-forward layers" in verdict("ablation.budget=none")
    other = "ablation.arms={relu: ffn=relu, swiglu: ffn=custom ffn.formula=relu(gate)*up}"
    assert "blocked: swiglu is not the arm of that name in conf/ffn" in verdict(other)
    cost = answer("SwiGLU costs more parameters", tmp_path, plan("relu", "swiglu", words=(other,)), planned_runs=[])
    assert cost.verdict == "not settled: blocked: swiglu is not the arm of that name in conf/ffn"
    other = "ablation.arms={relu: ffn=relu, swiglu: ffn=swiglu ffn.per_layer.0=relu}"
    assert "blocked: swiglu is not the arm of that name in conf/ffn" in verdict(other)
    other = "ablation.arms={relu: ffn=relu, swiglu: ffn=swiglu optim.weight_decay=0.2}"
    assert "blocked: swiglu and relu differ in optim.weight_decay" in verdict(other)


def test_missing_runs_are_reported(tmp_path):
    text = "SwiGLU beats ReLU"
    found = answer(text, tmp_path, plan("relu", "swiglu"), planned_runs=[])
    assert found.verdict == "not settled: no seed has final_eval_loss of swiglu and relu"
    found = answer(text, tmp_path / "other", plan("relu", "gelu"), planned_runs=[])
    assert found.verdict == "not settled: none of the plans has the arms (swiglu, relu)"
    text = "The wider the model, the less the choice matters"
    found = answer(text, tmp_path / "third", plan("relu", "gelu"), planned_runs=[])
    assert found.verdict == "not settled: none of the plans has sizes of two widths"


def test_missing_pairs_count_as_not_shown(tmp_path):
    text = "GLU variants almost always beat the same curve without a gate"
    found = answer(text, tmp_path, plan("relu", "reglu"), {"reglu": -0.05})
    assert found.verdict == "not settled: the plan does not have both glu and sigmoid"


def test_a_claim_whose_premise_does_not_hold_is_not_settled(tmp_path):
    text = "Where ReLU's units die, LeakyReLU and PReLU are the cure"
    figures = {arm: {"dead": 0.001} for arm in ("relu", "leaky_relu", "prelu")}
    found = answer(text, tmp_path, plan("relu", "leaky_relu", "prelu"), {"prelu": -0.05}, figures)
    assert found.verdict.startswith("not settled: its premise does not hold here: dead: relu 0.00")


def test_a_difference_that_is_ruled_out_is_distinguished_from_the_opposite(tmp_path):
    text, of_plan = "SwiGLU beats ReLU", plan("relu", "swiglu")
    opposite = answer(text, tmp_path, of_plan, {"swiglu": 0.05})
    assert opposite.verdict == "contradicted at nano only"
    missing = answer(text, tmp_path, of_plan, {})
    assert missing.verdict == "contradicted at nano only: a difference of 0.01 in final_eval_loss is ruled out"
    same = answer(
        "ReLU's unboundedness explodes gradients, and SwiGLU is safer",
        tmp_path,
        of_plan,
        {},
        SAFE | {"swiglu": SAFE["relu"]},
    )
    assert same.verdict == (
        "contradicted at nano only: a difference by a factor of 1.1 in gradient_first_over_last is ruled out"
    )


def test_a_multiplier_needs_horizons(tmp_path):
    found = answer("SwiGLU converges in fewer steps", tmp_path, plan("relu", "swiglu"), {"swiglu": -0.05})
    assert found.verdict == "not settled: the plan has one horizon (ablation.horizons)"


def test_an_arm_that_diverges_supports_no_claim_of_its_own(tmp_path):
    diverges = lambda planned: float("nan") if (planned.arm, planned.seed) == ("swiglu", 1) else None  # noqa: E731
    for text in ("SwiGLU beats ReLU", "SwiGLU converges in fewer steps"):
        found = answer(text, tmp_path, plan("relu", "swiglu"), {"swiglu": -0.05}, loss=diverges)
        assert found.state == OPEN


# -------------------------------------------------------------------------------------------------------- the command


def test_without_folders_no_claim_is_settled(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.count("not settled:") == len(CLAIMS)
    tested = [claim for claim in CLAIMS.values() if not claim.untestable]
    assert {found.verdict for found in judge(tested, [])} == {"not settled: no plans given"}
    assert max(map(len, out.splitlines())) <= 80


def test_the_markdown_names_the_runs_and_the_plan_behind_a_verdict(tmp_path, capsys):
    of_plan = plan("relu", "swiglu")
    made = make(of_plan, tmp_path, losses({"swiglu": -0.05}, noise=0.001))
    assert main([str(made), f"to={tmp_path / 'claims.md'}"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    text = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert "| SwiGLU beats ReLU | supported at equal parameters | supported at nano only |" in text
    assert text.count("|---|---|---|") == 1
    section = text.partition("## SwiGLU beats ReLU")[2].partition("##")[0]
    assert f"nano of {made}, plan glu_variants {of_plan.hash}: supported" in section
    assert "`nano-swiglu-lr0.004-seed{0,1,2}`, `nano-relu-lr0.004-seed{0,1,2}`" in section
    assert re.search(
        r"final_eval_loss: swiglu -0\.0\d+ relative to relu \(95% interval -0\.0\d+ to -0\.0\d+, 3 seeds\)", section
    )
    assert markdown(judge(CLAIMS.values(), [read_results(made)])) == text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{folder}"], "has no manifest.json: it is not a folder of `python -m ablation.run`"),
        (["two=FILE.md"], "unknown option 'two': did you mean 'to'?"),
        (["to={folder}/none/claims.md"], "there is no such file or folder"),
    ],
)
def test_bad_input_is_refused(words, sentence, tmp_path):
    with pytest.raises(UserError, match=re.escape(sentence)):
        main([word.format(folder=tmp_path) for word in words])


def test_a_claim_waits_for_the_look_of_its_plan(tmp_path):
    of_plan = plan("relu", "swiglu", seeds="[0,1,2,3,4]")
    rule = losses({"swiglu": -0.05})
    four = [planned for planned in all_planned(of_plan, rule) if planned.seed != 4]
    found = answer("SwiGLU beats ReLU", tmp_path, of_plan, {"swiglu": -0.05}, planned_runs=four)
    assert found.verdict == (
        "not settled: final_eval_loss of swiglu and relu is withheld until 5 seeds have ended: 4 have"
    )


def test_a_multiplier_of_a_claim_is_that_of_the_report(tmp_path):
    """Refused where it would be extrapolated, and as uncertain as the learning rates."""
    of_plan = plan("relu", "swiglu", words=HORIZONS)
    text = "SwiGLU converges in fewer steps"
    beyond = answer(text, tmp_path / "beyond", of_plan, {"swiglu": -0.6})
    assert beyond.verdict.startswith("not settled: swiglu is as good as relu with less compute than its shortest run")

    def uncertain(planned: PlannedRun) -> float:
        sweep = random.Random(planned.name).gauss(0, 0.006) if planned.stage == "sweep" else 0.0
        return losses({"swiglu": -0.012}, noise=0.0005)(planned) + sweep

    results = read_results(make(of_plan, tmp_path / "uncertain", uncertain))
    [of] = series(results)
    fixed, _ = multipliers(results, of)["swiglu"]
    [found] = judge([CLAIMS[text]], [results])
    assert fixed.reason == "the interval covers 1"
    assert found.state == OPEN
