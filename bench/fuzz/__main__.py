"""Feed random and damaged input to what reads it: `python -m bench.fuzz inputs=20000 seed=0`.

    inputs=20000   of each campaign
    seed=0         of the inputs
    campaign=NAME  one of those below; without it all
    first=0        number of the first input, to repeat a failure or to go on
    seconds=1.0    of processor time that an input may take

formulas    sums, products, powers and calls at random, and mutations of the arms of conf/ffn, with parameters and
            `from_output`: parsed, checked, differentiated and lowered to the programs that backends print, telemetry's too.
            Only FormulaError may be raised.
overrides   keys of the schema and others with random values, read by `conf.load.load`, checked by `validate`, and read back
            from YAML, which must give the same configuration.
indexes     damaged indexes and records of shards of a prepared corpus, opened as training opens it and as `data.verify` does,
            and damaged indexes of a checkpoint, resumed from.
manifests   damaged manifests of checkpoints and plans, config.yaml, state.json, ending.json.
tokenizers  damaged SentencePiece models, tokenizer.json and the configurations beside them, loaded and used.
metrics     damaged metrics.jsonl, summary.json and provenance.json, read as status, report, dashboard, `training.compare`,
            `training.verify` and a resumed run read them.
html        markup, quotes and control characters in names, formulas, notes and hosts: they must stay text in the report, in
            the dashboard and on a terminal.

From overrides on, only UserError may be raised, and by readers of records nothing. Every input that raises something else,
crashes its process, starts another one, takes too long or more than 1 GiB is printed; the status is then 1.
"""

from __future__ import annotations

import importlib
import os
import resource
import tempfile
from pathlib import Path

from bench.fuzz.campaign import Campaign, fuzz
from kernels.common.commands import run_command
from kernels.common.errors import unknown
from kernels.common.options import read_options

_OPTIONS = {"inputs": 20_000, "seed": 0, "campaign": "", "seconds": 1.0, "first": 0}
CAMPAIGNS = {  # the module of each, whose `campaign(name, folder)` prepares it in an empty folder
    "formulas": "texts",
    "overrides": "texts",
    "indexes": "indexes",
    "manifests": "manifests",
    "tokenizers": "tokenizers",
    "metrics": "metrics",
    "html": "pages",
}


def main(argv: list[str]) -> int:
    options = read_options(argv, _OPTIONS)
    if options["campaign"] and options["campaign"] not in CAMPAIGNS:
        raise unknown("campaign", options["campaign"], CAMPAIGNS)
    failed = False
    for name in [options["campaign"]] if options["campaign"] else CAMPAIGNS:
        with tempfile.TemporaryDirectory() as folder:
            before = _processor_seconds()
            numbers = range(options["first"], options["first"] + options["inputs"])
            result = fuzz(name, prepare(name, Path(folder)), numbers, options["seed"], options["seconds"])
        for failure in result.failures:
            print(f"  {failure}")
        print(
            f"{name}: {options['inputs']:,} inputs, seed {options['seed']}: {result.accepted:,} accepted, {result.refused:,} "
            f"refused, {len(result.failures)} failures; slowest {result.slowest:.2f} s: {result.slowest_input[:100]}; "
            f"{_processor_seconds() - before:.0f} s in all",
            flush=True,
        )
        failed |= bool(result.failures)
    return int(failed)


def prepare(name: str, folder: Path) -> Campaign:
    """Return a campaign, which reads copies of sound files that it makes in an empty folder."""
    return importlib.import_module(f"bench.fuzz.{CAMPAIGNS[name]}").campaign(name, folder)


def _processor_seconds() -> float:
    """Return the processor time of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    run_command(main, __doc__)
