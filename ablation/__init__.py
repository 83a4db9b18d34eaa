"""From a question to a verdict: arms at equal cost, over seeds and learning rates, and what their losses show.

    plan.py         a plan of conf/ablation, read and resolved: its runs, and what they cost
    budget.py       the width that makes an arm cost what the baseline costs
    speed.py        step times, for arms at equal time
    command.py      the command that trains a run
    run.py          a plan becomes runs; goes on wherever it was stopped
    manifest.py     what the runs of a folder are, refused when it does not fit them
    outcomes.py      how a run stands, from its folder alone
    results.py      what the runs of a plan showed, checked
    statistics.py   paired differences, intervals, what could have been detected, verdicts
    efficiency.py   what a loss costs: compute, seconds, memory
    measures.py     other figures of runs, by seed
    verdict.py      the verdict in a sentence
    claims.py       what articles claim (claims.yaml), and what runs say of it
    status.py       how the runs of a plan stand, at a glance
    report.py       report.html (page.html is its frame), results.csv and figures (figures.py)
    dashboard.py    workspaces, a report and a table of a plan on W&B

This room learns of a run only from what the run wrote, and never imports torch.
"""
