"""Runs a script that imports mmdet or mmseg before it reads a config: `python -m san_backbones.mm.run SCRIPT [ARGS]`.

`custom_imports` in a config comes too late for MMDetection's tools/test.py and its like, and for data loader workers
that are spawned: they import `mmcv.ops` first. Started this way, `san_backbones.mm` is there before them. Otherwise it
is `san_backbones.run`: it takes a module too, as `-m MODULE`.

Under torchrun (`torchrun --nproc-per-node=2 -m san_backbones.mm.run SCRIPT ... --launcher pytorch`) it also makes the
process group where there is no GPU, over gloo: MMEngine would ask for one.
"""
import torch.distributed as dist

from san_backbones.run import start, without_gpus


def _join() -> None:
    if without_gpus():
        dist.init_process_group('gloo')


if __name__ in ('__main__', '__mp_main__'):
    start(globals(), _join)
