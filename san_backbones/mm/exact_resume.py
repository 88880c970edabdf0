"""Resumes a training as if it had never stopped."""
from functools import partial
from typing import Any
from collections.abc import Callable, Iterator

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import set_random_seed

from .checkpoints import resume_from_whole

__all__ = ['ExactResumeHook']


def _seed_all(*numbers: int) -> None:
    """Seeds Python, NumPy and torch in this process."""
    set_random_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def _reseed(seed: int, step: int) -> None:
    """Seeds this process for one epoch or iteration."""
    _seed_all(seed, get_rank(), step)


def _seed_worker(worker_id: int, other_duties: Callable[[int], None] | None) -> None:
    """Seeds a loader's worker differently in each pass over the data; MMEngine's worker_init_fn repeats one seed.

    Whenever torch starts workers, it draws their seed from the main process's generator, which `_reseed` has set.
    """
    seed = torch.initial_seed()
    if other_duties is not None:
        other_duties(worker_id)
    _seed_all(seed)


class _Reseeding:
    """An iterator that reseeds before each item, by the item's number."""

    def __init__(self, iterator: Iterator, seed: int):
        self._iterator, self._seed, self._step = iterator, seed, 0

    def __iter__(self) -> '_Reseeding':
        return self

    def __next__(self) -> Any:
        _reseed(self._seed, self._step)
        self._step += 1
        return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """Draws the items that a resumed loop has seen; onedl-mmengine skips them, and workers augment differently."""
        for _ in range(num_iters):
            next(self)


class ExactResumeHook(Hook):
    """Makes losses after a resume equal to those of an uninterrupted run, bit for bit with deterministic operators.

    MMEngine restores weights, optimizer, schedules and the position in the data, but random augmentation, dropout and
    stochastic depth restart from the seed. With this hook in both runs, randomness is a function of seed, rank and
    epoch (or iteration, in an iteration-based loop), so that checkpoints need no random state.

        randomness = dict(seed=0)
        custom_hooks = [dict(type='ExactResumeHook')]

    It works for iteration-based loops, and for epoch-based loops that resume at the end of an epoch. Epoch-based loops
    that augment in worker processes need `persistent_workers=False`; otherwise a warning is logged. MMEngine saves no
    gradients: if they accumulate, save at multiples of `accumulative_counts` iterations.

    A training that was killed while it saved resumes from the last complete checkpoint. With `max_keep_ckpts=1` there
    may be none, since MMEngine removes the previous one first; a warning is logged.

    Raises:
        ValueError: `randomness` names no seed; without one the order of the data differs from run to run.
    """

    def before_run(self, runner: Any) -> None:
        """Skips checkpoints that an interruption truncated."""
        resume_from_whole(runner)
        if any(isinstance(hook, CheckpointHook) and hook.max_keep_ckpts == 1 for hook in runner.hooks):
            runner.logger.warning('ExactResumeHook: with max_keep_ckpts=1 the only checkpoint is removed before the '
                                  'next is saved, and a training that is killed meanwhile has none; keep 2 or more')

    def before_train(self, runner: Any) -> None:
        """Checks that the order of the data can be repeated, and makes each pass augment differently."""
        seed = runner._randomness_cfg.get('seed')
        if seed is None:
            raise ValueError(f'ExactResumeHook needs a seed, for instance randomness=dict(seed=0), got '
                             f'randomness={dict(runner._randomness_cfg)}')
        loader = runner.train_loop.dataloader
        if not hasattr(runner.train_loop, 'dataloader_iterator') and loader.num_workers and loader.persistent_workers:
            runner.logger.warning('ExactResumeHook: workers that persist over epochs augment differently after a '
                                  'resume; set persistent_workers=False in train_dataloader')
        # in an iteration-based loop the first workers run already, until the data are used up (with an InfiniteSampler
        # never); after a resume they augment the skipped items again
        loader.worker_init_fn = partial(_seed_worker, other_duties=loader.worker_init_fn)

    def before_train_epoch(self, runner: Any) -> None:
        """Seeds this epoch; in an iteration-based loop, which calls this once, each coming iteration."""
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            # after a resume the loop first draws what was already seen, so the count reaches its iteration
            loop.dataloader_iterator = _Reseeding(loop.dataloader_iterator, runner.seed)
        else:
            _reseed(runner.seed, runner.epoch)
