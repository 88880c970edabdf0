"""Norms in configs."""
from mmengine.device import get_device
from mmengine.registry import MODELS

from ..norms import SyncBatchNorm

__all__ = ['allow_sync_bn_on_cpu']


def allow_sync_bn_on_cpu() -> None:
    """Where there is no GPU, makes 'SyncBN' in a config one that trains without, in backbones, necks and heads.

    torch's own refuses tensors on the CPU, and so does DistributedDataParallel a model that holds it.
    """
    if get_device() != 'cpu':
        return
    try:
        import mmcv.cnn  # noqa: F401, registers the 'SyncBN' that this one takes the place of
    except ModuleNotFoundError:  # mmengine alone has no norms by name
        return
    MODELS.register_module('SyncBN', module=SyncBatchNorm, force=True)
