"""SAN for OpenMMLab: put `custom_imports = dict(imports=['san_backbones.mm'])` in a config, or import this first.

Importing this package
- supplies mmcv's operators where compiled ones are missing (`operators`), so it must come before `mmdet.models`,
  `mmdet.apis`, `mmseg.models` and the like;
- lets mmengine load its own checkpoints under torch 2.6 and later (`checkpoints`);
- lets the error of a dataset that cannot be built name its annotation file (`checks`);
- registers `SANBackbone` and `CheckSetupHook` in mmengine's root registries.
"""
from .operators import install_operators, operators_in_use

install_operators()

from .checkpoints import allow_mmengine_checkpoints  # noqa: E402

allow_mmengine_checkpoints()

from .checks import CheckSetupHook, name_files_of_datasets  # noqa: E402

name_files_of_datasets()

from .backbone import SANBackbone  # noqa: E402

__all__ = ['CheckSetupHook', 'SANBackbone', 'operators_in_use']
