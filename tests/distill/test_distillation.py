"""Distillation: what the student is taught, against the teacher's own answers; resumed to the same bits; options."""
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import san_backbones  # noqa: F401
from san_backbones.distill import Answer, Settings, Size, Teacher, distill, load_teacher
from san_backbones.distill.networks import Student
from san_backbones.distill.pictures import Files, Store, Views
from tests import environment

STUDENT, TEACHER = 'test_san_patchwise', 'test_efficientnet'


def settings(**changes):
    return Settings(**dict(dict(sizes=(Size(32, 4),), teacher_scale=1., warmup=0, decay=0., lr=1e-3), **changes))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder of 12 pictures of smooth noise, of several shapes."""
    folder = tmp_path_factory.mktemp('pictures')
    draw = np.random.default_rng(0)
    for i in range(12):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((40 + 8 * (i % 3), 40 + 4 * (i % 4)), Image.Resampling.BICUBIC).save(folder / f'{i:02}.png')
    return folder


@pytest.fixture(scope='module')
def teacher():
    """With weights of its own, but no statistics that would make every picture alike."""
    torch.manual_seed(1)
    model = timm.create_model(TEACHER, num_classes=10)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 32, 32))
    return model.eval()


def run(out, source, teacher, student=STUDENT, **options):
    changes = options.pop('settings', {})
    options.setdefault('pictures', 24)
    return distill(student, teacher, [source], out, settings(**changes), tell=options.pop('tell', lambda line: None),
                   device='cpu', **options)


def state(out):
    return torch.load(out / 'last.pt', weights_only=True)


def tensors(value, prefix=''):
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from tensors(each, f'{prefix}.{key}')
    elif isinstance(value, (list, tuple)):
        for key, each in enumerate(value):
            yield from tensors(each, f'{prefix}.{key}')


def same(a, b):
    a, b = (dict(tensors(state(out))) for out in (a, b))
    assert a.keys() == b.keys() and len(a) > 100
    return all(torch.equal(a[name], b[name]) for name in a)


# --- pictures --------------------------------------------------------------------------------------------------------

def packed(pictures, kind, path):
    names = sorted(pictures.iterdir())
    if kind == 'zip':
        with zipfile.ZipFile(path, 'w') as archive:
            for name in names:
                archive.write(name, f'some/{name.name}')
    else:  # a shard of a WebDataset has other members too
        with tarfile.open(path, 'w') as archive:
            for name in names:
                archive.add(name, name.name)
                info = tarfile.TarInfo(f'{name.stem}.json')
                info.size = 2
                archive.addfile(info, io.BytesIO(b'{}'))
    return path


@pytest.mark.parametrize('kind', ['zip', 'tar'])
def test_an_archive_holds_what_its_folder_holds(pictures, tmp_path, kind):
    folder, archive = Files([pictures]), Files([packed(pictures, kind, tmp_path / f'pictures.{kind}')])
    assert len(folder) == len(archive) == 12
    for i in range(12):
        assert folder.read(i).tobytes() == archive.read(i).tobytes() == Image.open(folder.name(i)).tobytes()
    assert len(Files([tmp_path, pictures])) == 24  # archives in a folder count


def test_a_tar_that_ends_in_a_zip(pictures, tmp_path):
    """As shards with .npz or .pt do: zipfile takes such a tar for a zip."""
    np.savez(tmp_path / 'last.npz', x=np.zeros(3))
    with tarfile.open(tmp_path / 'shard.tar', 'w') as archive:
        for name in sorted(pictures.iterdir()):
            archive.add(name, name.name)
        archive.add(tmp_path / 'last.npz', '11.npz')
    assert zipfile.is_zipfile(tmp_path / 'shard.tar')
    assert len(Files([tmp_path / 'shard.tar'])) == 12
    assert Files([tmp_path / 'shard.tar']).read(3).tobytes() == Files([pictures]).read(3).tobytes()


@pytest.mark.parametrize('kind, kept', [('zip', None), *(('tar', 512 * n + 100) for n in range(3, 15))])
def test_a_damaged_archive(pictures, tmp_path, kind, kept):
    """A tar that ends within a picture, and within the head of one."""
    path = packed(pictures, kind, tmp_path / f'pictures.{kind}')
    content = bytearray(path.read_bytes())
    if kind == 'tar':
        content = content[:kept]
    else:
        at = content.index(b'PK\x01\x02')
        content[at:at + 4] = b'none'  # the head of its directory
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f'pictures.{kind} is damaged .*: fetch it again'):
        Files([path])


def test_a_name_that_is_no_text(pictures, tmp_path):
    name = os.fsdecode(b'caf\xe9.png')
    (tmp_path / name).write_bytes((pictures / '00.png').read_bytes())
    assert len(Store.of(Files([tmp_path]), 48, tmp_path / 'store.bin', print)) == 1


def test_the_store_is_made_anew_for_files_that_were_written_anew(tmp_path):
    for value in (10, 200):
        Image.new('RGB', (40, 40), (value,) * 3).save(tmp_path / 'a.bmp')
        os.utime(tmp_path / 'a.bmp', (value, value))
        assert Store.of(Files([tmp_path / 'a.bmp']), 48, tmp_path / 'store.bin', print)[0].getpixel((0, 0))[0] == value


def test_a_part_of_an_archive(pictures, tmp_path):
    path = packed(pictures, 'zip', tmp_path / 'pictures.zip')
    assert [name[-6:] for name in map(Files([f'{path}//some/0']).name, range(10))] == [f'{i:02}.png' for i in range(10)]
    assert len(Files([f'{path}//some/1'])) == 2 and len(Files([f'{pictures}//11'])) == 1
    with pytest.raises(ValueError, match='holds no picture whose path begins with'):
        Files([f'{path}//other/'])


def test_what_is_no_picture(pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere is not there: expected a folder, zip or tar'):
        Files([tmp_path / 'nowhere'])
    with pytest.raises(ValueError, match='holds no picture: expected files that end in .bmp'):
        Files([tmp_path])
    (tmp_path / 'notes.txt').write_text('x')
    with pytest.raises(ValueError, match='notes.txt is neither a folder'):
        Files([tmp_path / 'notes.txt'])
    with tarfile.open(tmp_path / 'some.tar.gz', 'w:gz') as archive:
        archive.add(pictures / '00.png')
    with pytest.raises(ValueError, match='compressed tar.*unpack it'):
        Files([tmp_path / 'some.tar.gz'])


def test_broken_pictures_are_told_and_left_out(pictures, tmp_path):
    (tmp_path / 'in').mkdir()
    for name in pictures.iterdir():
        (tmp_path / 'in' / name.name).write_bytes(name.read_bytes())
    (tmp_path / 'in' / '05.png').write_bytes(b'no picture')
    (tmp_path / 'in' / '07.png').write_bytes((pictures / '07.png').read_bytes()[:200])
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(tmp_path / 'in' / '09.png')
    lines = []
    store = Store.of(Files([tmp_path / 'in']), 48, tmp_path / 'store.bin', lines.append)
    assert len(store) == 9 and store.about['left_out'] == 3
    assert [name[-6:] for name in store.about['broken']] == ['05.png', '07.png', '09.png']
    assert sum(line.startswith('left out: ') for line in lines) == 3 and 'more than 8 bits' in '\n'.join(lines)
    for name in (tmp_path / 'in').iterdir():
        name.write_bytes(b'')
    with pytest.raises(ValueError, match='none of the 12 pictures can be read'):
        Store.of(Files([tmp_path / 'in']), 48, tmp_path / 'store.bin', lines.append)


def test_the_store_keeps_pictures_and_is_made_once(pictures, tmp_path):
    files, lines = Files([pictures]), []
    store = Store.of(files, 64, tmp_path / 'store.bin', lines.append)
    assert all(store[i].tobytes() == files.read(i).tobytes() and store[i].size == files.read(i).size for i in range(12))
    before = len(lines)
    Store.of(files, 64, tmp_path / 'store.bin', lines.append)
    assert len(lines) == before
    small = Store.of(files, 36, tmp_path / 'store.bin', lines.append)  # of another size: made anew
    assert len(lines) > before and all(min(small[i].size) == 36 for i in range(12))
    aspects = [small[i].width / small[i].height - files.read(i).width / files.read(i).height for i in range(12)]
    assert max(map(abs, aspects)) < .03
    (pictures / '99.png').write_bytes((pictures / '00.png').read_bytes())
    try:
        assert len(Store.of(Files([pictures]), 36, tmp_path / 'store.bin', lines.append)) == 13
    finally:
        (pictures / '99.png').unlink()


def test_a_long_picture_is_cut(tmp_path):
    Image.new('RGB', (400, 50)).save(tmp_path / 'long.png')
    assert Store.of(Files([tmp_path]), 32, tmp_path / 's.bin', print)[0].size == (64, 32)


def test_no_room(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda path: os.terminal_size((1, 1)) and type('', (), dict(free=10)))
    with pytest.raises(OSError, match='12 decoded pictures of 48 pixels need about .* GB, and .* free'):
        Store.of(Files([pictures]), 48, tmp_path / 'store.bin', print)


def test_room_for_small_pictures_is_enough(pictures, tmp_path, monkeypatch):
    """They are not enlarged: 12 of 40 to 56 pixels take 90 kB, of whatever side."""
    for free, enough in ((100_000, True), (50_000, False)):
        monkeypatch.setattr('shutil.disk_usage', lambda path, free=free: type('', (), dict(free=free)))
        if enough:
            assert len(Store.of(Files([pictures]), 336, tmp_path / f'{free}.bin', print)) == 12
            assert (tmp_path / f'{free}.bin').stat().st_size < free
        else:
            with pytest.raises(OSError, match='12 decoded pictures of 336 pixels need about'):
                Store.of(Files([pictures]), 336, tmp_path / f'{free}.bin', print)


def ramp(width=64, height=48):
    """Red grows to the right, green downwards."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across, down, 0 * across], 2).astype(np.uint8))


def test_views_are_crops_of_the_picture_at_both_sizes():
    views = Views([ramp()], seed=3, scale=(.4, .9))
    areas, flips = [], 0
    for number in range(200):
        small, large = (view.astype(float) for view in views.sample(number, [16, 32]))
        assert small.shape == (16, 16, 3) and large.shape == (32, 32, 3)
        halved = large.reshape(16, 2, 16, 2, 3).mean((1, 3))
        assert np.abs(halved - small)[1:-1, 1:-1].max() < 2.5  # the same part
        width, height = abs(small[8, 14, 0] - small[8, 1, 0]) * 16 / 13, (small[14, 8, 1] - small[1, 8, 1]) * 16 / 13
        flips += small[8, 0, 0] > small[8, 15, 0]
        areas.append(width * height / (64 * 48))
        assert .6 < width / height < 1.6
    assert .33 < min(areas) < .5 and .8 < max(areas) < 1. and 70 < flips < 130


def test_views_are_functions_of_the_number():
    store = [Image.new('RGB', (8, 8), (i, 0, 0)) for i in range(10)]
    views = Views(store, seed=1)
    shown = [int(views.sample(n, [4])[0][0, 0, 0]) for n in range(30)]
    assert all(sorted(shown[i:i + 10]) == list(range(10)) for i in (0, 10, 20)) and shown[:10] != shown[10:20]
    assert shown[::-1] == [int(Views(store, seed=1).sample(n, [4])[0][0, 0, 0]) for n in range(29, -1, -1)]
    assert shown != [int(Views(store, seed=2).sample(n, [4])[0][0, 0, 0]) for n in range(30)]
    numbers = [n for _ in range(40) for place in range(10) for n in range(place, 30, 10)]  # an epoch after the other
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            threads = list(pool.map(lambda n: int(views.sample(n, [4])[0][0, 0, 0]), numbers))
    finally:
        sys.setswitchinterval(interval)
    assert threads == [shown[n] for n in numbers]
    batch, = views.batch(range(5, 9), [4])
    assert batch.shape == (4, 3, 4, 4) and batch[:, 0, 0, 0].tolist() == shown[5:9]


# --- what is taught --------------------------------------------------------------------------------------------------

def test_the_teacher_answers_as_the_model_does(teacher):
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    answer = Teacher(teacher)(images)
    mean, std = (torch.tensor(teacher.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
    x = (images / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, teacher(x), rtol=1e-4, atol=1e-4)
        maps = timm.create_model(TEACHER, features_only=True, out_indices=(2, 3, 4))
        maps.load_state_dict({k: v for k, v in teacher.state_dict().items() if k in maps.state_dict()})
        for stride, expected in zip((8, 16, 32), maps.eval()(x)):
            torch.testing.assert_close(answer.maps[stride], expected, rtol=1e-4, atol=1e-4)
    assert not answer.logits.requires_grad and not Teacher(teacher).train().training


def test_a_callable_teacher():
    def answer(x):
        return x.mean((2, 3)), [nn.functional.avg_pool2d(x, 16), nn.functional.avg_pool2d(x, 8)]

    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    half = [.5, .5, .5]
    found = Teacher(answer, (8, 16), mean=half, std=half)(images)
    torch.testing.assert_close(found.logits, (images / 127.5 - 1).mean((2, 3)))
    torch.testing.assert_close(found.maps[16], nn.functional.avg_pool2d(images / 127.5 - 1, 16))
    assert Teacher(lambda x: x.mean((2, 3)), ())(images).maps == {}
    with pytest.raises(ValueError, match='no feature map at stride 32, only at 16, 8'):
        Teacher(answer)(images)


@pytest.mark.parametrize('kind', ['timm', 'maps', 'logits'])
def test_the_teacher_sees_a_few_pictures_at_a_time(teacher, monkeypatch, kind):
    model, levels = dict(timm=(teacher, (8, 16, 32)), logits=(lambda x: x.mean((2, 3)), ()), maps=(
        lambda x: (None, [nn.functional.avg_pool2d(x, 8)]), (8,)))[kind]
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    whole, shown = Teacher(model, levels)(images), []

    class Seen(Teacher):
        def forward(self, images):
            shown.append(len(images))
            return super().forward(images)

    monkeypatch.setattr('san_backbones.distill.networks.PIXELS', -(-2 * 64 * 64 // torch.get_num_threads()))
    parts = Seen(model, levels)(images)
    assert shown == [5, 2, 2, 1]
    assert [x is None for x in whole[:2]] == [x is None for x in parts[:2]] and parts.maps.keys() == set(levels)
    for expected, found in zip([*whole[:2], *whole.maps.values()], [*parts[:2], *parts.maps.values()]):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name, message', [
    ('resnet_of_nobody', 'there is no teacher'), ('no_such_module:make', 'there is no teacher .* MODULE:FUNCTION'),
    ('math:no_such_function', 'there is no teacher')])
def test_no_such_teacher(name, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(name)


def test_teachers_by_name(teacher, tmp_path, monkeypatch):
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    (tmp_path / 'teachers_of_a_test.py').write_text('def make():\n    return abs\n\n\ndef fails():\n    None.x\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert load_teacher('teachers_of_a_test:make') is abs
    with pytest.raises(AttributeError, match="no attribute 'x'"):  # its own error
        load_teacher('teachers_of_a_test:fails')
    with pytest.raises(ValueError, match='brings its own weights'):
        load_teacher('teachers_of_a_test:make', tmp_path / 'teacher.pth')
    torch.save(timm.create_model(TEACHER).state_dict(), tmp_path / 'whole.pth')
    assert torch.equal(load_teacher(TEACHER, tmp_path / 'whole.pth').conv_stem.weight,
                       torch.load(tmp_path / 'whole.pth')['conv_stem.weight'])
    with pytest.raises(RuntimeError, match='size mismatch'):
        load_teacher(TEACHER, tmp_path / 'teacher.pth')


def taught(teacher, reuse=True, count=64, levels=(8, 16, 32)):
    torch.manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 3, 3), dtype=torch.uint8)
    images = nn.functional.interpolate(coarse.float(), (64, 64), mode='bilinear').to(torch.uint8)
    frozen = Teacher(teacher, levels)
    answer = frozen(images)
    student = Student(timm.create_model(STUDENT, num_classes=10), frozen, answer, reuse)
    student.measure(Answer(answer.logits[i:i + 7], answer.pooled[i:i + 7], {
        stride: each[i:i + 7] for stride, each in answer.maps.items()}) for i in range(0, count, 7))
    return student, images, answer


@pytest.mark.parametrize('reuse', [False, True])
def test_the_losses_are_those_of_the_definition(teacher, reuse):
    student, images, answer = taught(teacher, reuse)
    x = images[:8].float() / 255
    some = Answer(answer.logits[:8], answer.pooled[:8], {s: m[:8] for s, m in answer.maps.items()})
    found = student.losses(x, some, 2.)
    assert set(found) == {'logits', '8', '16', '32'} | ({'pooled'} if reuse else set())
    logits, pooled, maps = student(x)
    p, q = (some.logits.double() / 2).softmax(1), (logits.double() / 2).softmax(1)
    torch.testing.assert_close(found['logits'].double(), 4 * (p * (p / q).log()).sum(1).mean(), rtol=1e-4, atol=1e-6)
    for stride in (8, 16, 32):
        all_of_it = answer.maps[stride].double()
        mean, std = all_of_it.mean((0, 2, 3), keepdim=True), all_of_it.std((0, 2, 3), keepdim=True)
        expected = ((some.maps[stride] - mean) / std - maps[str(stride)]).square().mean()
        torch.testing.assert_close(found[str(stride)].double(), expected, rtol=1e-3, atol=1e-4)
    if reuse:
        mean, std = answer.pooled.double().mean(0), answer.pooled.double().std(0)
        torch.testing.assert_close(found['pooled'].double(), ((some.pooled - mean) / std - pooled).square().mean(),
                                   rtol=1e-3, atol=1e-4)


def test_maps_of_other_sizes_are_compared_where_they_lie(teacher):
    student, images, answer = taught(teacher)
    larger = Answer(answer.logits, answer.pooled, {
        stride: m.repeat_interleave(2, 2).repeat_interleave(2, 3) for stride, m in answer.maps.items()})
    x = images.float() / 255
    student.eval()
    with torch.no_grad():
        a, b = student.losses(x, answer, 1.), student.losses(x, larger, 1.)
        smaller = student.losses(x, larger._replace(maps={
            stride: nn.functional.avg_pool2d(m, 2) if m.shape[-1] > 2 else m for stride, m in answer.maps.items()}), 1.)
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    assert all(torch.isfinite(part) for part in smaller.values())


def test_the_export_answers_as_the_student(teacher):
    student, images, _ = taught(teacher)
    x = images.float() / 255 - .5
    nn.init.normal_(student.embed.weight, 0, .1)
    with torch.no_grad():
        for _ in range(40):
            student(x)  # takes running statistics
    student.eval()
    model = timm.create_model(STUDENT, num_classes=10).eval()
    model.load_state_dict(student.export())
    with torch.no_grad():
        logits = student(x)[0]
        torch.testing.assert_close(model(x), logits, rtol=1e-3, atol=1e-3)
        assert logits.std(0).min() > 1e-2
    again = taught(teacher)[0]
    again.take(student.export(), [x])
    again.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x)[0], logits, rtol=.02, atol=.02)


def test_what_a_network_lacks_is_an_error(teacher):
    with pytest.raises(ValueError, match='the teacher .* has no feature map at stride 64, only at 2, 4, 8, 16, 32'):
        Teacher(teacher, (16, 64))
    with pytest.raises(ValueError, match='the teacher VisionTransformer has no feature map at stride 8'):
        Teacher(timm.create_model('test_vit'))


# --- training --------------------------------------------------------------------------------------------------------

def test_it_learns(pictures, tmp_path):
    """The written weights answer like the teacher, which distinguishes colours."""
    pool = nn.functional.avg_pool2d
    teacher = Teacher(lambda x: (4 * x.mean((2, 3)), [pool(x, 8), pool(x, 16)]), (8, 16))
    run(tmp_path, pictures, teacher, pictures=1200, settings=dict(
        sizes=(Size(32, 12),), lr=5e-3, projection_lr=1., decay=.5, ema=.9, levels=(8, 16)), tell_seconds=0)
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    first, last = ({name: sum(line[name] for line in some) for name in ('logits', '8', '16')}
                   for some in (lines[:10], lines[-10:]))
    assert lines[-1]['pictures'] == 1200 and all(last[name] < .5 * first[name] for name in first), (first, last)
    model = timm.create_model(STUDENT, num_classes=3).eval()
    weights = load_file(tmp_path / 'model.safetensors')
    assert {w.dtype for w in weights.values() if w.is_floating_point() and w.dim() > 1} == {torch.float16}
    model.load_state_dict(weights)
    images = Views(Store(tmp_path / 'pictures.bin'), 0, (.9, 1.)).batch(range(48), [32])[0]
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
    with torch.no_grad():
        mine = model((images / 255 - mean) / std).softmax(1)
    assert (mine - teacher(images).logits.softmax(1)).abs().mean() < .1


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(pictures, teacher, tmp_path):
    def go(out, pictures_in_all, end=None):
        torch.manual_seed(5)
        model = timm.create_model(STUDENT, num_classes=10, drop_path_rate=.3, drop_rate=.2)
        return run(out, pictures, teacher, model, pictures=pictures_in_all, tell_seconds=0,
                   settings=dict(decay=.5, sizes=(Size(32, 4, 12), Size(64, 4))), tell=end or (lambda line: None))

    def stop(line):
        if line.startswith('20 pictures'):
            os.kill(os.getpid(), signal.SIGTERM)

    assert go(tmp_path / 'whole', 40)['signal'] is None
    done = go(tmp_path / 'parts', 40, stop)
    assert done['signal'] == 'SIGTERM' and done['pictures'] == state(tmp_path / 'parts')['seen'] == 24
    assert not same(tmp_path / 'whole', tmp_path / 'parts')
    torch.randn(3)  # whatever the generator's state is
    done = go(tmp_path / 'parts', 40)
    assert done['pictures'] == 40 and same(tmp_path / 'whole', tmp_path / 'parts')
    a, b = (load_file(tmp_path / name / 'model.safetensors') for name in ('whole', 'parts'))
    assert all(torch.equal(a[name], b[name]) for name in a)


CODE = """
import timm, torch
from tests.distill import test_distillation as t
torch.set_num_threads(1)
torch.manual_seed(1)
teacher = timm.create_model(t.TEACHER, num_classes=10).eval()
t.run({out!r}, {pictures!r}, teacher, pictures=40, save_minutes=0, tell_seconds=0,
      tell=lambda line: print(line, flush=True))
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bits(pictures, tmp_path):
    def start(out):
        code = CODE.format(out=str(out), pictures=str(pictures))
        return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=environment())

    whole, parts = start(tmp_path / 'whole'), start(tmp_path / 'parts')
    for line in parts.stdout:
        if line.startswith('16 pictures'):
            parts.kill()
            break
    assert parts.wait() == -signal.SIGKILL and whole.communicate() and whole.returncode == 0
    assert 0 < state(tmp_path / 'parts')['seen'] < 40
    again = start(tmp_path / 'parts')
    assert 'continues from' in again.communicate()[0] and again.returncode == 0
    assert same(tmp_path / 'whole', tmp_path / 'parts')


def test_threads_give_the_same_bits(pictures, teacher, tmp_path):
    run(tmp_path / 'a', pictures, teacher)
    run(tmp_path / 'b', pictures, teacher, workers=3, store=tmp_path / 'elsewhere.bin')
    assert same(tmp_path / 'a', tmp_path / 'b')
    assert (tmp_path / 'elsewhere.bin').exists() and not (tmp_path / 'b' / 'pictures.bin').exists()


@pytest.mark.parametrize('change', [
    dict(teacher_scale=2.), dict(teacher_size=64), dict(crop=.9), dict(levels=(8, 16)), dict(reuse=False),
    dict(temperature=3.), dict(weights=(2., 4., 1.)), dict(weights=(1., 0., 1.)), dict(weights=(1., 4., 0.)),
    dict(lr=2e-3), dict(projection_lr=1.), dict(weight_decay=.5), dict(warmup=100), dict(decay=1.), dict(clip=.01),
    dict(ema=.1), dict(seed=1), dict(precision='bf16'), dict(teacher_precision='bf16'), dict(sizes=(Size(64, 4),)),
    dict(sizes=(Size(32, 2),)), dict(sizes=(Size(32, 4, 8), Size(64, 4)))], ids=lambda change: str(change)[5:40])
def test_every_setting_matters(pictures, teacher, tmp_path, change):
    """Every setting changes the weights, and a run does not continue with another."""
    weights = {}
    for name, changes in (('a', {}), ('b', change)):
        torch.manual_seed(3)
        run(tmp_path / name, pictures, teacher, timm.create_model(STUDENT, num_classes=10), pictures=16,
            settings=dict(changes, ema=changes.get('ema', .9)))
        weights[name] = load_file(tmp_path / name / 'model.safetensors')
    assert any(not torch.equal(weights['a'][name], weights['b'][name]) for name in weights['a'])
    with pytest.raises(ValueError, match=f'made with other settings: {next(iter(change))} .*, now .*--start'):
        run(tmp_path / 'a', pictures, teacher, timm.create_model(STUDENT, num_classes=10),
            settings=dict(change, ema=change.get('ema', .9)))


def test_the_learning_rate():
    s = settings(lr=1., warmup=10, decay=.5)
    assert [round(s.rate(seen, 0.), 3) for seen in (0, 4, 9, 1000)] == [.1, .5, 1., 1.]
    assert [round(s.rate(1000, done), 3) for done in (.5, .75, 1., 1.1)] == [1., .5, 0., 0.]
    assert settings(lr=1., decay=0.).rate(9, 1.) == 1. and round(settings(lr=1., decay=1.).rate(9, .5), 3) == .5


def test_sizes():
    s = settings(sizes=(Size.parse('48x128:100'), Size.parse('64:50'), Size.parse('96x32')))
    assert s.sizes == (Size(48, 128, 100), Size(64, 64, 50), Size(96, 32))
    assert [s.size(seen).pixels for seen in (0, 99, 100, 149, 150, 10 ** 9)] == [48, 48, 64, 64, 96, 96]
    assert [settings(teacher_scale=x).teacher_pixels(Size(48)) for x in (.1, 1.9, 2.)] == [32, 96, 96]
    for text in ('', 'x32', '64x', '64:', '64x0', 'a', '64x32:1.5', '-64'):
        with pytest.raises(ValueError, match='expected PIXELS'):
            Size.parse(text)


@pytest.mark.parametrize('change', [
    dict(sizes=()), dict(sizes=(Size(32), Size(64))), dict(teacher_scale=0), dict(teacher_size=0), dict(crop=0),
    dict(crop=1.1), dict(levels=(8, 8)), dict(temperature=0), dict(weights=(1., 1.)), dict(weights=(1., -1., 1.)),
    dict(lr=0), dict(projection_lr=0), dict(weight_decay=-1), dict(warmup=-1), dict(decay=1.5), dict(clip=-1),
    dict(ema=1.), dict(precision='fp8'), dict(teacher_precision='half')], ids=str)
def test_settings_out_of_range(change):
    name, = change
    with pytest.raises(ValueError, match=f'^{name}: expected .*, got '):
        settings(**change)


def test_ends(pictures, teacher, tmp_path):
    started = time.monotonic()
    done = run(tmp_path, pictures, teacher, pictures=None, minutes=.02, save_minutes=60)
    assert 1.2 <= done['seconds'] < 20 and time.monotonic() - started < 60 and done['pictures'] > 4
    again = run(tmp_path, pictures, teacher, pictures=None, minutes=.02)  # done already
    assert again['pictures'] == done['pictures']
    more = run(tmp_path, pictures, teacher, pictures=done['pictures'] + 8)  # longer than it was planned
    assert more['pictures'] >= done['pictures'] + 8
    for name in ('pictures', 'minutes', 'keep_pictures'):
        with pytest.raises(ValueError, match=f'{name}: expected a number above 0, got 0'):
            run(tmp_path, pictures, teacher, **{name: 0})


def test_kept_weights_are_those_of_their_time(pictures, teacher, tmp_path):
    run(tmp_path / 'a', pictures, teacher, pictures=24, keep_pictures=10)
    assert sorted(path.name for path in (tmp_path / 'a' / 'kept').iterdir()) == [
        '000000012.safetensors', '000000020.safetensors']
    run(tmp_path / 'b', pictures, teacher, pictures=12)
    a, b = load_file(tmp_path / 'a/kept/000000012.safetensors'), load_file(tmp_path / 'b/model.safetensors')
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_starts_from_another(pictures, teacher, tmp_path):
    run(tmp_path / 'a', pictures, teacher)
    lines = []
    done = run(tmp_path / 'b', pictures, teacher, pictures=8, start=tmp_path / 'a/last.pt', tell=lines.append,
               settings=dict(decay=1., lr=1e-4))
    assert done['pictures'] == 32 and state(tmp_path / 'b')['begun'] == 24 and 'which has seen 24 pictures' in lines[-2]
    a, b = state(tmp_path / 'a'), state(tmp_path / 'b')
    assert b['steps'] == a['steps'] + 2
    moved = (a['student']['model.stem.conv.weight'] - b['student']['model.stem.conv.weight']).abs().max()
    assert 0 < moved < 3e-4
    assert {group['weight_decay'] for group in b['optimizer']['param_groups']} == {0., .05}
    run(tmp_path / 'e', pictures, teacher, pictures=4, start=tmp_path / 'a/last.pt',
        settings=dict(weight_decay=.2, projection_lr=.5))  # of this run
    groups = state(tmp_path / 'e')['optimizer']['param_groups']
    assert {group['weight_decay'] for group in groups} == {0., .2} and {group['factor'] for group in groups} == {1., .5}
    # from weights alone: the same model, with an optimizer that has seen nothing
    run(tmp_path / 'c', pictures, teacher, pictures=4, start=tmp_path / 'a/model.safetensors', settings=dict(lr=1e-9))
    weights, again = (load_file(tmp_path / name / 'model.safetensors') for name in 'ac')
    for name in ('stem.conv.weight', 'stages.3.blocks.0.attn.query.weight'):
        assert torch.equal(weights[name], again[name])
    for wrong, reason in (('nothing.pt', 'no such file'), ('text.pt', 'cannot be read'), ('text.safetensors', '')):
        if wrong.startswith('text'):
            (tmp_path / wrong).write_text('x')
        with pytest.raises(RuntimeError, match=f'cannot start from .*{wrong}: .*{reason}'):
            run(tmp_path / 'd', pictures, teacher, start=tmp_path / wrong)


def test_a_damaged_checkpoint(pictures, teacher, tmp_path):
    run(tmp_path, pictures, teacher, pictures=4)
    (tmp_path / 'last.pt').write_bytes((tmp_path / 'last.pt').read_bytes()[:1000])
    with pytest.raises(RuntimeError, match='last.pt cannot be read as a checkpoint of a distillation'):
        run(tmp_path, pictures, teacher)


def test_another_network_or_other_pictures(pictures, teacher, tmp_path):
    run(tmp_path, pictures, teacher, pictures=4)
    with pytest.raises(ValueError, match="model 'test_san_patchwise', now 'test_san_pairwise'"):
        run(tmp_path, pictures, teacher, 'test_san_pairwise')
    with pytest.raises(ValueError, match='pictures .*, now '):
        run(tmp_path, f'{pictures}//0', teacher)


def test_a_training_that_diverges_stops(pictures, teacher, tmp_path):
    run(tmp_path, pictures, Teacher(teacher, ()), pictures=4, settings=dict(levels=(), reuse=False))
    before = (tmp_path / 'last.pt').read_bytes()

    def broken(x):
        return torch.full((len(x), 10), float('nan'))

    with pytest.raises(FloatingPointError, match='after 4 pictures the gradient is not finite'):
        run(tmp_path, pictures, Teacher(broken, ()), pictures=8, settings=dict(levels=(), reuse=False))
    assert (tmp_path / 'last.pt').read_bytes() == before


@pytest.mark.parametrize('student', ['test_san_pairwise', 'test_resnet'])
def test_other_students(pictures, teacher, tmp_path, student):
    run(tmp_path, pictures, teacher, student, pictures=8)
    timm.create_model(student, num_classes=10).load_state_dict(load_file(tmp_path / 'model.safetensors'))


def test_a_teacher_of_logits_and_one_of_maps(pictures, tmp_path):
    run(tmp_path / 'a', pictures, Teacher(lambda x: x.mean((2, 3)), ()), pictures=8)
    assert load_file(tmp_path / 'a/model.safetensors')['head.fc.weight'].shape == (3, 128)
    assert state(tmp_path / 'a')['about']['settings']['levels'] == []
    run(tmp_path / 'b', pictures, Teacher(lambda x: (None, [nn.functional.avg_pool2d(x, 8)]), (8,)), pictures=8)
    assert 'head.fc.weight' not in load_file(tmp_path / 'b/model.safetensors')


# --- two processes ---------------------------------------------------------------------------------------------------

TWO = """
import timm, torch, torch.distributed as dist
from tests.distill import test_distillation as t
torch.set_num_threads(1)
dist.init_process_group('gloo')
torch.manual_seed(1)
teacher = timm.create_model(t.TEACHER, num_classes=10).eval()
torch.manual_seed(7)
# group norms: batches of half the size have the same gradients
model = timm.create_model(t.STUDENT, num_classes=10, norm_layer='groupnorm1')
print(dist.get_rank(), t.run({out!r}, {pictures!r}, teacher, model, pictures=24,
      settings=dict(reuse=False, precision='fp32')))
dist.destroy_process_group()
"""


def test_two_processes_learn_what_one_does(pictures, tmp_path):
    for processes in (1, 2):
        code = TWO.format(out=str(tmp_path / str(processes)), pictures=str(pictures))
        (tmp_path / 'two.py').write_text(code)
        done = subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}',
             tmp_path / 'two.py'], text=True, capture_output=True, timeout=300, env=environment())
        assert done.returncode == 0, done.stderr
    one, two = (state(tmp_path / str(processes)) for processes in (1, 2))
    assert one['seen'] == two['seen'] == 24 and one['about']['processes'] == 1 and two['about']['processes'] == 2
    begun = timm.create_model(STUDENT, num_classes=10, norm_layer='groupnorm1')
    for name, tensor in one['student'].items():
        if name.startswith('model.') and name[6:] in begun.state_dict() and tensor.is_floating_point():
            torch.testing.assert_close(tensor, two['student'][name], rtol=0, atol=2e-3)
    differences = [float((one['student'][name] - two['student'][name]).abs().mean()) for name in one['student']]
    assert max(differences) < 5e-4  # six steps of 1e-3 would move them by some 3e-3


def test_batches_that_cannot_be_shared(pictures, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr('torch.distributed.is_initialized', lambda: True)
    monkeypatch.setattr('torch.distributed.get_rank', lambda: 0)
    monkeypatch.setattr('torch.distributed.get_world_size', lambda: 3)
    monkeypatch.setattr('torch.distributed.barrier', lambda: None)
    with pytest.raises(ValueError, match='3 processes cannot share batches of 4 pictures evenly'):
        run(tmp_path, pictures, teacher)


def test_settings_are_documented():
    for each in (Settings, Size):
        for field in dataclasses.fields(each):
            assert f'        {field.name}: ' in each.__doc__
