"""Trains `test_san_patchwise`, the small model that ships, to tell the demo's three shapes apart.

    python weights/train_shapes.py --out work_dirs/shapes     # minutes on two CPU cores

Pictures are those of demo/shapes.py: textured squares, stars and rings on photographs. A sample is a square cut around
one shape, a fifth larger than its box, scaled to 96 x 96. Training and held-out pictures share no photograph.
Writes `checkpoint.pth` and `report.json`; `convert.py` turns the checkpoint into the form of the Hub.
"""
import argparse
import json
import pathlib
import sys

import cv2
import numpy as np
import timm
import torch
import torch.nn.functional as F

import san_backbones  # noqa: F401

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'demo'))
import shapes

SIZE = 96
MARGIN = 0.2


def cut(picture, box):
    """The square around a box (x, y, width, height) of a BGR picture, as RGB, SIZE x SIZE x 3."""
    x, y, width, height = box
    side = (1 + MARGIN) * max(width, height)
    corner = x + (width - side) / 2, y + (height - side) / 2
    transform = np.float32([[SIZE / side, 0, -corner[0] * SIZE / side], [0, SIZE / side, -corner[1] * SIZE / side]])
    patch = cv2.warpAffine(picture, transform, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return cv2.cvtColor(patch, cv2.COLOR_BGR2RGB)


def samples(folder, split):
    """All shapes of a split: uint8 images (N, 3, SIZE, SIZE) and classes (N,)."""
    coco = json.loads((folder / 'annotations' / f'instances_{split}.json').read_text())
    names = {image['id']: folder / split / image['file_name'] for image in coco['images']}
    pictures = {image_id: cv2.imread(str(path)) for image_id, path in names.items()}
    patches = [cut(pictures[a['image_id']], a['bbox']) for a in coco['annotations']]
    classes = [a['category_id'] - 1 for a in coco['annotations']]
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous(), torch.tensor(classes)


def normalised(images, cfg):
    """uint8 to what the model takes."""
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ('mean', 'std'))
    return (images / 255 - mean) / std


def accuracy(model, images, classes):
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(normalised(part, model.pretrained_cfg)) for part in images.split(64)])
    return (logits.argmax(1) == classes).float().mean().item()


def main(arguments=None):
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument('--out', type=pathlib.Path, default=pathlib.Path('work_dirs/shapes'))
    options.add_argument('--pictures', type=int, default=1200, help='training pictures')
    options.add_argument('--held-out', type=int, default=300, help='held-out pictures')
    options.add_argument('--epochs', type=int, default=12)
    options.add_argument('--batch', type=int, default=64)
    options.add_argument('--learning-rate', type=float, default=0.004)
    options.add_argument('--seed', type=int, default=0)
    options = options.parse_args(arguments)
    torch.manual_seed(options.seed)
    folder = shapes.make(options.out / 'data', options.pictures, options.held_out, seed=options.seed)
    images, classes = samples(folder, 'train')
    held_out = samples(folder, 'val')
    print(f'{len(classes)} training and {len(held_out[1])} held-out shapes', flush=True)

    model = timm.create_model('test_san_patchwise.shapes')
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    steps = options.epochs * (len(classes) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps)
    for epoch in range(options.epochs):
        model.train()
        total = 0.
        batches = torch.randperm(len(classes)).split(options.batch)[:len(classes) // options.batch]
        for batch in batches:
            x = normalised(images[batch], model.pretrained_cfg)
            x = x.flip([axis for axis in (2, 3) if torch.rand(()) < 0.5])
            loss = F.cross_entropy(model(x), classes[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / len(batches)
        print(f'epoch {epoch + 1}: loss {total:.3f}, held-out accuracy {accuracy(model, *held_out):.3f}', flush=True)
    report = dict(classes=list(shapes.KINDS), train_shapes=len(classes), held_out_shapes=len(held_out[1]),
                  train_accuracy=accuracy(model, images, classes), held_out_accuracy=accuracy(model, *held_out),
                  epochs=options.epochs, seed=options.seed)
    (options.out / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    torch.save({'state_dict': model.state_dict()}, options.out / 'checkpoint.pth')
    print(f'{report}\nwrote {options.out / "checkpoint.pth"}')


if __name__ == '__main__':
    main()
