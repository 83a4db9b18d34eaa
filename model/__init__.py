"""The decoder, written once.

`decoder.py` is the model; `attention.py`, `loss.py` and `layers.py` are the operations it calls, one seam each;
`initialise.py` gives the same weights for the same (name, seed); `generate.py` continues a prompt. Parameters, FLOPs and
bytes of a configuration are counted in `launch/estimate/counts.py`, without torch. Training is in `training/`.
"""
