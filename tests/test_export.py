"""Programs and files made of the models: torch.compile, torch.export, ONNX, int8; all against the model itself."""
import copy
import re
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn

import san_backbones
from san_backbones import SAN, PairwiseAttention, PatchwiseAttention
from san_backbones._requirements import older
from san_backbones.export import _Flat, _names, export_detector, export_onnx, quantize_onnx
from san_backbones.ops import traced
from san_backbones.runtimes import export_to

FORMS = ('pairwise', 'patchwise')


def settle(model, seed=0):
    """The model in eval mode, its norms and weights away from where they begin."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5),
                                    (module.running_var, 0.5)):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                spread = module.weight[0].numel() ** -0.5
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * spread)
    return model.eval()


def small(form, features=False, **kwargs):
    """Two stages, strides 2 and 4, the second as wide as its footprint reaches."""
    options = dict(attention=form, depths=(1, 1), widths=(32, 64), kernel_sizes=(3, 5), stem_width=16, num_classes=5)
    model = settle(SAN(**{**options, **kwargs}))
    if not features:
        return model
    from timm.models import FeatureListNet
    return FeatureListNet(model, out_indices=(0, 1), flatten_sequential=True).eval()


def pictures(*size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def as_list(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def assert_equal(actual, expected):
    actual, expected = as_list(actual), as_list(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        largest = b.abs().max().item()  # sums whose terms are that large
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-5 * max(1., largest))


SIZES = ((1, 3, 16, 16), (3, 3, 13, 22), (2, 3, 31, 9))


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch.compiler.reset()

    @pytest.mark.parametrize('form, features', [('pairwise', True), ('patchwise', False)])
    def test_sizes_left_open(self, form, features):
        model = small(form, features, depths=(0, 1))
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='eager')
        with torch.no_grad():
            for size in SIZES:
                assert_equal(compiled(pictures(*size)), model(pictures(*size)))

    @pytest.mark.skipif(traced.has_static_value is None, reason='this torch.compile cannot tell which sizes are open')
    @pytest.mark.parametrize('dynamic', [None, True])
    @pytest.mark.parametrize('form', FORMS)
    def test_a_side_of_one_pixel_beside_an_open_one(self, form, dynamic):
        """All five stages: a map's side comes to one pixel while the other stays open."""
        model = settle(timm.create_model(f'test_san_{form}', num_classes=5))
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend='eager')
        with torch.no_grad():
            for size in ((16, 64), (1, 20)) if dynamic else ((64, 64), (48, 96), (16, 64), (64, 3)):
                assert_equal(compiled(pictures(2, 3, *size)), model(pictures(2, 3, *size)))
                if dynamic:
                    torch.compiler.reset()  # each size is the first

    @pytest.mark.parametrize('norms', ['batch', 'frozen'])
    @pytest.mark.parametrize('form', FORMS)
    def test_training_steps(self, form, norms):
        """Two steps, so that what the first wrote counts: weights, and statistics unless these are frozen."""
        results, fresh = [], small(form, features=True, depths=(0, 1))
        for compiling in (False, True):
            model = copy.deepcopy(fresh).train()
            if norms == 'frozen':
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
            run = torch.compile(model, fullgraph=True, backend='aot_eager') if compiling else model
            optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
            losses = []
            for step in range(2):
                loss = sum(f.square().mean() for f in run(pictures(2, 3, 16, 20, seed=step)))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.detach())
            results.append((losses, model.state_dict()))
        (losses, state), (compiled_losses, compiled_state) = results
        torch.testing.assert_close(compiled_losses, losses, rtol=1e-4, atol=1e-5)
        assert losses[0] != losses[1]
        torch.testing.assert_close(dict(compiled_state), dict(state), rtol=1e-3, atol=1e-4)

    def test_fused_models(self):
        model = small('patchwise', features=True)
        fused = san_backbones.fuse_for_inference(copy.deepcopy(model))
        with torch.no_grad():
            compiled = torch.compile(fused, fullgraph=True, backend='aot_eager')
            assert_equal(compiled(pictures(2, 3, 16, 20)), model(pictures(2, 3, 16, 20)))


@pytest.mark.skipif(not hasattr(torch.export.Dim, 'DYNAMIC'), reason='torch 2.4 and 2.5 have no Dim.DYNAMIC')
class TestExport:
    @pytest.mark.parametrize('form, features, kwargs, strict', [
        ('pairwise', True, dict(position_ref_size=64), False),
        ('pairwise', False, dict(), True),
        ('patchwise', True, dict(), False),
    ])
    def test_saved_and_loaded_with_open_sizes(self, form, features, kwargs, strict, tmp_path, export_keeps_parity):
        model = small(form, features, depths=(0, 1), **kwargs)  # torch takes seconds for each block
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        with torch.no_grad():
            program = torch.export.export(model, (pictures(2, 3, 20, 24),), dynamic_shapes=(dims,), strict=strict)
            torch.export.save(program, tmp_path / 'model.pt2')
            loaded = torch.export.load(tmp_path / 'model.pt2').module()
            for size in ((1, 3, 12, 8), (3, 3, 28, 44)) if export_keeps_parity else SIZES:
                assert_equal(loaded(pictures(*size)), model(pictures(*size)))
            # torch takes an open size to be at least 2, in the last map as elsewhere, and says so; 2.6 not always
            try:
                assert_equal(loaded(pictures(1, 3, 7, 16)), model(pictures(1, 3, 7, 16)))
                assert older(torch.__version__, '2.7')
            except (AssertionError, RuntimeError) as error:
                assert re.search(r'Guard failed: .*8|shape\[2\] to be >= 8', str(error))


@pytest.fixture(scope='module')
def onnx_packages():
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')


def session(path):
    import onnxruntime
    return onnxruntime.InferenceSession(path)


def run(path, images):
    return session(path).run(None, {'images': images.numpy()})


LAYERS = [
    *(PairwiseAttention(32, relation=relation, position=position, kernel_size=5, dilation=dilation,
                        position_ref_size=ref)
      for relation, position, dilation, ref in (
          ('subtraction', 'relative', 2, None), ('summation', 'none', 1, None), ('hadamard', 'absolute', 1, 8),
          ('concatenation', 'relative', 1, 8), ('dot', 'relative', 1, None))),
    *(PatchwiseAttention(32, relation=relation, kernel_size=3, dilation=dilation)
      for relation, dilation in (('concatenation', 2), ('star', 1), ('clique', 1)))]


@pytest.mark.usefixtures('onnx_packages')
class TestOnnx:
    @pytest.mark.parametrize('layer', LAYERS, ids=lambda layer: f'{type(layer).__name__}-{layer.relation}')
    def test_layers_at_any_size(self, layer, tmp_path):
        """Maps down to a pixel, which the footprint reaches beyond many times."""
        path = export_onnx(settle(layer), tmp_path / 'layer.onnx', (6, 9), verify=False)
        with torch.no_grad():
            for size in ((1, 32, 6, 9), (3, 32, 1, 4), (2, 32, 11, 2), (1, 32, 1, 1)):
                assert_equal(run(path, pictures(*size)), layer(pictures(*size)))

    def test_classifier(self, tmp_path):
        import onnx
        model = small('pairwise')
        path = export_onnx(model, tmp_path / 'model.onnx', (20, 24))
        with torch.no_grad():
            for size in (*SIZES, (1, 3, 4, 4)):
                assert_equal(run(path, pictures(*size)), model(pictures(*size)))
        graph = onnx.load(path)
        assert [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
                for v in (*graph.graph.input, *graph.graph.output)] == [
            ('images', ['batch', 3, 'height', 'width']), ('logits', ['batch', 5])]
        assert {i.version for i in graph.opset_import if i.domain == ''} == {18}
        weights = sum(p.numel() * 4 for p in model.parameters())
        assert path.stat().st_size < weights + 400_000
        assert any(node.name.startswith('stages.1.blocks.0.attn.weight_mlp') for node in graph.graph.node)

    def test_features_of_fixed_size(self, tmp_path):
        model = small('patchwise', features=True)
        before = dict(model.named_modules())
        path = export_onnx(model, str(tmp_path / 'model.onnx'), 16, batch_size=2, dynamic=False, opset=20)
        assert [(o.name, o.shape) for o in session(path).get_outputs()] == [
            ('features_2', [2, 32, 8, 8]), ('features_4', [2, 64, 4, 4])]
        assert_equal(run(path, pictures(2, 3, 16, 16)), model(pictures(2, 3, 16, 16)))
        assert before == dict(model.named_modules())

    @pytest.mark.parametrize('size', [31, 33, 47, 63, 95])
    def test_maps_are_named_after_their_strides(self, size):
        """Also where a side is not a multiple of them, and is rounded down."""
        zeros = torch.zeros(1, 3, size, size)
        for out_indices in ((0, 1, 2, 3, 4), (3, 4)):
            model = timm.create_model('test_san_patchwise', features_only=True, out_indices=out_indices).eval()
            assert _names(_Flat(model), zeros) == [f'features_{2 ** (i + 1)}' for i in out_indices]

    @pytest.mark.parametrize('size', [33, 65])
    def test_maps_that_are_rounded_up(self, size):
        pytest.importorskip('mmengine')
        from san_backbones.mm import SANBackbone
        arch = dict(attention='patchwise', depths=(0, 0, 0, 0, 1), widths=5 * (32,), kernel_sizes=3, stem_width=16)
        model = SANBackbone(arch, out_indices=(1, 2, 3, 4), ceil_mode=True).eval()
        assert _names(_Flat(model), torch.zeros(1, 3, size, size)) == [f'features_{2 ** i}' for i in (2, 3, 4, 5)]

    def test_names_of_a_model_for_one_size(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(8 * 25, 7)).eval()
        assert _names(_Flat(model), torch.zeros(2, 3, 20, 20)) == ['logits']

    def test_a_neck_before_its_backbone_and_an_adapter(self, tmp_path):
        """Images go into the stem, though another convolution stands first; or not into the stem."""
        class Neck(nn.Module):
            def __init__(self):
                super().__init__()
                self.lateral, self.body = nn.Conv2d(64, 16, 1), small('patchwise', features=True)

            def forward(self, images):
                return self.lateral(self.body(images)[1])
        model = settle(Neck())
        path = export_onnx(model, tmp_path / 'model.onnx', 16, dynamic=False)
        assert_equal(run(path, pictures(1, 3, 16, 16)), model(pictures(1, 3, 16, 16)))
        assert [o.name for o in session(path).get_outputs()] == ['features_4']
        export_to(model, 'torchscript', tmp_path / 'model.pt', 16)
        adapted = settle(nn.Sequential(nn.Conv2d(12, 3, 1), small('patchwise')))
        path = export_onnx(adapted, tmp_path / 'model.onnx', 16, dynamic=False)
        assert_equal(run(path, pictures(1, 12, 16, 16)), adapted(pictures(1, 12, 16, 16)))

    def test_what_differs_from_torch_is_an_error(self, tmp_path, monkeypatch):
        right, verify = traced._pad_known, san_backbones.export._verify

        def and_then_right(*args):  # the file was made
            monkeypatch.setattr(traced, '_pad_known', right)
            verify(*args)

        monkeypatch.setattr(traced, '_pad_known', lambda x, pad: nn.functional.pad(x, (pad,) * 4, mode='replicate'))
        monkeypatch.setattr(san_backbones.export, '_verify', and_then_right)
        path = tmp_path / 'layer.onnx'
        path.write_text('an older one')
        with pytest.raises(RuntimeError, match=r'not kept: for images \[1, 32, 6, 6\] onnxruntime computes features_1'):
            export_onnx(settle(PatchwiseAttention(32, kernel_size=3)), path, 6, dynamic=False)
        assert [file.read_text() for file in tmp_path.iterdir()] == ['an older one']

    @pytest.mark.parametrize('kwargs, message', [
        (dict(image_size=0), 'positive integers, got height 0'),
        (dict(image_size=(16, 2.5)), 'positive integers, got width 2.5'),
        (dict(image_size=(1, 2, 3)), r'got \(1, 2, 3\)'),
        (dict(batch_size=-1), 'got batch_size -1'),
        (dict(dynamic='height'), "'batch' or 'size', got 'height'"),
        (dict(opset=11), 'at least 18, got 11'),
        (dict(path='absent/model.onnx'), 'there is no folder .*absent'),
    ])
    def test_bad_arguments(self, kwargs, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=message):
            export_onnx(small('patchwise'), **{'path': 'model.onnx', 'image_size': 16, **kwargs})

    def test_models_that_do_not_fit(self, tmp_path):
        model = small('patchwise')
        model.stages[0].train()
        with pytest.raises(ValueError, match=r'stages.0 is in training mode: call model.eval\(\)'):
            export_onnx(model, tmp_path / 'model.onnx')
        with pytest.raises(ValueError, match='no SAN attention in this Conv2d'):
            export_onnx(nn.Conv2d(3, 4, 1).eval(), tmp_path / 'model.onnx')
        for dtype in (torch.bfloat16, torch.float64):
            with pytest.raises(ValueError, match=rf'this model is in {dtype}: call model.float\(\)'):
                export_onnx(small('patchwise').to(dtype), tmp_path / 'model.onnx')

    @pytest.mark.parametrize('package', ['onnx', 'onnxscript'])
    def test_missing_packages_are_named(self, package, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"'{package}', which is not .*pip install 'san-backbones\[onnx\]'"):
            export_onnx(small('patchwise'), tmp_path / 'model.onnx')

    def test_torch_that_cannot_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch, '__version__', '2.7.1')
        with pytest.raises(ImportError, match=r'export_onnx needs torch 2\.8 or later, found torch 2\.7\.1'):
            export_onnx(small('patchwise'), tmp_path / 'model.onnx')

    def test_other_norms(self, tmp_path):
        model = small('pairwise', depths=(0, 1),
                      norm_layer=lambda channels, **kwargs: nn.GroupNorm(1, channels, **kwargs))
        path = export_onnx(model, tmp_path / 'model.onnx', 16, dynamic='size')
        assert_equal(run(path, pictures(1, 3, 9, 14)), model(pictures(1, 3, 9, 14)))

    @pytest.mark.parametrize('form', FORMS)
    @pytest.mark.parametrize('size', [5, (7, 20), (20, 7)])
    def test_open_sizes_from_a_small_example(self, form, size, onnx_packages, tmp_path):
        model = small(form)
        path = export_onnx(model, tmp_path / 'model.onnx', size)
        for shape in ((1, 3, 5, 5), (2, 3, 16, 24), (1, 3, 33, 6)):
            with torch.no_grad():
                assert_equal(run(path, pictures(*shape)), model(pictures(*shape)))

    def test_backbone_of_openmmlab(self, tmp_path):
        pytest.importorskip('mmengine')
        pytest.importorskip('mmdet')
        import san_backbones.mm
        arch = dict(attention='pairwise', depths=(1, 1), widths=(32, 64), kernel_sizes=(3, 5), stem_width=16)
        model = settle(san_backbones.mm.SANBackbone(arch, out_indices=(0, 1), norm_cfg=dict(type='BN')))
        path = export_onnx(model, tmp_path / 'model.onnx', 16, dynamic='batch')
        assert [output.name for output in session(path).get_outputs()] == ['features_2', 'features_4']
        assert_equal(run(path, pictures(3, 3, 16, 16)), model(pictures(3, 3, 16, 16)))


@pytest.mark.usefixtures('onnx_packages')
class TestPlainExporters:
    """What people call who have not read of export_onnx."""

    @pytest.fixture(params=FORMS)
    @staticmethod
    def model(request):
        return small(request.param, depths=(0, 1))

    def _same(self, model, path, sizes=SIZES):
        run = session(path)
        with torch.no_grad():
            for size in sizes:
                images = pictures(*size)
                assert_equal(run.run(None, {run.get_inputs()[0].name: images.numpy()}), model(images))

    @pytest.mark.parametrize('opset', [11, 13, 17])
    def test_torchscript_exporter(self, model, opset, tmp_path):
        """As MMDeploy calls it."""
        path, names = tmp_path / 'model.onnx', ['images']
        for axes, sizes in (({0: 'batch', 2: 'height', 3: 'width'}, (*SIZES, (1, 3, 1, 5))), (None, SIZES[:1])):
            torch.onnx.export(model, (pictures(*SIZES[0]),), str(path), dynamo=False, opset_version=opset,
                              input_names=names, dynamic_axes=axes and {'images': axes})
            self._same(model, path, sizes)

    @pytest.mark.parametrize('dynamo', [False, True])
    @pytest.mark.parametrize('dynamic_size', [False, True])
    def test_timms_script(self, model, dynamo, dynamic_size, tmp_path):
        from timm.utils.onnx import onnx_export
        path = tmp_path / 'model.onnx'
        onnx_export(model, str(path), example_input=pictures(1, 3, 16, 16), check=True, check_forward=True,
                    use_dynamo=dynamo, dynamic_size=dynamic_size)
        self._same(model, path, ((1, 3, 16, 16), (1, 3, 13, 22)) if dynamic_size else ((1, 3, 16, 16),))

    def test_dynamo_exporter_with_open_sizes(self, tmp_path):
        model, path = small('pairwise', features=True, depths=(0, 1)), tmp_path / 'model.onnx'
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        torch.onnx.export(model, (pictures(2, 3, 20, 24),), str(path), dynamo=True, dynamic_shapes=(dims,),
                          verbose=False)
        self._same(model, path)


@pytest.mark.parametrize('form', FORMS)
def test_openvino_from_torch_at_any_size(form):
    """Which traces at one size."""
    openvino = pytest.importorskip('openvino', reason='needs the openvino extra')
    model = small(form, depths=(0, 1))
    converted = openvino.convert_model(model, example_input=pictures(1, 3, 16, 16))
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    with torch.no_grad():
        for size in (*SIZES, (1, 3, 1, 5)):
            assert_equal([compiled(pictures(*size).numpy())[0]], model(pictures(*size)))


@pytest.mark.usefixtures('onnx_packages')
class TestQuantized:
    @pytest.fixture(scope='class')
    @staticmethod
    def model():
        return small('patchwise')

    @pytest.fixture(scope='class')
    @staticmethod
    def file(model, onnx_packages, tmp_path_factory):
        return export_onnx(model, tmp_path_factory.mktemp('float') / 'model.onnx', 16, dynamic='batch', verify=False)

    def test_int8(self, model, file, tmp_path):
        import onnx
        path = quantize_onnx(file, tmp_path / 'int8.onnx', (pictures(4, 3, 16, 16, seed=s) for s in range(8)))
        graph = onnx.load(path).graph
        made_by = {output: node for node in graph.node for output in node.output}
        weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
        for node in graph.node:
            if node.op_type in ('Conv', 'Gemm'):
                source = made_by.get(node.input[1])
                quantized = source is not None and source.op_type == 'DequantizeLinear'
                assert quantized == ('weight_mlp' not in node.name), node.name
                if quantized:
                    assert weights[source.input[0]].dtype == np.int8
                    assert weights[source.input[1]].shape == weights[source.input[0]].shape[:1]  # a scale per channel
        images = pictures(16, 3, 16, 16, seed=9)
        with torch.no_grad():
            expected = model(images)
        error = (torch.from_numpy(run(path, images)[0]) - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.2

    def test_bad_arguments(self, file, tmp_path):
        out = tmp_path / 'int8.onnx'
        with pytest.raises(ValueError, match=r"float32 of shape \['batch', 3, 16, 16\].*got float32 \[1, 3, 8, 8\]"):
            quantize_onnx(file, out, [pictures(1, 3, 8, 8)])
        with pytest.raises(ValueError, match=r'got float64 \[1, 3, 16, 16\]'):
            quantize_onnx(file, out, [np.zeros((1, 3, 16, 16))])
        with pytest.raises(ValueError, match='no calibration images'):
            quantize_onnx(file, out, [])
        with pytest.raises(ValueError, match="'percentile', got 'best'"):
            quantize_onnx(file, out, [pictures(1, 3, 16, 16)], method='best')
        with pytest.raises(ValueError, match=r'leaves none of the \d+ linear maps'):
            quantize_onnx(file, out, [pictures(1, 3, 16, 16)], keep_float=[''])
        with pytest.raises(ValueError, match='no file .*absent.onnx'):
            quantize_onnx(tmp_path / 'absent.onnx', out, [pictures(1, 3, 16, 16)])
        for batch in (pictures(0, 3, 16, 16), pictures(1, 3, 16, 16) * float('nan')):
            with pytest.raises(ValueError, match='empty, or holds values that are not finite'):
                quantize_onnx(file, out, [batch])
        with pytest.raises(ValueError, match=r'batches of one shape, got \[1, 3, 16, 16\] after \[2, 3, 16, 16\]'):
            quantize_onnx(file, out, [pictures(2, 3, 16, 16), pictures(1, 3, 16, 16)], method='percentile')
        assert not out.exists()

    def test_one_name_is_one_name(self, file, tmp_path):
        images = [pictures(2, 3, 16, 16)]
        one, several = (quantize_onnx(file, tmp_path / f'{len(names)}.onnx', images, keep_float=names)
                        for names in ('fc2', ['fc2']))
        assert one.read_bytes() == several.read_bytes()

    def test_only_float32_files(self, file, tmp_path):
        path = tmp_path / 'int8.onnx'
        quantize_onnx(file, path, [pictures(2, 3, 16, 16)])
        before = path.read_bytes()
        with pytest.raises(ValueError, match='int8.onnx is quantised already'):
            quantize_onnx(path, path, [pictures(2, 3, 16, 16)])
        assert path.read_bytes() == before
        half = export_onnx(small('patchwise').half(), tmp_path / 'half.onnx', 16, verify=False)
        with pytest.raises(ValueError, match=r'takes tensor\(float16\), and only files in float32'):
            quantize_onnx(half, path, [pictures(2, 3, 16, 16).half()])


class TestDetector:
    """Whole detectors of torchvision, from an image to boxes."""

    def make(self, kind):
        from torchvision.models.detection import MaskRCNN, RetinaNet
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        pytest.importorskip('onnxruntime')
        torch.manual_seed(0)
        features = timm.create_model('test_san_patchwise', features_only=True, out_indices=(1, 2, 3, 4))
        layers = {f'stages_{i}': str(i) for i in (1, 2, 3, 4)}
        pyramid = BackboneWithFPN(features, layers, features.feature_info.channels(), 32)
        options = dict(num_classes=3, min_size=64, max_size=96)
        if kind == 'mask':
            return MaskRCNN(pyramid, box_score_thresh=0., box_detections_per_img=4, **options).eval()
        anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((1.,),) * 5)
        detector = RetinaNet(pyramid, anchor_generator=anchors, score_thresh=0., detections_per_img=4, **options).eval()
        detector.head.classification_head.cls_logits.weight.data.normal_()  # scores that differ
        return detector

    @pytest.mark.parametrize('kind', ['mask', 'one-stage'])
    def test_finds_what_torch_finds(self, kind, tmp_path):
        detector, image = self.make(kind), torch.rand(3, 48, 64)
        import onnxruntime
        path = export_detector(detector, tmp_path / 'detector.onnx', image)
        assert not detector.training
        session = onnxruntime.InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        assert set(names) == {'boxes', 'labels', 'scores'} | ({'masks'} if kind == 'mask' else set())
        other = torch.rand(3, 48, 64)
        with torch.no_grad():
            expected, = detector([other])
        found = dict(zip(names, session.run(names, {'image': other.numpy()}), strict=True))
        assert found['boxes'].shape == expected['boxes'].shape
        np.testing.assert_allclose(np.sort(found['scores']), expected['scores'].sort().values, atol=1e-4)

    @pytest.mark.parametrize('lost, fits', [(2, True), (1, False)])
    def test_ties_are_not_compared(self, lost, fits, tmp_path):
        class Detector(nn.Module):  # the third object is there or not by one rounding; the file loses one
            def forward(self, images):
                level = images[0].sum()
                keep = torch.stack([level > 0, level > 1, level >= limit])
                if torch.jit.is_tracing():
                    keep = keep & (torch.arange(3) != lost)
                boxes = torch.tensor([[0., 0., 9., 9.], [20., 0., 29., 9.], [40., 0., 49., 9.]])
                return [{'boxes': boxes[keep], 'labels': torch.arange(3)[keep], 'scores': torch.full((3,), .5)[keep]}]

        pytest.importorskip('onnxruntime')
        image = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
        limit, path = image.sum(), tmp_path / 'detector.onnx'
        before = torch.get_rng_state()
        if fits:
            export_detector(Detector().eval(), path, image)
        else:
            with pytest.raises(RuntimeError, match='does not find 1 of the 2 objects'):
                export_detector(Detector().eval(), path, image)
        assert path.exists() == fits and torch.equal(torch.get_rng_state(), before)

    def test_errors(self, tmp_path, monkeypatch):
        detector, path = self.make('one-stage'), tmp_path / 'detector.onnx'
        with pytest.raises(ValueError, match='training mode'):
            export_detector(detector.train(), path, torch.rand(3, 48, 64))
        with pytest.raises(ValueError, match=r'got \[1, 3, 48, 64\]'):
            export_detector(detector.eval(), path, torch.rand(1, 3, 48, 64))
        detector.score_thresh = 2.
        with pytest.raises(RuntimeError, match='finds nothing'):
            export_detector(detector, path, torch.rand(3, 48, 64))
        detector.score_thresh = 0.
        image, calls, forward = torch.rand(3, 48, 64), [], detector.forward
        monkeypatch.setattr(detector, 'forward', lambda images: calls.append(1) or forward(
            images if len(calls) > 9 else [1 - images[0]]))
        with pytest.raises(RuntimeError, match='is not kept'):
            export_detector(detector, path, image)
        assert not path.exists()
