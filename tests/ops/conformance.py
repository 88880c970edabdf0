"""What test_conformance.py needs: the backends, layers to run, and the comparison with the definition.

A backend is tested because it is registered: `SUBJECTS` has each of `ops.BACKENDS` on each device that it runs on here.
Triton's kernels run on the CPU in its interpreter only, which is chosen when Triton is imported; test_triton.py runs
the suite in a process of its own for that, with few and small cases, since it is slow.
"""
import copy
import os
from typing import NamedTuple

import torch
from torch import nn

from san_backbones import PairwiseAttention, PatchwiseAttention, ops
from san_backbones.ops import fused, relations, statistics

LAYERS = (PairwiseAttention, PatchwiseAttention)
INTERPRETING = os.environ.get('TRITON_INTERPRET') == '1'


class Subject(NamedTuple):
    """A backend on a device."""
    name: str
    device: torch.device

    def __str__(self):
        return self.name if self.device.type == 'cpu' else f'{self.name}-{self.device.type}'

    @property
    def fused(self):
        """What is registered of it, where it is a fused backend."""
        return next((backend for backend in fused.FUSED if backend.name == self.name), None)

    @property
    def small(self):
        """Whether it takes seconds for what others do in milliseconds."""
        return INTERPRETING

    @property
    def bound(self):
        """Of the relative error of the output in float32."""
        return 2e-6 if self.small else 2e-5

    @property
    def gradient_bound(self):
        """Of the relative error of gradients. A pair whose normalised relation rounds to the other side of a ReLU
        changes them by a whole term: the more pairs, the likelier.
        """
        return 5e-5 if self.small else 2e-4

    def relations(self, *layers):
        """(layer, relation) for all that it computes."""
        return [(cls, relation) for cls in layers or LAYERS for relation in cls.relations
                if self.fused is None or self.name in relations.find(cls.pairwise, relation).backends]

    def trains(self, cls, relation):
        """Whether it has batch statistics of the relation."""
        return self.fused is None or (cls.pairwise, relation) in statistics.SUPPORTED

    def random(self, *size):
        return torch.randn(size).to(self.device)

    def layer(self, cls, dim=64, **kwargs):
        """In eval mode, with norms away from where they begin."""
        torch.manual_seed(0)
        layer = cls(dim, **kwargs).eval()
        for norm in (layer.weight_mlp.norm1, layer.weight_mlp.norm2):
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
        return layer.to(self.device)

    def projected(self, layer, x):
        """Maps as the layer's projections might make them of x."""
        torch.manual_seed(1)
        widths = (layer.rel_planes, layer.rel_planes, layer.out_planes)
        return [self.random(x.shape[0], width, *x.shape[2:]) for width in widths] + [layer.place(x)]

    def use(self):
        return ops.use_backend(self.name)

    @torch.no_grad()
    def error(self, layer, x):
        """Relative error of the output in the layer's dtype to the definition in float64."""
        with self.use():
            actual = layer(x)
        dtype = layer.query.weight.dtype
        with ops.use_backend('reference'):
            expected = layer.double()(x.double())
        layer.to(dtype)
        return ((actual.double() - expected).norm() / expected.norm()).item()

    def check_training(self, layer, x, training):
        """Compares output, every gradient and the running buffers with the definition's in float64; gradients of
        parameters that are small among the others are compared on the scale of those.
        """
        seed = self.random(x.shape[0], layer.out_planes, *x.shape[2:])
        with self.use():
            actual = step(layer, x, seed, training)
        with ops.use_backend('reference'):
            expected = step(layer.double(), x.double(), seed.double(), training)
        layer.float()
        parameters = {name for name, _ in layer.named_parameters()}
        largest = max(expected[name].norm() for name in parameters)
        for name, tensor in expected.items():
            scale = max(tensor.norm(), 0.01 * largest) if name in parameters else tensor.norm()
            assert (actual[name] - tensor).norm() < self.gradient_bound * scale, name


def step(layer, x, seed, training):
    """Output, gradients and running buffers of a training step."""
    x = x.clone().requires_grad_()
    layer = copy.deepcopy(layer).train(training)
    output = layer(x)
    output.backward(seed)
    return {'output': output.detach(), 'input': x.grad, **{n: p.grad for n, p in layer.named_parameters()},
            **{n: b for n, b in layer.named_buffers() if 'running' in n}}


def _runs(backend, device):
    request = ops.Request(ops.Spec(True, 'subtraction', 'relative', 3, 1), device, torch.float32, (1, 8, 8, 8), False,
                          False, None)
    return backend.refusal(request) is None


DEVICES = [torch.device('cpu'), *([torch.device('cuda')] if torch.cuda.is_available() and not INTERPRETING else [])]
SUBJECTS = [Subject(backend.name, device) for backend in ops.BACKENDS for device in DEVICES if _runs(backend, device)
            and (not INTERPRETING or backend.name == 'triton')]
FUSED = [subject for subject in SUBJECTS if subject.fused is not None]
