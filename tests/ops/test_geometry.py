"""Reflection, footprints, coordinates."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from san_backbones.ops import coordinates, footprint, padding, reflect_pad, reflection_index


@pytest.mark.parametrize('size', [1, 2, 3, 5, 8])
@pytest.mark.parametrize('pad', [0, 1, 2, 4, 9, 15])
def test_reflection_is_numpys_repeated_reflection(size, pad):
    expected = np.pad(np.arange(size), pad, mode='reflect') if size > 1 else np.zeros(size + 2 * pad)
    assert reflection_index(size, pad).tolist() == expected.tolist()


def test_reflection_is_torchs_where_torch_has_one():
    x = torch.randn(2, 3, 9, 7)
    assert torch.equal(reflect_pad(x, 5), F.pad(x, (5, 5, 5, 5), mode='reflect'))


@pytest.mark.parametrize('kernel_size, dilation', [(1, 1), (3, 1), (3, 2), (5, 3), (7, 1)])
def test_footprint_is_unfold(kernel_size, dilation):
    x = torch.randn(2, 3, 17, 19)
    padded = reflect_pad(x, padding(kernel_size, dilation))
    view = footprint(padded, kernel_size, dilation)
    assert view.untyped_storage().data_ptr() == padded.untyped_storage().data_ptr(), 'a view, not a copy'
    expected = F.unfold(padded, kernel_size, dilation=dilation).view(2, 3, kernel_size, kernel_size, 17, 19)
    assert torch.equal(view, expected)


def test_coordinates():
    x = torch.empty(1, 1, 4, 6)
    horizontal, vertical = coordinates(x)
    torch.testing.assert_close(horizontal[2], torch.linspace(-1, 1, 6))
    torch.testing.assert_close(vertical[:, 3], torch.linspace(-1, 1, 4))
    stepped = coordinates(x, step=0.5)
    torch.testing.assert_close(stepped[0, 0].diff(), torch.full((5,), 0.5))
    torch.testing.assert_close(stepped[1, :, 0].diff(), torch.full((3,), 0.5))
    assert coordinates(x.half()).dtype == torch.float32 and coordinates(x.double()).dtype == torch.float64
    assert coordinates(torch.empty(1, 1, 1, 1)).flatten().tolist() == [-1, -1]  # as linspace(-1, 1, 1)
