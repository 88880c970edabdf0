"""`hf-hub:ORG/NAME[@REVISION]` in an `init_cfg`, through the real client and a server on this machine."""
import subprocess
import sys

import pytest

pytest.importorskip('mmengine', reason='needs the mm extra')

import timm
from safetensors.torch import save

import san_backbones  # noqa: F401
from tests.hub_server import HubServer

SMALL = dict(attention='patchwise', depths=(1, 1, 1, 1, 1), widths=(32, 32, 64, 64, 96), stem_width=16)
CODE = '''
import sys, torch
from san_backbones.mm import SANBackbone
backbone = SANBackbone({small!r}, init_cfg=dict(type='Pretrained', checkpoint=sys.argv[1]))
backbone.init_weights()
print('sum', backbone.stem.conv.weight.double().sum().item())
'''


def _load(server, checkpoint, home, offline=False):
    environment = server.environment(home, HF_HUB_OFFLINE=str(int(offline)), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-c', CODE.format(small=SMALL), checkpoint], env=environment,
                          capture_output=True, text=True)


def test_loads_at_a_revision_and_again_offline(tmp_path):
    weights = timm.create_model('test_san_patchwise', num_classes=0, **{
        k: v for k, v in SMALL.items() if k != 'attention'}).state_dict()
    with HubServer() as server:
        server.add_repo('org/name')
        server.put('org/name', 'model.safetensors', save(weights))
        server.tag('org/name', 'v1')
        server.put('org/name', 'model.safetensors', b'later')
        expected = f"sum {weights['stem.conv.weight'].double().sum().item()}"
        for offline in (False, True):
            result = _load(server, 'hf-hub:org/name@v1', tmp_path, offline)
            assert expected in result.stdout, result.stderr[-2000:]
        absent = _load(server, 'hf-hub:org/name@v2', tmp_path)
        assert absent.returncode != 0 and 'hf-hub:org/name@v2' in absent.stderr and "no revision 'v2'" in absent.stderr
        assert 'init_cfg=None, frozen_stages=-1 and norm_eval=False' in absent.stderr
        broken = _load(server, 'hf-hub:org/name', tmp_path)
        assert broken.returncode != 0 and 'is not a safetensors file' in broken.stderr
