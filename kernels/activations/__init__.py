"""The differentiable function of a formula, and its backends.

activation.py                          `Activation`: argument checks, choice of the backend, autograd
ops.py                                 custom operators of torch, for torch.compile and FakeTensor
reference.py                           the backend in plain torch, in any precision
c_source.py, c_backend.py              the C backend: generated source, calls
triton_source.py, triton_backend.py    the Triton backend
telemetry.py                           statistics that the forward kernel computes
eager.py                               the formula as hand-written torch, the baseline
properties.py                          cost, memory and shape of an activation
"""

from . import ops  # registers the operators
from .activation import Activation

__all__ = ["Activation", "ops"]
