"""Training through MMEngine's Runner: resuming, loading, low precision, accumulation, freezing, averaging."""
import itertools
import random

import pytest

pytest.importorskip('mmdet', reason='needs the mm extra')
pytest.importorskip('mmseg', reason='needs the mm extra')

import numpy as np
import torch
from mmengine.runner import Runner

from san_backbones.mm.exact_resume import _Reseeding
from tests.mm.tiny_training import (  # noqa: F401
    ARCH, Recorder, detection, make_pictures, plain_configs, segmentation, train)

EXACT = [dict(type='ExactResumeHook')]
# everything random at once: order, flips and colours, dropout of the head, stochastic depth
RANDOM = dict(augment=True, batch_size=1, backbone=dict(drop_path_rate=0.3))


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp('pictures'))


class TestResume:
    @staticmethod
    def _runs(build, pictures, folder, stop, checkpoint, workers=0, **kwargs):
        """Losses of the iterations after the checkpoint, and last weights, without and with an interruption."""
        def config(name):
            config = build(pictures, folder / name, **kwargs)
            config.train_dataloader.num_workers = workers
            return config
        whole, recorded = train(config('whole'))
        _, before = train(config('parts'), stop=stop)
        assert all(before.losses[i] == recorded.losses[i] for i in range(1, stop + 1)), 'not even the start repeats'
        config = config('parts')
        config.resume = True
        resumed, after = train(config)
        assert min(after.losses) == checkpoint + 1 and max(after.losses) == max(recorded.losses)
        return recorded.losses, after.losses, whole.model.state_dict(), resumed.model.state_dict(), \
            recorded.metrics, after.metrics

    @pytest.mark.parametrize('build, kwargs, stop, checkpoint', [
        (segmentation, dict(RANDOM, dropout=0.3, iters=6), 5, 4),
        (segmentation, dict(RANDOM, dropout=0.3, epochs=3), 6, 4),  # in the middle of the second of 4 iterations each
        (detection, dict(RANDOM, iters=6), 5, 4),
        (detection, dict(RANDOM, epochs=2), 6, 4),
        (segmentation, dict(RANDOM, iters=6, workers=2), 5, 4),
        (segmentation, dict(RANDOM, epochs=2, workers=2), 6, 4),
    ])
    def test_losses_weights_and_metrics_are_those_of_one_run(self, build, kwargs, stop, checkpoint, pictures, tmp_path):
        losses, after, weights, resumed, metrics, metrics_after = self._runs(
            build, pictures, tmp_path, stop, checkpoint, custom_hooks=EXACT, **kwargs)
        for i, values in after.items():
            assert values == losses[i], f'iteration {i}'
        assert weights.keys() == resumed.keys() and all(torch.equal(weights[n], resumed[n]) for n in weights)
        assert metrics_after == metrics[-len(metrics_after):]

    @pytest.mark.parametrize('kwargs', [dict(iters=6), dict(epochs=2)])
    def test_without_the_hook_randomness_starts_anew(self, kwargs, pictures, tmp_path):
        losses, after, *_ = self._runs(segmentation, pictures, tmp_path, 5, 4, **RANDOM, **kwargs)
        assert any(values != losses[i] for i, values in after.items()), 'MMEngine does it alone: the hook can go'

    @pytest.mark.parametrize('kwargs', [dict(iters=6), dict(epochs=2)])
    def test_without_randomness_mmengine_alone_is_exact(self, kwargs, pictures, tmp_path):
        losses, after, *_ = self._runs(segmentation, pictures, tmp_path, 5, 4, batch_size=1, **kwargs)
        assert all(values == losses[i] for i, values in after.items())

    def test_every_iteration_has_its_own_randomness(self):
        def draw():
            return random.random(), float(np.random.rand()), float(torch.rand(()))
        first = list(itertools.islice(_Reseeding(iter(draw, None), 3), 5))
        assert all(len({numbers[kind] for numbers in first}) == 5 for kind in range(3))
        resumed = _Reseeding(iter(lambda: None, 1), 3)
        for _ in range(3):  # drawn again, and with another appetite for random numbers
            next(resumed)
        resumed._iterator = iter(draw, None)
        assert next(resumed) == first[3]
        assert next(_Reseeding(iter(draw, None), 4)) != first[0]
        resumed = _Reseeding(iter(draw, None), 3)
        resumed.skip_iter(3)  # as onedl-mmengine goes to where it was
        assert next(resumed) == first[3]

    @pytest.mark.parametrize('passes', [dict(epochs=3), dict(iters=12)], ids=['epochs', 'iterations'])
    @pytest.mark.parametrize('hooks', [EXACT, []], ids=['hook', 'mmengine'])
    def test_every_pass_over_the_data_augments_differently_in_workers(self, hooks, passes, pictures, tmp_path,
                                                                      monkeypatch):
        config = segmentation(pictures, tmp_path, augment=True, batch_size=1, custom_hooks=hooks, **passes)
        config.train_dataloader.update(num_workers=1, sampler=dict(type='DefaultSampler', shuffle=False))
        config.optim_wrapper.optimizer.lr = 0.  # a picture's loss changes with its augmentation alone
        monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
        losses = list(train(config)[1].losses.values())
        same = [losses[i] == losses[i + 4] for i in range(8)]
        assert same == [not hooks] * 8, 'MMEngine does it alone: _seed_worker can go'

    def test_a_seed_is_needed(self, pictures, tmp_path):
        config = segmentation(pictures, tmp_path, custom_hooks=EXACT)
        config.randomness = dict(seed=None)
        with pytest.raises(ValueError, match='ExactResumeHook needs a seed.*randomness=dict.*None'):
            train(config)

    def test_persistent_workers_are_warned_about(self, pictures, tmp_path):
        config = segmentation(pictures, tmp_path, custom_hooks=EXACT, epochs=0)
        config.train_dataloader.update(num_workers=1, persistent_workers=True)
        train(config)
        assert 'persistent_workers=False' in ''.join(p.read_text() for p in tmp_path.rglob('*.log'))


@pytest.mark.parametrize('build', [segmentation, detection])
def test_load_from_and_test_from_a_checkpoint(build, pictures, tmp_path):
    trained, recorded = train(build(pictures, tmp_path / 'first', epochs=1))
    saved = tmp_path / 'first/epoch_1.pth'
    weights = trained.model.state_dict()

    config = build(pictures, tmp_path / 'test')
    config.load_from = str(saved)
    config.randomness = dict(seed=5)  # other initial weights
    runner, tested = Runner.from_cfg(config), Recorder()
    assert not torch.equal(runner.model.backbone.stem.conv.weight, weights['backbone.stem.conv.weight'])
    runner.register_hook(tested)
    runner.test()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in runner.model.state_dict().items())
    assert tested.metrics == recorded.metrics[-1:] and tested.metrics[0]

    config = build(pictures, tmp_path / 'second', epochs=1)
    config.load_from = str(saved)
    config.optim_wrapper.optimizer.lr = 0.
    runner, continued = train(config)
    assert min(continued.losses) == 1, 'load_from starts counting anew'
    assert all(torch.equal(p, weights[name]) for name, p in runner.model.named_parameters())


@pytest.mark.parametrize('build', [segmentation, detection])
@pytest.mark.parametrize('attention', ['pairwise', 'patchwise'])
def test_bfloat16(attention, build, pictures, tmp_path):
    arch = dict(ARCH, attention=attention)
    losses = {}
    for wrapper in ('OptimWrapper', 'AutocastOptimWrapper'):
        config = build(pictures, tmp_path / wrapper, epochs=2, backbone=dict(arch=arch))
        config.optim_wrapper.type = wrapper
        runner = Runner.from_cfg(config)
        dtypes = set()
        runner.model.backbone.stages[2].blocks[0].attn.register_forward_hook(
            lambda module, args, output: dtypes.add(output.dtype) if module.training else None)
        recorder = Recorder()
        runner.register_hook(recorder)
        runner.train()
        losses[wrapper] = [values['loss'] for values in recorder.losses.values()]
        assert dtypes == {torch.bfloat16 if wrapper == 'AutocastOptimWrapper' else torch.float32}
    for name, p in runner.model.named_parameters():
        gradient = recorder.gradients[name]
        assert p.dtype == gradient.dtype == torch.float32 and gradient.isfinite().all(), name
    assert len(set(losses['OptimWrapper'])) > 2
    # a map is rounded to 8 bits of mantissa, 0.4 %, about 40 times on its way to the loss: 0.4 % * sqrt(40) = 2.5 %,
    # and what the first steps learned differently on top
    assert losses['AutocastOptimWrapper'] == pytest.approx(losses['OptimWrapper'], rel=0.05)


def test_mmengine_refuses_its_own_amp_on_the_cpu(pictures, tmp_path):
    """Why AutocastOptimWrapper exists."""
    if torch.cuda.is_available():
        pytest.skip('has a GPU')
    config = segmentation(pictures, tmp_path)
    config.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
    with pytest.raises(AssertionError, match='only available'):
        train(config)


def test_accumulated_gradients_are_those_of_the_whole_batch(pictures, tmp_path):
    weights = {}
    for batch_size, counts in ((4, 1), (2, 2)):
        config = segmentation(pictures, tmp_path / str(counts), batch_size=batch_size, epochs=1, norm=None,
                              backbone=dict(norm_eval=True))  # statistics of a batch would not be those of its halves
        # one step without momentum, at a learning rate of 1: what weights move by is the gradient
        config.optim_wrapper = dict(optimizer=dict(type='SGD', lr=1.), accumulative_counts=counts)
        config.param_scheduler = []
        runner, recorder = train(config)
        assert len(recorder.losses) == counts
        weights[counts] = dict(runner.model.named_parameters())
        torch.manual_seed(0)
    initial = dict(Runner.from_cfg(config).model.named_parameters())
    for name in initial:
        whole, halves = (initial[name].detach() - weights[counts][name].detach() for counts in (1, 2))
        assert (whole - halves).norm() <= 1e-4 * whole.norm() + 1e-6, name
    assert sum(not torch.equal(initial[name], weights[1][name]) for name in initial) > 0.9 * len(initial)


def test_with_cp_trains_a_detector_alike(pictures, tmp_path):
    states = []
    for with_cp in (False, True):
        runner, recorder = train(detection(pictures, tmp_path / str(with_cp), epochs=1,
                                           backbone=dict(with_cp=with_cp, drop_path_rate=0.3)))
        states.append((recorder.losses, recorder.gradients, runner.model.state_dict()))
    for plain, checkpointed in zip(*states):
        assert plain.keys() == checkpointed.keys()
        for name in plain:
            torch.testing.assert_close(plain[name], checkpointed[name], msg=name)


@pytest.mark.parametrize('build', [segmentation, detection])
def test_frozen_stages_stay_as_they_are(build, pictures, tmp_path):
    config = build(pictures, tmp_path, epochs=2, backbone=dict(frozen_stages=2))  # validates between the epochs
    initial = Runner.from_cfg(config).model.state_dict()
    config.experiment_name += '_again'
    runner, recorder = train(config)
    assert len(recorder.metrics) == 2
    frozen = ('backbone.stem.', 'backbone.stages.0.', 'backbone.stages.1.')
    for name, tensor in runner.model.state_dict().items():
        if not name.endswith('.bound'):  # a setting
            assert torch.equal(tensor, initial[name]) == name.startswith(frozen), name
    for name, _ in runner.model.named_parameters():
        assert (name in recorder.gradients) != name.startswith(frozen), name
    for name, module in runner.model.train().named_modules():
        assert module.training != (name + '.').startswith(frozen), name


class _Averages(Recorder):
    """Also the weights after every iteration, and those that evaluation sees."""

    def before_train(self, runner):
        super().before_train(runner)
        self.weights, self.evaluated = [], []
        runner.model.backbone.register_forward_pre_hook(
            lambda module, args: None if module.training else self.evaluated.append(self._copy(runner)))

    @staticmethod
    def _copy(runner):
        return {name: p.detach().clone() for name, p in runner.model.named_parameters()}

    def after_train_iter(self, runner, *args, **kwargs):
        self.weights.append(self._copy(runner))
        super().after_train_iter(runner, *args, **kwargs)


@pytest.mark.parametrize('build', [segmentation, detection])
def test_averaged_weights(build, pictures, tmp_path):
    def config(name):
        return build(pictures, tmp_path / name, epochs=2, custom_hooks=[
            *EXACT, dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.25)])

    runner, recorder = Runner.from_cfg(config('whole')), _Averages()
    runner.register_hook(recorder)
    runner.train()
    average = recorder.weights[0]
    for weights in recorder.weights[1:]:
        average = {name: 0.75 * average[name] + 0.25 * weights[name] for name in weights}
    saved = torch.load(tmp_path / 'whole/epoch_2.pth', weights_only=True)['state_dict']
    for name, expected in average.items():
        torch.testing.assert_close(saved[name], expected, msg=name)
        assert torch.equal(recorder.evaluated[-1][name], saved[name]), 'evaluated other weights than the averages'
    assert any((average[name] - recorder.weights[-1][name]).abs().max() > 1e-4 for name in average)

    train(config('parts'), stop=3)
    again = config('parts')
    again.resume = True
    train(again)
    resumed = torch.load(tmp_path / 'parts/epoch_2.pth', weights_only=True)
    assert all(torch.equal(resumed['state_dict'][name], saved[name]) for name in saved)
