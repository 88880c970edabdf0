"""Fixtures for the weight commands: files in the authors' format, and a manifest of small models."""
import json

import pytest
import torch

from tests import oracle
from tests.weights.small_models import SPECS


@pytest.fixture
def manifest(tmp_path):
    """A manifest whose models are the small ones."""
    entries = {
        f'{name}.in1k': {
            'architecture': name, 'tag': 'in1k', 'drive_id': f'drive-id-of-{name}', 'source_file': 'model_best.pth',
            'source_sha256': None, 'sha256': None, 'parameters': oracle.parameter_count(spec), 'paper_top1': 74.9,
            'paper_top5': 92.1, 'measured': None, 'license': 'mit',
        } for name, spec in SPECS.items()}
    path = tmp_path / 'manifest.json'
    path.write_text(json.dumps({'models': entries}))
    return path


@pytest.fixture
def released(tmp_path):
    """Writes a file in the authors' format: `released(name, seed=0, **changes)` returns its path."""

    def write(name, path=None, seed=0, num_classes=1000, **changes):
        path = path or tmp_path / f'{name}-{seed}.pth'
        path.parent.mkdir(parents=True, exist_ok=True)
        state = oracle.random_tensors(oracle.state_shapes(SPECS.get(name, name), num_classes), seed)
        state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        state.update(changes)
        torch.save(oracle.released_checkpoint(state), path)
        return path

    return write
