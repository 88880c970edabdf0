"""The authors' weights, and weights of one's own: getting, converting, verifying and publishing them.

`san-backbones weights` runs the commands; `python -m san_backbones.weights` does too, and `weights/*.py` of a checkout.
"""
