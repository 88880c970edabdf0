"""Measures accuracy: `san-backbones weights verify`, which says more with --help."""
import sys

from san_backbones.weights.verify import main

if __name__ == '__main__':
    sys.exit(main())
