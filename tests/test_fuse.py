"""fuse_for_inference: the same outputs, the same state, and never a stale one."""
import copy
import io
import os
import socket
import threading
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import san_backbones.fuse
from san_backbones import SAN, PatchwiseAttention, fuse_for_inference, ops, refold
from san_backbones.san import Block, Stage


def _model(attention='patchwise', **kwargs):
    torch.manual_seed(0)
    model = SAN(attention, depths=(1, 2, 1), widths=(32, 64, 96), kernel_sizes=(3, 7, 5), stem_width=16, num_classes=7,
                **kwargs).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.3, 1.3)  # norms that do something, of either place
    return model


def _image(*shape):
    return torch.randn(*(shape or (2, 3, 36, 44)))


def _error(model, image):
    """Relative error of the model to its modules in float64 by the plain definition."""
    plain = copy.deepcopy(model).double()
    for stage in plain.stages:
        stage.set_folding(False)
    with torch.no_grad(), ops.use_backend('reference'):
        expected = plain.forward_features(image.double())
    with torch.no_grad():
        actual = model.forward_features(image)
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _runs_folded(model, image):
    """Whether the blocks' modules are passed by."""
    called = []
    inner = Block.forward
    Block.forward = lambda block, x: called.append(block) or inner(block, x)
    try:
        model(image)
    finally:
        Block.forward = inner
    return model.stages[1].blocks[0] not in called


@pytest.mark.parametrize('backend', ['auto', 'reference', 'tiled'])
@pytest.mark.parametrize('attention, options', [
    ('pairwise', {}), ('patchwise', {}), ('pairwise', dict(position='none', relation='hadamard')),
    ('pairwise', dict(relation='concatenation', position='absolute')), ('patchwise', dict(relation='star')),
    ('pairwise', dict(position_ref_size=64, output_stride=8)), ('patchwise', dict(drop_path_rate=0.3))])
def test_outputs(attention, options, backend):
    model = _model(attention, **options)
    assert fuse_for_inference(model) is model
    with ops.use_backend(backend):
        for size in ((2, 3, 36, 44), (1, 3, 32, 32), (1, 3, 67, 40), (1, 3, 40, 67)):  # places are kept by size
            assert _error(model, _image(*size)) < 2e-6
    with torch.inference_mode():
        assert _runs_folded(model, _image())


@pytest.mark.skipif(not ops.native.has_int8(), reason='needs AVX-512 VNNI')
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_int8(attention):
    torch.manual_seed(0)
    model = SAN(attention, depths=(1, 2), widths=(64, 256), kernel_sizes=(3, 7), stem_width=64, num_classes=7).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.3, 1.3)
    state, image = {name: tensor.clone() for name, tensor in model.state_dict().items()}, _image()
    assert fuse_for_inference(model, int8=True) is model
    error = _error(model, image)
    assert 1e-4 < error < 0.02
    with torch.no_grad():
        several = model.forward_features(image)
        for i in range(2):
            torch.testing.assert_close(model.forward_features(image[i:i + 1]), several[i:i + 1])
        assert _runs_folded(model, image)
        folded = model.stages[1]._folded[0]
        for linear in (folded.conv, *(part for block in folded.blocks for part in (block.project, block.expand))):
            steps = linear.weight / (linear.weight.abs().amax(1, keepdim=True) / 127)
            assert (steps - steps.round()).abs().max() < 1e-3
        model.stages[0].conv.weight.mul_(2)  # it folds anew, and so does refold, as before
        assert 1e-4 < _error(model, image) < 0.02
        model.load_state_dict(state)
        assert torch.equal(refold(model).forward_features(image), several)
        assert torch.equal(copy.deepcopy(model).forward_features(image), several)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    fuse_for_inference(model)
    assert _error(model, image) < 2e-6


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(attention, dtype, monkeypatch):
    """Between stages the maps are in half precision; the loops compute in float32, from weights that were rounded once
    more. A batch in parts has the same bits."""
    model, image = _model(attention).to(dtype), _image(5, 3, 36, 44).to(dtype)
    unfused = _error(model, image)
    assert fuse_for_inference(model) is model
    assert _error(model, image) / 1.5 <= unfused < (0.02 if dtype == torch.bfloat16 else 0.004)
    with torch.no_grad():
        assert _runs_folded(model, image)
        features = model.forward_features(image)
        assert features.dtype == dtype
        assert model.stages[1]._folded[0].in_loops == (ops.native.unavailable() is None)
        monkeypatch.setattr(san_backbones.fuse, 'CACHED_BYTES', 1)
        assert torch.equal(model.forward_features(image), features)
        with pytest.raises((RuntimeError, ValueError)):  # as of the modules
            model.stages[0](torch.randn(2, 16, 9, 11))


def test_int8_is_not_everywhere(monkeypatch):
    image = _image()
    with pytest.warns(RuntimeWarning, match='int8=True has no effect.* torch.float64 on cpu'):
        assert _error(_model().double().fuse_for_inference(int8=True), image.double()) < 1e-12
    monkeypatch.setattr(ops.native, 'has_int8', lambda: False)
    with pytest.warns(RuntimeWarning, match='int8=True has no effect.*(AVX-512 VNNI|not installed)'):
        assert _error(_model().fuse_for_inference(int8=True), image) < 2e-6


@pytest.mark.filterwarnings('ignore:int8=True has no effect')
def test_int8_has_no_effect_on_half_precision():
    """On gamma neither, whose relations are wide here."""
    torch.manual_seed(0)
    model = SAN('patchwise', depths=(1,), widths=(512,), kernel_sizes=(7,), zero_init_last=False, num_classes=0)
    model, image = model.eval().bfloat16(), _image(2, 3, 36, 44).bfloat16()
    with torch.no_grad():
        expected = model.fuse_for_inference().forward_features(image)
        assert torch.equal(model.fuse_for_inference(int8=True).forward_features(image), expected)


def test_pooling_that_is_changed_later():
    """Calls that are kept for a map which they pool do not serve a map of the same size that is pooled already."""
    stage = _model().fuse_for_inference().stages[1]
    small, large = (torch.randn(2, stage.conv.in_channels, side, side).to(memory_format=torch.channels_last)
                    for side in (10, 19))
    with torch.no_grad():
        stage(small)
        stage.pool.ceil_mode = True
        found = stage(large)
        stage.set_folding(False)
        torch.testing.assert_close(found, stage(large), atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings('ignore:int8=True has no effect')
@pytest.mark.parametrize('int8', [False, True])
def test_refold_keeps_the_form(int8):
    assert {stage.folds_to_int8 for stage in refold(_model().fuse_for_inference(int8=int8)).stages} == {int8}


def test_state_dict_is_untouched():
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.fuse_for_inference()(_image())
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_run_the_modules_and_say_so():
    model, image = fuse_for_inference(_model()), _image()
    with pytest.warns(UserWarning, match='inference_mode'):
        model(image).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_training_and_back():
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        before = model(image)
        model.train()
        model(image)  # moves running statistics
        model.eval()
        assert not torch.allclose(model(image), before)
    assert _error(model, image) < 2e-6
    model.stages[1].blocks[1].norm2.train()  # one layer alone
    with torch.no_grad():
        assert not _runs_folded(model, image)


def _scaled(model):
    return {name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}


def _step(model, block):
    block.norm2.bias.grad = torch.ones_like(block.norm2.bias)
    torch.optim.SGD(model.parameters(), 0.5).step()


def _replace_layer(model, block):
    block.norm1 = copy.deepcopy(block.norm1)
    nn.init.constant_(block.norm1.bias, -0.2)


CHANGES = {
    'load': lambda model, block: model.load_state_dict(_scaled(model)),
    'assign': lambda model, block: model.load_state_dict(_scaled(model), assign=True),
    'in place': lambda model, block: block.attn.weight_mlp.fc2.weight.mul_(3),
    'one element in place': lambda model, block: block.conv.weight[0, 1].add_(3),
    'optimizer': _step,
    'replaced parameter': lambda model, block: setattr(
        block.attn.value, 'bias', nn.Parameter(block.attn.value.bias + 1)),
    'replaced layer': _replace_layer,
    'buffer': lambda model, block: block.attn.weight_mlp.norm2.running_var.mul_(4),
    'data': lambda model, block: setattr(block.conv.weight, 'data', block.conv.weight.data * 2),
    'double': lambda model, block: model.double(),
    'there and back': lambda model, block: model.to(torch.bfloat16).float(),
    'eps': lambda model, block: setattr(block.attn.weight_mlp.norm2, 'eps', 0.5),
    'dilation': lambda model, block: setattr(block.attn, 'dilation', 2),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changes_are_seen(change):
    model, image = fuse_for_inference(_model('pairwise')), _image()
    with torch.no_grad():
        before = model(image)
        CHANGES[change](model, model.stages[1].blocks[0])
        image = image.to(model.stem.conv.weight.dtype)
    assert _error(model, image) < 2e-6
    with torch.no_grad():
        assert change == 'double' or not torch.equal(model(image), before)
        assert _runs_folded(model, image)


def _other_kind(module, kind, forward):
    """Makes a module one of a class derived from `kind`, with another forward."""
    module.__class__ = type('Other', (kind,), {'forward': forward})


@pytest.mark.parametrize('change', [
    pytest.param(lambda blocks, block: block.attn.weight_mlp.append(nn.Tanh()), id='a layer more'),
    pytest.param(lambda blocks, block: setattr(block.act2, 'forward', lambda x: x.relu().square()),
                 id='another forward'),
    pytest.param(lambda blocks, block: setattr(block, 'forward', lambda x: 2 * x), id='another forward of a block'),
    pytest.param(lambda blocks, block: _other_kind(
        block.attn, PatchwiseAttention, lambda self, x: PatchwiseAttention.forward(self, x) / 2),
        id='an attention of another kind'),
    pytest.param(lambda blocks, block: setattr(block, 'act1', type('Leaky', (nn.ReLU,), {
        'forward': lambda self, x: nn.functional.leaky_relu(x, 0.5)})()), id='an activation of another kind'),
    pytest.param(lambda blocks, block: blocks.append(copy.deepcopy(block)), id='a block more'),
    pytest.param(lambda blocks, block: _other_kind(block, Block, lambda self, x: Block.forward(self, x) / 2),
                 id='a block of another kind'),
    pytest.param(lambda blocks, block: setattr(block, 'drop_path', nn.Tanh()), id='another drop_path'),
    pytest.param(lambda blocks, block: _other_kind(
        blocks, nn.Sequential, lambda self, x: nn.Sequential.forward(self, x) / 2), id='blocks of another kind')])
def test_what_does_not_fold_any_more_runs_as_modules(change):
    model, image = fuse_for_inference(_model()), _image()
    blocks = model.stages[1].blocks
    with torch.no_grad():
        before = model(image)
        change(blocks, blocks[0])
        found = model(image)
        assert not torch.allclose(found, before, rtol=1e-2)
        for stage in model.stages:
            stage.set_folding(False)
        torch.testing.assert_close(found, model(image), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('optimizer, lr', [(torch.optim.SGD, 1e-7), (torch.optim.AdamW, 0.01)])
@pytest.mark.parametrize('mode', ['eval', 'frozen norms', 'frozen norms, autocast'])
def test_fused_optimizers_count_no_writes(mode, optimizer, lr):
    """Into parameters; with norms that keep their statistics nothing else tells of a step."""
    model, image = fuse_for_inference(_model()), _image()
    optimizer = optimizer(model.parameters(), lr, fused=True)
    with torch.no_grad():
        before = model(image)
    if mode != 'eval':
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    with torch.autocast('cpu', torch.bfloat16, enabled='autocast' in mode), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it runs unfused
        model(image).square().mean().backward()
    versions = [parameter._version for parameter in model.parameters()]
    optimizer.step()
    assert versions == [parameter._version for parameter in model.parameters()]
    model.eval()
    with torch.no_grad():
        assert not torch.equal(model(image), before)
    assert _error(model, image) < 2e-6


@pytest.mark.parametrize('how', ['step', 'compiled step', 'a step that fails', 'function'])
def test_a_fused_optimizer_writes_after_the_fold(how):
    """Gradients are there, the model folds once more, and then comes the step."""
    model, image = fuse_for_inference(_model()), _image()
    optimizer = torch.optim.SGD(model.parameters(), 1e-7, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it runs unfused
        model(image).square().mean().backward()
    parameters = list(model.parameters())
    compiled = torch.compile(optimizer.step, backend='eager')
    for _ in range(2):
        with torch.no_grad():
            before = model(image)
            assert _runs_folded(model, image)
        versions = [parameter._version for parameter in parameters]
        if how == 'step':
            optimizer.step()
        elif how == 'compiled step':
            compiled()
        elif how == 'a step that fails':
            optimizer.add_param_group(dict(params=[nn.Parameter(torch.zeros(1))], lr='much'))
            optimizer.param_groups[-1]['params'][0].grad = torch.ones(1)
            with pytest.raises(TypeError):
                optimizer.step()
        else:
            with torch.no_grad():
                torch._fused_sgd_(parameters, [p.grad for p in parameters], [], weight_decay=0., momentum=0., lr=1e-7,
                                  dampening=0., nesterov=False, maximize=False, is_first_step=False)
        assert versions == [parameter._version for parameter in parameters]
        with torch.no_grad():
            assert not torch.equal(model(image), before)
        assert _error(model, image) < 2e-6


def test_a_fused_optimizer_of_a_small_step_of_some():
    """A step so small, and of one layer alone, that only the optimizer itself can tell of it."""
    model, image = fuse_for_inference(_model()), _image()
    weight = model.stages[1].blocks[0].attn.value.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 1] = 1.
    with torch.no_grad():
        before = model(image)
        torch.optim.SGD([weight], 1., fused=True).step()
        assert not torch.equal(model(image), before)
    assert _error(model, image) < 2e-6


def _write(kind, parameter):
    if kind == 'data':
        parameter.data.mul_(1.5)
    elif kind == 'numpy':
        parameter.detach().numpy()[...] *= 1.5
    elif kind == 'dlpack':
        torch.from_dlpack(torch.utils.dlpack.to_dlpack(parameter.detach())).mul_(1.5)
    elif kind == 'storage':
        parameter.untyped_storage().copy_((parameter.detach() * 1.5).untyped_storage())
    else:
        with torch.autograd._unsafe_preserve_version_counter(parameter), torch.no_grad():
            parameter.mul_(1.5)


@pytest.mark.parametrize('kind', ['data', 'numpy', 'dlpack', 'storage', 'uncounted'])
@pytest.mark.parametrize('name', ['attn.value.weight', 'conv.bias', 'norm1.running_var', 'attn.weight_mlp.fc2.weight'])
def test_writes_past_torch_are_seen_on_the_cpu(kind, name):
    model, image = fuse_for_inference(_model()), _image()
    module, _, name = name.rpartition('.')
    tensor = getattr(model.stages[1].blocks[0].get_submodule(module), name)
    with torch.no_grad():
        before, version = model(image), tensor._version
        _write(kind, tensor)
        assert tensor._version == version and not torch.equal(model(image), before)
    assert _error(model, image) < 2e-6


@pytest.mark.parametrize('where', [(3, slice(None)), (slice(None), slice(3, 9))])
def test_a_row_written_past_torch_is_seen(where):
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        before = model(image)
        model.stages[1].blocks[0].attn.value.weight.data[where] *= 1.5
        assert not torch.equal(model(image), before)


def test_memory_that_was_given_back_is_not_read():
    """As FullyShardedDataParallel does between calls."""
    model, image = fuse_for_inference(_model()), _image()
    weight = model.stages[1].blocks[0].conv.weight
    with torch.no_grad():
        model(image)
        watch, kept = model.stages[1]._folded[0].watch, weight.detach().clone()
        storage = weight.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        watch.entries = []  # where nothing else tells of it
        watch.entries.append((model.stages[1]._modules, 'conv', model.stages[1].conv))
        watch.tensors, watch.states = [], []
        assert not watch.unchanged(model.stages[1])
        storage.resize_(size)
        weight.data.copy_(kept)
    assert _error(model, image) < 2e-6


def _sharded(rank, port, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    torch.manual_seed(rank)
    image, found = _image(), []
    for parts in (None, ModuleWrapPolicy({Stage}), ModuleWrapPolicy({Block})):
        for original in (False, True):
            def wrap(model):
                return FullyShardedDataParallel(
                    model, use_orig_params=original, auto_wrap_policy=parts, device_id=torch.device('cpu'))
            message = None
            try:
                fuse_for_inference(wrap(_model()))
            except ValueError as error:
                message = str(error)
            plain, fused = wrap(_model()), wrap(fuse_for_inference(_model()))
            stage = next(module for module in fused.modules() if isinstance(module, Stage))
            for model in (plain, fused):
                model(image).square().mean().backward()
            errors = []
            for _ in range(2):
                with torch.no_grad():
                    expected = plain(image)
                    errors.append(((fused(image) - expected).norm() / expected.norm()).item())
                for model in (plain, fused):
                    torch.optim.SGD(model.parameters(), 1e-7, fused=True).step()
            found.append((message, errors, stage._folded[0] is not None))
    torch.save(found, f'{folder}/{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def test_fully_sharded_models_are_fused_before_they_are_wrapped(tmp_path):
    """Whole models and stages, each without and with use_orig_params, fold; blocks run as modules."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(_sharded, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pt')
        assert [folded for _, _, folded in found] == [True] * 4 + [False] * 2
        assert all(error < 2e-6 for _, errors, _ in found for error in errors), found
        for i, (message, _, _) in enumerate(found):
            if i < 4:
                assert message is None  # whose weights are whole inside a call
            else:
                assert 'cannot fold' in message and 'fuse the model before it is wrapped' in message


def test_addresses_that_are_used_again():
    """Parameters become views of a vector that is freed, time and again: others lie where they lay."""
    from torch.nn.utils import parameters_to_vector, vector_to_parameters
    fused, plain = (_model().bfloat16() for _ in range(2))
    fuse_for_inference(fused)
    vector, image = parameters_to_vector(fused.parameters()).detach(), _image().bfloat16()
    with torch.no_grad():
        for _ in range(6):
            candidate, found = vector * torch.empty_like(vector).uniform_(0.5, 1.5), []
            for model in (fused, plain):
                vector_to_parameters(candidate, model.parameters())
                found.append(model(image).float())
                vector_to_parameters(vector, model.parameters())
            del candidate
            assert (found[0] - found[1]).norm() < 0.1 * found[1].norm()


def test_writes_of_others_are_seen_whole_or_not_at_all():
    """Into shared memory, say: a fold holds copies only."""
    model, image = fuse_for_inference(_model().share_memory()), _image()
    with torch.no_grad():
        x = model.stages[0].pool(model.stem(image))
        folded = model.stages[0].inference_form(x)
        before = folded(x.clone())
        for parameter in model.stages.parameters():
            parameter.detach().numpy()[...] *= 1.5
        assert torch.equal(folded(x.clone()), before)
        again = model.stages[0].inference_form(x)
        assert again is not folded and not torch.equal(again(x.clone()), before)


def test_parameters_can_be_swapped():
    model, image = fuse_for_inference(_model()), _image()
    other = {
        name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model(image)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert _error(model, image) < 2e-6


def test_what_goes_unseen_is_what_the_docstring_says():
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        for again in (refold, fuse_for_inference):
            before = model(image)
            model.stages[1].blocks[0].attn.value.weight.data[0, 1] += 2  # beside the diagonal
            assert torch.equal(model(image), before)
            assert again(model) is model
            assert not torch.equal(model(image), before)
            assert _error(model, image) < 2e-6


@pytest.mark.parametrize('training', [True, False])
def test_training_forgets_folds(training):
    """Whatever is written afterwards need not be seen."""
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        before = model(image)
    for module in model.modules():
        module.training = training and not isinstance(module, nn.BatchNorm2d)  # whose buffers would tell
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that it runs unfused
        model(image)
    model.eval()
    with torch.no_grad():
        model.stages[1].blocks[0].attn.value.weight.data[0, 1] += 2
        assert not torch.equal(model(image), before)


def test_refold_takes_fused_models_only():
    for model in (nn.Linear(2, 2), _model()):
        with pytest.raises(ValueError, match='there is no fused SAN in this .* fuse_for_inference'):
            refold(model)
    detector = nn.ModuleDict(dict(backbone=fuse_for_inference(_model()), head=nn.Linear(2, 2)))
    assert refold(detector) is detector


def test_double_precision():
    assert _error(fuse_for_inference(_model('pairwise').double()), _image().double()) < 1e-13


def test_autocast_runs_the_modules():
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert not _runs_folded(model, image)


def test_the_meta_device():
    """Shapes and multiply-adds are counted there; autocast does not know it."""
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        expected, actual = model(image), model.to('meta')(image.to('meta'))
    assert actual.is_meta and actual.shape == expected.shape


@pytest.mark.parametrize('where', ['stages.1.blocks.0', 'stages.1.blocks.0.attn', 'stages.1.conv'])
def test_hooks_are_called(where):
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        expected = model(image)
        seen = []
        handle = model.get_submodule(where).register_forward_hook(lambda module, inputs, output: seen.append(output))
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
        assert len(seen) == 1
        kept = seen[0].clone()
        handle.remove()
        model(image)
        assert torch.equal(seen[0], kept)  # nobody wrote into what a hook took
        handle = model.get_submodule(where).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(image)
        assert len(seen) == 2
        handle.remove()
        model(image)
    assert len(seen) == 2


def test_copies_and_pickles():
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        expected = model(image)
        plain = io.BytesIO()
        torch.save(_model(), plain)
        file = io.BytesIO()
        torch.save(model, file)
        assert len(file.getvalue()) < 1.02 * len(plain.getvalue())  # no folded weights inside
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(image), expected)
            nn.init.constant_(other.stages[0].norm.bias, 3.)
            assert not torch.equal(other(image), expected)
        assert torch.equal(model(image), expected)


def test_inside_other_models():
    image = torch.rand(1, 3, 64, 64)
    features = timm.create_model('test_san_pairwise', features_only=True).eval()
    with torch.no_grad():
        expected = features(image)
        for a, b in zip(fuse_for_inference(features)(image), expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert features.stages_1._folded[0] is not None


def test_traced_and_compiled_models_hold_the_modules():
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        expected = model(image)
        for other in (torch.jit.script(model), torch.jit.trace(model, image), torch.fx.symbolic_trace(model),
                      torch.export.export(model, (image,)).module()):
            torch.testing.assert_close(other(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('tool', ['fake tensors', 'subclass', 'make_fx', 'FlopCounterMode'])
def test_tools_that_look_at_every_operator(tool, first):
    """They see the modules, and no fold made from their tensors is kept."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.testing._internal.two_tensor import TwoTensor
    from torch.utils.flop_counter import FlopCounterMode
    model, image = fuse_for_inference(_model()), _image()
    with torch.no_grad():
        expected = fuse_for_inference(_model())(image)
        if not first:
            model(image)
        if tool == 'fake tensors':
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert model(mode.from_tensor(image)).shape == expected.shape
        elif tool == 'subclass':
            torch.testing.assert_close(model(TwoTensor(image, image)).a, expected, rtol=1e-4, atol=1e-5)
        elif tool == 'make_fx':
            torch.testing.assert_close(make_fx(model)(image)(2 * image), model(2 * image), rtol=1e-4, atol=1e-5)
        else:
            with FlopCounterMode(display=False) as counter:
                torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
            assert counter.get_total_flops() > 0
        assert torch.equal(model(image), expected)


def test_what_cannot_be_folded_is_an_error():
    with pytest.raises(ValueError, match='stages.0: norm is a GroupNorm and not a batch norm'):
        fuse_for_inference(_model(norm_layer=lambda channels, **kwargs: nn.GroupNorm(1, channels, **kwargs)))
    model = _model()
    model.stages[1].blocks[1].act2 = nn.GELU()
    with pytest.raises(ValueError, match='stages.1: blocks.1.act2 is a GELU and not a ReLU'):
        model.fuse_for_inference()
    model = _model()
    model.stages[0].blocks[0].norm2 = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match='stages.0: blocks.0.norm2 has no running statistics'):
        model.fuse_for_inference()
    with pytest.raises(ValueError, match='no SAN in this Linear'):
        fuse_for_inference(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='no SAN in this NoneType'):
        fuse_for_inference(None)
    scripted = torch.jit.script(timm.create_model('test_san_pairwise').eval())
    with pytest.raises(ValueError, match='no SAN in this RecursiveScriptModule to fuse: expected a model of'):
        fuse_for_inference(scripted)


def test_other_threads_load_weights_meanwhile():
    """A forward may meet weights half loaded; once the loading is over, the next one must not."""
    model, image = fuse_for_inference(_model()), _image(1, 3, 32, 32)
    states = [{name: tensor * factor if tensor.is_floating_point() else tensor
               for name, tensor in model.state_dict().items()} for factor in (1., 1.2)]
    expected = []
    with torch.no_grad():
        for state in states:
            model.load_state_dict(state)
            expected.append(model(image))
        stop = threading.Event()

        def infer():
            with torch.no_grad():
                while not stop.is_set():
                    model(image)
        threads = [threading.Thread(target=infer) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for i in range(20):
                model.load_state_dict(states[i % 2])
                assert torch.equal(model(image), expected[i % 2])
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_no_warning_without_gradients():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('error')
        san_backbones.fuse_for_inference(_model())(_image())


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_images_that_go_through_a_stage_apart_have_the_same_bits(attention, monkeypatch):
    """A batch goes through a stage in parts that stay in the caches."""
    model, images = fuse_for_inference(_model(attention)), _image(5, 3, 36, 44)
    with torch.no_grad():
        expected, taken = model.forward_features(images), []
        run = san_backbones.fuse._FoldedStage._run
        monkeypatch.setattr(san_backbones.fuse._FoldedStage, '_run',
                            lambda stage, x, *others: taken.append(len(x)) or run(stage, x, *others))
        for size, parts in ((1, [1] * 5), (2 * 4 * 18 * 22 * 32, [2, 2, 1])):
            monkeypatch.setattr(san_backbones.fuse, 'CACHED_BYTES', size)
            taken.clear()
            assert torch.equal(model.forward_features(images), expected)
            assert taken[:len(parts)] == parts
            if size == 1:
                assert torch.equal(torch.cat([model.forward_features(image[None]) for image in images]), expected)


@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_calls_are_kept_for_few_sizes(attention):
    """And the same bits come out whether they are new or not, in whatever order the axes lie in memory."""
    model = fuse_for_inference(_model(attention))
    pictures = [_image(1 + i % 3, 3, 32 + 8 * (i // 2), 40) for i in range(6)]  # two batches of a size
    with torch.no_grad():
        expected = [copy.deepcopy(model).forward_features(picture) for picture in pictures]
        for order in (range(6), (5, 0, 0, 5), range(5, -1, -1)):
            for i in order:
                found = model.forward_features(pictures[i])
                assert torch.equal(found, expected[i])
                assert torch.equal(found, model.forward_features(pictures[i].contiguous(
                    memory_format=torch.channels_last)))
                folded = model.stages[1]._folded[0]
                assert not folded.in_loops or 1 <= len(folded.programs) <= san_backbones.fuse.SIZES_PREPARED
        x = torch.randn(2, 16, 9, 11)
        alike = [x, x.contiguous(memory_format=torch.channels_last), torch.randn(2, 24, 9, 11).copy_(
            torch.cat([x, x[:, :8]], 1))[:, :16], x.expand(2, 16, 9, 11)]
        outputs = [model.stages[0].inference_form(part)(part) for part in alike]
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_maps_of_other_channels_are_an_error():
    model = fuse_for_inference(_model())
    with torch.no_grad():
        for backend in ('auto', 'reference'):
            with ops.use_backend(backend), pytest.raises(ValueError, match=r'with 16 channels .*got \[2, 9, 11, 32\]'):
                model.stages[0](torch.randn(2, 32, 9, 11))
