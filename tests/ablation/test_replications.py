"""Published comparisons as plans: what they report is shown beside what runs find, and decides nothing."""

from __future__ import annotations

import pytest

from ablation.growth import continue_plan
from ablation.plan import read_plan
from ablation.report import page
from ablation.resolve import resolve
from ablation.results import read_results
from conf.keys import choices
from kernels.common.errors import UserError
from tests.ablation.made import losses, make, plan_of
from tests.ablation.test_statistics import SHAZEER

PLANS = [name for name in choices("ablation") if name.startswith("replications/")]


@pytest.mark.parametrize("name", PLANS)
def test_a_replication_has_a_source_and_reports_on_its_own_arms(name):
    config, _ = read_plan([f"ablation={name}"])
    assert config.reported["source"]
    assert set(config.reported["values"]) <= set(config.arms)
    assert config.baseline in config.reported["values"]


def test_the_table_is_that_of_the_paper():
    config, _ = read_plan(["ablation=replications/shazeer_2020"])
    values = {arm.replace("silu", "swish"): value for arm, value in config.reported["values"].items()}
    assert values == {arm: mean for arm, (mean, _) in SHAZEER.items()}


def test_the_report_shows_both(tmp_path):
    plan = plan_of("ablation=replications/xielu_2024", "ablation.seeds=[0,1,2]")
    results = read_results(make(plan, tmp_path, losses({"relu2": 0.05, "xielu": -0.05}, noise=0.001)))
    text = page(results, [])
    assert "They report, we find. Huang 2024 (arXiv 2411.13010). 1.1B parameters" in text
    row = text[text.index("they report, loss") :].partition("</table>")[0]
    assert "-0.016" in row  # relu2 less swiglu, as reported
    assert ">worse<" in row
    assert ">better<" in row


def test_what_is_reported_belongs_to_no_hash_that_runs_depend_on(tmp_path):
    plan = plan_of("ablation=replications/xielu_2024", "ablation.seeds=[0,1,2]")
    folder = make(plan, tmp_path, losses({}, noise=0.001))
    other = plan_of(
        "ablation=replications/xielu_2024", "ablation.seeds=[0,1,2]", "ablation.reported={source: a letter}"
    )
    continued = continue_plan(other, folder)
    assert (continued.amendment, continued.narrower) == (None, False)


@pytest.mark.parametrize("reported", ["5", "{values: {relu: 1}}", "{source: x, values: {relu: low}}", "{source: x, page: 3}",
                                      "{source: x, values: [1]}", "{source: x, note: 3}"])  # fmt: skip
def test_another_form_is_refused(reported):
    with pytest.raises(UserError, match=r"ablation\.reported must be"):
        resolve(*read_plan(["ablation=smoke", f"ablation.reported={reported}"]))
