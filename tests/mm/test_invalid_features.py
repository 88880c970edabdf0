"""CheckInvalidFeaturesHook: an evaluation that is not finite names the layer."""
import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import torch
from mmengine.runner import Runner

from tests.mm.tiny_training import detection, make_pictures, plain_configs, segmentation  # noqa: F401


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp('pictures'))


def runner(build, pictures, folder, monkeypatch, broken=True, **options):
    """A runner, and the errors in its log."""
    made = Runner.from_cfg(build(pictures, folder, iters=2, custom_hooks=[
        dict(type='CheckInvalidFeaturesHook', **options)]))
    if broken:
        with torch.no_grad():
            block = made.model.backbone.stages[2].blocks[0]
            block.norm2.bias.fill_(1e3)
            block.conv.weight.fill_(1e38)
    said = []
    monkeypatch.setattr(made.logger, 'error', lambda message, *rest: said.append(message))
    return made, said


@pytest.mark.parametrize('loop', ['val', 'test'])
@pytest.mark.parametrize('build', [segmentation, detection])
def test_names_the_layer_once(build, loop, pictures, tmp_path, monkeypatch):
    made, said = runner(build, pictures, tmp_path, monkeypatch)
    try:
        getattr(made, loop)()
    except Exception:  # what heads and evaluators make of NaN is their affair
        made.call_hook(f'after_{loop}_epoch')
    said = [message for message in said if 'SANBackbone gave values' in message]
    assert len(said) == 1 and 'stages.2.norm is the first layer out of range' in said[0]
    assert not made.model.backbone._forward_hooks  # fused inference comes back


def test_can_end_the_run(pictures, tmp_path, monkeypatch):
    made, _ = runner(segmentation, pictures, tmp_path, monkeypatch, stop=True)
    with pytest.raises(RuntimeError, match=r'stages\.2\.norm is the first layer'):
        made.val()


def test_says_nothing_of_a_network_in_order(pictures, tmp_path, monkeypatch):
    made, said = runner(segmentation, pictures, tmp_path, monkeypatch, broken=False)
    made.train()
    assert not said


@pytest.mark.parametrize('bound', [float('inf'), 2.])
def test_the_backbones_option(bound, pictures, tmp_path):
    """relu_bound of a config reaches the network, and a checkpoint brings it back."""
    config = segmentation(pictures, tmp_path, iters=2, backbone=dict(relu_bound=bound))
    made = Runner.from_cfg(config)
    made.train()
    expected = None if bound == float('inf') else bound
    assert made.model.backbone.stages[0].blocks[0].act1.limit == expected
    saved = torch.load(tmp_path / 'iter_2.pth', weights_only=True)['state_dict']
    assert saved.get('backbone.stages.1.blocks.0.act1.bound') == (None if expected is None else torch.tensor(bound))
    other = segmentation(pictures, tmp_path / 'other', iters=2)
    other.load_from = str(tmp_path / 'iter_2.pth')
    loaded = Runner.from_cfg(other)
    loaded.load_or_resume()
    assert loaded.model.backbone.stages[0].blocks[0].act1.limit == expected
