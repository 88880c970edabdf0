"""Runs the command line as `python -m san_backbones`, for when the script `san-backbones` is not on the PATH."""
from san_backbones_cli import main

if __name__ == '__main__':
    main()
