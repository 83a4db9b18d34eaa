"""From a question to a verdict: arms at equal cost, over seeds and learning rates, and the statistics of their losses.

    plan.py            what a plan is: its keys, its runs, and their overrides
    resolve.py         checks a plan, loads its configurations and matches widths
    budget.py          finds the width at which an arm costs what the baseline costs
    speed.py           measures step times, for arms at equal wall-clock time
    command.py         builds the command that trains a run
    run.py             trains the runs of a plan, or submits them; continues wherever it was stopped
    slurm.py           turns a plan into SLURM job arrays
    manifest.py        records what the runs of a folder are, and refuses runs that do not match
    outcomes.py        reads the state of a run from its folder
    progress.py        decides which runs of a plan come next
    learning_rates.py  chooses an arm's learning rate from its sweep, and what missing the best one costs
    results.py         loads and checks everything the runs of a plan wrote
    growth.py          lets a plan grow, and records by what and what had been seen
    metrics.py         what arms are compared by
    statistics.py      paired differences, intervals, verdicts
    ttest.py           t-tests, what they can find, and Holm's adjustment
    power.py           says before a plan runs which differences it can find
    looks.py           pays for verdicts that are made more than once
    text_scatter.py    how far a difference depends on the held-out text
    multipliers.py     compute multipliers of planned horizons and sizes
    transfer.py        whether an arm's best learning rate holds at other sizes
    rank_agreement.py  whether the order of arms at fewer tokens or parameters is that at more
    efficiency.py      losses at equal time and equal memory
    measures.py        other metrics of the runs, by seed
    verdict.py         states the verdict in one sentence per size
    claims.py          published claims (claims.yaml) and what the runs show about them
    criteria.py        decides one criterion of a claim by the runs of a plan
    status.py          shows the state of a plan's runs in a terminal
    report.py          writes report.html (from report.html.jinja), CSV files and figures
    tables.py          tables of the report, with the plots of sketch.py
    figures.py         figures of the report, by what drawing.py has for all of them
    dashboard.py       builds workspaces, a report and a table on W&B

This package reads only what a run wrote to its folder, and never imports torch.
"""
