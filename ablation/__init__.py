"""From a question to a verdict: arms at equal cost, over seeds and learning rates, and what their losses show.

    plan.py         a plan of conf/ablation, read and resolved: its runs, and what they cost
    budget.py       the width that makes an arm cost what the baseline costs
    statistics.py   paired differences, intervals, what could have been detected, verdicts
    verdict.py      a sentence for every size: what was shown, and what was not

This room learns of a run only from what the run wrote, and never imports torch.
"""
