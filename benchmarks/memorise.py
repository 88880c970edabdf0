"""Can a detector of another library, with a SAN in it, memorise eight pictures?

    python benchmarks/memorise.py rtdetr --data FOLDER
    python benchmarks/memorise.py mask2former --data FOLDER
    python benchmarks/memorise.py yolo --data FOLDER

FOLDER is a data set in COCO's format, with masks. The first pictures with at most --most objects, none smaller than
--least, are scaled to squares; RT-DETR v2 and Mask2Former of transformers, or a YOLO head of Ultralytics, learn them
for --steps, from the backbone's pretrained weights. COCO's average precision on those same pictures, before and after,
says whether gradients arrive where they should: a network that works comes close to 1.
"""
import argparse
import contextlib
import io
import pathlib
import tempfile

import harness
import numpy as np
import timm
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import san_backbones.ultralytics  # noqa: F401
from san_backbones.data import coco

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
BACKBONE = 'test_san_patchwise'
CHANNELS = [64, 64, 96, 128]  # at strides 4 to 32


class Pictures:
    """Squares: `images` (N, 3, S, S) uint8, and of each its `masks` (objects, S, S) and `classes`."""

    def __init__(self, folder, count, size, most, least=0):
        split = coco.find(folder)[0]
        api = quietly(COCO, str(split.json))
        found = {index: api.loadAnns(api.getAnnIds(index, iscrowd=False)) for index in sorted(api.getImgIds())}


        def smallest(index, things):
            picture = api.imgs[index]
            return min(min(thing['bbox'][2] / picture['width'], thing['bbox'][3] / picture['height'])
                       for thing in things) * size

        chosen = [index for index, things in found.items()
                  if 0 < len(things) <= most and smallest(index, things) >= least][:count]
        names = sorted({thing['category_id'] for index in chosen for thing in found[index]})
        self.size, self.names = size, [api.cats[name]['name'] for name in names]
        self.images, self.masks, self.classes = [], [], []
        for index in chosen:
            picture = Image.open(pathlib.Path(split.images) / api.imgs[index]['file_name']).convert('RGB')
            self.images.append(torch.from_numpy(np.array(picture.resize((size, size)))).permute(2, 0, 1))
            masks = [np.array(Image.fromarray(api.annToMask(thing)).resize((size, size), Image.Resampling.NEAREST))
                     for thing in found[index]]
            kept = [number for number, mask in enumerate(masks) if mask.any()]
            self.masks.append(torch.from_numpy(np.stack([masks[number] for number in kept])).float())
            self.classes.append(torch.tensor([names.index(found[index][number]['category_id']) for number in kept]))
        self.images = torch.stack(self.images)
        self.pixels = (self.images / 255 - MEAN) / STD

    def boxes(self, number):
        """Boxes (x, y, width, height) around the masks of a picture."""
        return np.stack([rle.toBbox(encode(mask)) for mask in self.masks[number]])

    def score(self, found, kind):
        """AP and AP50 of COCO; found: dicts of an image_id, a category_id, a score and a bbox or a segmentation."""
        truth = COCO()
        things = [dict(id=0, image_id=number, category_id=int(label), iscrowd=0, area=float(mask.sum()), bbox=list(box),
                       segmentation=encode(mask))
                  for number, masks in enumerate(self.masks)
                  for mask, label, box in zip(masks, self.classes[number], self.boxes(number), strict=True)]
        truth.dataset = dict(
            images=[dict(id=number, height=self.size, width=self.size) for number in range(len(self.images))],
            annotations=[dict(thing, id=number + 1) for number, thing in enumerate(things)],
            categories=[dict(id=number, name=name) for number, name in enumerate(self.names)])
        quietly(truth.createIndex)
        if not found:
            return 0., 0.
        evaluation = COCOeval(truth, quietly(truth.loadRes, found), kind)
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            quietly(step)
        return evaluation.stats[0], evaluation.stats[1]


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def encode(mask):
    return rle.encode(np.asfortranarray(np.asarray(mask, dtype=np.uint8)))


class Transformers:
    """A model of transformers on a SAN with pretrained weights."""

    def __init__(self, name, config, maps, pictures, **sizes):
        import transformers
        backbone = transformers.TimmBackboneConfig(backbone=BACKBONE, out_indices=maps)
        self.model = getattr(transformers, name)(getattr(transformers, config)(
            backbone_config=backbone, num_labels=len(pictures.names), **sizes)).to(harness.DEVICE)
        body, = (part for part in self.model.modules() if isinstance(part, timm.models.FeatureListNet))
        body.load_state_dict(
            timm.create_model(BACKBONE, pretrained=True, features_only=True, out_indices=maps).state_dict())
        self.pictures, self.pixels = pictures, pictures.pixels.to(harness.DEVICE)

    def train(self, steps):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-4, weight_decay=1e-4)
        for step in range(steps):
            for group in optimizer.param_groups:
                group['lr'] = 5e-4 * min(1, (step + 1) / 20, 4 * (1 - step / steps))
            loss = self.model.train()(pixel_values=self.pixels, **self.labels()).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
            optimizer.step()
            if step % 50 == 0:
                print(f'step {step}: loss {loss.item():.3f}', flush=True)

    @torch.no_grad()
    def output(self):
        return self.model.eval()(pixel_values=self.pixels)


class RTDetr(Transformers):
    """RT-DETR v2, small."""
    kind = 'bbox'

    def __init__(self, pictures):
        super().__init__('RTDetrV2ForObjectDetection', 'RTDetrV2Config', (2, 3, 4), pictures, d_model=96,
                         encoder_hidden_dim=96, encoder_in_channels=CHANNELS[1:], decoder_in_channels=[96] * 3,
                         encoder_ffn_dim=192, decoder_ffn_dim=192, decoder_layers=3, encoder_attention_heads=4,
                         decoder_attention_heads=4, num_queries=60, num_denoising=20)

    def labels(self):
        size, result = self.pictures.size, []
        for number, classes in enumerate(self.pictures.classes):
            boxes = torch.from_numpy(self.pictures.boxes(number)).float() / size
            boxes[:, :2] += boxes[:, 2:] / 2
            result.append(dict(class_labels=classes.to(harness.DEVICE), boxes=boxes.to(harness.DEVICE)))
        return dict(labels=result)

    def found(self):
        output, size = self.output(), self.pictures.size
        boxes = output.pred_boxes.cpu() * size
        boxes[..., :2] -= boxes[..., 2:] / 2
        for number, logits in enumerate(output.logits.sigmoid().cpu()):
            for query, label in (logits > 0.01).nonzero().tolist():
                yield dict(image_id=number, category_id=label, bbox=boxes[number, query].tolist(),
                           score=logits[query, label].item())


class Mask2Former(Transformers):
    """Mask2Former, small."""
    kind = 'segm'

    def __init__(self, pictures):
        super().__init__('Mask2FormerForUniversalSegmentation', 'Mask2FormerConfig', (1, 2, 3, 4), pictures,
                         feature_size=96, mask_feature_size=96, hidden_dim=96, encoder_feedforward_dim=192,
                         encoder_layers=2, decoder_layers=4, num_attention_heads=4, dim_feedforward=192,
                         num_queries=30, train_num_points=1024)

    def labels(self):
        return dict(mask_labels=[masks.to(harness.DEVICE) for masks in self.pictures.masks],
                    class_labels=[classes.to(harness.DEVICE) for classes in self.pictures.classes])

    def found(self):
        output, size = self.output(), self.pictures.size
        masks = torch.nn.functional.interpolate(output.masks_queries_logits, (size, size), mode='bilinear').sigmoid()
        classes = output.class_queries_logits.softmax(-1)[..., :-1].cpu()
        for number in range(len(masks)):
            for query, label in (classes[number] > 0.05).nonzero().tolist():
                mask = masks[number, query].cpu()
                inside = mask > 0.5
                if inside.any():
                    yield dict(image_id=number, category_id=label, segmentation=encode(inside),
                               score=(classes[number, query, label] * mask[inside].mean()).item())


class Yolo:
    """Ultralytics' Detect on three maps of a SAN."""
    kind = 'bbox'

    def __init__(self, pictures):
        import ultralytics
        self.pictures, self.ultralytics = pictures, ultralytics
        self.folder = pathlib.Path(tempfile.mkdtemp())
        for kind in ('images', 'labels'):
            (self.folder / kind).mkdir()
        for number, image in enumerate(pictures.images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(self.folder / f'images/{number}.png')
            boxes = pictures.boxes(number) / pictures.size
            lines = [' '.join(map(str, (int(label), *box[:2] + box[2:] / 2, *box[2:])))
                     for label, box in zip(pictures.classes[number], boxes, strict=True)]
            (self.folder / f'labels/{number}.txt').write_text('\n'.join(lines))
        names = ''.join(f'\n  {number}: {name}' for number, name in enumerate(pictures.names))
        (self.folder / 'data.yaml').write_text(f'path: {self.folder}\ntrain: images\nval: images\nnames:{names}\n')
        maps = '\n'.join(f'  - [0, 1, Index, [{width}, {4 + number}]]' for number, width in enumerate(CHANNELS[1:]))
        (self.folder / 'san.yaml').write_text(
            f'nc: {len(pictures.names)}\nbackbone:\n'
            f'  - [-1, 1, TorchVision, [{CHANNELS[-1]}, {BACKBONE}, DEFAULT, True, 0, True]]\n{maps}\n'
            'head:\n  - [[1, 2, 3], 1, Detect, [nc]]\n')
        self.model = ultralytics.YOLO(self.folder / 'san.yaml', task='detect')

    def train(self, steps):
        self.model.train(
            data=self.folder / 'data.yaml', epochs=steps, patience=steps, workers=0,
            batch=len(self.pictures.images), nbs=len(self.pictures.images),  # nbs: a step of the optimizer every epoch
            imgsz=self.pictures.size, device='cpu', project=self.folder, name='run', plots=False, verbose=False,
            val=False, amp=False, optimizer='AdamW', lr0=2e-3, warmup_epochs=5, mosaic=0., fliplr=0., scale=0.,
            translate=0., hsv_h=0., hsv_s=0., hsv_v=0., erasing=0., auto_augment=None)
        self.model = self.ultralytics.YOLO(self.folder / 'run/weights/last.pt')
        return steps

    def found(self):
        for number in range(len(self.pictures.images)):
            result, = self.model.predict(self.folder / f'images/{number}.png', imgsz=self.pictures.size, conf=0.01,
                                         device='cpu', verbose=False)
            boxes = result.boxes
            for box, label, score in zip(boxes.xyxy.tolist(), boxes.cls.tolist(), boxes.conf.tolist(), strict=True):
                yield dict(image_id=number, category_id=int(label), score=score,
                           bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]])


DETECTORS = {'rtdetr': RTDetr, 'mask2former': Mask2Former, 'yolo': Yolo}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('detector', choices=DETECTORS)
    parser.add_argument('--data', type=pathlib.Path, required=True, help="a data set in COCO's format, with masks")
    parser.add_argument('--pictures', type=int, default=8)
    parser.add_argument('--most', type=int, default=6, help='objects in a picture')
    parser.add_argument('--least', type=int, default=0, help='pixels of the shorter side of every object')
    parser.add_argument('--size', type=int, default=160, help='pixels a side')
    parser.add_argument('--steps', type=int, default=500, help='of training, each with all pictures')
    options = parser.parse_args()
    torch.manual_seed(0)
    pictures = Pictures(options.data, options.pictures, options.size, options.most, options.least)
    objects = sum(map(len, pictures.classes))
    print(f'{options.detector} on {BACKBONE}, {len(pictures.images)} pictures of {options.size} pixels with {objects} '
          f'objects of {len(pictures.names)} classes; {harness.machine()}')
    detector = DETECTORS[options.detector](pictures)
    before = pictures.score(list(detector.found()), detector.kind)
    detector.train(options.steps)
    after = pictures.score(list(detector.found()), detector.kind)
    print(f'{options.steps} steps: AP {before[0]:.3f}, then {after[0]:.3f}; AP50 {before[1]:.3f}, then {after[1]:.3f}')


if __name__ == '__main__':
    main()
