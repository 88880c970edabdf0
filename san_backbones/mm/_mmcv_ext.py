"""The module that `import mmcv._ext` yields once `install_operators` was called and mmcv brings none of its own.

Each function has the name, the arguments and the in-place outputs with which the Python files of `mmcv.ops` call the
compiled extension. What `mmcv.ops` names beyond them can be imported, and says at its first call that it is missing.

This file runs under the name `mmcv._ext`, hence the absolute imports.
"""
from san_backbones.mm._mmcv_ext_boxes import (  # noqa: F401
    bbox_overlaps, box_iou_rotated, nms, nms_match, nms_rotated, softnms)
from san_backbones.mm._mmcv_ext_layers import (  # noqa: F401
    carafe_backward, carafe_forward, carafe_naive_backward, carafe_naive_forward, deform_conv_backward_input,
    deform_conv_backward_parameters, deform_conv_forward, masked_col2im_forward, masked_im2col_forward,
    modulated_deform_conv_backward, modulated_deform_conv_forward, ms_deform_attn_backward, ms_deform_attn_forward,
    psamask_backward, psamask_forward, sigmoid_focal_loss_backward, sigmoid_focal_loss_forward,
    softmax_focal_loss_backward, softmax_focal_loss_forward, sync_bn_backward_data, sync_bn_backward_param,
    sync_bn_forward_mean, sync_bn_forward_output, sync_bn_forward_var)
from san_backbones.mm._mmcv_ext_regions import (  # noqa: F401
    deform_roi_pool_backward, deform_roi_pool_forward, roi_align_backward, roi_align_forward, roi_pool_backward,
    roi_pool_forward)

_MISSING = (
    "mmcv operator '{}' is not provided: mmcv is installed without its compiled extension, and san_backbones stands in "
    "for it on torchvision's operators, which do not cover this one. To get compiled mmcv: `pip uninstall mmcv-lite; "
    "pip install -U openmim; mim install 'mmcv>=2.0.0rc4,<2.2.0'`, or see "
    'https://mmcv.readthedocs.io/en/latest/get_started/installation.html')


def __getattr__(name: str):
    """Answers for every operator that is not above, since `mmcv.ops` checks at import that each of them exists."""
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args, **kwargs):
        raise NotImplementedError(_MISSING.format(name))

    missing.__name__ = missing.__qualname__ = name
    return missing


def get_compiler_version() -> str:
    """Stands in mmcv's environment report for the compiler of the extension."""
    return 'san_backbones: torchvision operators, not compiled'


def get_compiling_cuda_version() -> str:
    """Stands in mmcv's environment report for the CUDA version of the extension."""
    return 'san_backbones: torchvision operators, not compiled'
