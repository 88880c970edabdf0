"""Exports the models to ONNX and quantises them to int8.

torch.export, torch.onnx.export and other converters take the models directly: all trace the attention in the form of
`ops.traced`. `export_onnx` calls torch.onnx.export, removes duplicates from the graph, names inputs, outputs and nodes,
and checks the file.
"""
import contextlib
import importlib
import logging
import math
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._files import atomic_write
from ._requirements import LEAST_FOR_ONNX, check
from .attention import FootprintAttention
from .checks import sides
from .san import PatchStem, Stage, Stem

__all__ = ['export_detector', 'export_onnx', 'quantize_onnx']

KEEP_FLOAT = ('weight_mlp',)
"""Layers that int8 models keep in float32: gamma, slower in 8 bits in pairwise models (benchmarks/export.py)."""

_logger = logging.getLogger('san_backbones')


def _need(*packages: str) -> list[Any]:
    """Imports packages; the error says how to install them."""
    try:
        return [importlib.import_module(package) for package in packages]
    except ImportError as error:
        raise ImportError(f"ONNX files need the package {error.name!r}, which is not installed: "
                          "pip install 'san-backbones[onnx]'") from error


class _Flat(nn.Module):
    """Wraps a model to return its outputs as a tuple of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(images)
        if isinstance(outputs, Tensor):
            return (outputs,)
        return tuple(outputs.values() if isinstance(outputs, Mapping) else outputs)


@torch.no_grad()
def _channels(model: nn.Module, size: tuple[int, int]) -> int:
    """Returns how many channels images have: what the first convolution takes, or if that is not where images go in, as
    of a neck that stands before its backbone, the stem.
    """
    weights: list[Any] = [p for p in model.parameters() if p.dim() == 4][:1]
    weights += [module.conv.weight for module in model.modules() if isinstance(module, (Stem, PatchStem))]
    found = list(dict.fromkeys(weight.shape[1] for weight in weights))
    for channels in found[:-1]:
        with contextlib.suppress(RuntimeError, ValueError):
            model(weights[0].new_zeros(1, channels, *size))
            return channels
    return found[-1]


@torch.no_grad()
def _names(model: nn.Module, example: Tensor) -> list[str]:
    """Names outputs: 'logits' for vectors and scores, features_STRIDE for maps, numbered if strides repeat."""
    even = [-(-side // 128) * 128 for side in example.shape[2:]]  # which strides divide
    try:
        height, outputs = even[0], model(example.new_zeros(1, example.shape[1], *even))
    except (RuntimeError, ValueError):  # of a fixed size
        height, outputs = example.shape[2], model(example)
    names: list[str] = []
    for output in outputs:
        name = 'logits' if output.dim() < 3 else f'features_{2 ** round(math.log2(height / output.shape[-2]))}'
        count = sum(other == name or other.startswith(name + '_') for other in names)
        names.append(f'{name}_{count + 1}' if count else name)
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's warnings, which are about its own internals."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'onnxscript', 'onnx_ir')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _simplify(model: Any) -> None:
    """Merges common subexpressions, folds constants, and names every node after its module."""
    passes = importlib.import_module('onnx_ir.passes.common')
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)  # before the optimizer, which is slow on many nodes
    importlib.import_module('onnxscript.optimizer').optimize(model)
    for node in model.graph:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get('pkg.torch.onnx.name_scopes', ''))
        module = next((scope for scope in reversed(scopes[:-1]) if scope), '').removeprefix('model').lstrip('.')
        node.name = f'{module}/{node.name}' if module else node.name
        node.metadata_props.clear()  # can be as large as the weights of a small model
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)):
        value.metadata_props.clear()
    model.metadata_props.clear()


def _verify(model: nn.Module, path: pathlib.Path, sizes: Iterable[tuple[int, ...]], like: Tensor) -> None:
    try:
        session = importlib.import_module('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
    except ImportError:
        _logger.info('%s is not compared with torch: onnxruntime is not installed', path)
        return
    tolerance = 1e-3 if like.dtype in (torch.float32, torch.float64) else 5e-2
    for size in sizes:
        images = torch.rand(size, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            expected = _Flat(model)(images)
        for output, given, wanted in zip(session.get_outputs(), session.run(None, {'images': images.cpu().numpy()}),
                                         expected, strict=True):
            wanted = wanted.cpu().double()
            error = float((torch.from_numpy(given).double() - wanted).abs().max())
            if not error <= tolerance * max(1e-6, float(wanted.abs().max())):
                raise RuntimeError(f'{path.name} is wrong, and is not kept: for images {list(size)} onnxruntime '
                                   f'computes {output.name} with an error of {error:.2g}, values being up to '
                                   f'{float(wanted.abs().max()):.2g}')


def export_onnx(
        model: nn.Module,
        path: str | os.PathLike[str],
        image_size: int | tuple[int, int] = 224,
        batch_size: int = 1,
        dynamic: bool | str = True,
        opset: int = 18,
        verify: bool = True,
) -> pathlib.Path:
    """Writes a model as an ONNX file.

    The input is `images`, (N, in_chans, H, W), in the dtype of the model. The output of a classifier is `logits`;
    feature maps are `features_STRIDE`, such as `features_4`, or `features_8`, `features_8_2`, ... if strides repeat.

    Args:
        model: A SAN, its features_only form, a SANBackbone, or a module around one that maps images to tensors; in eval
            mode. It is not changed.
        path: The file to write.
        image_size: Side of the images in pixels, or (height, width). With dynamic sizes, that of the traced example,
            which gets at least two pixels in the last map.
        batch_size: Images in a batch. With a dynamic batch, that of the example.
        dynamic: Dynamic axes: True for batch, height and width; 'batch'; 'size' (height and width); or False.
        opset: Version of the ONNX operators, 18 or later.
        verify: Compare with torch if onnxruntime is installed, at the size of the example and, with dynamic sizes, at
            another.

    Returns:
        The path of the file.

    Raises:
        ImportError: onnx or onnxscript are missing, or torch is too old; the message says what to install.
        ValueError: An argument is out of range, the model is in training mode, neither in float32 nor in float16, or it
            has no SAN attention.
        RuntimeError: onnxruntime computes other values than torch. The file is then not written.
    """
    check('export_onnx', LEAST_FOR_ONNX)
    onnx, _ = _need('onnx', 'onnxscript')
    height, width = sides(image_size)
    for name, value in dict(height=height, width=width, batch_size=batch_size).items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f'image_size and batch_size must be positive integers, got {name} {value!r}')
    if dynamic not in (True, False, 'batch', 'size'):
        raise ValueError(f"dynamic must be True, False, 'batch' or 'size', got {dynamic!r}")
    if not isinstance(opset, int) or opset < 18:
        raise ValueError(f'opset must be an integer of at least 18, got {opset!r}')
    in_training = [name or 'the model itself' for name, module in model.named_modules() if module.training]
    if in_training:
        raise ValueError(f'an ONNX file is for inference, and {in_training[0]} is in training mode: call model.eval()')
    path = pathlib.Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f'there is no folder {path.absolute().parent} to write {path.name} into')

    original, model = model, _Flat(model)
    like = next((module.query.weight for module in model.modules() if isinstance(module, FootprintAttention)), None)
    if like is None:
        raise ValueError(f'there is no SAN attention in this {type(model.model).__name__}; use torch.onnx.export for '
                         'other models')
    if like.dtype not in (torch.float32, torch.float16):
        raise ValueError(f'onnxruntime runs float32 and float16, and this model is in {like.dtype}: call model.float()')
    channels = _channels(model, (height, width))
    batch_example = batch_size if dynamic in (False, 'size') else max(2, batch_size)  # torch.export fixes sizes of one
    dims: dict[int, Any] = {}
    if dynamic in (True, 'batch'):
        dims[0] = 'batch'
    if dynamic in (True, 'size'):
        dims.update({2: 'height', 3: 'width'})
    least = 2 * _stride(model) if 2 in dims else 1  # a map of one pixel would be fixed, too
    example = torch.rand(batch_example, channels, max(height, least), max(width, least), dtype=like.dtype,
                         device=like.device)
    with torch.no_grad(), _quiet():
        names = _names(model, example)
        program = torch.onnx.export(
            model, (example,), dynamo=True, opset_version=opset, input_names=['images'], output_names=names,
            dynamic_shapes=(dims,) if dims else None, verbose=False, optimize=False)
        assert program is not None  # only torch's legacy exporter returns None
        _simplify(program.model)
    with atomic_write(path) as part:
        with _quiet():
            program.save(str(part))
        onnx.checker.check_model(str(part), full_check=True)
        if verify:
            more = 32 if 2 in dims else 0
            sizes = {(batch_size, channels, height, width),
                     (batch_size + (1 if 0 in dims else 0), channels, height + more, width + more)}
            _verify(original, part, sizes, like)
    return path


def _stride(model: nn.Module) -> int:
    """Pixels of an image along a side of a pixel of the last map: of several SANs, the largest."""
    networks = [net for net in model.modules() if any(isinstance(child, (Stem, PatchStem)) for child in net.children())]
    return max((math.prod(module.stride for module in net.modules() if isinstance(module, (Stem, PatchStem, Stage)))
                for net in networks), default=1)


class _Detector(nn.Module):
    """Wraps a torchvision detector: an image (3, H, W) to a tuple of what it finds."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found, = self.model([image])
        return tuple(found.values())


def export_detector(
        detector: nn.Module,
        path: str | os.PathLike[str],
        image: Tensor,
        *,
        opset: int = 17,
) -> pathlib.Path:
    """Writes a whole torchvision detector to ONNX: resizing, backbone, heads and non-maximum suppression.

    The file takes `image`, (3, H, W), float32 in [0, 1], of the size of the given one, and returns `boxes` (N, 4: left,
    top, right, bottom in pixels), `labels` (N) and `scores` (N), and of a Mask R-CNN `masks` (N, 1, H, W). It is
    compared with torch in onnxruntime, on the image. Objects at the edge of a decision (a threshold, two equal scores),
    which torch itself loses when the pixels move by 1e-5, are not compared.

    Args:
        detector: A model of torchvision.models.detection with a SAN backbone, or any other, in eval mode.
        path: The .onnx file.
        image: An image on which it finds something: (3, H, W), float32. The file is for images of this size.
        opset: Version of ONNX's operators.

    Returns:
        The path.

    Raises:
        ValueError: The detector is in training mode, or the image has another shape or dtype.
        RuntimeError: It finds nothing on the image that 1e-5 would not change, or the file computes something else than
            torch; nothing is kept.
        ImportError: A package is missing.
    """
    onnx, runtime = _need('onnx', 'onnxruntime')
    if detector.training:
        raise ValueError('the detector is in training mode: call eval() first')
    if image.dim() != 3 or image.dtype != torch.float32:
        raise ValueError(f'expected an image (3, H, W) of torch.float32, got {list(image.shape)} of {image.dtype}')
    with torch.no_grad():
        expected = _certain(detector, image)
        if not len(expected['boxes']):
            raise RuntimeError('the detector finds nothing for certain on this image, so that the file could not be '
                               'checked: give an image with objects, or lower its score_thresh')
        names = list(expected)
        with atomic_write(path) as part:
            with _quiet(), warnings.catch_warnings():
                warnings.simplefilter('ignore')
                torch.onnx.export(  # torch.export does not take detectors, whose shapes depend on what they find
                    _Detector(detector).eval(), (image,), str(part), dynamo=False, opset_version=opset,
                    input_names=['image'], output_names=names, dynamic_axes={name: {0: 'objects'} for name in names})
            onnx.checker.check_model(str(part), full_check=True)
            session = runtime.InferenceSession(part, providers=['CPUExecutionProvider'])
            given = dict(zip(names, session.run(names, {'image': image.cpu().numpy()}), strict=True))
            missing = (~_found(expected, given)).sum()
            if missing:
                raise RuntimeError(f'{pathlib.Path(path).name} is wrong, and is not kept: onnxruntime does not find '
                                   f'{missing} of the {len(expected["boxes"])} objects that torch finds')
    return pathlib.Path(path)


def _certain(detector: nn.Module, image: Tensor, repeats: int = 8) -> dict[str, np.ndarray]:
    """The objects that torch finds on the image, and again each time that its pixels move by about 1e-5.

    Non-maximum suppression and the choice of the best decide between scores that may lie one rounding apart; a file
    that is right may decide the other way.
    """
    def find(pixels: Tensor) -> dict[str, np.ndarray]:
        found, = detector([pixels])
        return {name: values.cpu().numpy() for name, values in found.items()}

    expected, generator = find(image), torch.Generator().manual_seed(0)
    for _ in range(repeats):
        noise = torch.randn(image.shape, generator=generator).mul_(1e-5).to(image.device)
        stays = _found(expected, find(image + noise))
        expected = {name: values[stays] for name, values in expected.items()}
    return expected


def _found(expected: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether each object has a counterpart within half a pixel and a hundredth of the score, in whatever order."""
    found = np.zeros(len(expected['boxes']), bool)
    for i in range(len(found)):
        near = np.abs(given['boxes'] - expected['boxes'][i]).max(1, initial=0) <= 0.5
        near &= given['labels'] == expected['labels'][i]
        for name in expected.keys() - {'boxes', 'labels'}:
            axes = tuple(range(1, given[name].ndim))
            near &= np.abs(given[name] - expected[name][i]).max(axes, initial=0) <= 1e-2
        found[i] = near.any()
    return found


class _Reader:
    """Reads images for onnxruntime's calibration."""

    def __init__(self, images: Iterable[Any], session: Any, method: str):
        self.input, self.images, self.method = session.get_inputs()[0], iter(images), method
        self.first: list[int] | None = None

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.images, None)
        if batch is None:
            if self.first is None:
                raise ValueError('there are no calibration images: give at least one batch')
            return None
        batch = np.asarray(batch.detach().cpu() if isinstance(batch, Tensor) else batch)
        shape = list(batch.shape)
        wanted = [n if isinstance(n, int) else None for n in self.input.shape]
        if batch.dtype != np.float32 or batch.ndim != 4 or any(n not in (None, m) for n, m in zip(
                wanted, batch.shape, strict=True)):
            raise ValueError(f'calibration images must be float32 of shape {self.input.shape}, as the model takes '
                             f'them, got {batch.dtype} {shape}')
        if not batch.size or not np.isfinite(batch).all():
            raise ValueError(f'a batch of calibration images {shape} is empty, or holds values that are not finite')
        self.first = self.first or shape
        if self.method != 'minmax' and shape != self.first:
            raise ValueError(f'method={self.method!r} takes calibration images in batches of one shape, got {shape} '
                             f"after {self.first}: leave a smaller last batch out, or take method='minmax'")
        return {self.input.name: batch}


def quantize_onnx(
        path: str | os.PathLike[str],
        out: str | os.PathLike[str],
        images: Iterable[Any],
        keep_float: str | Sequence[str] = KEEP_FLOAT,
        method: str = 'minmax',
        reduce_range: bool = True,
) -> pathlib.Path:
    """Quantises a float32 file of `export_onnx` to int8 after training (onnxruntime, static, QDQ format).

    Linear maps (1x1 convolutions, the classifier) take uint8 activations and int8 weights, with one scale per output
    channel. Everything between them, such as softmax and aggregation, stays float32.

    Args:
        path: The float32 file.
        out: The int8 file to write.
        images: Batches (N, C, H, W) for calibration, float32, normalised for the model; tensors or arrays. A few
            hundred typical pictures are enough.
        keep_float: Linear maps whose names contain this, or one of these, stay float32; () quantises all.
        method: How ranges of activations are calibrated: 'minmax', 'entropy' or 'percentile'.
        reduce_range: Quantise weights to 7 bits, so that processors without VNNI do not saturate 16-bit sums.

    Returns:
        The path of the int8 file.

    Raises:
        ImportError: onnxruntime is missing; the message says what to install.
        ValueError: There are no images, they do not fit the model, the file is not in float32 or is quantised already,
            or no linear map is left to quantise.
    """
    _need('onnx', 'onnxruntime', 'onnxruntime.quantization')
    import onnx
    from onnxruntime import InferenceSession
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process
    methods = {'minmax': q.CalibrationMethod.MinMax, 'entropy': q.CalibrationMethod.Entropy,
               'percentile': q.CalibrationMethod.Percentile}
    if method not in methods:
        raise ValueError(f'method must be one of {", ".join(map(repr, methods))}, got {method!r}')
    path, out = pathlib.Path(path), pathlib.Path(out)
    if not path.is_file():
        raise ValueError(f'there is no file {path} to quantise: write it with export_onnx first')
    session = InferenceSession(path, providers=['CPUExecutionProvider'])
    if session.get_inputs()[0].type != 'tensor(float)':
        raise ValueError(f'{path} takes {session.get_inputs()[0].type}, and only files in float32 can be quantised: '
                         'export model.float()')
    if any(node.op_type in ('QuantizeLinear', 'DequantizeLinear') for node in onnx.load(path).graph.node):
        raise ValueError(f'{path} is quantised already: give the float32 file that it was made of')
    keep_float = (keep_float,) if isinstance(keep_float, str) else keep_float
    reader = _Reader(images, session, method)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = pathlib.Path(folder) / 'prepared.onnx'
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)  # folds norms into linear maps
        maps = [node.name for node in onnx.load(prepared).graph.node if node.op_type in ('Conv', 'Gemm')]
        chosen = [name for name in maps if not any(word in name for word in keep_float)]
        if not chosen:
            raise ValueError(f'keep_float={tuple(keep_float)!r} leaves none of the {len(maps)} linear maps of {path} '
                             'to quantise')
        with atomic_write(out) as part:
            q.quantize_static(
                str(prepared), str(part), reader, quant_format=q.QuantFormat.QDQ, per_channel=True,
                reduce_range=reduce_range, op_types_to_quantize=['Conv', 'Gemm'], nodes_to_quantize=chosen,
                activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8, calibrate_method=methods[method])
            InferenceSession(part, providers=['CPUExecutionProvider'])  # a file that does not load is not kept
    return out
