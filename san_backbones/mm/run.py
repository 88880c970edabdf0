"""Runs a script that imports mmdet or mmseg before it reads a config: `python -m san_backbones.mm.run SCRIPT [ARGS]`.

`custom_imports` in a config is too late for scripts such as MMDetection's tools/test.py and for spawned data loader
workers: they import `mmcv.ops` first. This imports `san_backbones.mm` before them. In all else it works like
`san_backbones.run`, and also runs a module, `-m MODULE`.

Under torchrun (`torchrun --nproc-per-node=2 -m san_backbones.mm.run SCRIPT ... --launcher pytorch`) without a GPU it
also makes the process group, over gloo: MMEngine would require a GPU.
"""
import torch.distributed as dist

from san_backbones.run import start, without_gpus


def _join() -> None:
    if without_gpus():
        dist.init_process_group('gloo')


if __name__ in ('__main__', '__mp_main__'):
    start(globals(), _join)
