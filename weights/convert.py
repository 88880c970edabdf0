"""Converts a checkpoint: `san-backbones weights convert`, which says more with --help."""
import sys

from san_backbones.weights.convert import main

if __name__ == '__main__':
    sys.exit(main())
