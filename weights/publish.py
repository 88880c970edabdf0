"""Publishes the authors' weights: `san-backbones weights publish`, which says more with --help."""
import sys

from san_backbones.weights.publish import main

if __name__ == '__main__':
    sys.exit(main())
