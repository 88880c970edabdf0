"""`hf-hub:ORG/NAME[@REVISION]` through the real huggingface_hub client, talking to a server on this machine."""
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip('mmengine', reason='needs the mm extra')

import timm  # noqa: E402
from safetensors.torch import save  # noqa: E402

import san_backbones  # noqa: E402, F401

SMALL = dict(attention='patchwise', depths=(1, 1, 1, 1, 1), widths=(32, 32, 64, 64, 96), stem_width=16)
CODE = '''
import sys, torch
from san_backbones.mm import SANBackbone
backbone = SANBackbone({small!r}, init_cfg=dict(type='Pretrained', checkpoint=sys.argv[1]))
backbone.init_weights()
print('sum', backbone.stem.conv.weight.double().sum().item())
'''


@pytest.fixture
def hub():
    """Serves one repository, org/name, with one file at revision v1."""
    weights = timm.create_model('test_san_patchwise', num_classes=0, **{
        k: v for k, v in SMALL.items() if k != 'attention'}).state_dict()
    content = save(weights)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, body):
            if self.path.split('?')[0] != '/org/name/resolve/v1/model.safetensors':
                self.send_response(404)
                self.send_header('X-Error-Code', 'RevisionNotFound')
                self.send_header('Content-Length', '0')
                self.end_headers()
                return
            self.send_response(200)
            self.send_header('ETag', '"0123456789abcdef"')
            self.send_header('X-Repo-Commit', 'a' * 40)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_address[1]}', weights
    server.shutdown()


def _load(endpoint, checkpoint, home, offline=False):
    environment = {**os.environ, 'HF_ENDPOINT': endpoint, 'HF_HOME': str(home), 'HF_HUB_OFFLINE': str(int(offline)),
                   'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, '-c', CODE.format(small=SMALL), checkpoint], env=environment,
                          capture_output=True, text=True)


def test_loads_at_a_revision_and_again_offline(hub, tmp_path):
    endpoint, weights = hub
    expected = f"sum {weights['stem.conv.weight'].double().sum().item()}"
    for offline in (False, True):
        result = _load(endpoint, 'hf-hub:org/name@v1', tmp_path, offline)
        assert expected in result.stdout, result.stderr[-2000:]


def test_what_is_not_there_is_an_error_that_names_it(hub, tmp_path):
    result = _load(hub[0], 'hf-hub:org/name@v2', tmp_path)
    assert result.returncode != 0 and "hf-hub:org/name@v2" in result.stderr.splitlines()[-1] + result.stderr[-1500:]
