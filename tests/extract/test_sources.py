"""Where pictures come from: names, order and bytes, against the files themselves and against other readers."""
import gzip
import hashlib
import io
import itertools
import os
import pathlib
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
from tests.extract.noise_pictures import MODEL, noise

from san_backbones.extract import Settings, extract
from san_backbones.extract.sources import File, Source, content

pyarrow = pytest.importorskip('pyarrow', reason='needs the features extra')
parquet = pytest.importorskip('pyarrow.parquet', reason='needs the features extra')

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = Settings(size=(32, 32), batch_size=4, partition=3)


def run(sources, out, **options):
    """Names and digests in order, and the report."""
    options = dict(workers=0, progress=False, settings=SETTINGS) | options
    report = extract(sources, out, MODEL, **options)
    table = parquet.read_table(out / 'features')
    return list(zip(table['file'].to_pylist(), table['sha1'].to_pylist())), report


def sha1(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def errors(out):
    return parquet.read_table(out / 'errors.parquet').to_pylist()


@pytest.fixture
def files(tmp_path):
    """Pictures that are not in the order of their names."""
    for seed, name in enumerate(('c.png', 'a.png', 'e.png', 'b.png', 'd.png')):
        noise(tmp_path / name, seed=seed)
    return [tmp_path / name for name in ('c.png', 'a.png', 'e.png', 'b.png', 'd.png')]


def tar_of(path, files, mode='w'):
    with tarfile.open(path, mode) as tar:
        for number, file in enumerate(files):
            tar.add(file, f'{number:03d}.{file.name}')
            label = tarfile.TarInfo(f'{number:03d}.json')
            tar.addfile(label, io.BytesIO(b''))
    return path


class TestFiles:

    def test_braces_that_stand_for_themselves(self, files, tmp_path):
        pytest.importorskip('braceexpand')
        (tmp_path / 'd{24}').mkdir()
        os.link(files[0], tmp_path / 'd{24}' / 'a.png')
        assert [digest for _, digest in run(f'{tmp_path}/d{{24}}/*.png', tmp_path / 'out')[0]] == [sha1(files[0])]
        with pytest.raises(FileNotFoundError, match=r'x\{1\}.png is not there'):
            run(f'{tmp_path}/x{{1}}.png', tmp_path / 'out')

    def test_named_and_globs(self, files, tmp_path):
        expected = [(str(file), sha1(file)) for file in files]
        assert run([str(file) for file in files], tmp_path / 'named')[0] == expected
        assert run(files[1], tmp_path / 'one')[0] == expected[1:2]
        assert run(str(tmp_path / '*.png'), tmp_path / 'glob')[0] == sorted(expected)
        assert run(str(tmp_path / '{c,e}.png'), tmp_path / 'braces')[0] == [expected[0], expected[2]]

    @pytest.mark.parametrize('name', ['nothing.jpg', '*.jpg', 'no-folder', 'memory://no-folder'])
    def test_not_there(self, name, tmp_path):
        with pytest.raises(FileNotFoundError, match='is not there: expected a picture, folder, glob'):
            run(name if '://' in name else str(tmp_path / name), tmp_path / 'out')

    def test_what_is_no_picture(self, tmp_path):
        (tmp_path / 'a.txt').write_text('no picture')
        with pytest.raises(ValueError, match=r'a\.txt has no pictures that can be read: expected'):
            run(tmp_path / 'a.txt', tmp_path / 'out')

    def test_a_tar_that_ends_in_a_zip(self, files, tmp_path):
        """As shards with .npz or .pt do: zipfile takes such a tar for a zip."""
        np.savez(tmp_path / 'last.npz', x=np.zeros(3))
        tar_of(tmp_path / 'a.tar', [*files, tmp_path / 'last.npz'])
        with tarfile.open(tmp_path / 'b.tar', 'w') as tar:
            tar.add(files[0], '0.png')
            tar.add(tmp_path / 'last.npz', '0.npz')
        assert zipfile.is_zipfile(tmp_path / 'b.tar')
        assert [digest for _, digest in run(tmp_path / 'b.tar', tmp_path / 'out')[0]] == [sha1(files[0])]

    def test_addresses_in_a_dataset(self, files, tmp_path, monkeypatch):
        pytest.importorskip('fsspec')
        monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(Image=type('Image', (), {})))
        rows = [dict(url=file.as_uri()) for file in files]

        class Rows:
            features = dict(url=None)

            def __init__(self, rows):
                self.rows = rows

            def __len__(self):
                return len(self.rows)

            def __iter__(self):
                return iter(self.rows)

            def select_columns(self, names):
                return self

            def select(self, wanted):
                return Rows([self.rows[i] for i in wanted])

        assert [digest for _, digest in run(Rows(rows), tmp_path / 'out')[0]] == [sha1(file) for file in files]

    @pytest.mark.parametrize('given, kind', [(None, 'NoneType'), (iter(['a.jpg']), 'list_iterator'),
                                             ([np.zeros((4, 4, 3))], 'ndarray'), (7, 'int')])
    def test_what_is_no_source(self, given, kind, tmp_path):
        with pytest.raises(TypeError, match=f'cannot be read from a {kind}: expected a picture, folder.*list of these'):
            run(given, tmp_path / 'out')

    def test_an_empty_list(self, tmp_path):
        with pytest.raises(ValueError, match='nothing is given to read pictures from: expected a picture, folder'):
            run([], tmp_path / 'out')

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / 'in').mkdir()
        (tmp_path / 'in' / 'a.txt').write_text('')
        with pytest.raises(ValueError, match=r'no pictures in .*in: looked for files whose names end in \.bmp'):
            run(tmp_path / 'in', tmp_path / 'out')
        assert not (tmp_path / 'out').exists()

    def test_a_folder_without_rights(self, folder, tmp_path, monkeypatch):
        """In words, at once, rather than as a folder with fewer pictures."""
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith('sub'):
                raise PermissionError(13, 'Permission denied', str(path))
            return scandir(path)

        monkeypatch.setattr(os, 'scandir', refuse)
        with pytest.raises(PermissionError, match='Permission denied.*sub'):
            run(folder, tmp_path / 'out')

    @pytest.mark.parametrize('name', ['Ёлка 你好 שלום 🌲.png', 'a"b\'c,d.png', 'percent%20#?.png', ' .png'])
    def test_a_name_in_any_script(self, name, tmp_path):
        noise(tmp_path / 'in' / name)
        path = tmp_path / 'in' / name
        assert run(tmp_path / 'in', tmp_path / 'out')[0] == [(str(path), sha1(path))]

    @pytest.mark.skipif(sys.platform != 'linux', reason='names are bytes')
    def test_a_name_that_is_no_text(self, tmp_path):
        noise(tmp_path / 'in' / 'a.png')
        os.rename(tmp_path / 'in' / 'a.png', os.fsencode(tmp_path / 'in') + b'/\xff\xfe.png')
        (name, _), = run(tmp_path / 'in', tmp_path / 'out')[0]
        assert name == str(tmp_path / 'in') + r'/\xff\xfe.png'

    def test_two_of_one_name(self, tmp_path):
        """In two folders, and twice in one archive: a row each."""
        for seed, folder in enumerate(('one', 'two')):
            noise(tmp_path / folder / 'a.png', seed=seed)
        found, _ = run([tmp_path / 'one', tmp_path / 'two'], tmp_path / 'folders')
        assert found == [(str(tmp_path / folder / 'a.png'), sha1(tmp_path / folder / 'a.png'))
                         for folder in ('one', 'two')]
        with zipfile.ZipFile(tmp_path / 'both.zip', 'w') as archive, pytest.warns(UserWarning, match='Duplicate'):
            for folder in ('one', 'two'):
                archive.write(tmp_path / folder / 'a.png', 'a.png')
        with tarfile.open(tmp_path / 'both.tar', 'w') as tar:
            for folder in ('one', 'two'):
                tar.add(tmp_path / folder / 'a.png', 'a.png')
        for kind in ('zip', 'tar'):
            found, _ = run(tmp_path / f'both.{kind}', tmp_path / kind)
            assert found == [(f'{tmp_path}/both.{kind}//a.png', sha1(tmp_path / folder / 'a.png'))
                             for folder in ('one', 'two')]


class TestArchives:

    def test_zip(self, files, tmp_path):
        with zipfile.ZipFile(tmp_path / 'all.zip', 'w') as archive:
            for file in files:
                archive.write(file, f'in/{file.name}')
            archive.writestr('in/notes.txt', 'no picture')
        found, report = run(tmp_path / 'all.zip', tmp_path / 'out')
        assert found == sorted((f'{tmp_path}/all.zip//in/{file.name}', sha1(file)) for file in files)
        assert sorted(path.name for path in (tmp_path / 'out' / 'features').iterdir()) == [
            '000000-000000.parquet', '000000-000001.parquet']

    @pytest.mark.parametrize('name, mode', [('all.tar', 'w'), ('all.tar.gz', 'w:gz'), ('all.tar.xz', 'w:xz')])
    def test_tar(self, name, mode, files, tmp_path):
        tar_of(tmp_path / name, files, mode)
        found, _ = run(tmp_path / name, tmp_path / 'out', workers=1)
        assert found == [(f'{tmp_path}/{name}//{number:03d}.{file.name}', sha1(file))
                         for number, file in enumerate(files)]

    def test_shards_are_what_webdataset_reads(self, files, tmp_path):
        wds = pytest.importorskip('webdataset')
        for number in range(3):
            with wds.TarWriter(str(tmp_path / f'shard-{number}.tar')) as sink:
                for place, file in enumerate(files[number:]):
                    sink.write({'__key__': f'{number}{place}', 'png': file.read_bytes(), 'cls': place})
        shards = str(tmp_path / 'shard-{0..2}.tar')
        read = [sample['png'] for sample in wds.WebDataset(shards, shardshuffle=False)]
        found, _ = run(shards, tmp_path / 'out')
        assert [digest for _, digest in found] == [hashlib.sha1(data).hexdigest() for data in read]
        assert [name.rpartition('//')[2] for name, _ in found[:5]] == [f'0{place}.png' for place in range(5)]
        lines = [f'pipe:cat {tmp_path}/shard-{number}.tar' for number in range(3)]
        assert [digest for _, digest in run(lines, tmp_path / 'pipes')[0]] == [digest for _, digest in found]

    def test_a_folder_of_both(self, files, tmp_path):
        """Archives stand where their names do, loose pictures around them are partitions of their own."""
        inside = tmp_path / 'in'
        inside.mkdir()
        for file in files:
            os.link(file, inside / file.name)
        tar_of(inside / 'bb.tar', files[:2])
        found, _ = run(inside, tmp_path / 'out')
        assert [name.removeprefix(f'{inside}/') for name, _ in found] == [
            'a.png', 'b.png', 'bb.tar//000.c.png', 'bb.tar//001.a.png', 'c.png', 'd.png', 'e.png']
        assert sorted(path.stem for path in (tmp_path / 'out' / 'features').iterdir()) == [
            '000000-000000', '000001-000000', '000002-000000']

    @pytest.mark.parametrize('kind', ['tar', 'tar.gz', 'zip', 'parquet'])
    def test_a_shard_cut_short(self, kind, files, tmp_path):
        """What it has is taken, the cut is told, and the other shards go on."""
        for number in range(2):
            path = tmp_path / f'{number}.{kind}'
            if kind == 'zip':
                with zipfile.ZipFile(path, 'w') as archive:
                    for file in files:
                        archive.write(file, file.name)
            elif kind == 'parquet':
                parquet.write_table(pyarrow.table(dict(image=[file.read_bytes() for file in files])), path)
            else:
                tar_of(path, files, 'w:gz' if kind == 'tar.gz' else 'w')
        whole = (tmp_path / f'0.{kind}').read_bytes()
        (tmp_path / f'0.{kind}').write_bytes(whole[:len(whole) * 5 // 12])
        found, report = run([tmp_path / f'{number}.{kind}' for number in range(2)], tmp_path / 'out')
        told = errors(tmp_path / 'out')
        assert report.complete and [digest for _, digest in found][-5:] == (
            [sha1(file) for file in (sorted(files) if kind == 'zip' else files)])
        assert len(found) > 5 if kind.startswith('tar') else len(found) == 5
        assert told[-1]['file'] == str(tmp_path / f'0.{kind}')
        assert 'cut short' in told[-1]['reason'] and 'fetch it again' in told[-1]['reason']

    @pytest.mark.parametrize('kind', ['tar', 'tar.gz'])
    def test_a_tar_cut_in_a_head(self, kind, files, tmp_path):
        tar_of(tmp_path / 'whole.tar', files)
        data = (tmp_path / 'whole.tar').read_bytes()
        with tarfile.open(tmp_path / 'whole.tar') as tar:
            data = data[:[member for member in tar if member.name.endswith('.png')][2].offset + 100]
        (tmp_path / f'a.{kind}').write_bytes(gzip.compress(data) if kind == 'tar.gz' else data)
        found, _ = run(tmp_path / f'a.{kind}', tmp_path / 'out')
        assert [digest for _, digest in found if digest] == [sha1(file) for file in files[:2]]
        assert 'cut short' in errors(tmp_path / 'out')[-1]['reason']

    def test_a_zip_with_a_password_at_an_address(self, files, tmp_path):
        path = tmp_path / 'a.zip'
        with zipfile.ZipFile(path, 'w') as archive:
            archive.write(files[0], 'a.png')
        data = bytearray(path.read_bytes())
        for mark, flags in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
            data[data.index(mark) + flags] |= 1  # encrypted
        path.write_bytes(data)
        run(f'file://{path}', tmp_path / 'out')
        assert 'password' in errors(tmp_path / 'out')[0]['reason']

    def test_upper_case_archives_in_a_folder(self, files, tmp_path):
        (tmp_path / 'in').mkdir()
        tar_of(tmp_path / 'in' / 'A.TAR', files[:1])
        with zipfile.ZipFile(tmp_path / 'in' / 'B.ZIP', 'w') as archive:
            archive.write(files[1], 'b.png')
        assert [digest for _, digest in run(tmp_path / 'in', tmp_path / 'out')[0]] == [sha1(file) for file in files[:2]]

    @pytest.mark.parametrize('kind', ['string', 'large_string', 'dictionary', 'string_view'])
    def test_names_in_any_form_of_text(self, kind, files, tmp_path):
        if kind == 'string_view' and not hasattr(pyarrow, 'string_view'):
            pytest.skip('this pyarrow has no string_view')
        names = pyarrow.array(['a', 'b'])
        names = names.dictionary_encode() if kind == 'dictionary' else names.cast(getattr(pyarrow, kind)())
        table = pyarrow.table(dict(image=[file.read_bytes() for file in files[:2]], file=names))
        try:
            parquet.write_table(table, tmp_path / 'p.parquet')
        except pyarrow.ArrowNotImplementedError:
            pytest.skip(f'this pyarrow writes no {kind}')
        found, _ = run(tmp_path / 'p.parquet', tmp_path / 'out')
        assert [name.partition('//')[2] for name, _ in found] == ['0//a', '1//b']

    def test_an_empty_tar(self, tmp_path):
        tar_of(tmp_path / 'a.tar', [])
        with pytest.raises(ValueError, match='there are no pictures'):
            run(tmp_path / 'a.tar', tmp_path / 'out')


class TestTables:

    @pytest.mark.parametrize('form', ['bytes', 'struct', 'paths', 'large'])
    def test_parquet(self, form, files, tmp_path):
        column = [file.read_bytes() for file in files]
        if form == 'struct':
            column = [dict(bytes=data, path=file.name) for data, file in zip(column, files)]
        elif form == 'paths':
            column = [file.name for file in files]
        elif form == 'large':
            column = pyarrow.array(column, pyarrow.large_binary())
        table = pyarrow.table({'image': column, 'label': list(range(5))})
        parquet.write_table(table, tmp_path / 'a.parquet', row_group_size=2)
        found, _ = run(tmp_path / 'a.parquet', tmp_path / 'out')
        title = {'bytes': '', 'large': ''}
        assert found == [(f'{tmp_path}/a.parquet//{row}' + title.get(form, f'//{file.name}'), sha1(file))
                         for row, file in enumerate(files)]

    def test_columns(self, files, tmp_path):
        table = pyarrow.table(dict(a=[file.read_bytes() for file in files], key=[f'k{i}' for i in range(5)],
                                   b=[file.read_bytes() for file in reversed(files)]))
        parquet.write_table(table, tmp_path / 'a.parquet')
        with pytest.raises(ValueError, match='no column of pictures: it has a, key, b; --column NAME'):
            run(tmp_path / 'a.parquet', tmp_path / 'none')
        found, _ = run(tmp_path / 'a.parquet', tmp_path / 'out', column='b')
        assert [digest for _, digest in found] == [sha1(file) for file in reversed(files)]
        assert found[0][0].endswith('a.parquet//0//k0')
        parquet.write_table(pyarrow.table(dict(image=[1, 2])), tmp_path / 'b.parquet')
        with pytest.raises(ValueError, match="the column 'image' holds int64, expected bytes, paths"):
            run(tmp_path / 'b.parquet', tmp_path / 'kind')

    def test_rows_without_a_picture(self, files, tmp_path):
        parquet.write_table(pyarrow.table(dict(image=[files[0].read_bytes(), None])), tmp_path / 'a.parquet')
        found, report = run(tmp_path / 'a.parquet', tmp_path / 'out')
        assert len(found) == 1 and errors(tmp_path / 'out') == [
            dict(file=f'{tmp_path}/a.parquet//1', reason='the row has neither bytes nor a path')]

    @pytest.mark.parametrize('start, stop', [(0, None), (0, 2), (1, 4), (3, 5), (4, None), (2, 2)])
    def test_any_part(self, start, stop, files, tmp_path):
        parquet.write_table(pyarrow.table(dict(image=[file.read_bytes() for file in files])), tmp_path / 'a.parquet',
                            row_group_size=2)
        shard, = Source([tmp_path / 'a.parquet']).entries()
        assert [content(picture.place) for picture in shard.pictures(start, stop)] == [
            file.read_bytes() for file in files][start:stop]

    @pytest.mark.parametrize('streams', [False, True])
    def test_datasets(self, streams, files, tmp_path):
        datasets = pytest.importorskip('datasets')
        rows = datasets.Dataset.from_dict(dict(picture=[str(file) for file in files], label=list(range(5))))
        rows = rows.cast_column('picture', datasets.Image())
        rows = rows.to_iterable_dataset() if streams else rows
        found, report = run(rows, tmp_path / 'out')
        assert [digest for _, digest in found] == [sha1(file) for file in files] and report.complete
        assert [name for name, _ in found] == [f'datasets//{i}//{file.name}' for i, file in enumerate(files)]
        if not streams:
            rows.save_to_disk(tmp_path / 'saved')
            found, _ = run(f'datasets:{tmp_path / "saved"}', tmp_path / 'disk', column='picture')
            assert [digest for _, digest in found] == [sha1(file) for file in files]
            with pytest.raises(ValueError, match='has no column other: it has picture, label'):
                run(rows, tmp_path / 'other', column='other')


class TestVideo:

    def test_every_nth_frame(self, tmp_path):
        cv2 = pytest.importorskip('cv2')
        path = str(tmp_path / 'a.avi')
        video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 48))
        for number in range(10):
            video.write(np.full((48, 64, 3), (200 - 20 * number, 40, 20 * number), np.uint8))
        video.release()
        found, report = run(path, tmp_path / 'out', every=3)
        assert [name for name, _ in found] == [f'{path}//{number}' for number in (0, 3, 6, 9)] and report.complete
        shard, = Source([path], every=3).entries()
        for number, picture in zip((0, 3, 6, 9), shard.pictures()):  # red grows
            assert abs(int(picture.place[20, 20, 0]) - 20 * number) < 12
            assert abs(int(picture.place[20, 20, 2]) - 200 + 20 * number) < 12
        (tmp_path / 'b.mp4').write_bytes(b'no video')
        with pytest.raises(ValueError, match='1 of|no'):
            assert run(tmp_path / 'b.mp4', tmp_path / 'broken')[1].errors == 1
            raise ValueError(errors(tmp_path / 'broken')[0]['reason'])


class TestAddresses:

    @pytest.fixture
    def memory(self, files):
        fsspec = pytest.importorskip('fsspec')
        system = fsspec.filesystem('memory')
        system.store.clear()
        for file in files:
            system.pipe(f'/bucket/in/sub/{file.name}', file.read_bytes())
        system.pipe('/bucket/in/notes.txt', b'')
        yield system
        system.store.clear()

    def test_folders_and_globs(self, memory, files, tmp_path):
        expected = sorted((f'memory:///bucket/in/sub/{file.name}', sha1(file)) for file in files)
        for number, given in enumerate(('memory://bucket/in', 'memory://bucket/in/sub/*.png')):
            found, report = run(given, tmp_path / str(number))
            assert [(name.replace('memory://bucket', 'memory:///bucket'), digest) for name, digest in found] == expected
        with pytest.raises(ValueError, match='there are no pictures'):
            memory.pipe('/other/a.txt', b'')
            run('memory://other', tmp_path / 'none')

    @pytest.mark.parametrize('kind', ['zip', 'tar', 'tar.gz', 'parquet'])
    def test_shards(self, kind, memory, files, tmp_path):
        local = tmp_path / f'a.{kind}'
        if kind == 'zip':
            with zipfile.ZipFile(local, 'w') as archive:
                for file in sorted(files):
                    archive.write(file, file.name)
        elif kind == 'parquet':
            parquet.write_table(pyarrow.table(dict(image=[file.read_bytes() for file in sorted(files)])), local)
        else:
            tar_of(local, sorted(files), 'w:gz' if kind == 'tar.gz' else 'w')
        memory.pipe(f'/shards/a.{kind}', local.read_bytes())
        found, report = run(f'memory://shards/a.{kind}', tmp_path / 'out')
        assert [digest for _, digest in found] == [sha1(file) for file in sorted(files)] and report.complete

    def test_an_address_is_asked_again(self, memory, files, monkeypatch):
        asked = itertools.count()

        def fails_twice(*given, **options):
            if next(asked) < 2:
                raise OSError('connection reset')
            return io.BytesIO(b'at last')

        monkeypatch.setattr('san_backbones.extract.sources.time.sleep', lambda seconds: None)
        monkeypatch.setattr(type(memory), 'open', fails_twice)
        assert content('memory://bucket/in/sub/a.png') == b'at last'

    def test_a_missing_protocol(self, tmp_path):
        with pytest.raises((ImportError, ValueError), match='nosuch'):
            run('nosuch://bucket/a', tmp_path / 'out')


def test_a_missing_package_is_named(tmp_path):
    """In a process that cannot import it."""
    noise(tmp_path / 'a.png')
    (tmp_path / 'a.mp4').write_bytes(b'')
    cases = [('pyarrow', 'a.png', "pip install 'san-backbones[features]'"), ('tqdm', 'a.png', 'san-backbones[f'),
             ('braceexpand', '{a,b}.png', 'webdataset'), ('datasets', 'datasets:NAME', 'datasets'),
             ('cv2', 'a.mp4', 'opencv-python-headless'), ('webdataset', 'pipe:cat a.tar', 'webdataset')]
    code = f'''
import sys
from san_backbones.extract import extract
for module, given, _ in {cases}:
    there = {{name: sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == module}}
    sys.modules[module] = None
    try:
        extract(given, 'out', {MODEL!r}, workers=0)
    except ImportError as error:
        print(error)
    del sys.modules[module]
    sys.modules.update(there)
'''
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stderr
    for (module, _, command), line in zip(cases, lines):
        assert f'needs {module}' in line and 'pip install' in line and command in line


def test_a_split_that_a_saved_dataset_has_not(tmp_path, monkeypatch):
    (tmp_path / 'state.json').touch()
    saved = types.SimpleNamespace(split='train', features=dict(image=None), select_columns=lambda names: None)
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_from_disk=lambda name: saved, Image=int))
    assert len(list(Source([f'datasets:{tmp_path}:train']).entries())) == 1
    assert len(list(Source([f'datasets:{tmp_path}']).entries())) == 1
    with pytest.raises(ValueError, match="holds one split, train, and 'test' was asked for: leave \":test\" out"):
        list(Source([f'datasets:{tmp_path}:test']).entries())


def test_a_tar_whose_last_picture_was_cut(files, tmp_path):
    tar_of(tmp_path / 'a.tar', files)
    *_, last = (entry for entry in next(Source([tmp_path / 'a.tar']).entries()).pictures())
    assert isinstance(last.place, File)
    data = (tmp_path / 'a.tar').read_bytes()
    (tmp_path / 'a.tar').write_bytes(data[:last.place.at + 20])
    with pytest.raises(OSError, match=f'the tar ends {last.place.size - 20} bytes before the picture does'):
        content(last.place)


def test_a_huge_folder_is_not_kept_in_memory(tmp_path, monkeypatch):
    """The first unit is there before the rest was listed."""
    listed = []

    def walk(folder):
        for number in range(1000):
            listed.append(number)
            yield f'{folder}/{number:04d}.png'

    monkeypatch.setattr('san_backbones._pictures.walk', walk)
    unit = next(Source([str(tmp_path)]).units(10))
    assert len(list(unit.pictures())) == 10 and len(listed) <= 11


