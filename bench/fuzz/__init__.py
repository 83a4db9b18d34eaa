"""Campaigns of random and damaged input for whatever reads text and files: `python -m bench.fuzz` (`__main__.py`).

campaign.py    how a campaign runs: in forked children with bounds, an input a function of campaign, seed and number
mutations.py   how JSON, YAML and bytes are damaged
sound.py       the sound folders that are damaged: a prepared corpus, a run with a checkpoint, a plan
texts.py       formulas, overrides
indexes.py     the indexes of a prepared corpus and of a checkpoint
manifests.py   manifests, config.yaml and other files that say what a folder is
tokenizers.py  folders given as tokenizer.path
metrics.py     what a run records: metrics.jsonl, summary.json, provenance.json
pages.py       names, formulas and notes in the report, the dashboard and on a terminal
"""
