"""torchvision: Mask R-CNN and RetinaNet over a pyramid on SAN."""
import timm
import torch
from timm.utils.model import freeze_batch_norm_2d
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import san_backbones  # noqa: F401


def pyramid(name='test_san_patchwise', out_indices=(1, 2, 3, 4), extra_blocks=None, **kwargs):
    features = timm.create_model(name, features_only=True, out_indices=out_indices, **kwargs)
    layers = {f'stages_{i}': str(i) for i in out_indices}
    return BackboneWithFPN(features, layers, features.feature_info.channels(), 32, extra_blocks)


def objects():
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 8:40, 8:40] = 1
    return [dict(boxes=torch.tensor([[8., 8., 40., 40.]]), labels=torch.tensor([1]), masks=mask)]


def step(model, body):
    before = {name: p.detach().clone() for name, p in body.named_parameters()}
    losses = model.train()([torch.rand(3, 64, 64)], objects())
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in body.parameters() if p.requires_grad)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    return {name: not torch.equal(before[name], p) for name, p in body.named_parameters()}


def test_the_body_gives_the_maps_of_timm():
    backbone = pyramid().eval()
    expected = timm.create_model('test_san_patchwise', features_only=True, out_indices=(1, 2, 3, 4)).eval()
    expected.load_state_dict(backbone.body.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = backbone.body(images)
        assert list(maps) == ['1', '2', '3', '4']
        assert all(torch.equal(a, b) for a, b in zip(maps.values(), expected(images), strict=True))
        assert [m.shape[1:] for m in backbone(images).values()] == [
            (32, 16, 24), (32, 8, 12), (32, 4, 6), (32, 2, 3), (32, 1, 2)]


def test_the_models_of_the_paper():
    with torch.device('meta'):
        maps = pyramid('san15_patchwise')(torch.empty(1, 3, 64, 64))
    assert [m.shape for m in maps.values()] == [(1, 32, side, side) for side in (16, 8, 4, 2, 1)]


def test_mask_rcnn():
    torch.manual_seed(0)
    model = MaskRCNN(pyramid(), num_classes=3, min_size=64, max_size=64, box_detections_per_img=5)
    moved = step(model, model.backbone.body)
    assert sum(moved.values()) > 0.8 * len(moved)
    with torch.no_grad():
        outputs = model.eval()([torch.rand(3, 64, 64), torch.rand(3, 50, 70)])
    assert [output['masks'].shape[1:] for output in outputs] == [(1, 64, 64), (1, 50, 70)]


def test_retinanet_with_frozen_norms_and_stem():
    torch.manual_seed(0)
    backbone = pyramid(pretrained=True, out_indices=(2, 3, 4), extra_blocks=LastLevelP6P7(32, 32))
    backbone.body = freeze_batch_norm_2d(backbone.body)
    backbone.body.stem.requires_grad_(False)
    model = RetinaNet(backbone, num_classes=3, min_size=64, max_size=64)
    buffers = {name: tensor.clone() for name, tensor in backbone.body.named_buffers()}
    moved = step(model, backbone.body)
    assert not any(moved[name] for name in moved if name.startswith('stem.'))
    assert all(moved[name] for name in moved if name.endswith('.conv.weight') and name.startswith('stages_'))
    assert all(torch.equal(buffers[name], tensor) for name, tensor in backbone.body.named_buffers())
    with torch.no_grad():
        output, = model.eval()([torch.rand(3, 64, 64)])
    assert output['boxes'].shape[1:] == (4,)
