"""Labels as they are found in the wild, to COCO's format: boxes and outlines are computed by hand."""
import json
import random

import pytest
from PIL import Image

from san_backbones import data


def picture(path, width=100, height=50, turned=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned:  # by a quarter: what is stored lies on its side
        exif[0x0112], width, height = 6, height, width
    Image.new('RGB', (width, height)).save(path, exif=exif)


def xml(path, *things, filename='', size=(100, 50)):
    objects = ''.join(
        f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}'
        f'</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>' for name, difficult, box in things)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<annotation><filename>{filename}</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}'
                    '</annotation>')


def read(out, split):
    """Returns each picture's (class, box) by name, and the content of the file."""
    content = json.loads((out / 'annotations' / f'instances_{split}.json').read_text())
    names = {category['id']: category['name'] for category in content['categories']}
    boxes = {image['file_name']: [] for image in content['images']}
    images = {image['id']: image['file_name'] for image in content['images']}
    for annotation in content['annotations']:
        boxes[images[annotation['image_id']]].append((names[annotation['category_id']], annotation['bbox']))
    assert all((out / split / name).is_file() for name in boxes)
    return boxes, content


def test_voc(tmp_path):
    """Coordinates start at 1 and include the last pixel; splits and difficult objects are VOC's."""
    voc = tmp_path / 'VOC2007'
    for name in ('a', 'b', 'c', 'd'):
        picture(voc / 'JPEGImages' / f'{name}.jpg')
    things = ('dog', 0, (11, 21, 30, 40)), ('cat', 1, (1, 1, 100, 50))
    xml(voc / 'Annotations' / 'a.xml', *things)
    xml(voc / 'Annotations' / 'b.xml', ('dog', 0, (50, 10, 400, 20)), ('dog', 0, (7, 7, 7, 9)))
    xml(voc / 'Annotations' / 'c.xml')
    xml(voc / 'Annotations' / 'renamed.xml', filename='d.jpg')
    xml(voc / 'Annotations' / 'lost.xml', filename='lost.jpg')
    (voc / 'ImageSets/Main').mkdir(parents=True)
    (voc / 'ImageSets/Main/train.txt').write_text('a\nrenamed\n')
    (voc / 'ImageSets/Main/val.txt').write_text('b\n')
    (voc / 'ImageSets/Main/dog_train.txt').write_text('c 1\n')
    report = data.convert(voc, tmp_path / 'out')
    boxes, content = read(tmp_path / 'out', 'train')
    assert boxes == {'JPEGImages_a.jpg': [('dog', [10, 20, 20, 20]), ('cat', [0, 0, 100, 50])], 'JPEGImages_d.jpg': []}
    assert [a['iscrowd'] for a in content['annotations']] == [0, 1] and content['annotations'][0]['area'] == 400
    assert content['images'][0]['width'] == 100 and content['images'][0]['height'] == 50
    assert read(tmp_path / 'out', 'val')[0] == {'JPEGImages_b.jpg': [('dog', [49, 9, 51, 11])]}  # clipped
    assert report.classes == ('cat', 'dog') and not report.has_masks
    assert report.pictures == dict(train=2, val=1) and report.objects == dict(train=2, val=1)
    notes = '\n'.join(report.notes)
    assert '1 boxes without area were left out' in notes and 'lost.xml' in notes and 'c.jpg' in notes
    assert [split.classes for split in data.find(tmp_path / 'out')] == [('cat', 'dog')] * 2


def test_names_that_become_the_same(tmp_path):
    """Every picture stays what it is, and is there."""
    paths = [tmp_path / 'in' / name for name in ('a/b.png', 'a_b.png', 'A/b.png')]
    for i, path in enumerate(paths):
        picture(path, 100 + i)
        path.with_suffix('.txt').write_text(f'0 0.5 0.5 0.{i + 1} 0.4\n')
    before = [path.read_bytes() for path in paths]
    data.convert(tmp_path / 'in', tmp_path / 'out', val=1 / 3)
    assert [path.read_bytes() for path in paths] == before
    found = []
    for split in ('train', 'val'):
        boxes, content = read(tmp_path / 'out', split)
        assert len(boxes) == len(content['images']) == len({name.lower() for name in boxes})
        for image in content['images']:
            with Image.open(tmp_path / 'out' / split / image['file_name']) as there:
                assert there.width == image['width']
            (_, box), = boxes[image['file_name']]
            found.append((image['width'], box[2]))
    assert sorted(found) == [(100, 10.), (101, 20.2), (102, 30.6)]


def test_voc_in_folders_of_splits(tmp_path):
    """As tools export it: the XML beside the pictures, and names that recur."""
    for split, right in (('train', 20), ('valid', 30), ('test', 40)):
        picture(tmp_path / 'in' / split / '1.jpg')
        xml(tmp_path / 'in' / split / '1.xml', ('dog', 0, (1, 1, right, 10)))
    assert data.convert(tmp_path / 'in', tmp_path / 'out').pictures == dict(train=1, val=1, test=1)
    for split, right in (('train', 20), ('val', 30), ('test', 40)):
        (_, box), = next(iter(read(tmp_path / 'out', split)[0].values()))
        assert box == [0, 0, right, 10]


@pytest.mark.parametrize('names, expected', [
    (('data.yaml', 'train: ../train/images\nnames: [ant, bee]\n'), ('ant', 'bee')),
    (('data.yaml', 'names:\n  0: ant\n  1: bee\n'), ('ant', 'bee')),
    (('train/labels/classes.txt', 'ant\nbee\n'), ('ant', 'bee')), (('obj.names', 'ant\nbee\n'), ('ant', 'bee')),
    (None, ('class 0', 'class 1'))])
def test_yolo(tmp_path, names, expected):
    root = tmp_path / 'in'
    for split in ('train', 'valid'):
        picture(root / split / 'images' / 'a.png')
        (root / split / 'labels').mkdir()
        (root / split / 'labels' / 'a.txt').write_text('1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.3 0.6\n')
    picture(root / 'train/images/nothing.png')
    if names:
        (root / names[0]).write_text(names[1])
    report = data.convert(root, tmp_path / 'out')
    boxes, content = read(tmp_path / 'out', 'train')
    assert boxes == {'train_images_a.png': [(expected[1], [40, 15, 20, 20]), (expected[0], [10, 10, 20, 20])],
                     'train_images_nothing.png': []}
    triangle = content['annotations'][1]
    assert triangle['segmentation'] == [pytest.approx([10, 10, 30, 10, 30, 30])] and triangle['area'] == pytest.approx(
        200)
    assert report.classes == expected and not report.has_masks and 'nothing.png' in ' '.join(report.notes)
    assert ('no names of classes' in ' '.join(report.notes)) == (names is None)


def test_yolo_outlines_are_masks(tmp_path):
    for name in 'abcde':
        picture(tmp_path / 'in' / f'{name}.jpg')
        (tmp_path / 'in' / f'{name}.txt').write_text('0 0.1 0.2 0.3 0.2 0.3 0.6\n')
    report = data.convert(tmp_path / 'in', tmp_path / 'out')
    assert report.has_masks and data.find(tmp_path / 'out')[0].without_masks == 0


def labelled(folder, count, first=0):
    """Pictures with a label of YOLO beside each."""
    for number in range(first, first + count):
        picture(folder / f'{number}.jpg')
        (folder / f'{number}.txt').write_text('0 0.5 0.5 0.2 0.4\n')


def coco(path, names, boxes=([10, 20, 30, 10],), classes=('dog',), ids=None, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = ids or range(1, len(names) + 1)
    path.write_text(json.dumps(dict(
        images=[dict(id=number, file_name=name, **size) for number, name in zip(ids, names)],
        annotations=[dict(image_id=number, category_id=1, bbox=box) for number in ids for box in boxes],
        categories=[dict(id=number, name=name) for number, name in enumerate(classes, 1)])))


def numbers(out, split):
    """Those of the pictures of a split."""
    return {int(name.rpartition('_')[2].partition('.')[0]) for name in read(out, split)[0]}


@pytest.mark.parametrize('train, val', [
    ('annotations/instances_train2017.json', 'annotations/instances_val2017.json'),
    ('annotations/person_keypoints_train.json', 'annotations/person_keypoints_valid.json'),
    ('train.json', 'my-test_set.json'), ('Train.json', 'a_validation.json')])
def test_coco_splits_by_the_names_of_the_files(train, val, tmp_path):
    """Though all pictures lie in one folder."""
    for number in range(5):
        picture(tmp_path / 'in/images' / f'{number}.jpg')
    coco(tmp_path / 'in' / train, [f'{number}.jpg' for number in (0, 2, 4)])
    coco(tmp_path / 'in' / val, [f'{number}.jpg' for number in (1, 3)])
    data.convert(tmp_path / 'in', tmp_path / 'out')
    assert numbers(tmp_path / 'out', 'train') == {0, 2, 4} and numbers(tmp_path / 'out', 'val') == {1, 3}


def test_coco_names_that_recur_in_both_splits(tmp_path):
    for split, width in (('train', 100), ('val', 90)):
        picture(tmp_path / 'in' / split / '0.jpg', width)
        coco(tmp_path / f'in/annotations/instances_{split}.json', ['0.jpg'], [[1, 1, width - 50, 9]])
    data.convert(tmp_path / 'in', tmp_path / 'out')
    for split, width in (('train', 100), ('val', 90)):
        boxes, content = read(tmp_path / 'out', split)
        assert [*boxes.values()] == [[('dog', [1, 1, width - 50, 9])]] and content['images'][0]['width'] == width


def test_a_picture_that_several_files_name_is_one(tmp_path):
    """Its objects are those of all, each once; it is never to train on and to be measured with."""
    for number in range(3):
        picture(tmp_path / 'in/images' / f'{number}.jpg')
    names = [f'images/{number}.jpg' for number in range(3)]
    coco(tmp_path / 'in/instances_all.json', names, ([10, 20, 30, 10], [1, 2, 3, 4]), ('dog', 'cat'))
    coco(tmp_path / 'in/keypoints_val.json', names[2:], ([10, 20, 30, 10], [5, 6, 7, 8]))
    coco(tmp_path / 'in/x_train.json', ['0.jpg', '0.jpg'])
    coco(tmp_path / 'in/x_val.json', names[:1])
    report = data.convert(tmp_path / 'in', tmp_path / 'out')
    assert numbers(tmp_path / 'out', 'train') == {0, 1} and numbers(tmp_path / 'out', 'val') == {2}
    assert read(tmp_path / 'out', 'val')[0]['images_2.jpg'] == [
        ('dog', [10, 20, 30, 10]), ('dog', [1, 2, 3, 4]), ('dog', [5, 6, 7, 8])]
    assert report.objects == dict(train=4, val=3)
    notes = ' '.join(report.notes)
    assert '4 pictures are named again' in notes and '1 of them are in two splits' in notes


def test_coco_that_contradicts_itself(tmp_path):
    picture(tmp_path / 'in/images/a.jpg')
    coco(tmp_path / 'in/a.json', ['train/a.jpg', 'val/a.jpg'])
    with pytest.raises(data.DataError, match=r'a.json names val/a.jpg, and it or a file before it train/a.jpg'):
        data.convert(tmp_path / 'in', tmp_path / 'out')
    coco(tmp_path / 'in/a.json', ['a.jpg', 'b.jpg'], ids=[1, 1])
    with pytest.raises(data.DataError, match='two images have the id 1: a.jpg and b.jpg'):
        data.convert(tmp_path / 'in', tmp_path / 'out')


def test_objects_of_no_picture_are_told(tmp_path):
    for name in 'ab':
        picture(tmp_path / 'in' / f'{name}.jpg')
    coco(tmp_path / 'in/a.json', ['a.jpg', 'b.jpg'])
    content = json.loads((tmp_path / 'in/a.json').read_text())
    content['annotations'].append(dict(image_id=77, category_id=1, bbox=[1, 2, 3, 4]))
    (tmp_path / 'in/a.json').write_text(json.dumps(content))
    report = data.convert(tmp_path / 'in', tmp_path / 'out', val=.5)
    assert sum(report.objects.values()) == 2 and '1 objects of pictures that the JSON does not name' in report.notes[0]


def test_voc_of_two_years(tmp_path):
    """Each has lists of its own, in which names recur; with suffixes in one, and a byte order mark."""
    for year, split_of_0 in (('VOC2007', 'train'), ('VOC2012', 'val')):
        voc = tmp_path / 'in' / year
        for number in range(3):
            picture(voc / 'JPEGImages' / f'{number}.jpg')
            xml(voc / 'Annotations' / f'{number}.xml', ('dog', 0, (11, 21, 30, 40)))
        (voc / 'ImageSets/Main').mkdir(parents=True)
        suffix, mark = ('', '\ufeff') if year == 'VOC2007' else ('.jpg', '')
        (voc / f'ImageSets/Main/{split_of_0}.txt').write_text(f'{mark}0{suffix}\n', encoding='utf-8')
        (voc / f"ImageSets/Main/{'val' if split_of_0 == 'train' else 'train'}.txt").write_text(f'1{suffix}\n')
    report = data.convert(tmp_path / 'in', tmp_path / 'out')
    assert set(read(tmp_path / 'out', 'train')[0]) == {'VOC2007_JPEGImages_0.jpg', 'VOC2012_JPEGImages_1.jpg'}
    assert set(read(tmp_path / 'out', 'val')[0]) == {'VOC2007_JPEGImages_1.jpg', 'VOC2012_JPEGImages_0.jpg'}
    assert '2 pictures that ImageSets/Main does not list' in ' '.join(report.notes)
    for year in ('VOC2007', 'VOC2012'):
        for name in ('train', 'val'):
            (tmp_path / 'in' / year / f'ImageSets/Main/{name}.txt').write_text('elsewhere/9.jpg\n')
    with pytest.raises(data.DataError, match='none of the 6 pictures with XML, .* whose names are such as 9'):
        data.convert(tmp_path / 'in', tmp_path / 'out')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'gbk', 'shift-jis'])
def test_xml_in_other_encodings(encoding, tmp_path):
    for name in 'ab':
        picture(tmp_path / 'in' / f'{name}.jpg')
        xml(tmp_path / f'in/{name}.xml', ('犬', 0, (11, 21, 30, 40)))
        text = (tmp_path / f'in/{name}.xml').read_text()
        declared = f'<?xml version="1.0" encoding="{encoding}"?>' if encoding in ('gbk', 'shift-jis') else ''
        (tmp_path / f'in/{name}.xml').write_bytes((declared + text).encode(encoding))
    assert data.convert(tmp_path / 'in', tmp_path / 'out', val=.5).classes == ('犬',)
    (tmp_path / 'in/a.xml').write_bytes(b'<?xml version="1.0" encoding="ascii"?><annotation>\xe7</annotation>')
    with pytest.raises(data.DataError, match=r'a\.xml is not in the encoding that its first line names'):
        data.convert(tmp_path / 'in', tmp_path / 'out')


@pytest.mark.parametrize('described', [
    {'data.yaml': 'path: ../datasets/mine\ntrain: a\nval: b\nnames: [dog]\n'},
    {'data.yaml': 'train: /content/mine/a\nval: [/content/mine/b/]\nnames: {0: dog}\n'},
    {'data.yaml': 'train: train.txt\nval: lists/val.txt\nnames: [dog]\n',
     'train.txt': './a/0.jpg\n./a/1.jpg\n./a/2.jpg\n', 'lists/val.txt': '/home/me/mine/b/3.jpg\nb/4.jpg\n'},
    {'obj.data': 'classes = 1\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n',
     'train.txt': 'data/a/0.jpg\ndata/a/1.jpg\ndata/a/2.jpg\n', 'valid.txt': 'data/b/3.jpg\ndata/b/4.jpg\n',
     'obj.names': 'dog\n'}])
def test_yolo_splits_of_its_own_files(described, tmp_path):
    labelled(tmp_path / 'in/a', 3)
    labelled(tmp_path / 'in/b', 2, first=3)
    labelled(tmp_path / 'in/c', 1, first=5)
    (tmp_path / 'in/c/5.txt').write_text('not of this data set')
    (tmp_path / 'in/a.data').write_bytes(b'\xff\x00 = \xfe')  # of something else
    for name, text in described.items():
        (tmp_path / 'in' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'in' / name).write_text(text)
    report = data.convert(tmp_path / 'in', tmp_path / 'out')
    assert report.classes == ('dog',)
    assert numbers(tmp_path / 'out', 'train') == {0, 1, 2} and numbers(tmp_path / 'out', 'val') == {3, 4}
    assert '1 pictures that' in ' '.join(report.notes) and '5.jpg' in ' '.join(report.notes)


def test_yolo_splits_that_are_not_there(tmp_path):
    labelled(tmp_path / 'in/a', 4)
    labelled(tmp_path / 'in/b', 4, first=4)
    (tmp_path / 'in/data.yaml').write_text('train: a\nval: elsewhere.txt\nnames: [dog]\n')
    with pytest.raises(data.DataError, match='`val: elsewhere.txt`, which names no picture in .*4 pictures, such as'):
        data.convert(tmp_path / 'in', tmp_path / 'out')
    (tmp_path / 'in/data.yaml').write_text('train: [a, b]\nval: elsewhere\nnames: [dog]\n')  # nothing else to take
    report = data.convert(tmp_path / 'in', tmp_path / 'out', val=.25)
    assert report.pictures == dict(train=6, val=2) and 'val: elsewhere' in ' '.join(report.notes)
    (tmp_path / 'in/data.yaml').write_text('train: [a, b]\nval: b\nnames: [dog]\n')
    report = data.convert(tmp_path / 'in', tmp_path / 'out', val=.25)
    assert report.pictures == dict(train=6, val=2) and '4 pictures are named for two splits' in ' '.join(report.notes)


def test_yolo_without_its_test_pictures(tmp_path):
    """As most downloads are: who names them need not have them."""
    for number, name in enumerate('abc'):
        labelled(tmp_path / 'in' / name, 2, first=2 * number)
    (tmp_path / 'in/data.yaml').write_text('train: a\nval: b\ntest: elsewhere\nnames: [dog]\n')
    report = data.convert(tmp_path / 'in', tmp_path / 'out')
    assert report.pictures == dict(train=2, val=2)
    assert 'test: elsewhere' in ' '.join(report.notes) and '2 pictures that data.yaml does not name' in ' '.join(
        report.notes)


def test_yolo_in_folders_of_darknet(tmp_path):
    labelled(tmp_path / 'in/obj_train_data', 3)
    labelled(tmp_path / 'in/obj_valid_data', 2, first=3)
    data.convert(tmp_path / 'in', tmp_path / 'out')
    assert numbers(tmp_path / 'out', 'train') == {0, 1, 2} and numbers(tmp_path / 'out', 'val') == {3, 4}


@pytest.mark.parametrize('points, dimensions', [(12, 2), (17, 3), (4, 3)])
def test_yolo_key_points_are_no_outlines(points, dimensions, tmp_path):
    labelled(tmp_path / 'in', 4)
    for number in range(3):
        numbers_of_points = ' '.join(['0.9'] * (points * dimensions))
        (tmp_path / f'in/{number}.txt').write_text(f'0 0.5 0.5 0.2 0.4 {numbers_of_points}\n')
    (tmp_path / 'in/pose.yaml').write_text(f'kpt_shape: [{points}, {dimensions}]\nnames: [dog]\n')
    report = data.convert(tmp_path / 'in', tmp_path / 'out')
    assert all(boxes == [('dog', [40, 15, 20, 20])] for boxes in read(tmp_path / 'out', 'train')[0].values())
    assert not report.has_masks and 'key points are left out' in ' '.join(report.notes)
    (tmp_path / 'in/pose.yaml').write_text('kpt_shape: [5, 2]\nnames: [dog]\n')
    with pytest.raises(data.DataError, match='expected `class x y width height` and 10 numbers of key points'):
        data.convert(tmp_path / 'in', tmp_path / 'out')


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])  # as Windows' Notepad and PowerShell write
def test_marks_of_byte_order_are_no_text(encoding, tmp_path):
    labelled(tmp_path / 'in', 2)
    for path in (tmp_path / 'in').glob('*.txt'):
        path.write_text(path.read_text(), encoding=encoding)
    (tmp_path / 'in/classes.txt').write_text('dog\n\ncat\n', encoding=encoding)
    (tmp_path / 'in/1.txt').write_text('2 0.5 0.5 0.2 0.4\n', encoding=encoding)
    assert data.convert(tmp_path / 'in', tmp_path / 'out', val=.5).classes == ('dog', 'class 1', 'cat')
    (tmp_path / 'in/classes.txt').write_bytes('Käfer\n'.encode('latin-1'))
    with pytest.raises(data.DataError, match=r'classes\.txt is not text in UTF-8'):
        data.convert(tmp_path / 'in', tmp_path / 'out')
    coco(tmp_path / 'coco/a.json', ['0.jpg', '1.jpg'])
    (tmp_path / 'coco/a.json').write_text((tmp_path / 'coco/a.json').read_text(), encoding=encoding)
    for number in range(2):
        picture(tmp_path / f'coco/{number}.jpg')
    assert data.convert(tmp_path / 'coco', tmp_path / 'out', val=.5).classes == ('dog',)


@pytest.mark.parametrize('size, turned, box, message', [
    ((200, 100), False, [10, 20, 30, 10], 'labels are of 200 x 100 pixels, .* has 100 x 50: take the pictures that'),
    ((120, 50), False, [90, 20, 30, 10], 'so that the box 90, 20, 120, 30 leaves it'),
    ((50, 100), True, [10, 20, 30, 10], 'labelled as it is stored, before its EXIF orientation'),
    ((50, 100), False, [10, 20, 30, 10], None), ((101, 50), False, [10, 20, 30, 10], None),
    ((100, 50), True, [10, 20, 30, 10], None), ((0, None), False, [10, 20, 30, 10], None)])
def test_labels_of_another_size(size, turned, box, message, tmp_path):
    """A box is of the picture that it is drawn on: labels of another one are refused, doubt is told."""
    width, height = size
    for kind in ('coco', 'voc'):
        picture(tmp_path / kind / 'train/a.jpg', turned=turned)
        picture(tmp_path / kind / 'val/b.jpg')
    left, top, wide, tall = box
    corners = (left + 1, top + 1, left + wide, top + tall)
    xml(tmp_path / 'voc/train/a.xml', ('dog', 0, corners), size=(width, height))
    xml(tmp_path / 'voc/val/b.xml', ('dog', 0, (1, 1, 9, 9)))
    coco(tmp_path / 'coco/train.json', ['train/a.jpg'], [box], width=width, height=height)
    coco(tmp_path / 'coco/val.json', ['val/b.jpg'])
    for kind in ('coco', 'voc'):
        if message:
            with pytest.raises(data.DataError, match=message):
                data.convert(tmp_path / kind, tmp_path / 'out')
        else:
            notes = ' '.join(data.convert(tmp_path / kind, tmp_path / 'out').notes)
            assert ('have another size' in notes) == (size not in ((100, 50), (0, None)))
            assert read(tmp_path / 'out', 'train')[1]['annotations'][0]['bbox'] == box


@pytest.mark.parametrize('kind', ['jpg', 'png', 'tif'])  # Pillow itself turns TIFF files
def test_pictures_are_turned_as_they_are_seen(kind, tmp_path):
    picture(tmp_path / f'in/a.{kind}', turned=True)
    picture(tmp_path / f'in/b.{kind}')
    for name in 'ab':
        (tmp_path / 'in' / f'{name}.txt').write_text('0 0.5 0.5 0.2 0.4\n')
    data.convert(tmp_path / 'in', tmp_path / 'out', val=.5)
    boxes = {**read(tmp_path / 'out', 'train')[0], **read(tmp_path / 'out', 'val')[0]}
    assert boxes[f'a.{kind}'] == boxes[f'b.{kind}'] == [('class 0', [40, 15, 20, 20])]


def test_coco_with_gaps(tmp_path):
    """One file without splits, sizes, areas and masks; Windows paths; a picture that is not there."""
    for name in 'abcd':
        picture(tmp_path / 'in/images' / f'{name}.jpg')
    content = dict(
        images=[dict(id=name, file_name=f'images\\{name}.jpg') for name in 'abcde'],
        annotations=[dict(image_id=name, category_id=7, bbox=[10, 20, 30, 10]) for name in 'abcd'],
        categories=[dict(id=7, name='dog')])
    (tmp_path / 'in/labels.json').write_text(json.dumps(content))
    report = data.convert(tmp_path / 'in', tmp_path / 'out', val=.25)
    assert report.pictures == dict(train=3, val=1) and 'images\\e.jpg' in ' '.join(report.notes)
    for split in ('train', 'val'):
        boxes, made = read(tmp_path / 'out', split)
        assert set(map(str, boxes.values())) == {"[('dog', [10, 20, 30, 10])]"}
        assert {(a['area'], a['iscrowd']) for a in made['annotations']} == {(300, 0)}
        assert {(i['width'], i['height']) for i in made['images']} == {(100, 50)}


def test_the_draw_for_validation(tmp_path):
    for number in range(20):
        picture(tmp_path / 'in' / f'{number}.jpg')
        (tmp_path / 'in' / f'{number}.txt').write_text('0 0.5 0.5 0.2 0.4\n')

    def drawn(name, **options):
        report = data.convert(tmp_path / 'in', tmp_path / name, **options)
        val = set(read(tmp_path / name, 'val')[0])
        assert report.pictures == dict(train=20 - len(val), val=len(val))
        assert not val & set(read(tmp_path / name, 'train')[0])
        return val
    first = drawn('a')
    assert len(first) == 4 and drawn('b') == first and drawn('c', seed=1) != first and len(drawn('d', val=.5)) == 10
    with pytest.raises(data.DataError, match='leaves none on one side'):
        drawn('e', val=0)


def test_a_folder_is_made_anew_but_never_taken_over(tmp_path):
    for name in 'ab':
        picture(tmp_path / 'in' / f'{name}.jpg')
        (tmp_path / 'in' / f'{name}.txt').write_text('0 0.5 0.5 0.2 0.4\n')
    data.convert(tmp_path / 'in', tmp_path / 'out', val=.5)
    (tmp_path / 'out' / 'train' / 'old.jpg').touch()
    data.convert(tmp_path / 'in', tmp_path / 'out', val=.5)
    assert not (tmp_path / 'out' / 'train' / 'old.jpg').exists()
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.tex').touch()
    with pytest.raises(FileExistsError, match='not empty'):
        data.convert(tmp_path / 'in', tmp_path / 'mine', val=.5)
    for here in (tmp_path / 'in', tmp_path):
        with pytest.raises(data.DataError, match='holds the data themselves'):
            data.convert(tmp_path / 'in', here)
    assert len(list((tmp_path / 'in').iterdir())) == 4


@pytest.mark.parametrize('files, message', [
    ({}, r'(?s)looked for:.*COCO.*VOC.*YOLO.*found: nothing'),
    ({'a.csv': 'file,x', 'a.json': '{}'}, r'(?s)looked for:.*found: 1 .csv, 1 .json, 3 .jpg|found: 3 .jpg, 1'),
    ({'a.txt': 'a photograph of a dog'}, r'(?s)no labels of boxes in'),
    ({'a.xml': '<annotation><object></annotation>'}, 'a.xml is broken XML'),
    ({'a.xml': '<annotation><object><name>dog</name></object></annotation>'}, 'a.xml: an <object> has no name, or no'),
    ({'x.xml': '<annotation></annotation>'}, 'none of the 1 XML files'),
    ({'a.xml': '<annotation></annotation>', 'b.xml': '<annotation></annotation>', 'c.xml': '<annotation></annotation>'},
     'no object is labelled'),
    ({'a.txt': '0 0.5 0.5 0.2 0.4\n0 0.5 nonsense'}, r'a.txt, line 2: expected `class x y width height`'),
    ({'a.txt': '0 50 25 20 20'}, r'a.txt, line 1: .*are these pixels\?'),
    ({'a.txt': '3 0.5 0.5 0.2 0.4', 'classes.txt': 'ant'}, 'classes.txt names classes 0, and labels have 3 too'),
    ({'a.json': json.dumps(dict(images=[dict(id=1, file_name='z.jpg')], annotations=[], categories=[]))},
     'none of the 1 pictures that .*a.json names, such as z.jpg'),
    ({'a.json': json.dumps(dict(images=[dict(id=1, file_name='a.jpg')], annotations=[dict(bbox=[1], category_id=1)],
                                categories=[dict(id=1, name='dog')]))}, 'expected a bbox of four numbers'),
    ({'a.json': json.dumps(dict(images=[dict(id=1, file_name='a.jpg')], annotations=[dict(bbox=[1], category_id=2)],
                                categories=[dict(id=1, name='dog')]))}, 'category_id 2, which the categories lack'),
])
def test_what_cannot_be_converted(tmp_path, files, message):
    (tmp_path / 'in').mkdir()
    for name in 'abc' if files else '':
        picture(tmp_path / 'in' / f'{name}.jpg')
    for name, text in files.items():
        (tmp_path / 'in' / name).write_text(text)
    with pytest.raises(data.DataError, match=message):
        data.convert(tmp_path / 'in', tmp_path / 'out')
    assert not (tmp_path / 'out' / 'converted.json').exists()


def test_broken_pictures_are_named(tmp_path):
    picture(tmp_path / 'in/a.jpg')
    (tmp_path / 'in/a.jpg').write_bytes(random.Random(0).randbytes(100))
    (tmp_path / 'in/a.txt').write_text('0 0.5 0.5 0.2 0.4\n')
    with pytest.raises(data.DataError, match='a.jpg cannot be read as a picture'):
        data.convert(tmp_path / 'in', tmp_path / 'out')


def test_on_the_command_line(tmp_path):
    testing = pytest.importorskip('typer.testing', reason='needs the cli extra')
    from san_backbones_cli.app import app
    for name in 'abcd':
        picture(tmp_path / 'in' / f'{name}.jpg')
        (tmp_path / 'in' / f'{name}.txt').write_text('0 0.5 0.5 0.2 0.4\n')
    arguments = ['convert-data', str(tmp_path / 'in'), '--val', '0.5', '--seed', '3', '--out']
    said = testing.CliRunner().invoke(app, [*arguments, str(tmp_path / 'a')])
    assert said.exit_code == 0 and 'train 2 pictures with 2 objects' in said.stdout
    told = json.loads(testing.CliRunner().invoke(app, [*arguments, str(tmp_path / 'b'), '--json']).stdout)
    expected = data.convert(tmp_path / 'in', tmp_path / 'c', .5, 3)
    assert told['pictures'] == expected.pictures and read(tmp_path / 'b', 'val')[0] == read(tmp_path / 'c', 'val')[0]
    broken = testing.CliRunner().invoke(app, ['convert-data', str(tmp_path), '--out', str(tmp_path / 'in')])
    assert broken.exit_code == 1 and 'not empty' in broken.stderr
