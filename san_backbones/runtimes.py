"""Converts models with the runtimes' own converters, and compares what they compute with torch.

All converters see the attention in the form of `ops.traced`. Programs take `images`, (N, in_chans, H, W) in float32,
normalised as the model expects.
"""
import contextlib
import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

from ._pictures import config, upright
from ._requirements import LEAST_FOR_ONNX, check
from .attention import FootprintAttention
from .checks import sides
from .export import _channels, _Flat, _names, _quiet, export_onnx

__all__ = ['TARGETS', 'Report', 'Runtime', 'Target', 'export_to', 'require']

Runtime = Literal['onnx', 'openvino', 'torchscript', 'executorch', 'litert', 'coreml', 'ncnn', 'aoti']
Run = Callable[[Tensor], Sequence[Any]]
"""Computes the outputs, tensors or arrays, of images (1, C, H, W)."""
PHOTOGRAPHS = ('astronaut.png', 'coffee.png', 'chelsea.png', 'rocket.jpg', 'motorcycle_left.png')
HOW_MANY = 3


class Report(NamedTuple):
    """What `export_to` wrote: files, the largest difference to torch, what was compared, or a note why nothing was."""
    files: tuple[pathlib.Path, ...]  # or folders; the first is the path that was asked for
    difference: float | None  # relative to the largest value of an output
    pictures: str  # '3 photographs of scikit-image', or 'seeded noise'
    note: str
    bytes: int  # of all files


class Target(NamedTuple):
    """A runtime that `export_to` serves: what it needs, and how its programs are written and loaded."""
    name: str  # as its makers write it
    suffix: str  # of the file or folder that it loads
    packages: tuple[str, ...]  # to convert and to compare
    extra: str  # of san-backbones, which installs them; or ''
    sizes: Literal['fixed', 'either', 'any']  # either: as open_sizes says
    write: Callable[[nn.Module, Tensor, pathlib.Path, bool], None]  # a model of tuples, an example, whether open
    load: Callable[[pathlib.Path], Run]
    only_on: str = ''  # sys.platform of the only system that runs its programs


def _program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The model at the size of the example; strict=False, as dynamo takes sizes for symbols."""
    return torch.export.export(model, (example,), strict=False)


def _trace(model: nn.Module, example: Tensor, open_sizes: bool = False) -> Any:
    """TorchScript of the model for all sizes, or at the size of the example, with constants in the place of indices."""
    return torch.jit.trace(model if open_sizes else _program(model, example).module(), example, check_trace=False)


# each runtime: write and load

def _write_onnx(model: nn.Module, example: Tensor, path: pathlib.Path, open_sizes: bool) -> None:
    export_onnx(model.model, path, tuple(example.shape[2:]), dynamic=open_sizes, verify=False)  # type: ignore[arg-type]


def _load_onnx(path: pathlib.Path) -> Run:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'images': images.numpy()})


def _write_torchscript(model: nn.Module, example: Tensor, path: pathlib.Path, open_sizes: bool) -> None:
    torch.jit.save(_trace(model, example, open_sizes), path)


def _load_torchscript(path: pathlib.Path) -> Run:
    return torch.jit.load(path)


def _write_openvino(model: nn.Module, example: Tensor, path: pathlib.Path, open_sizes: bool) -> None:
    import openvino
    shape = [-1, example.shape[1], -1, -1] if open_sizes else list(example.shape)
    converted = openvino.convert_model(_trace(model, example, open_sizes), example_input=example, input=shape)
    for ports, names in ((converted.inputs, ['images']),
                         (converted.outputs, _names(model, example))):
        for port, name in zip(ports, names, strict=True):
            port.set_names({name})
    openvino.save_model(converted, path, compress_to_fp16=False)


def _load_openvino(path: pathlib.Path) -> Run:
    import openvino
    compiled = openvino.compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda images: list(compiled(images.numpy()).values())


def _write_executorch(model: nn.Module, example: Tensor, path: pathlib.Path, open_sizes: bool) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    lowered = to_edge_transform_and_lower(_program(model, example), partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def _load_executorch(path: pathlib.Path) -> Run:
    from executorch.runtime import Runtime
    program = Runtime.get().load_program(path)
    method = program.load_method('forward')
    return lambda images: [output.clone() for output in (program, method)[1].execute([images.contiguous()])]


def _write_litert(model: nn.Module, example: Tensor, path: pathlib.Path, open_sizes: bool) -> None:
    import litert_torch
    litert_torch.convert(model, (example,)).export(str(path))


def _load_litert(path: pathlib.Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter
    runner = Interpreter(str(path)).get_signature_runner()
    taken, = runner.get_input_details()
    given = sorted(runner.get_output_details(), key=lambda name: int(name.rpartition('_')[2]))  # output_0, output_1

    def run(images: Tensor) -> list[np.ndarray]:
        outputs = runner(**{taken: images.numpy()})
        return [outputs[name] for name in given]
    return run


def _write_coreml(model: nn.Module, example: Tensor, path: pathlib.Path, open_sizes: bool) -> None:
    import coremltools
    names = _names(model, example)
    coremltools.convert(
        _trace(model, example), convert_to='mlprogram', compute_precision=coremltools.precision.FLOAT32,
        inputs=[coremltools.TensorType('images', tuple(example.shape))],
        outputs=[coremltools.TensorType(name) for name in names]).save(str(path))


def _load_coreml(path: pathlib.Path) -> Run:
    import coremltools
    program = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
    names = [output.name for output in program.get_spec().description.output]

    def run(images: Tensor) -> list[np.ndarray]:
        outputs = program.predict({'images': images.numpy()})
        return [outputs[name] for name in names]
    return run


def _write_ncnn(model: nn.Module, example: Tensor, path: pathlib.Path, open_sizes: bool) -> None:
    import pnnx
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # pnnx writes seven files beside what it reads
        torch.jit.save(_trace(model, example), pathlib.Path(folder) / 'model.pt')
        shape = ','.join(map(str, example.shape))
        done = subprocess.run([pnnx.EXEC_PATH, 'model.pt', f'inputshape=[{shape}]', 'fp16=0'], cwd=folder,
                              capture_output=True, text=True)
        unknown = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith('ignore ')]
        if done.returncode or unknown:
            raise RuntimeError(f'pnnx ended with {done.returncode}: {"; ".join(unknown) or done.stderr[-300:]}')
        for suffix in ('.param', '.bin'):
            os.replace(pathlib.Path(folder) / f'model.ncnn{suffix}', path.with_suffix(suffix))


def _load_ncnn(path: pathlib.Path) -> Run:
    import ncnn
    net = ncnn.Net()
    for option in ('use_fp16_packed', 'use_fp16_storage', 'use_fp16_arithmetic', 'use_bf16_storage'):
        setattr(net.opt, option, False)
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix('.bin'))):
        raise RuntimeError('ncnn refuses the file: it lacks an operator, which it names above')

    def run(images: Tensor) -> list[np.ndarray]:
        extractor = net.create_extractor()
        extractor.input(net.input_names()[0], ncnn.Mat(images[0].numpy()).clone())
        outputs = []
        for name in sorted(net.output_names(), key=lambda name: int(name.removeprefix('out'))):
            failed, output = extractor.extract(name)
            if failed:  # the output is then empty, and an array of it ends the process
                raise RuntimeError(f'ncnn ends with {failed} where it computes {name}')
            outputs.append(np.array(output)[None])
        return outputs
    return run


def _write_aoti(model: nn.Module, example: Tensor, path: pathlib.Path, open_sizes: bool) -> None:
    torch._inductor.aoti_compile_and_package(_program(model, example), package_path=str(path))


def _load_aoti(path: pathlib.Path) -> Run:
    program = torch._inductor.aoti_load_package(str(path))

    def run(images: Tensor) -> Sequence[Any]:
        outputs = program(images)
        return [outputs] if isinstance(outputs, Tensor) else outputs
    return run


TARGETS: dict[Runtime, Target] = {
    'onnx': Target('ONNX Runtime', '.onnx', ('onnx', 'onnxscript', 'onnxruntime'), 'onnx', 'either', _write_onnx,
                   _load_onnx),
    'openvino': Target('OpenVINO', '.xml', ('openvino',), 'openvino', 'either', _write_openvino, _load_openvino),
    'torchscript': Target('TorchScript', '.pt', (), '', 'any', _write_torchscript, _load_torchscript),
    'executorch': Target('ExecuTorch', '.pte', ('executorch',), 'executorch', 'fixed', _write_executorch,
                         _load_executorch),
    'litert': Target('LiteRT', '.tflite', ('litert_torch', 'ai_edge_litert'), 'litert', 'fixed', _write_litert,
                     _load_litert),
    'coreml': Target('Core ML', '.mlpackage', ('coremltools',), 'coreml', 'fixed', _write_coreml, _load_coreml,
                     'darwin'),
    'ncnn': Target('ncnn', '.param', ('ncnn', 'pnnx'), 'ncnn', 'fixed', _write_ncnn, _load_ncnn),
    'aoti': Target('AOTInductor', '.pt2', (), '', 'fixed', _write_aoti, _load_aoti),
}
"""The runtimes by the name that `export_to` and `san-backbones export --to` take."""


def require(to: Runtime) -> Target:
    """Returns a target, if its packages are installed.

    Raises:
        ImportError, ValueError: As `export_to`.
    """
    if to not in TARGETS:
        raise ValueError(f'to must be one of {", ".join(TARGETS)}, got {to!r}')
    target = TARGETS[to]
    if to != 'torchscript':
        check(f'export_to {to}', LEAST_FOR_ONNX)
    for package in target.packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'{target.name} needs the package {package!r}, which is not installed: '
                              f"pip install 'san-backbones[{target.extra}]'")
    return target


def _check(model: nn.Module, target: Target, path: pathlib.Path, size: tuple[int, int], open_sizes: bool) -> None:
    if any(not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(f'image_size must be a side or (height, width) in pixels, got {size!r}')
    if open_sizes and target.sizes == 'fixed':
        raise ValueError(f'{target.name} programs are made for one size: leave open_sizes out; '
                         f'{", ".join(name for name, other in TARGETS.items() if other.sizes != "fixed")} take others')
    if path.suffix != target.suffix:
        raise ValueError(f'files of {target.name} end in {target.suffix}, got {str(path)!r}')
    if not path.parent.is_dir():
        raise ValueError(f'there is no folder {path.parent} to write {path.name} into')
    in_training = [name or 'the model itself' for name, module in model.named_modules() if module.training]
    if in_training:
        raise ValueError(f'programs are for inference, and {in_training[0]} is in training mode: call model.eval()')
    if not any(isinstance(module, FootprintAttention) for module in model.modules()):
        raise ValueError(f'there is no SAN attention in this {type(model).__name__}; use the converter of '
                         f'{target.name} for other models')
    others = {f'{p.dtype} on {p.device}' for p in model.parameters() if p.dtype != torch.float32 or p.is_cuda}
    if others:
        raise ValueError(f'models are converted in float32 on the CPU, and this one is in {others.pop()}: call '
                         'model.float().cpu()')


def _photographs(model: nn.Module, channels: int, size: tuple[int, int]) -> list[Tensor]:
    """Photographs of scikit-image, prepared as timm evaluates the model; as many as the installation has, HOW_MANY."""
    package = importlib.util.find_spec('skimage')
    if package is None or package.origin is None or channels not in (1, 3):
        return []
    folder = pathlib.Path(package.origin).parent / 'data'
    cfg = dict(getattr(model, 'pretrained_cfg', None) or {}, input_size=(channels, *size))
    prepare = create_transform(**config(cfg, size), is_training=False)
    found = []
    for path in [folder / name for name in PHOTOGRAPHS if (folder / name).is_file()][:HOW_MANY]:
        with Image.open(path) as picture:
            found.append(prepare(upright(picture, channels))[None])
    return found


def _images(model: nn.Module, channels: int, size: tuple[int, int], more: bool) -> tuple[str, list[Tensor]]:
    """What programs are compared on, and what to call it; `more` adds another size."""
    sizes = [size, (size[0] + 32, size[1] + 19)] if more else [size]
    found = [image for one in sizes for image in _photographs(model, channels, one)]
    if found:
        return f'{len(found) // len(sizes)} photographs of scikit-image', found
    generator = torch.Generator().manual_seed(0)
    return 'seeded noise', [torch.randn(1, channels, *one, generator=generator) for one in sizes for _ in range(2)]


def _largest_difference(name: str, run: Run, model: nn.Module, images: Sequence[Tensor]) -> float:
    """Relative to the largest value of each output over all images of a size.

    Raises:
        RuntimeError: torch computes values that are not finite, or the program's outputs have other shapes.
    """
    expected = [[output.double() for output in model(image)] for image in images]
    if not all(bool(output.isfinite().all()) for outputs in expected for output in outputs):
        raise RuntimeError('torch itself computes values that are not finite with these weights, which leaves nothing '
                           'to compare with')
    scales = [max(float(output.abs().max()) for output in outputs) for outputs in zip(*expected, strict=True)]
    largest = 0.
    for image, wanted in zip(images, expected, strict=True):
        given = [torch.as_tensor(output).double() for output in run(image)]
        if [output.shape for output in given] != [output.shape for output in wanted]:
            raise RuntimeError(f'{name} gives outputs of shapes {[list(output.shape) for output in given]}, expected '
                               f'{[list(output.shape) for output in wanted]}')
        for output, right, scale in zip(given, wanted, scales, strict=True):
            error = float((output - right).abs().max()) / max(scale, 1e-30)
            largest = error if not error <= largest else largest  # keeps NaN
    return largest


def _move(folder: pathlib.Path, path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Moves all that is in the folder to beside the path, the path itself last; returns the places, the path first."""
    made = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as old:
        for file in made:
            place = path.parent / file.name
            if place.is_dir():  # which os.replace does not replace
                os.replace(place, pathlib.Path(old) / file.name)
            os.replace(file, place)
    return tuple(path.parent / file.name for file in reversed(made))


def _bytes(file: pathlib.Path) -> int:
    return sum(inner.stat().st_size for inner in (file.rglob('*') if file.is_dir() else (file,)) if inner.is_file())


@contextlib.contextmanager
def _explain(what: str) -> Iterator[None]:
    """Silences warnings, sends what converters print to standard error, and turns their errors into RuntimeErrors."""
    try:
        with _quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter('ignore')
            yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # converters raise many kinds
        raise RuntimeError(f'{what}: {type(error).__name__}: {str(error).strip()[:1000]}') from error


def export_to(
        model: nn.Module,
        to: Runtime,
        path: str | os.PathLike[str],
        image_size: int | tuple[int, int] = 224,
        open_sizes: bool = False,
        tolerance: float = 1e-4,
) -> Report:
    """Converts a model for a runtime, and compares what the runtime computes with torch.

    Pictures are photographs that come with scikit-image, if it is installed, else seeded noise; with open sizes, at
    another size too.

    Args:
        model: A SAN, its features_only form, a SANBackbone, or a module around one that maps images to tensors; in eval
            mode, float32, on the CPU. It is not changed.
        to: 'onnx', 'openvino', 'torchscript', 'executorch', 'litert', 'coreml', 'ncnn' or 'aoti' (AOTInductor).
        path: The file to write, its suffix that of `TARGETS[to]`. OpenVINO and ncnn write a `.bin` beside it.
        image_size: Side of the images in pixels, or (height, width). With open sizes, that of the traced example.
        open_sizes: Leave batch, height and width open, where the runtime can.
        tolerance: Largest difference to torch that is accepted, relative to the largest value of an output.

    Returns:
        The files, and the difference. Core ML programs run on macOS only; elsewhere nothing is compared.

    Raises:
        ImportError: A package is missing, or torch is too old; the message says what to install.
        ValueError: An argument is out of range, or the model is in training mode, has no SAN attention, or is not in
            float32 on the CPU.
        RuntimeError: The converter refuses the model, the runtime does not load the program, or it computes other
            values than torch. Nothing is then written, and files of before stay.
    """
    target = require(to)
    path = pathlib.Path(path)
    size = sides(image_size)
    _check(model, target, path, size, open_sizes)
    is_open = open_sizes or target.sizes == 'any'
    flat = _Flat(model)
    flat.training = False  # as all that is in it
    channels = _channels(flat, size)
    said, images = _images(model, channels, size, is_open)
    runs_here = target.only_on in ('', sys.platform)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder, torch.no_grad():
        part = pathlib.Path(folder).absolute() / path.name
        with _explain(f'{target.name} cannot be made of this model'):
            target.write(flat, images[0], part, is_open)
        difference, note = None, f'converted only: {target.name} runs on {target.only_on} only'
        if runs_here:
            with _explain(f'{target.name} does not run {path.name}, which is not kept'):
                difference, note = _largest_difference(target.name, target.load(part), flat, images), ''
            if not difference <= tolerance:
                raise RuntimeError(
                    f'{path.name} is wrong, and is not kept: {target.name} differs from torch by {difference:.2g} of '
                    f'the largest value, on {said}; {tolerance:g} is accepted')
        files = _move(pathlib.Path(folder), path)
    return Report(files, difference, said if runs_here else '', note, sum(map(_bytes, files)))
