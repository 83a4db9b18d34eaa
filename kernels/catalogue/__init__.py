"""The published arms: where each is from, what it costs, and which of them a formula is.

arms.py       the files of conf/ffn, with the source and the other libraries that their comments name
likeness.py   which arms compute what a formula computes, and which differ only by constants
table.py      the figures of every arm, as text and as Markdown
__main__.py   the command `python -m formula_ffn.catalogue`

The files stay in conf/ffn, where Hydra composes runs from them and where an arm is added. This package reads them there, and
the installed library carries a copy (pyproject.toml).
"""
