"""Pictures of every unusual kind: taken as they look, or a row of errors.parquet that says what to do."""
import io
import os
import struct
import zlib

import numpy as np
import pytest
import timm
import torch
from tests.extract.noise_pictures import MODEL, noise
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config

from san_backbones.extract import Settings, extract

parquet = pytest.importorskip('pyarrow.parquet', reason='needs the features extra')

SETTINGS = Settings(size=(32, 32))


def run(folder, out):
    report = extract(folder, out, MODEL, SETTINGS, workers=0, progress=False)
    rows = {os.path.basename(row['file']): row for row in parquet.read_table(out / 'features').to_pylist()}
    told = parquet.read_table(out / 'errors.parquet')
    return rows, {os.path.basename(file): reason for file, reason in zip(*(
        told[name].to_pylist() for name in ('file', 'reason')))}, report


def features(image):
    """Of a picture in memory, as timm evaluates it."""
    model = timm.create_model(MODEL, pretrained=True).eval()
    prepare = create_transform(**dict(resolve_model_data_config(model), input_size=(3, 32, 32)), is_training=False)
    with torch.inference_mode():
        return model.forward_features(prepare(image.convert('RGB'))[None]).mean((2, 3))[0]


def test_taken_as_they_look(tmp_path):
    folder = tmp_path / 'in'
    noise(folder / 'plain.png', 50, 60)
    plain = Image.open(folder / 'plain.png')
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by 90 degrees
    Image.fromarray(np.rot90(np.asarray(plain), -1)).save(folder / 'rotated.png', exif=exif)
    plain.convert('CMYK').save(folder / 'cmyk.tif')
    plain.convert('L').save(folder / 'grey.png')
    plain.convert('P', palette=Image.Palette.ADAPTIVE).save(folder / 'palette.png')
    plain.convert('1').save(folder / 'bits.png')
    plain.save(folder / 'animated.gif', save_all=True, append_images=[ImageOps.invert(plain)])
    plain.save(folder / 'animated.webp', save_all=True, append_images=[ImageOps.invert(plain)], lossless=True)
    (folder / 'named.jpg').write_bytes((folder / 'plain.png').read_bytes())  # what it is counts
    Image.new('RGB', (1, 1), (200, 30, 90)).save(folder / 'one.png')
    Image.new('RGB', (3000, 1), (200, 30, 90)).save(folder / 'line.png')
    rows, told, report = run(folder, tmp_path / 'out')
    assert told == {} and report.rows == len(list(folder.iterdir()))
    for name in ('plain.png', 'rotated.png', 'cmyk.tif', 'animated.webp', 'named.jpg'):
        assert (rows[name]['width'], rows[name]['height']) == (60, 50), name
        torch.testing.assert_close(torch.tensor(rows[name]['features']), features(plain), msg=name)
    for name in ('grey.png', 'palette.png', 'bits.png', 'animated.gif', 'one.png', 'line.png'):
        with Image.open(folder / name) as picture:
            torch.testing.assert_close(torch.tensor(rows[name]['features']), features(picture), msg=name)


@pytest.mark.parametrize('name, exif', [
    ('a.jpg', b'Exif\0\0garbage!'), ('a.jpg', b'Exif\0\0II*\0'), ('a.png', b'garbage'),
    ('a.jpg', b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\x006\0\0\0\0\0\0\0')],  # orientation '6', a text
    ids=['no TIFF', 'cut', 'png', 'text'])
def test_damaged_metadata(name, exif, tmp_path):
    """The picture is taken as it lies, everywhere, and is not turned a second time where it is read again."""
    from san_backbones import _pictures
    path = tmp_path / 'in' / name
    noise(path, 50, 60)
    Image.open(path).save(path, exif=exif)
    with Image.open(path) as picture:
        found, expected = _pictures.upright(picture), picture.convert('RGB')
    assert _pictures.upright(found).tobytes() == found.tobytes() == expected.tobytes() and not found.info
    rows, told, _ = run(tmp_path / 'in', tmp_path / 'out')
    assert told == {} and (rows[name]['width'], rows[name]['height']) == (60, 50)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_turned_as_pillow_turns(kind, orientation):
    from san_backbones import _pictures
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).save(file, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).convert('RGB')
    with Image.open(io.BytesIO(file.getvalue())) as picture:
        assert _pictures.size_upright(picture) == expected.size
        found = _pictures.upright(picture)
        assert _pictures.size_upright(picture) == expected.size  # after it was read, too
    assert found.tobytes() == expected.tobytes() and found.size == expected.size


@pytest.mark.parametrize('orientation', range(1, 9))
def test_a_large_rotated_jpeg(orientation, tmp_path):
    """Draft mode and EXIF together; width and height are those of the picture as it is shown."""
    noise(tmp_path / 'in' / 'a.jpg', 300, 400, quality=100, subsampling=0)
    upright = Image.open(tmp_path / 'in' / 'a.jpg')
    upright.load()
    back = {1: None, 2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90',
            7: 'TRANSVERSE', 8: 'ROTATE_270'}[orientation]
    stored = upright if back is None else upright.transpose(Image.Transpose[back])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / 'in' / 'a.jpg', quality=100, subsampling=0, exif=exif)
    rows, _, _ = run(tmp_path / 'in', tmp_path / 'out')
    assert (rows['a.jpg']['width'], rows['a.jpg']['height']) == (400, 300)
    found, expected = torch.tensor(rows['a.jpg']['features']), features(upright)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert orientation == 1 or (found - features(stored)).norm() > 0.1 * expected.norm()


def test_colours_of_16_bits(tmp_path):
    """Their upper 8 bits are taken."""
    from san_backbones import _pictures
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (6, 5, 3))

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    head = struct.pack('>IIBBBBB', 5, 6, 16, 2, 0, 0, 0)
    (tmp_path / 'a.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head)
                                     + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))
    with Image.open(tmp_path / 'a.png') as picture:
        np.testing.assert_array_equal(np.asarray(_pictures.upright(picture)), pixels >> 8)


def test_told(tmp_path, monkeypatch):
    folder = tmp_path / 'in'
    noise(folder / 'good.png')
    noise(folder / 'cut.png', 200, 200)
    noise(folder / 'cut.jpg', 200, 200)
    for name in ('cut.png', 'cut.jpg'):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:len(data) // 2])
    (folder / 'text.png').write_text('no picture')
    (folder / 'empty.png').write_bytes(b'')
    Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(folder / 'deep.png')
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(folder / 'floats.tif')
    os.symlink('nowhere', folder / 'gone.png')
    noise(folder / 'locked.png')
    noise(folder / 'vast.png', 300, 300)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 30_000)
    read = type(folder).read_bytes

    def refuse(path):
        if path.name == 'locked.png':
            raise PermissionError(13, 'Permission denied', str(path))
        return read(path)

    monkeypatch.setattr(type(folder), 'read_bytes', refuse)
    rows, told, report = run(folder, tmp_path / 'out')
    assert (report.errors, report.pictures, report.complete) == (len(told), 10, True)
    expected = {
        'text.png': 'no picture in a format that Pillow knows', 'empty.png': 'the file is empty',
        'deep.png': 'more than 8 bits (mode I;16); convert it to 8 bits first',
        'floats.tif': 'more than 8 bits (mode F); convert it to 8 bits first', 'gone.png': 'No such file',
        'locked.png': 'Permission denied', 'vast.png': 'DecompressionBomb', 'cut.png': '', 'cut.jpg': ''}
    for name, words in expected.items():
        assert words in told[name] and told[name], (name, told[name])
    assert not told.keys() & rows.keys()


def test_cut_short_are_told(tmp_path):
    noise(tmp_path / 'in' / 'cut.jpg', 400, 400)
    data = (tmp_path / 'in' / 'cut.jpg').read_bytes()
    (tmp_path / 'in' / 'cut.jpg').write_bytes(data[:len(data) // 2])
    assert 'truncated' in run(tmp_path / 'in', tmp_path / 'out')[1]['cut.jpg']


def test_a_picture_does_not_stop_its_batch(tmp_path):
    """Others of the batch have the features that they have without it."""
    for seed, name in enumerate('acd'):
        noise(tmp_path / 'in' / f'{name}.png', seed=seed)
    before, _, _ = run(tmp_path / 'in', tmp_path / 'before')
    (tmp_path / 'in' / 'b.png').write_bytes(b'no picture')
    after, told, _ = run(tmp_path / 'in', tmp_path / 'after')
    assert list(told) == ['b.png'] and before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(torch.tensor(after[name]['features']), torch.tensor(before[name]['features']))


def test_a_fault_of_ours_is_named(tmp_path, monkeypatch):
    """What decoders raise is a reason with its kind, also where it has no words."""
    noise(tmp_path / 'in' / 'a.png')
    monkeypatch.setattr('san_backbones._pictures.upright', lambda *given: {}['nothing'])
    assert run(tmp_path / 'in', tmp_path / 'out')[1] == {'a.png': "KeyError: 'nothing'"}
