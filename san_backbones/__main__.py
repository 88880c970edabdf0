"""`python -m san_backbones`: the command line, where its script `san-backbones` is not on the PATH."""
from .cli import main

if __name__ == '__main__':
    main()
