"""NorMuon (Li et al. 2025, arXiv 2510.05491): Muon whose updates have rows of one size, for the hidden matrices."""

from __future__ import annotations

from conf.optimizers.muon import OrthogonalOptimizer
from conf.optimizers.optimizer import Rule

NORMUON = OrthogonalOptimizer("normuon", Rule("normuon", ("momentum",), 26, row_states=("row_variance",)))
