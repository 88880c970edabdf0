"""Every backend against the float64 definition: outputs, gradients, batch statistics, layouts, dtypes and refusals."""
import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from tests.ops.conformance import FUSED, LAYERS, SUBJECTS, step
from torch import nn

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import fused

SIZES = ((1, 1), (1, 5), (9, 20))


def _marked(cases):
    """Parameters of a test, a subject first; their ids name it first."""
    return [pytest.param(*case, id='-'.join(
        getattr(part, '__name__', None) or str(part).replace('torch.', '') for part in case)) for case in cases]


def parametrise(names, cases):
    """`names` for every subject, beside what `cases` gives for it."""
    return pytest.mark.parametrize(f'subject, {names}', _marked(
        (subject, *(case if isinstance(case, tuple) else (case,))) for subject in SUBJECTS for case in cases(subject)))


every = pytest.mark.parametrize('subject', SUBJECTS, ids=str)
every_fused = pytest.mark.parametrize('subject', FUSED, ids=str)
both = pytest.mark.parametrize('cls', LAYERS)


# --- Outputs ---------------------------------------------------------------------------------------------------------

def _definitions(subject):
    """Relations, footprints, widths and sizes of maps; 96 channels: weight channels that fill no vector."""
    for cls, relation in subject.relations():
        if subject.small:
            yield cls, relation, 3, 2, (256,), ((5, 7),)  # more pixels than a program of the interpreter has
        elif subject.fused:
            for kernel_size, dilation in ((1, 1), (3, 1), (5, 2), (7, 1), (7, 2), (11, 1)):
                yield cls, relation, kernel_size, dilation, (32, 64, 96, 256), SIZES
        else:
            for kernel_size, dilation in ((1, 1), (3, 2)) if relation == 'clique' else ((1, 1), (3, 2), (7, 1)):
                yield cls, relation, kernel_size, dilation, (32, 96), SIZES
    if subject.small:
        for cls in LAYERS:
            for kernel_size, dilation, size in ((1, 1, (3, 2)), (5, 2, (4, 7)), (7, 1, (1, 5))):
                yield cls, cls.relations[0], kernel_size, dilation, (32,), (size,)


@pytest.mark.parametrize('subject, cls, relation, kernel_size, dilation, dims, sizes', [
    pytest.param(subject, *case, id=f'{subject}-{case[0].__name__}-{case[1]}-{case[2]}-{case[3]}')
    for subject in SUBJECTS for case in _definitions(subject)])
def test_definition(subject, cls, relation, kernel_size, dilation, dims, sizes):
    for dim, size in itertools.product(dims, sizes):
        layer = subject.layer(cls, dim, relation=relation, kernel_size=kernel_size, dilation=dilation)
        assert subject.error(layer, subject.random(2, dim, *size)) < subject.bound, (dim, size)


@parametrise('relation, position, ref', lambda subject: (
    (relation, *option) for _, relation in subject.relations(PairwiseAttention)
    if not subject.small or relation in ('subtraction', 'dot')
    for option in (('none', None), ('absolute', None), ('absolute', 8), ('relative', 8))))
def test_positions(subject, relation, position, ref):
    layer = subject.layer(PairwiseAttention, relation=relation, position=position, position_ref_size=ref,
                          kernel_size=3 if subject.small else 7)
    assert subject.error(layer, subject.random(1, 64, *((4, 3) if subject.small else (6, 11)))) < subject.bound


WIDTHS = {name: dict(zip(('dim', 'rel_planes', 'out_planes', 'share_planes'), widths)) for name, widths in {
    '96': (96, 6, 24, 8), '5': (64, 5, 16, 8), '24,3': (64, 4, 24, 3), '16,1': (64, 4, 16, 1), '20,4': (64, 4, 20, 4),
    '14,7': (64, 4, 14, 7)}.items()}


@parametrise('cls, widths', lambda subject: itertools.product(LAYERS, list(WIDTHS)[:3] if subject.small else WIDTHS))
def test_odd_widths(subject, cls, widths):
    layer = subject.layer(cls, **WIDTHS[widths], kernel_size=3 if subject.small else 7)
    size = (2, 1) if subject.small else (7, 8)  # also a map narrower than the footprint reaches
    assert subject.error(layer, subject.random(2, layer.dim, *size)) < subject.bound


@every
@both
@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision(subject, cls, dtype, bound):
    dim = 256 if subject.small else 64
    layer = subject.layer(cls, dim, kernel_size=3 if subject.small else 7).to(dtype)
    x = subject.random(2, dim, *((4, 4) if subject.small else (9, 9))).to(dtype)
    if subject.fused is None:  # rounds every intermediate result
        bound *= 5
    assert subject.error(layer, x) < bound
    with torch.no_grad(), subject.use():
        assert layer(x).dtype == dtype


@every
@both
def test_wide_layers(subject, cls):
    """More channels than registers take at a time, with the finish."""
    dim = 64 if subject.small else 1024
    layer = subject.layer(cls, dim, kernel_size=3, **(dict(rel_planes=100) if subject.small else {}))
    x, shift = subject.random(2, dim, *((2, 2) if subject.small else (5, 6))), subject.random(layer.out_planes)
    assert subject.error(layer, x) < subject.bound
    maps = [layer.query(x), layer.key(x), layer.value(x), layer.place(x)]
    with torch.no_grad(), subject.use():
        finished = ops.footprint_attention(*maps, layer.gamma(), layer.spec(), shift)
        plain = ops.footprint_attention(*maps, layer.gamma(), layer.spec())
    torch.testing.assert_close(finished, torch.relu(plain + shift[:, None, None]))


@every
def test_shift_in_any_dtype(subject):
    layer, shift = subject.layer(PairwiseAttention, kernel_size=3), subject.random(16)
    x = subject.random(1, 64, 3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        maps = [m(x).to(dtype) for m in (layer.query, layer.key, layer.value)]
        gamma = copy.deepcopy(layer).to(dtype).gamma()
        with torch.no_grad(), subject.use():
            found = [ops.footprint_attention(*maps, layer.place(x), gamma, layer.spec(), s)
                     for s in (shift, shift.double())]
        assert found[0].dtype == found[1].dtype == dtype
        torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


# --- Layouts ---------------------------------------------------------------------------------------------------------

@every
@both
def test_layouts(subject, cls):
    """Channels last in, channels last out; strided, sliced and expanded maps; what is computed stays."""
    dim, kernel_size, size = (32, 3, (4, 5)) if subject.small else (64, 7, (8, 10))
    layer = subject.layer(cls, dim, kernel_size=kernel_size)
    *maps, place = subject.projected(layer, torch.empty(2, dim, *size, device=subject.device))
    joined = torch.cat(maps, 1).to(memory_format=torch.channels_last)
    others = [[torch.stack([x, x], -1)[..., 0] for x in maps],
              [x.to(memory_format=torch.channels_last) for x in maps],
              [nn.functional.pad(x, (2, 1, 1, 3)).to(memory_format=torch.channels_last)[:, :, 1:-3, 2:-1]
               for x in maps],
              joined.split([x.shape[1] for x in maps], 1)]
    assert not any(x.is_contiguous() for other in others for x in other)
    with torch.no_grad(), subject.use():
        plain = layer._forward_operators(*maps, place)
        found = [layer._forward_operators(*other, place) for other in others]
        expanded = layer._forward_operators(*(x[:1].expand(3, -1, -1, -1) for x in maps), place)
    assert plain.is_contiguous() and expanded.shape[0] == 3
    torch.testing.assert_close(expanded[2], plain[0], rtol=1e-5, atol=1e-6)
    for output in found:
        assert torch.equal(output, plain) or not subject.fused
        torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-6)
    if subject.fused:
        assert all(found[i].is_contiguous(memory_format=torch.channels_last) for i in (1, 3))
        assert all(ops.folding.channels_last(x).data_ptr() == x.data_ptr() for x in others[3]), 'a copy'


@every
@both
def test_memory_formats_of_a_layer(subject, cls):
    layer, x = subject.layer(cls, 32, kernel_size=3), subject.random(2, 32, 4, 5)
    with torch.no_grad(), subject.use():
        plain = layer(x)
        last = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert plain.is_contiguous() and (subject.fused is None or last.is_contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-6)


@every_fused
def test_the_output_has_the_memory_format_of_the_value(subject):
    layer, x = subject.layer(PairwiseAttention, kernel_size=3), subject.random(2, 64, 4, 5)
    query, key, value, place = layer.query(x), layer.key(x), layer.value(x), layer.place(x)
    wide = torch.cat([value, value], 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), subject.use():
        y = ops.footprint_attention(query, key, wide[:, 16:], place, layer.gamma(), layer.spec())
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert ops.footprint_attention(query, key, value, place, layer.gamma(), layer.spec()).is_contiguous()


def _strided(tensors):
    """Equal ones, none of which is contiguous."""
    others = [torch.stack([x, x.flip(0)], -1)[..., 0] for x in tensors]
    assert not any(x.is_contiguous() for x in others)
    return others


@every_fused
@both
def test_operators_read_folded_gamma_in_any_layout(subject, cls, monkeypatch):
    """A compiled graph may hand it over with other strides than it was folded with."""
    layer, x = subject.layer(cls, kernel_size=3), subject.random(2, 64, 3, 3)
    calls, plain = [], fused._attend
    monkeypatch.setattr(fused, '_attend', lambda *arguments: calls.append(arguments) or plain(*arguments))
    with torch.no_grad(), subject.use():
        layer(x)
        (query, key, value, place, *folded, _, shape), = calls
        strided = _strided(folded)
        shift = subject.random(2 * layer.out_planes)[::2]
        results = []
        for tensors, s in ((folded, shift.contiguous()), (strided, shift)):
            maps = query, key, value, place
            sums = query, key, place, *tensors[:3]
            results.append([plain(*maps, *tensors, s, shape)])
            if not cls.pairwise and subject.fused.parts:
                continue
            gradients = fused._attend_backward(value, *maps, *tensors, shape)
            moments = fused._hidden_sums(*sums, shape)
            results[-1] += [*gradients, moments, *fused._hidden_sums_backward(moments, *sums, shape)]
    for expected, actual in zip(*results):
        assert torch.equal(expected, actual)


in_parts = pytest.mark.parametrize('subject', [subject for subject in FUSED if subject.fused.parts], ids=str)


def _parts(subject):
    """Of the operators that do the patchwise form in parts, the arguments: maps, folded gamma, `shape`."""
    layer = subject.layer(PatchwiseAttention, 128, kernel_size=3)
    gamma, spec, width = layer.gamma(), layer.spec(), subject.fused.width()
    query, key, value = (subject.random(2, c, 4, 3) for c in (layer.rel_planes, layer.rel_planes, layer.out_planes))
    norm1 = ops.fold(gamma.norm1, gamma.norm1.running_mean, gamma.norm1.running_var)
    weight2, bias2, channels = ops.folding.fold_weights(gamma, spec, width)
    hidden, number = len(gamma.weight1), fused.FUSED.index(subject.fused)
    shape = ops.folding.Shape.of(spec, hidden, channels, bias2.shape[-1], number)
    first = [query, key, *fused._inputs_folded(norm1, gamma, spec, width)]
    second = [subject.random(2, hidden, 4, 3).relu(), value, weight2, bias2]
    return [[*(x.detach() for x in tensors), shape] for tensors in (first, second)]


@in_parts
def test_parts_read_maps_and_gamma_in_any_layout(subject):
    for operator, backward, arguments in zip((fused._hidden, fused._attend_hidden),
                                             (fused._hidden_backward, fused._attend_hidden_backward), _parts(subject)):
        *tensors, shape = arguments
        results = [[y, *backward(y, *given, shape)] for given in (tensors, _strided(tensors))
                   for y in [operator(*given, shape)]]
        for expected, actual in zip(*results):
            assert torch.equal(expected, actual)


@in_parts
def test_parts_are_registered_as_torch_expects(subject):
    for operator, arguments in zip((fused._hidden, fused._attend_hidden), _parts(subject)):
        arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(operator, tuple(arguments))


@in_parts
def test_parts_refuse_what_does_not_fit(subject):
    (query, key, scale1, *first), (middle, value, *second) = _parts(subject)
    with pytest.raises(ValueError, match='key must be a tensor, got None'):
        fused._hidden(query, None, scale1, *first)
    with pytest.raises(ValueError, match='scale1 must be a float32 tensor'):
        fused._hidden(query, key, scale1[1:], *first)
    with pytest.raises(ValueError, match=r'middle must be a float32 tensor \[2, 4, 4, 3\].*got middle \[2, 3, 4, 3\]'):
        fused._attend_hidden(middle[:, 1:], value, *second)
    with pytest.raises(ValueError, match='middle must be a float32 tensor.*float64'):
        fused._attend_hidden(middle.double(), value, *second)
    with pytest.raises(ValueError, match='channels of value must be a multiple'):
        fused._attend_hidden(middle, value[:, 1:], *second)
    with pytest.raises(ValueError, match='gradient must be'):
        fused._attend_hidden_backward(value[:, 1:], middle, value, *second)
    with pytest.raises(ValueError, match='gradient must be'):
        fused._hidden_backward(middle[:, 1:], query, key, scale1, *first)
    pairwise = [ops.relations.number(True, 'subtraction'), *first[-1][1:]]
    with pytest.raises(ValueError, match='does not do the pairwise form in parts'):
        fused._hidden(query, key, scale1, *first[:-1], pairwise)
    layer = subject.layer(PatchwiseAttention, 32, kernel_size=3)
    arguments = _operator_arguments(subject, layer)
    with pytest.raises(ValueError, match='call the operators hidden and attend_hidden'):
        torch.ops.san_backbones.attend(**arguments).sum().backward()


@every_fused
@both
def test_a_finish_beside_batch_statistics(subject, cls):
    layer, x = subject.layer(cls, 32, kernel_size=3).train(), subject.random(2, 32, 4, 3)
    maps, shift = subject.projected(layer, x), subject.random(layer.out_planes)
    with torch.no_grad(), subject.use():
        plain = ops.footprint_attention(*maps, layer.gamma(), layer.spec())
        finished = ops.footprint_attention(*maps, layer.gamma(), layer.spec(), shift)
    torch.testing.assert_close(finished, torch.relu(plain + shift[:, None, None]), rtol=1e-4, atol=1e-5)


@in_parts
def test_hidden_vectors_are_kept_only_where_they_are_computed_again(subject, monkeypatch):
    calls, plain = [], fused._hidden
    monkeypatch.setattr(fused, '_hidden', lambda *arguments: calls.append(arguments) or plain(*arguments))
    layer, x = subject.layer(PatchwiseAttention, 32, kernel_size=3), subject.random(2, 32, 4, 3)
    for training, gradients, expected in ((False, False, 0), (False, True, 1), (True, False, 1), (True, True, 1)):
        calls.clear()
        with subject.use(), torch.set_grad_enabled(gradients):
            layer.train(training)(x)
        assert len(calls) == expected


@every
@both
def test_a_gradient_that_is_a_part_of_a_wider_map(subject, cls):
    layer, x = subject.layer(cls, kernel_size=3), subject.random(2, 64, 4, 3)
    wide = subject.random(2, 48, 4, 3).contiguous(memory_format=torch.channels_last)
    found = []
    for gradient in (wide[:, 16:32], wide[:, 16:32].contiguous()):
        with subject.use():
            found.append(torch.autograd.grad(layer(x), [*layer.parameters()], gradient))
    for a, b in zip(*found):
        if subject.name == 'native':
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- Numbers at the edges of float32 ---------------------------------------------------------------------------------

@parametrise('tap', lambda subject: (0, 4, 8) if subject.small else range(9))
def test_softmax_with_its_maximum_at_any_neighbour(subject, tap):
    """Logits of 1e3 and one of 1e4."""
    layer = subject.layer(PairwiseAttention, kernel_size=3)
    query, key, value, place = subject.projected(layer, torch.zeros(1, 64, 8, 8, device=subject.device))
    key[0, :, 3 + tap // 3, 3 + tap % 3] += subject.random(4)
    gamma = layer.gamma()
    gamma = gamma._replace(weight2=1e4 * gamma.weight2)
    found = []
    for name in (subject.name, 'reference'):
        with torch.no_grad(), ops.use_backend(name):
            found.append(ops.footprint_attention(query, key, value, place, gamma, layer.spec()))
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0][0, :, 4, 4], found[1][0, :, 4, 4], rtol=1e-3, atol=1e-3)


@every
@pytest.mark.parametrize('factor, scale, bound', [(1e4, 100, 0.05), (30, 3, None)], ids=['large', 'small weights'])
def test_softmax_of_logits(subject, factor, scale, bound):
    """It does not overflow, and keeps small weights; float32 holds logits of 1e5 to about 1e-2."""
    layer = subject.layer(PairwiseAttention, kernel_size=3 if subject.small else 7)
    with torch.no_grad():
        layer.weight_mlp.fc2.weight.mul_(factor)
    x = scale * subject.random(2, 64, *((4, 4) if subject.small else (9, 9)))
    with torch.no_grad(), subject.use():
        assert layer(x).isfinite().all()
    assert subject.error(layer, x) < (bound or 2e-5)


@every
def test_logits_of_minus_infinity_come_first(subject):
    """Nothing was summed before them; as soon as one is more, they weigh nothing."""
    layer = subject.layer(PairwiseAttention, 32, kernel_size=3, position='none')
    x = subject.random(1, 32, 4, 4)
    results = []
    with torch.no_grad():
        layer.weight_mlp.fc2.weight.fill_(-1e10)  # times relu(norm(3e38)): beyond float32
        query, key, value = layer.query(x), layer.key(x), layer.value(x)
        key[0, :, 1, 1] = -3e38
        for name in (subject.name, 'reference'):
            with ops.use_backend(name):
                results.append(layer._forward_operators(query, key, value, None))
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert results[1].isfinite().all()


@every
@both
def test_nan_of_the_relation_alone_is_not_hidden(subject, cls):
    layer = subject.layer(cls, 32, kernel_size=3)
    query, key, value, place = subject.projected(layer, torch.empty(1, 32, 6, 6, device=subject.device))
    key[0, :, 2, 3] = float('nan')  # not in value too, through which it would come in any case
    with torch.no_grad(), subject.use():
        y = layer._forward_operators(query, key, value, place)[0].isnan().all(0)
    assert y[1:4, 2:5].all() and y.sum() == 9


@every
@both
def test_nan_is_not_hidden(subject, cls):
    layer, x = subject.layer(cls, 32, kernel_size=3), subject.random(1, 32, 6, 6)
    x[0, :, 2, 3] = float('nan')
    with torch.no_grad(), subject.use():
        y = layer(x)[0].isnan().all(0)
    assert y[1:4, 2:5].all() and y.sum() == 9


@every
@both
def test_empty_batch(subject, cls):
    layer = subject.layer(cls, kernel_size=3)
    with subject.use():
        output = layer(torch.empty(0, 64, 5, 4, device=subject.device))
        output.sum().backward()
    assert output.shape == (0, 16, 5, 4) and layer.value.weight.grad.abs().sum() == 0
    assert layer.position is None or layer.position.weight.grad.abs().sum() == 0


@every
@both
def test_in_place_use_of_the_output(subject, cls):
    with subject.use():
        subject.layer(cls, kernel_size=3)(subject.random(1, 64, 3, 4)).relu_().sum().backward()


# --- Training --------------------------------------------------------------------------------------------------------

def _gradients(subject):
    for cls, relation in subject.relations():
        for training in (False, True):
            if training and not subject.trains(cls, relation):
                continue
            if subject.small:
                if not (training and relation in ('summation', 'hadamard')):  # nothing that other relations do not run
                    yield cls, relation, 3, 2, training, ((256, 2, (5, 7)),)
            else:
                cases = ((32, 3, (6, 25)), (96, 3, (13, 4)), (64, 3, (2, 1)))
                for kernel_size, dilation in ((1, 1), (3, 2), (7, 1)) if subject.fused else ((3, 2),):
                    yield cls, relation, kernel_size, dilation, training, cases


@pytest.mark.parametrize('subject, cls, relation, kernel_size, dilation, training, cases', [
    pytest.param(subject, *case, id=f'{subject}-{case[0].__name__}-{case[1]}-{case[2]}-{case[3]}-'
                                    f'{"batch statistics" if case[4] else "frozen norms"}')
    for subject in SUBJECTS for case in _gradients(subject)])
def test_gradients(subject, cls, relation, kernel_size, dilation, training, cases):
    for dim, batch, size in cases:
        layer = subject.layer(cls, dim, relation=relation, kernel_size=kernel_size, dilation=dilation)
        subject.check_training(layer, subject.random(batch, dim, *size), training)


@parametrise('position, ref, training', lambda subject: (
    (('none', None, False), ('absolute', None, True)) if subject.small else itertools.chain.from_iterable(
        ((*option, False), (*option, True)) for option in (('none', None), ('absolute', None), ('relative', 8)))))
def test_gradients_of_positions(subject, position, ref, training):
    layer = subject.layer(PairwiseAttention, position=position, position_ref_size=ref,
                          kernel_size=3 if subject.small else 5)
    subject.check_training(layer, subject.random(2, 64, *((4, 5) if subject.small else (9, 8))), training)


@parametrise('cls, relation, training', lambda subject: (
    (cls, relation, norm) for cls, relation in subject.relations() for norm in ('norm1', 'norm2')
    if subject.trains(cls, relation) and (not subject.small or relation == cls.relations[0])))
def test_one_norm_in_training_mode(subject, cls, relation, training):
    layer, x = subject.layer(cls, 32, kernel_size=3, relation=relation), subject.random(2, 32, 5, 6)
    layer.weight_mlp.get_submodule(training).train()
    exact = copy.deepcopy(layer).double()
    with torch.no_grad():
        with subject.use():
            actual = layer(x)
        with ops.use_backend('reference'):
            expected = exact(x.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer.double(), exact.get_buffer(name).double(), rtol=1e-4, atol=1e-6)


@every
@both
@pytest.mark.parametrize('training', [False, True], ids=['frozen norms', 'batch statistics'])
def test_gradients_of_odd_widths(subject, cls, training):
    layer = subject.layer(cls, kernel_size=3, rel_planes=5, out_planes=36, share_planes=12)
    subject.check_training(layer, subject.random(3, 64, 2, 1), training)


@every
@both
def test_gradients_of_many_shares(subject, cls):
    """More than a backward pass may take at once; their number is no multiple of anything."""
    layer = subject.layer(cls, 32, kernel_size=3, out_planes=112, share_planes=7)
    subject.check_training(layer, subject.random(1, 32, 3, 3), False)


@every
def test_gradients_of_wide_layers(subject):
    if subject.small:  # weights that are not kept while the taps go by
        subject.check_training(subject.layer(PairwiseAttention, kernel_size=3, rel_planes=100),
                               subject.random(1, 64, 2, 2), False)
        return
    layer = subject.layer(PatchwiseAttention, 512)
    layer.weight_mlp.fc2.reset_parameters()  # with this draw no pair lies so near a ReLU's edge
    subject.check_training(layer, subject.random(1, 512, 7, 7), True)
    subject.check_training(subject.layer(PairwiseAttention, 512), subject.random(1, 512, 7, 7), False)


@every
@pytest.mark.parametrize('cls, dtype', list(zip(LAYERS, (torch.bfloat16, torch.float16))))
def test_gradients_under_autocast(subject, cls, dtype):
    """No further from float32 than the definition under autocast."""
    layer = subject.layer(cls, 256, kernel_size=3).train()
    x = subject.random(1, 256, 4, 4).requires_grad_()

    def gradients(backend, enabled):
        with ops.use_backend(backend):
            with torch.autocast(subject.device.type, dtype, enabled=enabled):
                output = layer(x)
            assert output.dtype == (dtype if enabled else torch.float32)
            return torch.autograd.grad(output.float().square().sum(), [x, layer.weight_mlp.fc1.weight])

    exact = gradients('reference', False)
    for e, defined, actual in zip(exact, gradients('reference', True), gradients(subject.name, True)):
        assert (actual - e).norm() < 1.2 * (defined - e).norm() + 0.005 * e.norm()


@pytest.mark.parametrize('subject', [subject for subject in SUBJECTS if subject.name != 'reference'], ids=str)
@both
def test_training_does_not_keep_the_footprint(subject, cls):
    side = 8 if subject.small else 40
    layer = subject.layer(cls).train()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with subject.use(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(subject.random(1, 64, side, side))
    maps, weights = 4 * side ** 2 * (64 + 4 + 4 + 16), sum(4 * p.numel() for p in layer.parameters())
    assert sum(saved.values()) < 6 * (maps + weights) < 4 * side ** 2 * 49 * 12 + 6 * weights


@pytest.mark.parametrize('subject', [subject for subject in SUBJECTS if subject.name != 'reference'], ids=str)
@both
def test_second_derivatives_are_refused(subject, cls):
    layer, x = subject.layer(cls, 32, kernel_size=1), subject.random(1, 32, 2, 2).requires_grad_()
    with subject.use(), pytest.raises(RuntimeError, match='second derivatives'):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@every_fused
def test_the_finish_has_no_gradients(subject):
    layer, x, shift = subject.layer(PairwiseAttention, kernel_size=3), subject.random(1, 64, 4, 5), subject.random(16)
    maps = [layer.query(x), layer.key(x), layer.value(x), layer.place(x)]
    y = fused.attend(subject.name, *maps, layer.gamma(), layer.spec(), shift)
    with pytest.raises(RuntimeError, match='call it without `shift`'):
        y.sum().backward()
    with subject.use():  # which the operator's users get by themselves
        y = ops.footprint_attention(*maps, layer.gamma(), layer.spec(), shift)
        found = torch.autograd.grad(y.sum(), layer.query.weight, retain_graph=True)
        plain = ops.footprint_attention(*maps, layer.gamma(), layer.spec())
        expected = torch.autograd.grad(torch.relu(plain + shift[:, None, None]).sum(), layer.query.weight)
    torch.testing.assert_close(found, expected)


@every
@both
def test_synchronised_statistics(subject, cls, tmp_path):
    """Norms that share their statistics; that several processes share them rightly is tested in test_distributed.py."""
    layer = subject.layer(cls, 32, kernel_size=3).train()
    maps = [subject.random(2, c, 3, 2) for c in (2, 2, 8)]
    results = []
    dist.init_process_group('gloo' if subject.device.type == 'cpu' else 'nccl', init_method=f'file://{tmp_path}/store',
                            rank=0, world_size=1)
    try:
        for backend, group in (('reference', None), (subject.name, dist.group.WORLD)):
            gamma = layer.gamma()
            gamma = gamma._replace(norm1=gamma.norm1._replace(group=group), norm2=gamma.norm2._replace(group=group))
            leaves = [x.clone().requires_grad_() for x in maps]
            with ops.use_backend(backend):
                output = ops.footprint_attention(*leaves, layer.place(maps[0]), gamma, layer.spec())
            results.append(torch.autograd.grad(output.sin().sum(), [*leaves, layer.weight_mlp.fc1.weight]))
    finally:
        dist.destroy_process_group()
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@every_fused
@both
def test_compiled_graphs_call_the_operators(subject, cls):
    layer = subject.layer(cls, 32, kernel_size=1).train()
    x, seed = subject.random(2, 32, 4, 3), subject.random(2, 8, 4, 3)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.registry.lookup_backend('aot_eager')(graph, inputs)

    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True, backend=backend)
    with subject.use():
        expected = step(layer, x, seed, True)
        leaf = x.clone().requires_grad_()
        compiled(leaf).backward(seed)
    assert any('san_backbones' in str(node.target) for node in graphs[0].graph.nodes)
    torch.testing.assert_close(leaf.grad, expected['input'], rtol=1e-4, atol=1e-5)
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def _operator_arguments(subject, layer):
    """Of the operator for the attention."""
    maps = [subject.random(1, c, 3, 2) for c in (layer.rel_planes, layer.rel_planes, layer.out_planes)]
    place, gamma = layer.place(maps[0]), layer.gamma()
    affine = [ops.fold(norm, norm.running_mean, norm.running_var) for norm in (gamma.norm1, gamma.norm2)]
    shape, folded = ops.folding.fold_gamma(
        *affine, gamma, layer.spec(), subject.fused.width(), fused.FUSED.index(subject.fused))
    tensors = [x if x is None else x.detach().requires_grad_() for x in (*maps, place, *folded)]
    return dict(zip(('query', 'key', 'value', 'place', 'scale1', 'shift1', 'weight1', 'shift2', 'weight2', 'bias2'),
                    tensors), shift=None, shape=shape)


@every_fused
def test_operators_are_registered_as_torch_expects(subject):
    arguments = _operator_arguments(subject, subject.layer(PairwiseAttention, 32, kernel_size=1))
    tests = ('test_schema', 'test_faketensor', 'test_autograd_registration')
    torch.library.opcheck(torch.ops.san_backbones.attend.default, tuple(arguments.values()), test_utils=tests)
    sums = tuple(arguments[name] for name in ('query', 'key', 'place', 'scale1', 'shift1', 'weight1', 'shape'))
    torch.library.opcheck(torch.ops.san_backbones.hidden_sums.default, sums, test_utils=tests)


# --- Refusals --------------------------------------------------------------------------------------------------------

@every_fused
def test_refusals_say_why(subject):
    small = dict(dim=32, kernel_size=3)
    with pytest.raises(RuntimeError, match=f"'{subject.name}'.*float64"), subject.use():
        subject.layer(PatchwiseAttention, **small).double()(subject.random(1, 32, 3, 3).double())
    for cls in LAYERS:
        for relation in cls.relations:
            layer = subject.layer(cls, relation=relation, **small)
            if (cls, relation) not in subject.relations():
                with pytest.raises(RuntimeError, match=f"'{subject.name}'.*no {relation}"), subject.use():
                    layer(subject.random(1, 32, 3, 3))
                assert subject._replace(name='auto').error(layer, subject.random(1, 32, 3, 3)) < 1e-5
            elif not subject.trains(cls, relation):
                reason = f"'{subject.name}'.*batch statistics of the {relation} relation"
                with pytest.raises(RuntimeError, match=reason), subject.use():
                    layer.train()(subject.random(2, 32, 3, 3))


@every
def test_a_single_value_has_no_batch_statistics(subject):
    with pytest.raises(ValueError, match='more than 1 value per channel'), subject.use():
        subject.layer(PatchwiseAttention).train()(subject.random(1, 64, 1, 1))


@every_fused
@pytest.mark.parametrize('name, change, message', [
    ('shape', lambda x: [len(ops.relations.RELATIONS), *x[1:]], r'relation must be in \[0, '),
    ('shape', lambda x: [ops.relations.number(False, 'clique'), *x[1:]], 'backend has no clique relation'),
    ('shape', lambda x: [*x[:-1], -1], 'backend must be one of 0'),
    ('query', lambda x: x.double(), 'one dtype'),
    ('scale1', lambda x: x[:-1], 'scale1 must be a float32 tensor'),
    ('bias2', lambda x: torch.cat([x, x], -1), 'bias2 must be a float32 tensor'),
    ('weight2', lambda x: None, 'weight2 must be a tensor, got None'),
])
def test_operators_refuse_what_does_not_fit(subject, name, change, message):
    if 'clique' in message and subject.name in ops.relations.find(False, 'clique').backends:
        pytest.skip('it has the clique-product')
    arguments = _operator_arguments(subject, subject.layer(PairwiseAttention, 32, kernel_size=1))
    torch.ops.san_backbones.attend(**arguments)
    with pytest.raises(ValueError, match=message):
        torch.ops.san_backbones.attend(**{**arguments, name: change(arguments[name])})
