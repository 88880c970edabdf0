"""SAN for OpenMMLab: put `custom_imports = dict(imports=['san_backbones.mm'])` in a config, or import this first.

Importing this package

- supplies mmcv's operators where compiled ones are missing (`operators`), so it must come before `mmdet.models`,
  `mmdet.apis`, `mmseg.models` and the like;
- lets mmengine load its own checkpoints under torch 2.6 and later, and nothing but tensors and data (`checkpoints`);
- lets norms of type SyncBN, which torch restricts to GPUs, train where there is none (`norms`);
- lets `mmseg::` in `_base_` be found where MMSegmentation is OneDL's (`onedl`);
- lets the error of a dataset that cannot be built name its annotation file (`checks`);
- registers `SANBackbone`, `SANLayerDecayOptimWrapperConstructor`, `AutocastOptimWrapper`, `CheckSetupHook`,
  `CheckInvalidFeaturesHook` and `ExactResumeHook` in mmengine's root registries.
"""
from .._requirements import check_pickles

check_pickles('san_backbones.mm')

from .operators import install_operators, operators_in_use  # noqa: E402

install_operators()

from .checkpoints import allow_mmengine_checkpoints  # noqa: E402

allow_mmengine_checkpoints()

from .autocast import AutocastOptimWrapper  # noqa: E402
from .backbone import SANBackbone  # noqa: E402
from .checks import CheckSetupHook, name_files_of_datasets  # noqa: E402
from .exact_resume import ExactResumeHook  # noqa: E402
from .invalid_features import CheckInvalidFeaturesHook  # noqa: E402
from .layer_decay import SANLayerDecayOptimWrapperConstructor  # noqa: E402
from .norms import allow_sync_bn_on_cpu  # noqa: E402
from .onedl import find_configs  # noqa: E402

name_files_of_datasets()
allow_sync_bn_on_cpu()
find_configs()

__all__ = ['AutocastOptimWrapper', 'CheckInvalidFeaturesHook', 'CheckSetupHook', 'ExactResumeHook', 'SANBackbone',
           'SANLayerDecayOptimWrapperConstructor', 'operators_in_use']
