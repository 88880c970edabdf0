"""Runs ONNX files in onnxruntime-web (WebAssembly, under node) and compares them with torch.

    python -m tools.run_onnx_web [--models MODEL ...]

Needs node and npm, which installs onnxruntime-web into .cache. Files of one size and, of the small models, of open
sizes, each at sizes of its own. Prints the largest difference, relative to the largest value of torch's output, and
exits with 1 if one is over 1e-4.
"""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import timm
import torch
from safetensors.torch import load_file

from san_backbones.export import export_onnx
from tools.run_apart import ROOT
from tools.run_exports import MODELS, write_weights

FOLDER = ROOT / '.cache' / 'onnx-web'
TOLERANCE = 1e-4
OPEN_SIZES = ((64, 96), (33, 33), (96, 64), (250, 187))
PROGRAM = """
const ort = require('onnxruntime-web'), fs = require('fs')
async function main() {
  const [model, ...cases] = process.argv.slice(2)
  ort.env.wasm.numThreads = 1
  const session = await ort.InferenceSession.create(fs.readFileSync(model), {executionProviders: ['wasm']})
  for (const path of cases) {
    const {shape, input, output} = JSON.parse(fs.readFileSync(path))
    const found = (await session.run({images: new ort.Tensor('float32', Float32Array.from(input), shape)})).logits.data
    let difference = 0, largest = 0
    output.forEach((y, i) => {
      difference = Math.max(difference, Math.abs(y - found[i])) || (y === found[i] ? difference : NaN)
      largest = Math.max(largest, Math.abs(y))
    })
    console.log(found.length === output.length ? difference / largest : NaN)
  }
}
main().catch(error => { console.error(error); process.exit(1) })
"""


def differences(name: str, dynamic: bool, sizes: list[tuple[int, int]]) -> list[float]:
    """Relative, one for each size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_weights(name, folder / 'weights')
        model = timm.create_model(name, zero_init_last=False).eval()
        model.load_state_dict(load_file(folder / 'weights'))
        export_onnx(model, folder / 'model.onnx', sizes[0], dynamic=dynamic)
        cases = []
        for height, width in sizes:
            images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
            with torch.no_grad():
                output = model(images)
            cases.append(folder / f'{height}x{width}.json')
            cases[-1].write_text(json.dumps(dict(
                shape=images.shape, input=images.flatten().tolist(), output=output.flatten().tolist())))
        printed = subprocess.run(['node', 'compare.js', folder / 'model.onnx', *cases], cwd=FOLDER, check=True,
                                 stdout=subprocess.PIPE, text=True).stdout
    return [float(line) for line in printed.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', metavar='MODEL', nargs='+', choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    if not (shutil.which('node') and shutil.which('npm')):
        sys.exit('node and npm are needed (Debian: apt install nodejs npm)')
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / 'compare.js').write_text(PROGRAM)
    subprocess.run(['npm', 'install', '--silent', '--no-save', '--prefix', FOLDER, 'onnxruntime-web'], check=True)
    package = json.loads((FOLDER / 'node_modules' / 'onnxruntime-web' / 'package.json').read_text())
    print(f'onnxruntime-web {package["version"]}')
    worst = 0.
    for name in options.models:
        found = differences(name, False, [(MODELS[name], MODELS[name])])
        if name.startswith('test'):
            found += differences(name, True, list(OPEN_SIZES))
        worst = max(worst, *found) if all(x == x for x in found) else float('nan')
        print(f'{name}: {", ".join(f"{x:.1e}" for x in found)}', flush=True)
    return int(not worst <= TOLERANCE)


if __name__ == '__main__':
    sys.exit(main())
