"""Campaigns of random and damaged input for whatever reads text and files: `python -m bench.fuzz` (`__main__.py`).

campaign.py    how a campaign runs: in forked children with bounds, an input a function of campaign, seed and number
mutations.py   how JSON, YAML and bytes are damaged
sound.py       the sound folders that are damaged: a prepared corpus, a run with a checkpoint, a plan
texts.py       formulas, overrides
indexes.py     the indexes of a prepared corpus and of a checkpoint
"""
