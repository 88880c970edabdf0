"""Everything that `import san_backbones.mm` changes outside this package, in the order of installation.

- `operators`: `import mmcv._ext` works if mmcv has no compiled operators. So this package must be imported before
  `mmdet.models`, `mmdet.apis`, `mmseg.models` and the like.
- `pickles`: `torch.load(weights_only=True)` reads what mmengine's Runner saves.
- `checkpoints`: mmengine reads only tensors and plain data, names files in errors, and reads `hf-hub:`.
- `configs`: `mmseg::` and the like in `_base_` are found if they come from OneDL's distributions.
- `datasets`: the error of a dataset that cannot be built names its annotation file.
- `sync_bn`: norms of type SyncBN, which torch restricts to GPUs, train without one.
- `classes`: configs can name `SANBackbone` and the other classes of this package (`REGISTERED`).

`effects.NAME.undo()` undoes one change, `effects.NAME.install()` makes it again; repeated calls have no effect.
`effects.undo()` undoes all. `import san_backbones`, which runs first, only registers models in timm and operators in
torch.
"""
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

__all__ = ['EFFECTS', 'Effect', 'checkpoints', 'classes', 'configs', 'datasets', 'install', 'operators', 'pickles',
           'sync_bn', 'undo']

# registry of mmengine, module of this package, class
REGISTERED = (
    ('MODELS', 'backbone', 'SANBackbone'),
    ('OPTIM_WRAPPER_CONSTRUCTORS', 'layer_decay', 'SANLayerDecayOptimWrapperConstructor'),
    ('OPTIM_WRAPPERS', 'autocast', 'AutocastOptimWrapper'),
    ('HOOKS', 'checks', 'CheckSetupHook'),
    ('HOOKS', 'invalid_features', 'CheckInvalidFeaturesHook'),
    ('HOOKS', 'exact_resume', 'ExactResumeHook'),
)


class Effect:
    """A change that can be undone, written as a generator that makes it before `yield` and undoes it after."""

    def __init__(self, change: Callable[[], Iterator[None]]):
        self.__doc__, self.__name__ = change.__doc__, change.__name__
        self._change, self._made = contextlib.contextmanager(change), contextlib.ExitStack()
        self.installed = False

    def install(self) -> None:
        """Makes the change, once."""
        if not self.installed:
            self._made.enter_context(self._change())
            self.installed = True

    def undo(self) -> None:
        """Undoes the change if it was made."""
        self._made.close()
        self.installed = False


@Effect
def operators() -> Iterator[None]:
    """Lets `mmcv.ops` find operators. Modules of it that are already imported keep them when this is undone."""
    from . import mmcv_ops
    mmcv_ops.install()
    yield
    mmcv_ops.uninstall()


@Effect
def pickles() -> Iterator[None]:
    """Adds the classes of mmengine's own checkpoints to torch's allow-list.

    torch 2.6 and later refuse other classes; without this, resuming, `load_from` and testing from a checkpoint fail in
    mmengine 0.10.7.
    """
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    from .._pickles import MMENGINE, entries
    before = get_safe_globals()
    added = [entry for entry in entries(MMENGINE) if entry not in before]
    add_safe_globals(added)
    yield
    kept = [entry for entry in get_safe_globals() if entry not in added]
    clear_safe_globals()
    add_safe_globals(kept)


@Effect
def checkpoints() -> Iterator[None]:
    """Makes mmengine read files by `load_from_local`, `hf-hub:` by `load_from_hub`, and only data from other sources.

    mmengine turns `weights_only` off for http:// and https://; onedl-mmengine also retries without it when torch
    refuses a file.
    """
    from mmengine.runner import checkpoint as mmengine
    from torch.hub import load_state_dict_from_url

    from .checkpoints import HUB_PREFIX, load_data, load_from_hub, load_from_local
    loader = mmengine.CheckpointLoader
    url, schemes, fallback = mmengine.load_url, dict(loader._schemes), getattr(mmengine, '_safe_torch_load', None)
    mmengine.load_url = partial(load_state_dict_from_url, weights_only=True)
    if fallback is not None:
        mmengine._safe_torch_load = load_data
    loader.register_scheme(prefixes='', loader=load_from_local, force=True)
    loader.register_scheme(prefixes=HUB_PREFIX, loader=load_from_hub, force=True)
    yield
    mmengine.load_url = url
    if fallback is not None:
        mmengine._safe_torch_load = fallback
    loader.register_scheme(prefixes='', loader=schemes[''], force=True)
    del loader._schemes[HUB_PREFIX]


@Effect
def configs() -> Iterator[None]:
    """Finds `mmseg::...` in `_base_` if mmseg comes from another distribution than mmsegmentation.

    mmengine looks up a module's OpenMMLab distribution by name. If that is not installed, the module's own name is put
    there, which mmengine accepts too.
    """
    from mmengine.config import utils
    before = dict(utils.MODULE2PACKAGE)
    for module, package in before.items():
        try:
            distribution(package)
        except PackageNotFoundError:
            if find_spec(module) is not None:
                utils.MODULE2PACKAGE[module] = module
    yield
    utils.MODULE2PACKAGE.update(before)


@Effect
def datasets() -> Iterator[None]:
    """Wraps the build functions of all registries of datasets, so that errors name files."""
    from mmengine.registry import DATASETS

    from .checks import naming_files

    def registries() -> tuple:  # evaluated again for undo: registries made meanwhile inherit the function
        return DATASETS, *DATASETS.children.values()

    for registry in registries():
        registry.build_func = naming_files(registry.build_func)
    yield
    for registry in registries():
        registry.build_func = getattr(registry.build_func, 'original', registry.build_func)


@Effect
def sync_bn() -> Iterator[None]:
    """Without a GPU, replaces 'SyncBN' in configs of backbones, necks and heads by a norm that trains on the CPU.

    torch's SyncBatchNorm refuses tensors on the CPU, and DistributedDataParallel refuses models that hold it there.
    """
    from mmengine.device import get_device
    from mmengine.registry import MODELS

    from ..norms import SyncBatchNorm
    # importing mmcv.cnn registers the 'SyncBN' that is replaced; mmengine alone registers no norms
    if get_device() != 'cpu' or find_spec('mmcv') is None:
        yield
        return
    import_module('mmcv.cnn')
    before = MODELS.module_dict['SyncBN']
    MODELS.register_module('SyncBN', module=SyncBatchNorm, force=True)
    yield
    MODELS.register_module('SyncBN', module=before, force=True)


@Effect
def classes() -> Iterator[None]:
    """Registers the classes of this package in mmengine's root registries."""
    import mmengine.registry
    for registry, module, name in REGISTERED:
        getattr(mmengine.registry, registry).register_module(
            module=getattr(import_module(f'.{module}', __package__), name))
    yield
    for registry, _, name in REGISTERED:
        del getattr(mmengine.registry, registry).module_dict[name]


EFFECTS = (operators, pickles, checkpoints, configs, datasets, sync_bn, classes)


def install() -> None:
    """Makes all changes."""
    for effect in EFFECTS:
        effect.install()


def undo() -> None:
    """Undoes all changes."""
    for effect in reversed(EFFECTS):
        effect.undo()
