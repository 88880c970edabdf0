"""lightly-train: a SAN learns from pictures without labels."""
import pytest

lightly_train = pytest.importorskip('lightly_train')

import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402

import san_backbones  # noqa: E402, F401


def test_pretraining_gives_weights_for_timm(tmp_path):
    pictures = tmp_path / 'pictures'
    pictures.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        PIL.Image.fromarray(noise).save(pictures / f'{number}.png')
    lightly_train.pretrain(
        out=tmp_path / 'out', data=pictures, model='timm/test_san_patchwise', method='simclr', epochs=1, batch_size=4,
        num_workers=0, accelerator='cpu', devices=1, transform_args=dict(image_size=(64, 64)),
        model_args=dict(pretrained=True))
    before = timm.create_model('test_san_patchwise', pretrained=True).state_dict()
    file = tmp_path / 'out/exported_models/exported_last.pt'
    after = timm.create_model('test_san_patchwise', checkpoint_path=file, num_classes=3).state_dict()
    moved = [not torch.equal(before[name], after[name]) for name in before if name.endswith('.weight')]
    assert sum(moved) > 0.8 * len(moved)
    name = 'stages.1.blocks.0.attn.query.weight'
    assert (after[name] - before[name]).abs().max() < 0.1  # it began with the pretrained ones
