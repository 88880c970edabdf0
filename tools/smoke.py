"""Tests an installed package; run_package.py runs this in an environment with only the package, torch and timm."""
import functools
import http.server
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading

import san_backbones
import timm
import torch
from san_backbones import fuse_for_inference
from san_backbones.ops import native

package = pathlib.Path(san_backbones.__file__).parent
assert package.is_relative_to(sys.prefix), f'{package} is not the installed package'
for absent in ('mmengine', 'mmcv', 'transformers', 'onnx', 'typer', 'matplotlib', 'pytest'):
    assert importlib.util.find_spec(absent) is None, f'{absent} is here: this environment is not clean'
assert not any(name.startswith('san_backbones.mm') for name in sys.modules)
for shipped in ('py.typed', '.mim/model-index.yml', '.weights/manifest.json', '.mim/tools/train.py'):
    assert (package / shipped).is_file(), shipped

assert {f'san{depth}_{form}' for depth in (10, 15, 19) for form in ('pairwise', 'patchwise')} <= set(
    timm.list_models('san*'))
model = timm.create_model('test_san_patchwise', pretrained=True).eval()  # offline: its weights ship
with torch.inference_mode():
    logits = model(torch.rand(2, 3, 96, 96))
    torch.testing.assert_close(fuse_for_inference(model)(torch.rand(2, 3, 96, 96)).shape, logits.shape)
timm.create_model('san10_patchwise.distilled', pretrained=True, num_classes=10)  # its weights ship too
for name in ('test_san_pairwise', 'test_san_patchwise'):
    network = timm.create_model(name, features_only=True)
    sum(features.square().mean() for features in network(torch.rand(2, 3, 64, 64))).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())

command = pathlib.Path(sys.executable).with_name('san-backbones')
done = subprocess.run([command, 'weights', 'get', 'test_san_patchwise'], capture_output=True, text=True)  # no extras
assert done.returncode == 0 and 'test_san_patchwise.shapes: ' in done.stdout, done.stdout + done.stderr
# first use of a file in the authors' format, from a mirror
NAMES = [(r'^stem\.conv', 'conv_in'), (r'^stem\.norm', 'bn_in'), (r'^stages\.(\d)\.conv', r'conv\1'),
         (r'^stages\.(\d)\.norm', r'bn\1'), (r'^stages\.(\d)\.blocks', r'layer\1'), (r'^head\.fc', 'fc'),
         (r'\.attn\.query', '.sam.conv1'), (r'\.attn\.key', '.sam.conv2'), (r'\.attn\.value', '.sam.conv3'),
         (r'\.attn\.position', '.sam.conv_p'), (r'\.attn\.weight_mlp\.norm1', '.sam.conv_w.0'),
         (r'\.attn\.weight_mlp\.fc1', '.sam.conv_w.2'), (r'\.attn\.weight_mlp\.norm2', '.sam.conv_w.3'),
         (r'\.attn\.weight_mlp\.fc2', '.sam.conv_w.5'), (r'\.norm(\d)\.', r'.bn\1.')]
state = timm.create_model('san10_pairwise').state_dict()
for ours, theirs in NAMES:
    state = {re.sub(ours, theirs, name): tensor for name, tensor in state.items()}
with tempfile.TemporaryDirectory() as folder:
    torch.save({'state_dict': {f'module.{name}': tensor for name, tensor in state.items()}},
               f'{folder}/san10_pairwise.pth')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, 'SAN_BACKBONES_CACHE': f'{folder}/cache', 'NO_PROXY': '127.0.0.1', 'HOME': folder,
                       'SAN_BACKBONES_AUTHORS_URL': f'http://127.0.0.1:{server.server_address[1]}'}
        use = [sys.executable, '-c', 'import timm, san_backbones; timm.create_model("san10_pairwise", pretrained=True)']
        subprocess.run(use, check=True, env=environment, cwd=folder)
        server.shutdown()
    subprocess.run(use, check=True, env=environment, cwd=folder)  # again, without the server

draw = 'import san_backbones.visualize as v; v.feature_figure(None, None)'
for extra, command in (('cli', [pathlib.Path(sys.executable).with_name('san-backbones'), 'list']),
                       ('visualize', [sys.executable, '-c', draw])):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and f'san-backbones[{extra}]' in done.stderr, done.stdout + done.stderr
print(f'{san_backbones.__version__}: works, the compiled loops ' +
      (f'do not: {native.unavailable()}' if native.unavailable() else 'too'))
