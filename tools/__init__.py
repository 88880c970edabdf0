"""What maintainers run, from the folder above: `python -m tools.NAME`."""
