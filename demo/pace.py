"""Keeps a training within a time limit, and prints its progress."""

import time

from mmengine.hooks import Hook


class Pace(Hook):
    """Prints progress, and lets a slow machine finish in time.

    The config's schedules (warm-up, decay) count iterations. If time runs faster than iterations, this hook advances
    the schedules in proportion to the elapsed time: the learning rate follows the same curve in fewer, larger steps,
    and the training ends when the iterations or the time are used up. On a fast enough machine the hook changes
    nothing, and results do not depend on the clock.

    Args:
        seconds: Most seconds that the training may take.
        say: Called with each line of progress.
        every: Seconds between two such lines.
        midway: Called once, when half of the training is done; the time that it takes does not count.
    """

    def __init__(self, seconds, say, every=10, midway=None):
        self.seconds, self.say, self.every, self.midway = seconds, say, every, midway

    def before_train(self, runner):
        self.start = self.spoke = time.monotonic()
        self.done = 0  # iterations
        self.position = 0  # in the schedule: equal to `done`, or ahead of it if time runs short
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        now = time.monotonic()
        elapsed = now - self.start
        self.done += 1
        self.position += 1  # by mmengine's own ParamSchedulerHook
        self.losses.append(outputs['loss'].item())
        due = min(runner.max_iters, int(runner.max_iters * elapsed / self.seconds))
        while self.position < due:
            for scheduler in runner.param_schedulers:
                scheduler.step()
            self.position += 1

        finished = self.position >= runner.max_iters
        if finished:
            runner.train_loop.stop_training = True
        if finished or self.done == 1 or now - self.spoke >= self.every:
            left = elapsed / self.position * (runner.max_iters - self.position)
            loss = sum(self.losses) / len(self.losses)
            self.say(f'  iteration {self.done:4d} of {runner.max_iters}   loss {loss:6.3f}   '
                     f'{clock(elapsed)} gone, {clock(left)} to go')
            self.spoke, self.losses = now, []
        self.elapsed = elapsed
        if self.midway is not None and not finished and self.position >= runner.max_iters / 2:
            midway, self.midway = self.midway, None
            midway()
            away = time.monotonic() - now
            self.start, self.spoke = self.start + away, self.spoke + away


def clock(seconds):
    """Formats seconds as minutes and seconds, such as 4:05."""
    return '{}:{:02d}'.format(*divmod(round(seconds), 60))
