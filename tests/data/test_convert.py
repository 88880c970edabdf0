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
    path.write_text(f'<annotation><filename>{filename}</filename><size><width>{size[0]}</width></size>{objects}'
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
