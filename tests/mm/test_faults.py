"""Faults of data, classes, folders and checkpoints end in errors that name the file and what does not match."""
import copy
import json
import os
import pickle
import types

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import cv2
import numpy as np
import torch
from mmengine.registry import DATASETS, HOOKS, MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint

import san_backbones.mm  # noqa: F401
from tests.mm.small_configs import CLASSES, backbone, coco, detection, masks, segmentation

NO_MODEL = torch.nn.Module()


@pytest.fixture
def folder(tmp_path):
    coco(tmp_path / 'coco', 2)
    masks(tmp_path / 'masks', 2)
    return tmp_path


def change(folder, edit):
    path = folder / 'coco/coco.json'
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def dataset(folder, kind='detection', **changes):
    make = dict(detection=detection, segmentation=segmentation)[kind]
    cfg = make(folder / ('coco' if kind == 'detection' else 'masks')).train_dataloader.dataset
    return DATASETS.build({**cfg, **changes})


def check(*loops, model=NO_MODEL, **options):
    """What the hook does before a run."""
    loops = [types.SimpleNamespace(dataloader=types.SimpleNamespace(dataset=data)) for data in loops]
    HOOKS.build(dict(type='CheckSetupHook', **options)).before_run(types.SimpleNamespace(
        **dict(zip(('_train_loop', '_val_loop', '_test_loop'), [*loops, None, {}])), model=model))


def read(data):
    check(data)
    return [data[i] for i in range(len(data))]


# Corrupted annotations


@pytest.mark.parametrize('edit, message', [
    (lambda content: content['annotations'][1].update(bbox=[1, 2, 3]), 'expected 4, got 3'),
    (lambda content: content['annotations'][1].pop('bbox'), "KeyError: 'bbox'"),
    (lambda content: content['annotations'][1].update(bbox=None), 'NoneType'),
    (lambda content: content['annotations'].clear(), 'no sample is left'),
    (lambda content: content['annotations'][1].update(category_id=9),
     'category_id 9; its categories have the ids 1, 2'),
    (lambda content: content['annotations'][1].update(segmentation=[[1, 2, 3]]),
     r'2\.png.*without a polygon of three or more points.*1, 2, 3'),
    (lambda content: content['annotations'][1].update(segmentation='x'), r'2\.png'),
    (lambda content: content['annotations'][1].update(segmentation=dict(size=[64, 64], counts='@@@@@')),
     r'2\.png.*RLE'),
    (lambda content: content['images'][1].update(file_name='absent.png'), r'absent\.png'),
])
def test_broken_coco_files(folder, edit, message):
    read(dataset(folder))
    change(folder, edit)
    with pytest.raises((RuntimeError, ValueError), match=message) as caught:
        read(dataset(folder))
    assert str(folder / 'coco/coco.json') in str(caught.value)


@pytest.mark.parametrize('wrapped', [False, True])
def test_a_truncated_coco_file(folder, wrapped):
    path = folder / 'coco/coco.json'
    path.write_text(path.read_text()[:200])
    with pytest.raises(RuntimeError, match='JSONDecodeError') as caught:
        if wrapped:
            inner = detection(folder / 'coco').train_dataloader.dataset
            DATASETS.build(dict(type='RepeatDataset', times=2, dataset=inner))
        dataset(folder)
    assert str(path) in str(caught.value)


def test_an_absent_coco_file_is_named_by_the_system(folder):
    (folder / 'coco/coco.json').unlink()
    with pytest.raises(FileNotFoundError, match='coco/coco.json'):
        dataset(folder)


@pytest.mark.parametrize('wrapper', [None, 'ConcatDataset', 'RepeatDataset', 'ClassBalancedDataset'])
def test_a_broken_picture_is_named_in_wrappers_too(folder, wrapper):
    data = dataset(folder)
    if wrapper == 'ConcatDataset':
        data = DATASETS.build(dict(type=wrapper, datasets=[data, dataset(folder)]))
    elif wrapper:
        option = dict(times=1) if wrapper == 'RepeatDataset' else dict(oversample_thr=0.1)
        data = DATASETS.build(dict(type=wrapper, dataset=data, **option))
    (folder / 'coco/2.png').write_bytes((folder / 'coco/2.png').read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r'2\.png of .*coco\.json'):
        read(data)


@pytest.mark.parametrize('spoil, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:40]), 'UnidentifiedImageError'),
    (lambda path: path.unlink(), 'No such file'),
    (lambda path: cv2.imwrite(str(path), np.array([[0, 1], [255, 7]], np.uint8)),
     "labels 7 are beyond the 2 classes 'square', 'disc'"),
])
def test_broken_masks(folder, spoil, message):
    assert len(read(dataset(folder, 'segmentation'))) == 2
    spoil(folder / 'masks/masks/2.png')
    with pytest.raises(RuntimeError, match=message) as caught:
        read(dataset(folder, 'segmentation'))
    assert str(folder / 'masks/masks/2.png') in str(caught.value)


def test_polygons_that_mmdet_leaves_out_pass(folder):
    change(folder, lambda content: content['annotations'][0]['segmentation'].append([1, 2, 3]))
    read(dataset(folder))
    change(folder, lambda content: content['annotations'][1].update(segmentation=[[1, 2, 3]]))
    boxes = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]
    read(dataset(folder, pipeline=boxes))
    change(folder, lambda content: content['annotations'][1].pop('segmentation'))
    read(dataset(folder, pipeline=boxes))
    with pytest.raises(RuntimeError, match=r'coco.json: .*a box and no segmentation.*mm_configs/faster_rcnn'):
        read(dataset(folder))


def test_a_broken_mask_is_named_by_workers_of_a_loop_by_iterations(folder):
    cfg = segmentation(folder / 'masks')
    cfg.custom_hooks = [dict(type='CheckSetupHook')]
    cfg.train_dataloader.update(num_workers=1, persistent_workers=True)
    cv2.imwrite(str(folder / 'masks/masks/2.png'), np.array([[0, 7], [0, 7]], np.uint8))
    cv2.imwrite(str(folder / 'masks/masks/1.png'), np.array([[0, 7], [0, 7]], np.uint8))
    with pytest.raises(RuntimeError, match=r"sample .*\.jpg of .*\.png: ValueError: labels 7 are beyond the 2 classes"):
        Runner.from_cfg(cfg).train()


def test_labels_that_the_heads_ignore_pass(folder):
    cv2.imwrite(str(folder / 'masks/masks/2.png'), np.array([[0, 7], [0, 7]], np.uint8))
    model = torch.nn.Module()
    model.decode_head = torch.nn.Module()
    model.decode_head.ignore_index = 7
    data = dataset(folder, 'segmentation')
    check(data, model=model)
    assert len([data[i] for i in range(len(data))]) == 2


def test_labels_to_ignore_pass(folder):
    cv2.imwrite(str(folder / 'masks/masks/2.png'), np.array([[0, 1], [255, 2]], np.uint8))
    read(dataset(folder, 'segmentation', reduce_zero_label=True, pipeline=[
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='PackSegInputs')]))  # 0 becomes 255, 1 and 2 the two classes


def test_the_pipeline_names_files_in_workers(folder):
    data = dataset(folder)
    check(data, data)  # the second time changes nothing
    pipeline = pickle.loads(pickle.dumps(data.pipeline))
    assert pipeline(data.get_data_info(0))['inputs'].shape == (3, 64, 64)
    with pytest.raises(RuntimeError, match=r'nowhere\.png of .*coco\.json'):
        pipeline({**data.get_data_info(0), 'img_path': 'nowhere.png'})


# Classes


@pytest.mark.parametrize('classes, message', [
    (('a', 'b'), "no category 'a', 'b'. Its categories are 'square', 'disc'"),
    (('square', 'b'), "no category 'b'.*the classes 'square', 'b'"),
    (('disc', 'square'), 'in another order'),
])
def test_classes_that_are_not_the_file_s(folder, classes, message):
    with pytest.raises(ValueError, match=f'coco/coco.json does not match.*{message}'):
        check(dataset(folder, metainfo=dict(classes=classes)))


def test_some_of_the_file_s_classes_pass(folder):
    check(dataset(folder, metainfo=dict(classes=('square',))))


@pytest.mark.parametrize('kind', ['detection', 'segmentation'])
def test_heads_with_another_number_of_classes(folder, kind):
    data = dataset(folder, kind)
    init_default_scope('mmdet' if kind == 'detection' else 'mmseg')
    cfg = detection(folder) if kind == 'detection' else segmentation(folder)
    check(data, data, model=MODELS.build(cfg.model))
    head = cfg.model.roi_head.mask_head if kind == 'detection' else cfg.model.auxiliary_head
    head.num_classes = 3
    name = 'roi_head.mask_head' if kind == 'detection' else 'auxiliary_head'
    source = folder / ('coco/coco.json' if kind == 'detection' else 'masks/images')
    with pytest.raises(ValueError, match=f"{name} .*num_classes=3.*{source}.*2 classes 'square', 'disc'"):
        check(None, data, model=MODELS.build(cfg.model))


def test_heads_that_mean_other_classes(folder):
    model = torch.nn.Module()
    model.bbox_head = torch.nn.Module()
    model.bbox_head.num_classes = 1
    with pytest.raises(ValueError, match='bbox_head of the model has num_classes=1.*check_heads=False'):
        check(dataset(folder), model=model)
    check(dataset(folder), model=model, check_heads=False)


def test_other_things_called_categories_pass(folder):
    change(folder, lambda content: content.update(images=[dict(image, categories=[1]) for image in content['images']]))
    path = folder / 'coco/coco.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(images=content.pop('images'), **content)))
    check(dataset(folder))


def test_empty_datasets(folder):
    with pytest.raises(RuntimeError, match='masks/images.*no sample is left'):
        dataset(folder, 'segmentation', img_suffix='.bmp')
    with pytest.raises(ValueError, match=r'coco\.json is empty'):
        check(dataset(folder, serialize_data=False, filter_cfg=dict(filter_empty_gt=True, min_size=100)))


def test_datasets_without_classes_pass(folder):
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 1

    check(Numbers(), torch.utils.data.Subset(Numbers(), [0]))
    numbers = Numbers()
    numbers.metainfo = dict(classes=('one',))
    check(numbers)


def test_a_run_is_stopped_before_its_first_step(folder):
    cfg = detection(folder / 'coco')
    cfg.custom_hooks = [dict(type='CheckSetupHook')]
    cfg.val_dataloader.dataset.metainfo = dict(classes=CLASSES[::-1])
    with pytest.raises(ValueError, match=r'coco\.json does not match the classes of CocoDataset'):
        Runner.from_cfg(cfg).train()


# Folders


@pytest.mark.parametrize('below', ['', 'deeper'])
def test_a_file_in_place_of_the_work_dir(folder, below):
    (folder / 'taken').write_text('')
    cfg = detection(folder / 'coco')
    cfg.work_dir = str(folder / 'taken' / below)
    with pytest.raises(OSError, match='taken'):
        Runner.from_cfg(cfg)


@pytest.mark.skipif(os.getuid() == 0, reason='permissions do not bind root')
def test_a_work_dir_that_is_read_only(folder):
    (folder / 'locked').mkdir(mode=0o500)
    cfg = detection(folder / 'coco')
    cfg.work_dir = str(folder / 'locked/work')
    with pytest.raises(OSError, match='locked/work'):
        Runner.from_cfg(cfg)


# Checkpoints


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """A pairwise detector's checkpoint, and the config of a patchwise one."""
    folder = tmp_path_factory.mktemp('detector')
    coco(folder, 1)
    other = MODELS.build(detection(folder, 'pairwise').model)
    torch.save(dict(state_dict=other.state_dict(), meta={}), folder / 'pairwise.pth')
    return folder, detection(folder), other.state_dict()


MISFIT = (r"pairwise\.pth' does not fit the backbone SANBackbone.*patchwise.*missing.*wrong shape.*"
          r"unexpected.*attn\.position")


@pytest.mark.parametrize('resume', [False, True])
def test_load_from_and_resume_of_another_architecture(detector, resume):
    folder, cfg, _ = detector
    cfg = cfg.copy()
    cfg.update(load_from=str(folder / 'pairwise.pth'), resume=resume)
    with pytest.raises(RuntimeError, match=MISFIT):
        Runner.from_cfg(cfg).load_or_resume()


def test_inferencers_and_load_checkpoint_of_another_architecture(detector):
    from mmdet.apis import DetInferencer, init_detector
    folder, cfg, _ = detector
    for load in (lambda path: DetInferencer(cfg.copy(), path, device='cpu'),
                 lambda path: init_detector(cfg.copy(), path, device='cpu', palette='random'),
                 lambda path: load_checkpoint(MODELS.build(cfg.model), path)):
        init_default_scope('mmdet')
        with pytest.raises(RuntimeError, match=MISFIT):
            load(str(folder / 'pairwise.pth'))


def test_what_holds_no_such_backbone_is_an_error(detector, tmp_path):
    folder, cfg, other = detector
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    for name, state in dict(timm=model.backbone.state_dict(), heads=model.roi_head.state_dict(prefix='roi_head.'),
                            resnet={'backbone.conv1.weight': torch.ones(1)}).items():
        torch.save(state, tmp_path / f'{name}.pth')
        with pytest.raises(RuntimeError, match=rf"{name}\.pth' does not fit.*missing.*init_cfg"):
            load_checkpoint(model, str(tmp_path / f'{name}.pth'))


def test_load_from_with_averaged_weights(detector, tmp_path):
    folder, cfg, _ = detector
    cfg = copy.deepcopy(cfg)
    trained = MODELS.build(cfg.model)
    torch.save(dict(state_dict={f'module.{name}': tensor for name, tensor in trained.state_dict().items()}, meta={}),
               tmp_path / 'wrapped.pth')
    cfg.update(load_from=str(tmp_path / 'wrapped.pth'), custom_hooks=[dict(type='EMAHook')])
    runner = Runner.from_cfg(cfg)
    runner.call_hook('before_run')
    runner.load_or_resume()
    assert torch.equal(runner.model.backbone.stem.conv.weight, trained.backbone.stem.conv.weight)


def test_what_fits_loads(detector, tmp_path):
    folder, cfg, other = detector
    init_default_scope('mmdet')
    trained = MODELS.build(cfg.model)
    state = {**trained.state_dict(), 'roi_head.bbox_head.fc_cls.weight': torch.zeros(9, 32)}  # of other classes
    torch.save(dict(state_dict={f'module.{name}': tensor for name, tensor in state.items()}), tmp_path / 'own.pth')
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(tmp_path / 'own.pth'))
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, trained.backbone.state_dict()[name]), name
    # fewer stages than the checkpoint's
    part = torch.nn.ModuleDict(dict(backbone=MODELS.build({k: v for k, v in dict(
        backbone(), out_indices=(1, 2)).items() if k != '_delete_'})))
    load_checkpoint(part, str(tmp_path / 'own.pth'))
    assert torch.equal(part['backbone'].stem.conv.weight, trained.backbone.stem.conv.weight)
    # what torch itself is told to load in part, it does
    assert model.load_state_dict(other.__class__(), strict=False).missing_keys


def test_a_pretrained_checkpoint_of_another_architecture(detector):
    folder, cfg, _ = detector
    model = MODELS.build({**{k: v for k, v in backbone().items() if k != '_delete_'},
                          'init_cfg': dict(type='Pretrained', checkpoint=str(folder / 'pairwise.pth'))})
    with pytest.raises(RuntimeError, match=r'pairwise\.pth.*does not fit.*missing'):
        model.init_weights()
