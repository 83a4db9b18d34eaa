"""The differentiable function of a formula, and its backends.

activation.py                          `Activation`: argument checks, choice of the backend, autograd
ops.py                                 custom operators of torch, for torch.compile and FakeTensor
reference.py                           the backend in plain torch, in any precision
reductions.py                          reductions over d_ff, which tensor ranks exchange
c_source.py, c_rows.py, c_backend.py   the C backend: generated source, that of formulas with reductions, calls
triton_*.py                            the Triton backend, likewise
telemetry.py                           statistics that the forward kernel computes
eager.py                               the formula as hand-written torch, the baseline
properties.py                          cost, memory and shape of an activation
"""

from . import ops  # registers the operators
from .activation import Activation

__all__ = ["Activation", "ops"]
