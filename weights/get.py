"""Gets pretrained weights: `san-backbones weights get`, which says more with --help."""
import sys

from san_backbones.weights.get import main

if __name__ == '__main__':
    sys.exit(main())
