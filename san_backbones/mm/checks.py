"""Checks datasets, and the model against them, with errors that name the file and what does not match.

mmengine, mmdet and mmseg find some of these faults late or without naming the file, others never: the categories of a
COCO file are not the classes of the config, the dataset is empty, or labels mean another class.
"""
import re
from collections.abc import Sized
from json import JSONDecoder
from typing import Any
from collections.abc import Callable, Iterator, Sequence

from mmengine.dataset import Compose
from mmengine.fileio import get_text
from mmengine.hooks import Hook

from .checkpoints import resume_from_whole

__all__ = ['CheckSetupHook', 'NamedPipeline', 'naming_files']


def _list(names: list[Any]) -> str:
    return ', '.join(map(repr, names[:10])) + (f', ... ({len(names)})' if len(names) > 10 else '')


def _classes(dataset: Any) -> list[str] | None:
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    return None if classes is None else list(classes)


def _heads(model: Any) -> list[tuple[str, Any]]:
    """Returns the heads of a model that classify the dataset's classes, without those for proposals or boundaries."""
    name_of_a_head = re.compile(r'.*(?<!rpn_)(?<!semantic_)head(\.\d+)?')
    return [(name, module) for name, module in model.named_modules()
            if name_of_a_head.fullmatch(name) and not hasattr(module, 'boundary_threshold')]


def _source(dataset: Any) -> str:
    """Returns the annotation file of a dataset, or its folders."""
    return str(getattr(dataset, 'ann_file', '') or ', '.join(map(str, getattr(dataset, 'data_prefix', {}).values())))


def _category_fault(dataset: Any) -> str | None:
    """Describes a mismatch between the classes and a COCO file, whose order numbers the classes in mmdet; or None."""
    classes, loader = _classes(dataset), getattr(type(dataset), 'load_data_list', None)
    if classes is None or getattr(loader, '__module__', None) != 'mmdet.datasets.coco':
        return None
    text = get_text(dataset.ann_file, backend_args=dataset.backend_args)
    starts = re.finditer(r'"categories"\s*:\s*(?=\[)', text)
    found = (JSONDecoder().raw_decode(text, start.end())[0] for start in starts)
    categories = next((value for value in found if all(isinstance(category, dict) for category in value)), None)
    if categories is None:  # another format, which the dataset can read
        return None
    names, ids = [category['name'] for category in categories], {category['id'] for category in categories}
    if [name for name in names if name in classes] != classes:
        absent = [name for name in classes if name not in names]
        return (f'{dataset.ann_file} does not match the classes of {type(dataset).__name__}: '
                + (f'it has no category {_list(absent)}' if absent else 'its categories are in another order')
                + f'. Its categories are {_list(names)}, the classes {_list(classes)}. Give the dataset '
                "metainfo=dict(classes=...) with names of the file's categories, in the file's order")
    unknown = sorted(set(getattr(dataset, 'cat_img_map', {})) - ids)
    return (f'{dataset.ann_file} has annotations of category_id {_list(unknown)}; its categories have the ids '
            f'{_list(sorted(ids))}') if unknown else None


def _explain(error: Exception, build_lazily: Callable) -> Exception:
    """Returns an error that names the file of a dataset that could not be built; `error` itself if it names it."""
    try:
        dataset = build_lazily()
    except Exception:  # the error is not about the file, or comes from an inner dataset and is explained already
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


def naming_files(build: Callable) -> Callable:
    """Wraps the `build_func` of a registry of datasets, so that its errors name the annotation file.

    The attribute `original` of the result is `build`. A function that is wrapped already is returned unchanged.
    """
    if hasattr(build, 'original'):
        return build

    def build_dataset(cfg, *args, **kwargs):
        try:
            return build(cfg, *args, **kwargs)
        except Exception as error:
            explained = _explain(error, lambda: build({**cfg, 'lazy_init': True}, *args, **kwargs))
            if explained is error:
                raise
            raise explained from error
    build_dataset.original = build  # type: ignore[attr-defined]
    return build_dataset


class NamedPipeline(Compose):
    """Runs the pipeline of a dataset, with errors that name the files of the sample.

    Args:
        dataset: A dataset of mmengine's interface.
        ignored: Labels that the model ignores, besides the dataset's `ignore_index`.

    Raises:
        RuntimeError: A transform failed, a mask has no polygon with three points, or a label in a mask of mmseg's
            datasets is neither a class nor ignored.
    """

    def __init__(self, dataset: Any, ignored: Sequence[int] = ()):
        self.transforms: Any = dataset.pipeline.transforms
        self.ann_file: str | None = getattr(dataset, 'ann_file', None)
        self.with_mask: bool = any(getattr(transform, 'with_mask', False) for transform in self.transforms)
        self.classes: Any = _classes(dataset) if hasattr(dataset, 'reduce_zero_label') else None  # mmseg's
        self.ignored: list[int] = sorted({getattr(dataset, 'ignore_index', 255), *ignored})

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        """Transforms a sample as `Compose` does."""
        files = [str(data[key]) for key in ('img_path', 'seg_map_path') if data.get(key)]
        try:
            for instance in data.get('instances', ()) if self.with_mask else ():
                if 'mask' not in instance:
                    raise ValueError('an object has a box and no segmentation, but the pipeline loads masks: from '
                                     'boxes a detector without a mask head learns (mm_configs/faster_rcnn), with '
                                     "dict(type='LoadAnnotations', with_bbox=True)")
                polygons = instance['mask']
                # mmdet drops other polygons, and the whole instance if none remains
                usable = [polygon for polygon in polygons if isinstance(polygon, list) and len(polygon) >= 6
                          and len(polygon) % 2 == 0] if isinstance(polygons, list) else [polygons]
                if not usable:
                    raise ValueError('a mask without a polygon of three or more points, each of two coordinates: '
                                     f'{str(instance)[:200]}')
            results = super().__call__(data)
            sample = getattr(results and results.get('data_samples'), 'gt_sem_seg', None)
            if self.classes is not None and sample is not None:
                labels = sample.data[sample.data >= len(self.classes)].unique().tolist()
                beyond = [label for label in labels if label not in self.ignored]
                if beyond:
                    raise ValueError(
                        f'labels {_list(beyond)} are beyond the {len(self.classes)} classes {_list(self.classes)}; '
                        f'labels to ignore are {_list(self.ignored)}. Correct the file, or set ignore_index of the '
                        'dataset and of the heads')
            return results
        except Exception as error:
            files += [str(self.ann_file)] if self.ann_file else []
            raise RuntimeError(f'sample {" of ".join(files)}: {type(error).__name__}: {error}') from error


class CheckSetupHook(Hook):
    """Checks each dataset of a runner, and the model against it, before the first step, and names files in errors.

    A training that resumes skips truncated checkpoints (`resume_from_whole`).

    Args:
        check_heads: Compare `num_classes` of the heads with the classes. Turn it off for heads with other classes than
            the data's, such as class-agnostic ones.

    Raises:
        ValueError: A dataset is empty; its classes are not categories of its COCO file, in the file's order; or a head
            has another number of classes.
    """

    def __init__(self, check_heads: bool = True):
        self.check_heads = check_heads

    def before_run(self, runner: Any) -> None:
        """Checks the datasets of the loops that this run has built, and the checkpoint that it resumes from."""
        resume_from_whole(runner)
        heads = _heads(runner.model)
        ignored = [head.ignore_index for _, head in heads if isinstance(getattr(head, 'ignore_index', None), int)]
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            loader: Any = getattr(loop, 'dataloader', None)
            for dataset in self._flatten(getattr(loader, 'dataset', None)):
                fault = _category_fault(dataset) or self._fault(dataset, heads)
                if fault:
                    raise ValueError(fault)
                if type(getattr(dataset, 'pipeline', None)) is Compose:
                    dataset.pipeline = NamedPipeline(dataset, ignored)
            if hasattr(loop, 'dataloader_iterator') and loader.num_workers:
                # an iteration-based loop has already started workers with the old pipelines
                loader._iterator = None
                loop.dataloader_iterator = type(loop.dataloader_iterator)(loader)

    def _flatten(self, dataset: Any) -> Iterator[Any]:
        """Yields the datasets inside wrappers such as ConcatDataset and RepeatDataset, or the dataset itself."""
        inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
        if inner[0] is not None:
            for part in inner:
                yield from self._flatten(part)
        elif dataset is not None:
            yield dataset

    def _fault(self, dataset: Any, heads: list[tuple[str, Any]]) -> str | None:
        name = f'{type(dataset).__name__} from {_source(dataset)}'
        if isinstance(dataset, Sized) and len(dataset) == 0:
            return f'{name} is empty: it has no samples, or filter_cfg drops all of them'
        classes = _classes(dataset)
        if classes is None or not self.check_heads:
            return None
        allowed = {len(classes), len(dataset.metainfo.get('thing_classes', classes))}  # panoptic: heads for things only
        for head_name, head in heads:
            count = getattr(head, 'num_classes', None)
            if isinstance(count, int) and count not in allowed:
                return (f'{head_name} of the model has num_classes={count}, but {name} has {len(classes)} classes '
                        f'{_list(classes)}. Set num_classes of every head to {len(classes)}, or the '
                        'metainfo=dict(classes=...) of the dataset; or, if the head is meant to differ, '
                        "dict(type='CheckSetupHook', check_heads=False)")
        return None
