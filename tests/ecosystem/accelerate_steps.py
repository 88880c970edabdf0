"""Trains for two steps with accelerate, started by torchrun in test_accelerate.py (or alone): python FILE FOLDER."""
import pathlib
import sys

import timm
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import san_backbones  # noqa: F401
from san_backbones.norms import SyncBatchNorm


def model():
    torch.manual_seed(0)
    model = timm.create_model('test_san_pairwise', num_classes=3, norm_layer=SyncBatchNorm, zero_init_last=False)
    model = model.double()
    for module in model.modules():
        if isinstance(module, SyncBatchNorm):
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def data(batch_size):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(8) % 3), batch_size=batch_size)


def step(accelerator, net, optimizer, batch):
    images, labels = batch
    loss = nn.functional.cross_entropy(net(images), labels)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()


def main(folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    net = model()
    net, optimizer, loader = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), data(4 // accelerator.num_processes))
    first, second = loader
    step(accelerator, net, optimizer, first)
    accelerator.save_state(str(folder / 'state'))
    step(accelerator, net, optimizer, second)
    straight = {name: tensor.clone() for name, tensor in accelerator.unwrap_model(net).state_dict().items()}
    step(accelerator, net, optimizer, first)  # somewhere else
    accelerator.load_state(str(folder / 'state'))
    step(accelerator, net, optimizer, second)
    resumed = accelerator.unwrap_model(net).state_dict()
    torch.save(dict(processes=accelerator.num_processes, straight=straight, resumed=resumed),
               folder / f'rank{accelerator.process_index}.pt')
    accelerator.end_training()


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
