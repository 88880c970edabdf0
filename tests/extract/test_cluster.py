"""Ray: several nodes on this machine, one of which dies under way; and people's own pipelines."""
import os
import pathlib
import threading
import time

import numpy as np
import pytest
from tests.extract.noise_pictures import MODEL, noise

from san_backbones.extract import Settings, extract, ray_actor

parquet = pytest.importorskip('pyarrow.parquet', reason='needs the features extra')

ray = pytest.importorskip('ray', reason='needs the ray extra')
pytest.importorskip('ray.data', reason='needs the ray extra')
ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = Settings(size=(32, 32), batch_size=2, partition=2)


@pytest.fixture(scope='module')
def environment():
    """Workers find the package where this process does, and one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH')))))
        patch.setenv('OMP_NUM_THREADS', '1')
        patch.setenv('RAY_ENABLE_UV_RUN_RUNTIME_ENV', '0')
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        yield


@pytest.fixture
def cluster(environment):
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, object_store_memory=100_000_000))
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def many(tmp_path):
    for seed in range(40):
        noise(tmp_path / 'in' / f'{seed:02d}.png', seed=seed)
    (tmp_path / 'in' / '05.png').write_bytes(b'no picture')
    return tmp_path / 'in'


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*') if path.is_file()}


def test_a_node_dies_under_way(many, tmp_path, cluster):
    """Every picture once, nothing lost, and the bits of a single process."""
    extract(many, tmp_path / 'one', MODEL, SETTINGS, workers=0, progress=False)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    killed = []

    def kill():
        while len(list((tmp_path / 'out').glob('features/*.parquet'))) < 3:
            time.sleep(0.01)
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.append(len(list((tmp_path / 'out').glob('features/*.parquet'))))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    report = extract(many, tmp_path / 'out', MODEL, SETTINGS, ray=cluster.address, progress=False)
    thread.join(60)
    assert killed and killed[0] < 20
    assert (report.complete, report.pictures, report.rows, report.errors) == (True, 40, 39, 1)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'one')


def test_own_pipeline(many, tmp_path, environment):
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=100_000_000)
    try:
        pictures = ray.data.read_binary_files(str(many), include_paths=True)
        rows = pictures.map_batches(ray_actor(MODEL, Settings(size=(32, 32), logits=True)), batch_size=4,
                                    concurrency=1).take_all()
    finally:
        ray.shutdown()
    settings = Settings(size=(32, 32), logits=True, batch_size=4)
    extract(many, tmp_path / 'out', MODEL, settings, workers=0, progress=False)
    expected = {row['sha1']: row for row in parquet.read_table(tmp_path / 'out' / 'features').to_pylist()}
    assert len(rows) == 40 and sum(row['error'] == '' for row in rows) == 39
    for row in rows:
        if row['error']:
            assert row['path'].endswith('05.png') and np.isnan(row['features']).all()
            assert row['error'] == 'no picture in a format that Pillow knows'
        else:
            for name in ('features', 'logits'):
                np.testing.assert_allclose(row[name], expected[row['sha1']][name], rtol=1e-4, atol=1e-4)
            assert (row['width'], row['height']) == (64, 48)


def test_an_actor_by_itself(many):
    actor = ray_actor(MODEL, Settings(size=(32, 32)))()
    paths = np.array([str(many / '00.png'), str(many / '05.png')])
    result = actor(dict(path=paths, label=np.array([3, 4])))
    assert list(result['label']) == [3, 4] and result['features'].shape == (2, 128)
    assert list(np.isnan(result['features']).any(1)) == [False, True] and result['error'][0] == ''
    with pytest.raises(ValueError, match='has the columns label: expected bytes, path or file'):
        actor(dict(label=np.array([3])))
    with pytest.raises(ValueError, match='a batch of Ray Data has vectors'):
        ray_actor(MODEL, Settings(pool='none'))
