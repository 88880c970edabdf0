"""Runs a script that imports mmdet or mmseg before it reads a config: `python -m san_backbones.mm.run SCRIPT [ARGS]`.

`custom_imports` in a config comes too late for MMDetection's tools/test.py and its like, and for data loader workers
that are spawned: they import `mmcv.ops` first. Started this way, `san_backbones.mm` is there before them.

Under torchrun (`torchrun --nproc-per-node=2 -m san_backbones.mm.run SCRIPT ... --launcher pytorch`) it also makes the
process group where there is no GPU, over gloo: MMEngine would ask for one.
"""
import atexit
import os
import sys
import threading

import torch
import torch.distributed as dist


def _end() -> None:
    """Ends the process as Python does, but for what is in C++, where a thread of gloo aborts it now and then."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == '__main__':
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        sys.exit(f'{__doc__}\ngiven: {" ".join(sys.argv[1:]) or "nothing"}; expected the path of a Python script')
    over_gloo = dist.is_available() and dist.is_torchelastic_launched() and not torch.cuda.is_available()
    if over_gloo:
        dist.init_process_group('gloo')
    del sys.argv[0]
    __file__ = os.path.abspath(sys.argv[0])
    sys.path[0] = os.path.dirname(__file__)
    # in this module, not a new one: a spawned worker imports the main module by its name, and san_backbones.mm with it
    with open(__file__, 'rb') as script:
        exec(compile(script.read(), __file__, 'exec'))
    if over_gloo:
        _end()
