"""What the commands of `san-backbones` do with models, weights and pictures.

Their options are in `san_backbones_cli`, which imports this package when a command runs.
"""
