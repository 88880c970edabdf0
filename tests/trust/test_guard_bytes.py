"""The compiled loops write where they should, and read no further than footprint.h says, whatever operators are given.

`library.run` is replaced by one that moves every array of a task into memory of its own: its last byte (in a second
run its first) lies at the edge of a page that nobody may touch, arrays that are only read lie in pages that nobody may
write, and the rest of the pages holds a pattern that has to be there afterwards. Sizes are those that the comments of
footprint.h, backward.c, linear.c and pointwise.c give; a loop that goes beyond ends the process, so that a process of
its own runs this.
"""
import contextlib
import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import native
from san_backbones.ops.native import library

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=f'no compiled loops: {native.unavailable()}'),
    pytest.mark.skipif(not sys.platform.startswith('linux'), reason='pages are protected by mprotect')]

PATTERN = 0xA5
NONE, READ, WRITE = 0, 1, 3  # PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE
FLOAT, LONG = 4, 8
WHOLE_VECTORS = ('query', 'key', 'place', 'scale1', 'shift1')  # read beyond their ends, by less than a vector
OPERATORS = {'attend', 'attend_backward', 'attend_hidden', 'attend_hidden_backward', 'difference_moments',
             'difference_moments_backward', 'hidden', 'hidden_backward', 'hidden_sums', 'hidden_sums_backward',
             'moments', 'scale_shift_relu', 'scale_shift_relu_gradient', 'scale_shift_relu_sums', 'stem',
             'stem_backward'}
TO_HIDDEN, FROM_HIDDEN = 1, 2  # enum part of footprint.h
OUTPUTS = ('output', 'd_query', 'd_key', 'd_value', 'd_place', 'd_parameters', 'sums', 'd_image', 'd_x')


def sizes(name, task):
    """Bytes of every array of a task."""
    if name == 'san_scaled':
        maps, line = task.pixels * task.channels * FLOAT, task.channels * FLOAT
        return dict(x=maps, output=maps, scale=line, shift=line)
    if name == 'san_normed':
        maps, line = task.pixels * task.channels * FLOAT, task.channels * FLOAT
        lines = dict.fromkeys(('mean', 'scale', 'shift', 'by_x', 'by_one'), line)
        return dict(x=maps, gradient=maps, beside=maps, d_x=maps, sums=task.slots * 2 * task.channels * 8, **lines)
    if name == 'san_stem':
        pooled = task.batch * (task.height // 2) * (task.width // 2) * task.out * FLOAT
        shape = (task.batch, task.inputs, task.height, task.width)
        image = 1 + sum((n - 1) * stride for n, stride in zip(shape, task.strides))
        return dict(image=image * FLOAT, weight=task.inputs * task.out_padded * FLOAT, bias=task.out_padded * FLOAT,
                    output=pooled, gradient=pooled,
                    d_image=task.batch * task.height * task.width * task.inputs * FLOAT,
                    d_parameters=task.slots * (task.inputs + 1) * task.out_padded * FLOAT)
    if name == 'san_differences':
        pixels, line = task.batch * task.height * task.width, task.channels * 8
        result = dict(sums=task.slots * 4 * line, slope=line, level=line)
        for field in ('query', 'key', 'd_query', 'd_key'):
            result[field] = ((pixels - 1) * getattr(task, field).row + task.channels) * FLOAT
        for axis, size in (('row', task.height), ('column', task.width)):
            for seeing in ('', 'seeing_'):
                result[f'{seeing}{axis}_starts'] = (size + 1) * LONG
                result[f'{seeing}{axis}_pixels'] = size * task.kernel * LONG
        return result
    if name == 'san_linear':
        panels = -(-task.columns // library.width()) * library.width()
        item = (4, 1, 1, 2)[task.kind]  # enum weights of linear.c
        filled = 1 if item == FLOAT else 64 // item  # channels come in whole lines of 64 bytes
        weight = panels * -(-task.inner // filled) * filled * item
        pixels = task.pixels
        if task.pooled_width:
            pixels = pixels // (task.pooled_width * task.pooled_height) * task.from_width * task.from_height
        return dict(input=((pixels - 1) * task.input.row + task.inner) * FLOAT, scale=task.inner * FLOAT,
                    shift=task.inner * FLOAT, weight=weight, bias=task.columns * FLOAT,
                    column_scale=task.columns * FLOAT, column_sum=task.columns * FLOAT,
                    output=task.pixels * task.columns * FLOAT, out_scale=task.columns * FLOAT,
                    out_shift=task.columns * FLOAT)
    t = getattr(task, 'task', task)
    patchwise = t.form == 1
    area, pixels = t.kernel ** 2, t.batch * t.height * t.width
    reach = t.dilation * (t.kernel - 1)
    relation = native.library._loaded().san_relations(t.form).split()[t.relation]
    inputs = {b'concatenation': t.rel * (1 + (area if patchwise else 1)), b'dot': 1, b'star': area}.get(relation, t.rel)
    inputs = 0 if t.part == FROM_HIDDEN else inputs + (2 if t.place.at else 0)
    columns = (area if patchwise else 1) * t.lanes

    def rows(row, channels):
        return ((pixels - 1) * row + channels) * FLOAT

    result = dict(
        query=rows(t.query.row, t.rel), key=rows(t.key.row, t.rel), value=rows(t.value.row, t.out),
        between=rows(t.between.row, t.hidden_used),
        place=2 * t.height * t.width * FLOAT, scale1=inputs * FLOAT, shift1=inputs * FLOAT,
        weight1=inputs * t.hidden * FLOAT, shift2=t.hidden * FLOAT, weight2=t.hidden_used * columns * FLOAT,
        bias2=columns * FLOAT, rows=(t.height + reach) * LONG, columns=(t.width + reach) * LONG,
        shift=t.out * FLOAT, output=pixels * t.out * FLOAT)
    if t is not task:
        padded, attention = task.inputs_padded, task.mode == 0
        parameters = 2 * padded + inputs * t.hidden
        if task.mode != 1:
            parameters = 2 * padded + inputs * t.hidden + t.hidden
            parameters += t.hidden_used * columns + columns if attention else 0
        result.update(
            gradient=(pixels * t.out if attention else 2 * t.hidden) * FLOAT,
            weight1_t=t.hidden_used * padded * FLOAT, weight2_t=columns * t.hidden * FLOAT,
            d_query=pixels * task.d_query.row * FLOAT, d_key=pixels * task.d_key.row * FLOAT,
            d_value=pixels * t.out * FLOAT, d_place=pixels * 2 * FLOAT,
            d_between=rows(task.d_between.row, t.hidden_used),
            d_parameters=task.slots * parameters * FLOAT, sums=task.slots * 2 * t.hidden * 8)
        if task.mode != 1:
            assert parameters == task.parameters
    return result


class Array:
    """Bytes of an array at one edge of pages between two that nobody may touch."""

    def __init__(self, address, size, more, at_end, written):
        self.address, self.size, self.written = address, size, written
        page = mmap.PAGESIZE
        room = max(page, -(-(size + more) // page) * page)
        self.memory = mmap.mmap(-1, room + 2 * page)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + page
        self.start = first + room - size - more if at_end else first
        self.room, self.first = room, first
        ctypes.memset(first, PATTERN, room)
        ctypes.memset(self.start + size, 0xFF, more)  # NaN, for those who read it
        ctypes.memmove(self.start, address, size)
        self.before = ctypes.string_at(first, self.start - first)
        self.after = ctypes.string_at(self.start + size, first + room - self.start - size)
        self._protect(first - page, page, NONE)
        self._protect(first + room, page, NONE)
        self._protect(first, room, WRITE if written else READ)

    def _protect(self, start, length, how):
        assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(length), how) == 0

    def give_back(self):
        assert ctypes.string_at(self.first, len(self.before)) == self.before, 'written before the beginning'
        assert ctypes.string_at(self.start + self.size, len(self.after)) == self.after, 'written beyond the end'
        if self.written:
            ctypes.memmove(self.address, self.start, self.size)
        self._protect(self.first - mmap.PAGESIZE, self.room + 2 * mmap.PAGESIZE, WRITE)


@contextlib.contextmanager
def addresses():
    """Returns the bytes at every address that Python passes meanwhile."""
    known, plain = {}, torch.Tensor.data_ptr

    def recorded(x):
        address = plain(x)
        known[address] = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
        return address

    torch.Tensor.data_ptr = recorded
    try:
        yield known
    finally:
        del torch.Tensor.data_ptr  # which uncovers that of its base class


class Short(Exception):
    """An array has less memory than the loops use."""


def owners(name, task):
    """The structures of a call that point to arrays, each with the name that `sizes` knows it by."""
    yield name, task
    if hasattr(task, 'task'):
        yield name, task.task
    if name == 'san' and task.eight:  # gamma in 8 bits: products with weight1, as many as the inputs fill, then weight2
        inputs, number = task.centre + (task.kernel ** 2 if task.form else 1) * task.tap + 2 * bool(task.place.at), 0
        while inputs > 0:
            inputs, number = inputs - task.eight[number].inner, number + 1
        yield from (('san_linear', task.eight[i]) for i in range(number + 1))


def is_written(field, task):
    """Whether a call writes to the array."""
    if field in ('between', 'd_between'):
        return getattr(task, 'task', task).part == (TO_HIDDEN if field == 'between' else FROM_HIDDEN)
    return field in OUTPUTS


def guarded(at_end, calls, known):
    """`library.run` with every array in guarded memory."""
    plain = library.run

    def run(name, task):
        arrays = []
        for part, owner in owners(name, task):
            for field, kind in owner._fields_:
                matrix = getattr(owner, field) if kind is library.Matrix else None
                address = matrix.at if matrix else getattr(owner, field) if kind is ctypes.c_void_p else None
                if address is None:
                    continue
                size = sizes(part, task if part == name else owner)[field]
                whole = part in ('san', 'san_backward') and field in WHOLE_VECTORS
                filled = field in ('query', 'key') and whole and owner.rel % library.width() == 0  # by the channels
                more = (library.width() - 1) * FLOAT if whole and not filled else 0
                if known[address] < size + more:
                    raise Short(f'{field} of {name}: {known[address]} bytes, {size + more} are used')
                arrays.append(Array(address, size, more, at_end, is_written(field, task)))
                setattr(matrix or owner, 'at' if matrix else field, arrays[-1].start)
        plain(name, task)
        for array in arrays:
            array.give_back()
        calls.append(name)

    return run


def results():
    """Outputs and gradients of the compiled operators, over sizes that leave vectors partly filled."""
    torch.manual_seed(0)
    found = []
    for cls in (PairwiseAttention, PatchwiseAttention):
        for relation in cls.relations:
            if 'native' not in ops.relations.find(cls.pairwise, relation).backends:
                continue
            for rel, size, kernel_size, dilation in ((3, (1, 1), 3, 1), (8, (5, 3), 3, 2), (21, (9, 4), 5, 1),
                                                     (5, (3, 37), 3, 1), (8, (6, 21), 3, 2)):
                layer = cls(32, rel_planes=rel, out_planes=20, share_planes=4, kernel_size=kernel_size,
                            dilation=dilation, relation=relation).eval()
                x = torch.randn(2, 32, *size)
                trains = (cls.pairwise, relation) in ops.statistics.SUPPORTED
                for training in (False, True) if trains else (False,):
                    y = layer.train(training)(x)
                    found += [y, *torch.autograd.grad(y.sin().sum(), list(layer.parameters()))]
                with torch.no_grad():
                    found.append(ops.footprint_attention(layer.query(x), layer.key(x), layer.value(x), layer.place(x),
                                                         layer.eval().gamma(), layer.spec(), torch.randn(20)))
    for channels, width, size in ((3, 20, (5, 7)), (1, 8, (2, 2)), (4, 33, (6, 3))):
        image, weight = torch.randn(2, channels, *size, requires_grad=True), torch.randn(width, channels)
        norm = ops.Norm(torch.ones(width), torch.zeros(width), torch.zeros(width), torch.ones(width), False, 0.1, 1e-5)
        y = ops.stem(image, weight.requires_grad_(), norm)
        found += [y, *torch.autograd.grad(y.sum(), [image, weight])]
        with torch.no_grad():
            found.append(ops.scale_shift_relu(torch.randn(70, width), torch.randn(width), torch.randn(width)))
    for pixels, training in (((2, 5, 7), True), ((1, 1, 3), False)):
        x = torch.randn(*pixels, 32).permute(0, 3, 1, 2).requires_grad_()
        y, same = ops.norm_relu(x, ops.Norm(*torch.randn(4, 32).abs(), training, 0.1, 1e-5), 2.)
        found += [y, *(torch.autograd.grad(z.sum(), x, retain_graph=True)[0] for z in (y.sin(), y.sin() + same.cos()))]
    for inner, columns, int8 in ((3, 5, False), (20, 70, False), (530, 33, False), (65, 70, True), (530, 129, True)):
        project, x = ops.Linear(torch.randn(columns, inner), torch.randn(columns), int8), torch.randn(2, 5, 7, inner)
        first, last = (ops.ScaleShiftReLU(torch.randn(n), torch.randn(n), 2.) for n in (inner, columns))
        with torch.no_grad():
            found += [project(x, first), project(x[..., :inner]), project.add_to(torch.ones(2, 5, 7, columns), x, last)]
            rounded = ops.Linear(project.weight.bfloat16())
            for linear, halve, size in ((rounded, False, (5, 7)), (rounded, True, (2, 3)), (project, True, (2, 3))):
                output = torch.empty(2, *size, columns)
                call = linear.prepare(x, first, output, halve=halve)
                library.run(call.name, call.task)
                found.append(output)
    for cls, rel in ((PatchwiseAttention, 21), (PatchwiseAttention, 70), (PairwiseAttention, 35)):
        if not library.has_int8():
            break
        layer = cls(32, rel_planes=rel, out_planes=20, share_planes=4, kernel_size=5).eval()
        x = torch.randn(2, 32, 6, 9)
        with torch.no_grad():
            gamma, spec = layer.gamma()._replace(cache={}), layer.spec()
            maps = [y if y is None else y.permute(0, 2, 3, 1).contiguous()
                    for y in (layer.query(x), layer.key(x), layer.value(x), layer.place(x))]
            output = torch.empty_like(maps[2])
            rounded = ops.round_gamma(gamma, spec, rel)
            call = ops.prepare_attention(*maps, gamma, spec, torch.randn(20), output, rounded)
            library.run(call.name, call.task)
            found.append(output)
    return [x.detach() for x in found]


class Recorder(TorchDispatchMode):
    """Keeps one call of each operator of ours for every relation and set of tensors given."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'san_backbones':
            relation = next((arg[0] for arg in args if isinstance(arg, list)), None)
            self.calls[func, relation, tuple(arg is None for arg in args)] = func, args
        return func(*args, **(kwargs or {}))


def wrong(argument):
    """What else an argument might be; most of it is refused, the rest has to stay within its memory."""
    if isinstance(argument, list):
        for i, number in enumerate(argument):
            for other in (-1, 0, 1, 7, number + 1, number + 2, -number):
                yield [*argument[:i], other, *argument[i + 1:]]
        yield from (argument[:-1], [*argument, 0], [])
    elif isinstance(argument, torch.Tensor):
        yield from (argument.to(dtype) for dtype in (torch.float64, torch.float16, torch.int64, torch.int8, torch.bool,
                                                     torch.complex64))
        yield from (argument[None], argument[..., None], argument[0], argument.flatten(), argument.to('meta'))
        for axis, size in enumerate(argument.shape):
            yield from (argument.narrow(axis, 0, size - 1), argument.narrow(axis, 0, 0),
                        torch.cat([argument, argument], axis), argument.mean(axis, keepdim=True))
        yield torch.empty(0)
        if argument.dim() > 1:
            yield argument.transpose(-1, -2)
        yield None


def fuzz():
    """Calls every operator with one argument changed; returns how many calls were refused and taken."""
    refused = taken = 0
    with Recorder() as recorder:
        results()
    assert {func._opname for func, _ in recorder.calls.values()} == OPERATORS
    for func, args in recorder.calls.values():
        expected = func(*args)
        strided = [torch.stack([x, x], -1)[..., 0] if isinstance(x, torch.Tensor) else x for x in args]
        for x, y in zip(*(y if isinstance(y, list) else [y] for y in (func(*strided), expected))):
            assert torch.equal(x, y), f'{func}: strides change the result'
        for i, argument in enumerate(args):
            for other in wrong(argument):
                try:
                    func(*args[:i], other, *args[i + 1:])
                    taken += 1
                except (ValueError, RuntimeError, NotImplementedError, MemoryError) as error:
                    assert str(error)
                    refused += 1
    return refused, taken


def main():
    torch.set_num_threads(1)
    plain, run = results(), library.run
    for at_end in (True, False):
        calls = []
        with addresses() as known:
            library.run = guarded(at_end, calls, known)
            same = results()
            refused, taken = fuzz()
        library.run = run
        assert refused > 5 * taken > 0, 'most of what is wrong is refused before an address is followed'
        assert set(calls) == {'san', 'san_backward', 'san_differences', 'san_linear', 'san_stem', 'san_scaled',
                              'san_normed'}
        for x, y in zip(plain, same):
            assert torch.equal(x, y), 'what lies around an array changes the result'


@pytest.mark.parametrize('capability, build', [('default', 'baseline'), ('avx2', 'avx2'), ('avx512', 'avx512')])
def test_no_access_beyond_an_array(capability, build):
    if build == 'avx512' and torch.backends.cpu.get_cpu_capability() != 'AVX512':
        pytest.skip('this processor has no AVX-512, which torch does not check')
    result = subprocess.run([sys.executable, '-X', 'faulthandler', __file__, build], text=True, capture_output=True,
                            env={**os.environ, 'ATEN_CPU_CAPABILITY': capability, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr[-3000:]
    if result.stdout:
        pytest.skip(result.stdout)


if __name__ == '__main__':
    if native.build() == sys.argv[1]:
        main()
    else:
        print(f'torch takes {native.build()} here instead of {sys.argv[1]}')
