"""The compiler of formulas: from text to the programs that backends print.

grammar.py    the names and operators of formulas, and their tree
parser.py     text -> a checked tree (`parse`); both with neither torch nor SymPy
parameters.py what a formula's parameters are: fixed, learned or scheduled
hints.py      what a near miss was meant to be
functions.py  the elementary functions, one entry each
intervals.py  interval arithmetic, for domains.py
domains.py    refuses division by zero and arguments outside of a domain
derivative.py derivatives of SymPy expressions, shared and bounded
reductions.py numbers per token that a formula takes from all channels, and the passes that compute them
symbolic.py   tree -> SymPy
compiled.py   derivatives -> programs (`compile_formula`)
program.py    straight-line programs, and the lowering of expressions to them
rows.py       reductions over rows of NumPy arrays, and their overflow
safety.py     refuses programs that overflow where the true value is moderate
settled.py    a formula at given values of its scheduled parameters
gaussian.py   RMS of h under standard normal pre-activations
"""

from .grammar import Formula, FormulaError, Node
from .parameters import Learned, Scheduled
from .parser import parse

__all__ = ["Formula", "FormulaError", "Learned", "Node", "Scheduled", "parse"]
