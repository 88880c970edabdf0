"""Commands to get, convert, verify and publish the authors' weights and your own.

Run them by `san-backbones weights`, `python -m san_backbones.weights`, or `weights/*.py` of a checkout.
"""
