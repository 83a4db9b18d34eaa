"""The differentiable function that a formula describes, and the backends that compute it.

activation.py                          `Activation`: checks, choice of the backend, autograd
ops.py                                 the same as operators of torch, for torch.compile and FakeTensor
reference.py                           the backend in plain torch, in any precision
c_source.py, c_backend.py              the C backend: generated source, and the calls
triton_source.py, triton_backend.py    the Triton backend
telemetry.py                           statistics that a forward kernel computes on the way
eager.py                               the formula as one writes it by hand, to compare with
properties.py                          cost and shape of an activation before it is trained
"""

from . import ops  # registers the operators
from .activation import Activation

__all__ = ["Activation", "ops"]
