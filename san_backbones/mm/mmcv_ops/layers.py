"""Layer operators of the `mmcv._ext` stand-in: convolutions, attention, upsampling, normalisation and losses."""
import functools
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401, registers torch.ops.torchvision
from torch import Tensor

from .sampling import gradients, widened

FAR = 1e6  # pixels, beyond any map

# Deformable convolution. mmcv's buffers (`columns`, `ones`) and `im2col_step` divide the work of its kernels;
# torchvision's do not need them.


def deform_conv_forward(input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
                        kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
                        group: int, deformable_group: int, im2col_step: int) -> None:
    """Convolution that samples at shifted taps (Deformable Convolutional Networks, equation 2).

    Args:
        input: (N, C, H, W).
        weight: (O, C / group, kH, kW).
        offset: (N, deformable_group * kH * kW * 2, H', W'), shifts down and across of every tap.
        output: (N, O, H', W'), written.
        columns: not needed; nor are `ones` and `im2col_step`.
        kW, kH, dW, dH, padW, padH, dilationW, dilationH: kernel, stride, padding and dilation across and down.
        group: groups of channels that are convolved separately.
        deformable_group: groups of input channels that share their shifts.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_deform_conv(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(input: Tensor, offset: Tensor, grad_output: Tensor, grad_input: Tensor,
                               grad_offset: Tensor, weight: Tensor, columns: Tensor, kW: int, kH: int, dW: int,
                               dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int,
                               deformable_group: int, im2col_step: int) -> None:
    """Writes gradients of `deform_conv_forward` in input and offset to `grad_input` and `grad_offset`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_backward(grad_output, input, weight, offset, None, None, geometry)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(input: Tensor, offset: Tensor, grad_output: Tensor, grad_weight: Tensor,
                                    columns: Tensor, ones: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int,
                                    padH: int, dilationW: int, dilationH: int, group: int, deformable_group: int,
                                    scale: float, im2col_step: int) -> None:
    """Adds `scale` times the gradient of `deform_conv_forward` in the weight to `grad_weight`.

    torchvision computes all gradients at once, so a full backward pass computes them twice. They are not shared between
    the two functions, since autograd may call either alone.
    """
    # mmcv does not pass the weight, and its gradient does not depend on it: only the shape matters here.
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _deform_conv_backward(grad_output, input, grad_weight, offset, None, None, geometry)
    grad_weight.add_(grads[1].to(grad_weight.dtype), alpha=scale)


def modulated_deform_conv_forward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                  mask: Tensor, output: Tensor, columns: Tensor, kernel_h: int, kernel_w: int,
                                  stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int,
                                  dilation_w: int, group: int, deformable_group: int, with_bias: bool) -> None:
    """Deformable convolution with a factor for every tap (Deformable ConvNets v2, equation 1).

    Args:
        input: (N, C, H, W).
        weight: (O, C / group, kernel_h, kernel_w).
        bias: (O,), used if `with_bias`.
        ones: not needed; nor is `columns`.
        offset: (N, deformable_group * kernel_h * kernel_w * 2, H', W'), shifts down and across of every tap.
        mask: (N, deformable_group * kernel_h * kernel_w, H', W'), factor of every tap.
        output: (N, O, H', W'), written. If it is smaller than offset and mask, see `_leading_part`.
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w: geometry down and across.
        group: groups of channels that are convolved separately.
        deformable_group: groups of input channels that share shifts and factors.
        with_bias: whether to add the bias.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = _leading_part(offset, output), _leading_part(mask, output)
    output.copy_(_deform_conv(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                   mask: Tensor, columns: Tensor, grad_input: Tensor, grad_weight: Tensor,
                                   grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor,
                                   kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
                                   dilation_h: int, dilation_w: int, group: int, deformable_group: int,
                                   with_bias: bool) -> None:
    """Writes gradients of `modulated_deform_conv_forward` to the tensors named after them."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    offset, mask = _leading_part(offset, grad_output), _leading_part(mask, grad_output)
    grads = _deform_conv_backward(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    grad_input.copy_(grads[0])
    grad_weight.copy_(grads[1])
    _leading_part_backward(grads[2], grad_offset)
    _leading_part_backward(grads[3], grad_mask)
    if with_bias:
        grad_bias.copy_(grads[4])


def _leading_part(tensor: Tensor, output: Tensor) -> Tensor:
    """Returns the values that mmcv's kernels read from an offset or mask (N, channels, H, W) larger than the output.

    The kernels do not check the size: they read the first values of each image as if the tensor had the output's size.
    DyHead passes offsets of the next larger pyramid level, and its published weights were trained like this.
    """
    height, width = output.shape[2:]
    if tensor.shape[2] * tensor.shape[3] <= height * width:  # equal, or else torchvision raises an error
        return tensor
    return tensor.flatten(1)[:, :tensor.shape[1] * height * width].unflatten(1, (-1, height, width))


def _leading_part_backward(grad: Tensor, target: Tensor) -> None:
    """Writes the gradient of `_leading_part`'s output to that of its input."""
    grad = grad.flatten(1)
    beyond = target[0].numel() - grad.shape[1]
    target.copy_(F.pad(grad, (0, beyond)).view(target.shape))


def _deform_conv(input, weight, offset, mask, bias, geometry) -> Tensor:
    return torch.ops.torchvision.deform_conv2d(*_deform_conv_operands(input, weight, offset, mask, bias), *geometry,
                                               mask is not None)


def _deform_conv_backward(grad_output, input, weight, offset, mask, bias, geometry) -> tuple[Tensor, ...]:
    """Returns gradients in input, weight, offset, mask and bias."""
    offset = _off_the_border(widened(offset), weight.shape[2:], *geometry[:6])
    return torch.ops.torchvision._deform_conv2d_backward(
        widened(grad_output).contiguous(), *_deform_conv_operands(input, weight, offset, mask, bias), *geometry,
        mask is not None)


def _off_the_border(offset: Tensor, kernel: tuple[int, int], stride_h: int, stride_w: int, pad_h: int, pad_w: int,
                    dilation_h: int, dilation_w: int) -> Tensor:
    """Moves taps at exactly -1, just outside the map, far outwards, for mmcv's gradients; shifts (N, channels, H', W').

    Such a tap reads 0 either way, but its derivative jumps there: mmcv takes 0, torchvision the one of the inner side.
    A new network, with shifts of 0 and a padding of 1, has taps there.
    """
    def positions(axis, stride, padding, dilation):
        """Returns coordinates (taps, size) of the taps without shifts."""
        taps, size = (torch.arange(count, device=offset.device) for count in (kernel[axis], offset.shape[2 + axis]))
        return taps[:, None] * dilation + size * stride - padding

    down, across = offset.unflatten(1, (-1, *kernel, 2)).unbind(4)  # (N, groups, kernel rows, kernel columns, H', W')
    rows = positions(0, stride_h, pad_h, dilation_h)[:, None, :, None]
    columns = positions(1, stride_w, pad_w, dilation_w)[:, None]
    shifts = [torch.where(down + rows == -1, -FAR, down), torch.where(across + columns == -1, -FAR, across)]
    return torch.stack(shifts, 4).view(offset.shape)


def _deform_conv_operands(input, weight, offset, mask, bias) -> list[Tensor]:
    # torchvision reads out of bounds for NaN shifts. mmcv reads 0, as both do beyond the map.
    offset = widened(offset).clamp(-FAR, FAR).nan_to_num(FAR)
    mask = input.new_zeros(len(input), 1) if mask is None else mask  # a shape that torchvision accepts and ignores
    bias = input.new_zeros(len(weight)) if bias is None else bias
    return [widened(tensor).contiguous() for tensor in (input, weight, offset, mask, bias)]


# Convolution at selected pixels only, as two steps around a matrix product; one image, stride 1.


def masked_im2col_forward(im: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, col: Tensor, kernel_h: int,
                          kernel_w: int, pad_h: int, pad_w: int) -> None:
    """Reads the footprints of P pixels (mask_h_idx, mask_w_idx) of an image (1, C, H, W) into `col` (C * taps, P)."""
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    row = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    column = mask_w_idx + torch.arange(kernel_w, device=im.device)[None, :, None]
    col.copy_(padded[:, row, column].flatten(0, 2))


def masked_col2im_forward(col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int,
                          channels: int) -> None:
    """Writes columns (C, P) to the P pixels (mask_h_idx, mask_w_idx) of an image (1, C, H, W)."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)


# Multi-scale deformable attention.


def ms_deform_attn_forward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                           sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int) -> Tensor:
    """Weighted sums of bilinear samples from several feature maps (Deformable DETR, equation 3).

    Args:
        value: (N, pixels of all levels, heads, width).
        value_spatial_shapes: (levels, 2), height and width of each.
        value_level_start_index: (levels,), first pixel of each.
        sampling_locations: (N, queries, heads, levels, points, 2), x and y as fractions of the map.
        attention_weights: (N, queries, heads, levels, points).
        im2col_step: not needed.

    Returns:
        (N, queries, heads * width).
    """
    batch, _, heads, width = value.shape
    maps, grid, share = _attention_operands(value, sampling_locations, attention_weights)
    total = maps.new_zeros(*grid.shape[:2], width)
    for level, pixels, size in _levels(value_spatial_shapes, value_level_start_index):
        total += _attend(maps[:, :, pixels], grid[:, :, level], share[:, :, level], size)
    return total.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2).to(value.dtype)


def ms_deform_attn_backward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                            sampling_locations: Tensor, attention_weights: Tensor, grad_output: Tensor,
                            grad_value: Tensor, grad_sampling_loc: Tensor, grad_attn_weight: Tensor,
                            im2col_step: int) -> None:
    """Writes gradients of `ms_deform_attn_forward` to the tensors named after them."""
    batch, _, heads, width = value.shape
    maps, grid, share = _attention_operands(value, sampling_locations, attention_weights)
    grad = grad_output.unflatten(2, (heads, width)).transpose(1, 2).flatten(0, 1)
    grads = [torch.zeros_like(tensor) for tensor in (maps, grid, share)]
    # Level by level, so that only one level's samples are in memory.
    for level, pixels, size in _levels(value_spatial_shapes, value_level_start_index):
        level_grads = gradients(functools.partial(_attend, size=size),
                                (maps[:, :, pixels], grid[:, :, level], share[:, :, level]), grad)
        grads[0][:, :, pixels], grads[1][:, :, level], grads[2][:, :, level] = level_grads
    grad_value.copy_(grads[0].unflatten(0, (batch, heads)).permute(0, 3, 1, 2))
    grad_sampling_loc.copy_(grads[1].unflatten(0, (batch, heads)).transpose(1, 2))
    grad_attn_weight.copy_(grads[2].unflatten(0, (batch, heads)).transpose(1, 2))


def _attention_operands(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To (N * heads, width, pixels), (N * heads, queries, levels, points, 2), (N * heads, queries, levels, points)."""
    maps = widened(value).permute(0, 2, 3, 1).flatten(0, 1)
    return maps, widened(locations).transpose(1, 2).flatten(0, 1), widened(weights).transpose(1, 2).flatten(0, 1)


def _levels(shapes: Tensor, starts: Tensor):
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist())):
        yield level, slice(start, start + height * width), (height, width)


def _attend(pixels: Tensor, locations: Tensor, share: Tensor, size: tuple[int, int]) -> Tensor:
    """Computes one level's part of the sums: (B, width, H * W), (B, Q, points, 2), (B, Q, points) -> (B, Q, width)."""
    samples = F.grid_sample(pixels.unflatten(2, size), 2 * locations - 1, padding_mode='zeros', align_corners=False)
    return (samples * share[:, None]).sum(3).transpose(1, 2)


# CARAFE: upsampling with a predicted kernel for every output pixel.


def carafe_forward(features: Tensor, masks: Tensor, rfeatures: Tensor, routput: Tensor, rmasks: Tensor,
                   output: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> None:
    """Computes weighted sums over footprints in the low-resolution map (CARAFE, equation 3).

    Args:
        features: (N, C, H, W).
        masks: (N, group_size * kernel_size^2, H * scale_factor, W * scale_factor), kernels of the output pixels.
        rfeatures: shaped as `features`, written: a copy for `carafe_backward`.
        routput: not needed; nor is `rmasks`.
        output: (N, C, H * scale_factor, W * scale_factor), written.
        kernel_size: side of the footprint, odd.
        group_size: groups of channels with a kernel each.
        scale_factor: how much larger the output is.
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(grad_output: Tensor, rfeatures: Tensor, masks: Tensor, rgrad_output: Tensor,
                    rgrad_input_hs: Tensor, rgrad_input: Tensor, rgrad_masks: Tensor, grad_input: Tensor,
                    grad_masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> None:
    """Writes gradients of `carafe_forward` to `grad_input` and `grad_masks`."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)


def carafe_naive_forward(features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int,
                         scale_factor: int) -> None:
    """As `carafe_forward`, without the buffers."""
    total: Any = 0
    kernels = _per_tap(masks, kernel_size, group_size, scale_factor)
    for neighbours, kernel in zip(_shifted(_padded(features, kernel_size, group_size), kernel_size), kernels):
        total = total + neighbours[..., None, :, None] * kernel
    output.copy_(total.flatten(5, 6).flatten(3, 4).flatten(1, 2))


def carafe_naive_backward(top_grad: Tensor, features: Tensor, masks: Tensor, bottom_grad: Tensor, mask_grad: Tensor,
                          kernel_size: int, group_size: int, scale_factor: int) -> None:
    """Writes gradients of `carafe_naive_forward` to `bottom_grad` (features) and `mask_grad`."""
    padded = _padded(features, kernel_size, group_size)
    grad_padded = torch.zeros_like(padded)
    grad = widened(top_grad).unflatten(1, (group_size, -1))
    grad = grad.unflatten(4, (-1, scale_factor)).unflatten(3, (-1, scale_factor))
    grad_kernels = []
    taps = zip(_shifted(padded, kernel_size), _shifted(grad_padded, kernel_size),
               _per_tap(masks, kernel_size, group_size, scale_factor))
    for neighbours, grad_neighbours, kernel in taps:
        grad_neighbours += (grad * kernel).sum((4, 6))
        grad_kernels.append((grad * neighbours[..., None, :, None]).sum(2))
    reach = kernel_size // 2
    bottom_grad.copy_(grad_padded[..., reach:reach + features.shape[2], reach:reach + features.shape[3]].flatten(1, 2))
    mask_grad.copy_(torch.stack(grad_kernels, 2).flatten(5, 6).flatten(3, 4).flatten(1, 2))


def _padded(features: Tensor, kernel_size: int, groups: int) -> Tensor:
    """Pads with zeros to (N, groups, C / groups, H + kernel_size - 1, W + kernel_size - 1)."""
    return F.pad(widened(features), (kernel_size // 2, ) * 4).unflatten(1, (groups, -1))


def _shifted(padded: Tensor, kernel_size: int) -> list[Tensor]:
    """Returns views (N, groups, C / groups, H, W) of a padded map, one per tap of the footprint."""
    height, width = (side - kernel_size + 1 for side in padded.shape[-2:])
    return [padded[..., down:down + height, across:across + width]
            for down in range(kernel_size) for across in range(kernel_size)]


def _per_tap(masks: Tensor, kernel_size: int, groups: int, scale: int) -> tuple[Tensor, ...]:
    """Splits kernels into values (N, groups, 1, H, scale, W, scale), one tensor per tap of the footprint."""
    masks = widened(masks).unflatten(1, (groups, kernel_size**2, 1))
    return masks.unflatten(5, (-1, scale)).unflatten(4, (-1, scale)).unbind(2)


# Point-wise spatial attention (PSANet): relative attention maps to absolute ones.

COLLECT, DISTRIBUTE = range(2)  # `psa_type`


def psamask_forward(input: Tensor, output: Tensor, psa_type: int, num_: int, h_feature: int, w_feature: int,
                    h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int) -> None:
    """Expands the attention of each pixel to its surroundings to the whole map (PSANet, figure 3).

    Args:
        input: (N, h_mask * w_mask, H, W), for each pixel a window centred on it.
        output: (N, H * W, H, W), written; 0 beyond the window. When collecting, the attention of pixel p to pixel q
            is at channel q, pixel p; when distributing, at channel p, pixel q.
        psa_type: 0 for collect, 1 for distribute.
        num_: N.
        h_feature, w_feature, h_mask, w_mask: sizes of the map and the window.
        half_h_mask, half_w_mask: index of the pixel itself in the window.
    """
    channel, within = _window(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, input.device)
    collected = input.flatten(2).gather(1, channel.expand(num_, -1, -1)) * within
    if psa_type == DISTRIBUTE:
        collected = collected.transpose(1, 2)
    output.copy_(collected.unflatten(2, (h_feature, w_feature)))


def psamask_backward(grad_output: Tensor, grad_input: Tensor, psa_type: int, num_: int, h_feature: int,
                     w_feature: int, h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int) -> None:
    """Writes the gradient of `psamask_forward` to `grad_input`."""
    channel, within = _window(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, grad_output.device)
    grad = grad_output.flatten(2)
    if psa_type == DISTRIBUTE:
        grad = grad.transpose(1, 2)
    total = grad.new_zeros(num_, h_mask * w_mask, h_feature * w_feature)
    total.scatter_add_(1, channel.expand(num_, -1, -1), grad * within)
    grad_input.copy_(total.unflatten(2, (h_feature, w_feature)))


def _window(height, width, h_mask, w_mask, half_h_mask, half_w_mask, device) -> tuple[Tensor, Tensor]:
    """Returns for pixels q (rows) and p (columns) the channel of q in p's window, and whether q is inside it."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    down = y[:, None] - y + half_h_mask
    across = x[:, None] - x + half_w_mask
    within = (down >= 0) & (down < h_mask) & (across >= 0) & (across < w_mask)
    return torch.where(within, down * w_mask + across, 0), within


# Focal losses (Focal Loss for Dense Object Detection, equation 5).


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Computes the binary focal loss of every class.

    Args:
        input: (N, classes), logits.
        target: (N,), the class; any other number for no class.
        weight: (classes,), factor for the samples of each class, or empty. Samples of no class keep their loss.
        output: (N, classes), written.
        gamma: focusing exponent.
        alpha: weight of the true class; the others have 1 - alpha.
    """
    output.copy_(_sigmoid_focal_loss(widened(input), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float,
                                alpha: float) -> None:
    """Writes derivatives of `sigmoid_focal_loss_forward`, each in its own logit, to `grad_input`."""
    def loss(logits):
        return _sigmoid_focal_loss(logits, target, weight, gamma, alpha)

    logits = widened(input)
    grad_input.copy_(gradients(loss, (logits, ), torch.ones_like(logits))[0])


def _sigmoid_focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    classes = logits.shape[1]
    true = target[:, None] == torch.arange(classes, device=logits.device)
    log_yes, log_no = F.logsigmoid(logits), F.logsigmoid(-logits)
    # exp(gamma * log) instead of a power: its derivative stays finite at probability 0.
    positive = -alpha * (gamma * log_no).exp() * log_yes
    negative = -(1 - alpha) * (gamma * log_yes).exp() * log_no
    loss = torch.where(true, positive, negative)
    if weight.numel():
        known = (target >= 0) & (target < classes)
        loss = loss * torch.where(known, widened(weight)[target.clamp(0, classes - 1)], 1)[:, None]
    return loss


def softmax_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Computes the focal loss of a softmax.

    Args:
        input: (N, classes), probabilities.
        target: (N,), the class; negative for samples without loss.
        weight: (classes,), factor for the samples of each class, or empty.
        output: (N,), written.
        gamma: focusing exponent.
        alpha: factor of the loss.
    """
    chance, factor = _true_class(input, target, weight, alpha)
    output.copy_(-factor * (1 - chance)**gamma * _safe_log(chance))


def softmax_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor,
                                gamma: float, alpha: float) -> None:
    """Writes the gradient of `softmax_focal_loss_forward` in the logits before the softmax; `buff` is not needed."""
    chance, factor = _true_class(input, target, weight, alpha)
    others = (1 - chance).clamp(min=torch.finfo(chance.dtype).tiny)  # gamma below 1 would divide by 0
    slope = factor * (gamma * others**(gamma - 1) * chance * _safe_log(chance) - (1 - chance)**gamma)
    true = target[:, None] == torch.arange(input.shape[1], device=input.device)
    grad_input.copy_(slope[:, None] * (true.to(slope.dtype) - widened(input)))


def _true_class(softmax: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Returns the probability (N,) of each sample's class and the factor (N,) of its loss."""
    index = target.clamp(min=0)
    factor = alpha * (target >= 0).to(widened(softmax).dtype)
    if weight.numel():
        factor = factor * widened(weight)[index]
    return widened(softmax).gather(1, index[:, None])[:, 0], factor


def _safe_log(chance: Tensor) -> Tensor:
    return chance.clamp(min=torch.finfo(chance.dtype).tiny).log()


# Synchronised batch normalisation: the arithmetic between mmcv's exchanges of statistics. Tensors are (N, C, pixels).


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Computes the mean of each channel (C,) over this process's samples."""
    mean.copy_(input.mean((0, 2), dtype=mean.dtype))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Computes the mean squared distance (C,) of each channel from the given mean."""
    var.copy_((input - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None,
                           running_mean: Tensor | None, running_var: Tensor | None, norm: Tensor, std: Tensor,
                           output: Tensor, eps: float, momentum: float, group_size: int) -> None:
    """Normalises, and updates the running statistics with `momentum`.

    Args:
        input: (N, C, pixels).
        mean: (C,), of all processes, as `var`.
        weight: (C,) or None, as `bias`.
        running_mean: (C,) or None, updated, as `running_var`.
        norm: (N, C, pixels), written: normalised values, before weight and bias.
        std: (C,), written.
        output: (N, C, pixels), written.
        eps: added to the variance.
        momentum: a number, or a tensor (1,).
        group_size: number of processes.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input - mean[:, None]) / std[:, None])
    output.copy_(norm if weight is None or bias is None else norm * weight[:, None] + bias[:, None])
    if running_mean is not None and running_var is not None:
        count = input.shape[0] * input.shape[2] * group_size
        unbiased = var * count / (count - 1) if count > 1 else var
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        running_var.copy_(momentum * unbiased + (1 - momentum) * running_var)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Computes gradients (C,) in weight and bias over this process's samples."""
    grad_weight.copy_((grad_output * norm).sum((0, 2)))
    grad_bias.copy_(grad_output.sum((0, 2), dtype=norm.dtype))


def sync_bn_backward_data(grad_output: Tensor, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor, norm: Tensor,
                          std: Tensor, grad_input: Tensor) -> None:
    """Computes the gradient (N, C, pixels) in the input from the parameters' gradients averaged over all processes."""
    count = grad_output.shape[0] * grad_output.shape[2]
    through_statistics = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    grad_input.copy_(weight[:, None] * (grad_output - through_statistics) / std[:, None])
