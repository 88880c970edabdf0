"""Contents of the stand-in for `mmcv._ext`.

Each function has the name, arguments and in-place outputs of the compiled extension's. Other operators that `mmcv.ops`
names can be imported, and raise an error when they are called.
"""
from .boxes import (  # noqa: F401
    bbox_overlaps, box_iou_rotated, nms, nms_match, nms_rotated, softnms)
from .layers import (  # noqa: F401
    carafe_backward, carafe_forward, carafe_naive_backward, carafe_naive_forward, deform_conv_backward_input,
    deform_conv_backward_parameters, deform_conv_forward, masked_col2im_forward, masked_im2col_forward,
    modulated_deform_conv_backward, modulated_deform_conv_forward, ms_deform_attn_backward, ms_deform_attn_forward,
    psamask_backward, psamask_forward, sigmoid_focal_loss_backward, sigmoid_focal_loss_forward,
    softmax_focal_loss_backward, softmax_focal_loss_forward, sync_bn_backward_data, sync_bn_backward_param,
    sync_bn_forward_mean, sync_bn_forward_output, sync_bn_forward_var)
from .regions import (  # noqa: F401
    deform_roi_pool_backward, deform_roi_pool_forward, roi_align_backward, roi_align_forward, roi_pool_backward,
    roi_pool_forward)

_MISSING = (
    "mmcv operator '{}' is not provided: mmcv is installed without its compiled extension, and the stand-in on "
    "torchvision's operators does not cover this one. To get compiled mmcv: `pip uninstall mmcv-lite; "
    "pip install -U openmim; mim install 'mmcv>=2.0.0rc4,<2.2.0'`, or see "
    'https://mmcv.readthedocs.io/en/latest/get_started/installation.html')


def __getattr__(name: str):
    """Returns a function that raises for every other operator: `mmcv.ops` checks at import that each exists."""
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args, **kwargs):
        raise NotImplementedError(_MISSING.format(name))

    missing.__name__ = missing.__qualname__ = name
    return missing


def get_compiler_version() -> str:
    """Reports the compiler of the extension, for mmcv's environment report."""
    return 'torchvision operators, not compiled'


def get_compiling_cuda_version() -> str:
    """Reports the CUDA version of the extension, for mmcv's environment report."""
    return 'torchvision operators, not compiled'
