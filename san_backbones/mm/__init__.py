"""SAN for OpenMMLab: put `custom_imports = dict(imports=['san_backbones.mm'])` in a config, or import this first.

The import provides mmcv's operators if the compiled ones are missing, so it must come before `mmdet.models`,
`mmdet.apis`, `mmseg.models` and the like. It lets mmengine's own checkpoints load, but only tensors and plain data. It
registers `SANBackbone`, `SANLayerDecayOptimWrapperConstructor`, `AutocastOptimWrapper`, `CheckSetupHook`,
`CheckInvalidFeaturesHook` and `ExactResumeHook`. `san_backbones.mm.effects` lists all changes outside this package and
can undo each of them.
"""
from .._requirements import check_pickles

check_pickles('san_backbones.mm')

from . import effects  # noqa: E402

effects.install()

from .autocast import AutocastOptimWrapper  # noqa: E402
from .backbone import SANBackbone  # noqa: E402
from .checks import CheckSetupHook  # noqa: E402
from .exact_resume import ExactResumeHook  # noqa: E402
from .invalid_features import CheckInvalidFeaturesHook  # noqa: E402
from .layer_decay import SANLayerDecayOptimWrapperConstructor  # noqa: E402
from .mmcv_ops import operators_in_use  # noqa: E402

__all__ = ['AutocastOptimWrapper', 'CheckInvalidFeaturesHook', 'CheckSetupHook', 'ExactResumeHook', 'SANBackbone',
           'SANLayerDecayOptimWrapperConstructor', 'effects', 'operators_in_use']
