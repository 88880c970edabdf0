"""Script of `mim train san-backbones CONFIG` and `mim test san-backbones CONFIG --checkpoint FILE`.

The wheel holds this file as `.mim/tools/train.py` and `.mim/tools/test.py`, where mim looks. Each runs the script of
the same name from the framework of the config (its `default_scope`), but imports mmcv's operators first: MMDetection's
tools/test.py imports them before it reads a config, so `mim test mmdet` needs compiled ones.
"""
import importlib.util
import os
import sys

import san_backbones.mm  # noqa: F401  at the top, since spawned workers import this file again


def find_tool(name: str, config: str) -> str:
    """Returns the path of the script `name` ('train.py', 'test.py') of the framework of a config file.

    Raises:
        ValueError: The config names no `default_scope`, or its package is missing or has no such script.
    """
    from mmengine.config import Config
    scope = Config.fromfile(config).get('default_scope')
    package = importlib.util.find_spec(scope) if scope else None
    path = os.path.join(os.path.dirname(package.origin), '.mim', 'tools', name) if package and package.origin else ''
    if not os.path.isfile(path):
        raise ValueError(f'{config}: default_scope is {scope!r}; expected an installed package that has '
                         f".mim/tools/{name}, such as 'mmdet', 'mmseg' or 'mmpretrain'")
    return path


if __name__ == '__main__':
    config = next((argument for argument in sys.argv[1:] if os.path.isfile(argument)), None)
    if config is None:  # mim asks for -h before it trains
        print(f'{__doc__}\nusage: {sys.argv[0]} CONFIG [arguments of the script that is run]')
        sys.exit(not {'-h', '--help'} & set(sys.argv[1:]))
    sys.argv[0] = find_tool(os.path.basename(__file__), config)
    with open(sys.argv[0], 'rb') as script:
        exec(compile(script.read(), sys.argv[0], 'exec'))
