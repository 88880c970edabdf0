"""Faults of a dataset, or between dataset and model, as errors that name the file and what does not match.

mmengine, mmdet and mmseg find some of them late or without naming the file, others never: where the categories of a
COCO file are not the classes of the config, the dataset is empty, or labels mean another class.
"""
import re
from json import JSONDecoder
from typing import Any, Callable, Iterator, List, Optional

from mmengine.dataset import Compose
from mmengine.fileio import get_text
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS

__all__ = ['CheckSetupHook', 'NamedPipeline', 'name_files_of_datasets']


def _some(names: List[Any]) -> str:
    return ', '.join(map(repr, names[:10])) + (f', ... ({len(names)})' if len(names) > 10 else '')


def _classes(dataset: Any) -> Optional[List[str]]:
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    return None if classes is None else list(classes)


def _source(dataset: Any) -> str:
    """The annotation file of a dataset, or its folders."""
    return str(getattr(dataset, 'ann_file', '') or ', '.join(map(str, getattr(dataset, 'data_prefix', {}).values())))


def _category_fault(dataset: Any) -> Optional[str]:
    """What is wrong between classes and file, if it is a COCO file: mmdet numbers classes in the order of the file."""
    classes = _classes(dataset)
    if classes is None or getattr(type(dataset), 'load_data_list', None).__module__ != 'mmdet.datasets.coco':
        return None
    text = get_text(dataset.ann_file, backend_args=dataset.backend_args)
    start = re.search(r'"categories"\s*:\s*(?=\[)', text)
    categories = JSONDecoder().raw_decode(text, start.end())[0]
    names, ids = [category['name'] for category in categories], {category['id'] for category in categories}
    if [name for name in names if name in classes] != classes:
        absent = [name for name in classes if name not in names]
        return (f'{dataset.ann_file} does not match the classes of {type(dataset).__name__}: '
                + (f'it has no category {_some(absent)}' if absent else 'its categories are in another order')
                + f'. Its categories are {_some(names)}, the classes {_some(classes)}. Give the dataset '
                "metainfo=dict(classes=...) with names of the file's categories, in the file's order")
    unknown = sorted(set(getattr(dataset, 'cat_img_map', {})) - ids)
    return (f'{dataset.ann_file} has annotations of category_id {_some(unknown)}; its categories have the ids '
            f'{_some(sorted(ids))}') if unknown else None


def _explained(error: Exception, build_lazily: Callable) -> Exception:
    """An error that names what the dataset, which `error` kept from being built, read; `error` itself if it does."""
    try:
        dataset = build_lazily()
    except Exception:  # it is not for what it reads; or an inner dataset's error, explained already
        return error
    try:
        fault = _category_fault(dataset)
    except Exception:  # the file cannot be read, as `error` says
        fault = None
    source = _source(dataset)
    if fault or not source or source in str(error):
        return ValueError(fault) if fault else error
    empty = 'no sample is left, it has none or filter_cfg drops all: ' if 'at least one array' in str(error) else ''
    return RuntimeError(
        f'{type(dataset).__name__} cannot be read from {source}: {empty}{type(error).__name__}: {error}')


def name_files_of_datasets() -> None:
    """Lets the error of a dataset that cannot be built name its annotation file. Calling it again changes nothing."""
    def naming(build):
        def build_dataset(cfg, *args, **kwargs):
            try:
                return build(cfg, *args, **kwargs)
            except Exception as error:
                explained = _explained(error, lambda: build({**cfg, 'lazy_init': True}, *args, **kwargs))
                if explained is error:
                    raise
                raise explained from error
        build_dataset.names_files = True
        return build_dataset

    for registry in (DATASETS, *DATASETS.children.values()):
        if not hasattr(registry.build_func, 'names_files'):
            registry.build_func = naming(registry.build_func)


class NamedPipeline(Compose):
    """The pipeline of a dataset, whose errors name the files of the sample.

    Raises:
        RuntimeError: A transform failed; a polygon has an odd number of coordinates; a label in a mask of mmseg's
            datasets is beyond the classes and not the one to ignore.
    """

    def __init__(self, dataset: Any):
        self.transforms = dataset.pipeline.transforms
        self.ann_file = getattr(dataset, 'ann_file', None)
        self.classes = _classes(dataset) if hasattr(dataset, 'reduce_zero_label') else None  # mmseg's
        self.ignore_index = getattr(dataset, 'ignore_index', 255)

    def __call__(self, data: dict) -> Optional[dict]:
        """Samples as `Compose` has them."""
        files = [str(data[key]) for key in ('img_path', 'seg_map_path') if data.get(key)]
        try:
            for instance in data.get('instances', ()):
                polygons = instance.get('mask') if isinstance(instance.get('mask'), list) else []
                if any(isinstance(polygon, list) and len(polygon) % 2 for polygon in polygons):
                    raise ValueError(f'a polygon with an odd number of coordinates: {str(instance)[:200]}')
            results = super().__call__(data)
            sample = getattr(results and results.get('data_samples'), 'gt_sem_seg', None)
            if self.classes is not None and sample is not None:
                beyond = sample.data[(sample.data >= len(self.classes)) & (sample.data != self.ignore_index)].unique()
                if len(beyond):
                    raise ValueError(f'labels {_some(beyond.tolist())} are beyond the {len(self.classes)} classes '
                                     f'{_some(self.classes)}; labels to ignore are {self.ignore_index}')
            return results
        except Exception as error:
            files += [str(self.ann_file)] if self.ann_file else []
            raise RuntimeError(f'sample {" of ".join(files)}: {type(error).__name__}: {error}') from error


@HOOKS.register_module()
class CheckSetupHook(Hook):
    """Checks each dataset of a runner, and the model against it, before the first step, and names files in errors.

    Raises:
        ValueError: A dataset is empty; its classes are not among the categories of its COCO file, in the file's order;
            or a head has another number of classes.
    """

    def before_run(self, runner) -> None:
        """Looks at the datasets of those loops that this run has built."""
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            for dataset in self._leaves(getattr(getattr(loop, 'dataloader', None), 'dataset', None)):
                fault = _category_fault(dataset) or self._fault(dataset, runner.model)
                if fault:
                    raise ValueError(fault)
                if type(getattr(dataset, 'pipeline', None)) is Compose:
                    dataset.pipeline = NamedPipeline(dataset)

    def _leaves(self, dataset: Any) -> Iterator[Any]:
        """The datasets in wrappers such as ConcatDataset and RepeatDataset, or the dataset itself."""
        inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
        if inner[0] is not None:
            for part in inner:
                yield from self._leaves(part)
        elif dataset is not None:
            yield dataset

    def _fault(self, dataset: Any, model: Any) -> Optional[str]:
        name = f'{type(dataset).__name__} from {_source(dataset)}'
        if len(dataset) == 0:
            return f'{name} is empty: it has no samples, or filter_cfg drops all of them'
        classes = _classes(dataset)
        if classes is None:
            return None
        allowed = {len(classes), len(dataset.metainfo.get('thing_classes', classes))}  # panoptic: heads for things only
        heads = re.compile(r'.*(?<!rpn_)(?<!semantic_)head(\.\d+)?')
        for head, module in model.named_modules():
            count = getattr(module, 'num_classes', None)
            if isinstance(count, int) and count not in allowed and heads.fullmatch(head):
                return (f'{head} of the model has num_classes={count}, but {name} has {len(classes)} classes '
                        f'{_some(classes)}. Set num_classes of every head to {len(classes)}, or the '
                        'metainfo=dict(classes=...) of the dataset')
        return None
