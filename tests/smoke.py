"""Run by run_package.py where the package, torch and timm are installed and nothing else: does what it should work?"""
import importlib.util
import pathlib
import subprocess
import sys

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
for name in ('test_san_pairwise', 'test_san_patchwise'):
    network = timm.create_model(name, features_only=True)
    sum(features.square().mean() for features in network(torch.rand(2, 3, 64, 64))).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())

draw = 'import san_backbones.visualize as v; v.feature_figure(None, None)'
for extra, command in (('cli', [pathlib.Path(sys.executable).with_name('san-backbones'), 'list']),
                       ('visualize', [sys.executable, '-c', draw])):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and f'san-backbones[{extra}]' in done.stderr, done.stdout + done.stderr
print(f'{san_backbones.__version__}: works, the compiled loops ' +
      (f'do not: {native.unavailable()}' if native.unavailable() else 'too'))
