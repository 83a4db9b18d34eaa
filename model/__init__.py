"""The decoder, written once.

`decoder.py` is the model; `attention.py`, `loss.py` and `layers.py` are the operations it calls, one seam each;
`initialise.py` gives the same weights for the same (name, seed); `accounting.py` counts parameters, FLOPs and bytes from a
configuration alone, without torch; `generate.py` continues a prompt. How the model is trained is `training/`'s affair.
"""
