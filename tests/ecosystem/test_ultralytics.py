"""Ultralytics: a YOLO head on SAN trains, is saved, and finds what it saw; the names that it asks torchvision for."""
import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torchvision

import san_backbones.ultralytics  # noqa: F401

YAML = """
nc: 2
backbone:
  - [-1, 1, TorchVision, [128, test_san_patchwise, DEFAULT, True, 0, True]]
  - [0, 1, Index, [64, 4]]
  - [0, 1, Index, [96, 5]]
  - [0, 1, Index, [128, 6]]
head:
  - [[1, 2, 3], 1, Detect, [nc]]
"""


def test_torchvision_knows_the_models():
    names = set(timm.list_models(module='san'))
    assert names and names <= set(torchvision.models.list_models())
    images = torch.rand(1, 3, 64, 64)
    expected = timm.create_model('test_san_patchwise', pretrained=True, features_only=True).eval()
    parts = list(torchvision.models.get_model('test_san_patchwise', weights='DEFAULT').eval().children())
    maps = [images]
    with torch.no_grad():
        for part in parts:
            maps.append(part(maps[-1]))
        assert all(torch.equal(a, b) for a, b in zip(maps[2:], expected(images), strict=True))
    states = [torchvision.models.get_model('test_san_patchwise', weights=None).state_dict() for _ in range(2)]
    assert not torch.equal(states[0]['stem.conv.weight'], states[1]['stem.conv.weight'])  # random ones


def write_data(folder):
    """Four pictures of a bright square on noise, with labels in YOLO's form; returns the file that describes them."""
    (folder / 'images').mkdir()
    (folder / 'labels').mkdir()
    for number in range(4):
        picture = np.random.default_rng(number).integers(0, 60, (64, 64, 3), np.uint8)
        picture[16:48, 16:48] = 255
        PIL.Image.fromarray(picture).save(folder / f'images/{number}.png')
        (folder / f'labels/{number}.txt').write_text(f'{number % 2} 0.5 0.5 0.5 0.5\n')
    description = folder / 'data.yaml'
    description.write_text(f'path: {folder}\ntrain: images\nval: images\nnames: [left, right]\n')
    return description


def test_yolo_trains_and_is_saved(tmp_path):
    ultralytics = pytest.importorskip('ultralytics')
    (tmp_path / 'san.yaml').write_text(YAML)
    model = ultralytics.YOLO(tmp_path / 'san.yaml', task='detect')
    assert model.model.stride.tolist() == [8, 16, 32]
    before = {name: p.clone() for name, p in model.model.model[0].named_parameters()}
    pretrained = timm.create_model('test_san_patchwise', pretrained=True, features_only=True).state_dict()
    there = model.model.model[0].state_dict()
    kept = [torch.equal(a, b) for a, b in zip(pretrained.values(), there.values(), strict=True) if a.ndim == 4]
    assert kept and all(kept)
    model.train(data=write_data(tmp_path), epochs=1, batch=4, imgsz=64, workers=0, device='cpu', project=tmp_path,
                name='run', plots=False, verbose=False, amp=False)
    moved = [not torch.equal(before[name], p.cpu()) for name, p in model.trainer.model.model[0].named_parameters()]
    assert sum(moved) > 0.8 * len(moved)
    again = ultralytics.YOLO(tmp_path / 'run/weights/last.pt')
    found = again.predict(tmp_path / 'images/0.png', imgsz=64, conf=0., verbose=False)
    assert found[0].boxes.xyxy.shape[1] == 4 and len(found[0].boxes)
