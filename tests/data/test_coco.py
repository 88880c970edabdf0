"""Folders in COCO's format: layouts that are found, and errors about what is not there."""
import copy
import json

import pytest
from PIL import Image

from san_backbones import data


@pytest.fixture
def coco():
    """Makes a minimal data set in COCO's format."""
    return dict(
        images=[dict(id=1, file_name='one.jpg', width=8, height=8)],
        annotations=[dict(id=1, image_id=1, category_id=3, bbox=[1, 1, 4, 4], area=16, iscrowd=0,
                          segmentation=[[1, 1, 5, 1, 5, 5, 1, 5]])],
        categories=[dict(id=3, name='thing')])


def write(root, train, val, train_json='annotations/instances_train2017.json',
          val_json='annotations/instances_val2017.json', train_images='train2017', val_images='val2017'):
    for name, content, images in (train_json, train, train_images), (val_json, val, val_images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
        (root / images).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(root / images / 'one.jpg')


class TestFind:

    @pytest.mark.parametrize('layout', [
        ('annotations/instances_train2017.json', 'annotations/instances_val2017.json', 'train2017', 'val2017'),
        ('annotations/instances_train.json', 'annotations/instances_val.json', 'images', 'images'),
        ('annotations/train.json', 'annotations/val.json', 'images/train', 'images/val'),
        ('train/_annotations.coco.json', 'valid/_annotations.coco.json', 'train', 'valid'),
        ('train.json', 'val.json', 'images', 'images'),
        ('train.json', 'val.json', '.', '.'),
        ('train/annotations.json', 'val/annotations.json', 'train/images', 'val/images'),
        ('train.json', 'test.json', 'train', 'test'),
    ])
    def test_usual_layouts(self, coco, tmp_path, layout):
        write(tmp_path, coco, coco, *layout)
        train, val = data.find(tmp_path)
        assert [train.json, val.json] == [tmp_path / name for name in layout[:2]]
        assert [train.images, val.images] == [tmp_path / name for name in layout[2:]]
        assert train.classes == ('thing',)

    def test_instances_before_captions(self, coco, tmp_path):
        write(tmp_path, coco, coco)
        (tmp_path / 'annotations' / 'captions_train2017.json').write_text('{}')
        (tmp_path / 'annotations' / 'person_keypoints_train2017.json').write_text('{}')
        assert data.find(tmp_path)[0].json.name == 'instances_train2017.json'

    def test_pictures_of_another_size_than_was_labelled(self, coco, tmp_path):
        write(tmp_path, dict(coco, images=[dict(coco['images'][0], width=16, height=16)]), coco)
        with pytest.raises(data.DataError, match=r'one.jpg: its labels are of 16 x 16 pixels, and .* has 8 x 8'):
            data.find(tmp_path)

    def test_byte_order_marks(self, coco, tmp_path):
        write(tmp_path, '\ufeff' + json.dumps(coco), coco)
        assert data.find(tmp_path)[0].classes == ('thing',)

    def test_first_pictures(self, coco, tmp_path):
        coco['images'] = [dict(coco['images'][0], id=number) for number in range(5)]
        coco['annotations'] = [dict(coco['annotations'][0], id=number, image_id=number) for number in (1, 2, 3)]
        write(tmp_path, coco, coco)
        train, _ = data.find(tmp_path)
        assert train.first(0, tmp_path) is train
        few = train.first(2, tmp_path)
        assert [image['id'] for image in few.coco['images']] == [1, 2]  # 0 has no annotation
        assert [annotation['id'] for annotation in few.coco['annotations']] == [1, 2]
        assert json.loads(few.json.read_text()) == few.coco

    def test_not_a_folder(self, tmp_path):
        with pytest.raises(data.DataError, match='nowhere is not a folder'):
            data.find(tmp_path / 'nowhere')

    def test_nothing_there(self, tmp_path):
        (tmp_path / 'holiday').mkdir()
        with pytest.raises(data.DataError, match=r'(?s)no train annotations.*instances_train.*holiday/.*none'):
            data.find(tmp_path)

    def test_no_validation(self, coco, tmp_path):
        write(tmp_path, coco, coco)
        (tmp_path / 'annotations' / 'instances_val2017.json').unlink()
        with pytest.raises(data.DataError, match=r'(?s)no val annotations.*valid.*instances_train2017.json'):
            data.find(tmp_path)

    @pytest.mark.parametrize('content, message', [
        ('{"images": [', 'not readable as JSON'),
        ('[1, 2]', 'holds a list, and should'),
        ('{"info": {}, "images": []}', 'holds an object with images, info, and should'),
        ('{"images": [], "annotations": [], "categories": []}', 'list of images is empty'),
    ])
    def test_not_coco(self, coco, tmp_path, content, message):
        write(tmp_path, content, coco)
        with pytest.raises(data.DataError, match=f'instances_train2017.json.*{message}'):
            data.find(tmp_path)

    @pytest.mark.parametrize('path, value, message', [
        (('images', 0, 'file_name'), None, 'image number 0 has no file_name'),
        (('images', 0, 'width'), None, 'image number 0 has no width'),
        (('categories', 0, 'name'), None, 'category number 0 has no name'),
        (('annotations', 0, 'bbox'), None, 'annotation number 0 has no bbox'),
        (('annotations', 0, 'image_id'), 7, '1 of 1 annotations have an unknown image_id, such as 7'),
        (('annotations', 0, 'category_id'), 7, '1 of 1 annotations have an unknown category_id, such as 7'),
        (('annotations', 0, 'segments_info'), [], 'panoptic'),
    ])
    def test_broken_entries(self, coco, tmp_path, path, value, message):
        broken = copy.deepcopy(coco)
        *parents, key = path
        entry = broken
        for parent in parents:
            entry = entry[parent]
        if value is None:
            del entry[key]
        else:
            entry[key] = value
        write(tmp_path, coco, broken)
        with pytest.raises(data.DataError, match=f'instances_val2017.json.*{message}'):
            data.find(tmp_path)

    def test_counts_what_has_no_mask(self, coco, tmp_path):
        coco['annotations'] += [dict(coco['annotations'][0], id=2, segmentation=[]), dict(coco['annotations'][0], id=3)]
        del coco['annotations'][2]['segmentation']
        write(tmp_path, coco, coco)
        assert data.find(tmp_path)[0].without_masks == 2

    def test_shared_ids(self, coco, tmp_path):
        coco['images'] *= 2
        write(tmp_path, coco, coco)
        with pytest.raises(data.DataError, match='several image entries share one id'):
            data.find(tmp_path)

    def test_missing_pictures(self, coco, tmp_path):
        two = dict(coco, images=coco['images'] + [dict(coco['images'][0], id=2, file_name='two.jpg')])
        write(tmp_path, two, coco)
        with pytest.raises(data.DataError, match='1 of the 2 pictures .*train2017.json.* not in .*: two.jpg'):
            data.find(tmp_path)
        for picture in tmp_path.rglob('one.jpg'):
            picture.unlink()
        with pytest.raises(data.DataError, match='none of the 2 pictures .*train2017.json.* such as one.jpg'):
            data.find(tmp_path)

    def test_different_categories(self, coco, tmp_path):
        write(tmp_path, coco, dict(coco, categories=[dict(id=3, name='other')]))
        with pytest.raises(data.DataError, match=r'(?s)same categories.*thing.*other'):
            data.find(tmp_path)
