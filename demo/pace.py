"""Keeps a training within its time, and says how it is going."""

import time

from mmengine.hooks import Hook


class Pace(Hook):
    """Shows progress, and makes a slow machine finish in time.

    The config's schedules (warm-up, decay) count iterations. Where the time runs faster than the iterations, this hook
    advances the schedules further, in proportion to the time that has gone: the learning rate goes through the same
    curve in fewer, larger strides, and the training ends when either the iterations or the time are used up. A machine
    that is fast enough never notices; what it computes does not depend on the clock.

    Args:
        seconds: Most seconds the training may take.
        say: Called with each line of progress.
        every: Seconds between two such lines.
    """

    def __init__(self, seconds, say, every=10):
        self.seconds, self.say, self.every = seconds, say, every

    def before_train(self, runner):
        self.start = self.spoke = time.monotonic()
        self.done = 0    # iterations
        self.place = 0   # in the schedule: as many iterations, or more where time runs short
        self.losses = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        now = time.monotonic()
        elapsed = now - self.start
        self.done += 1
        self.place += 1  # by mmengine's own ParamSchedulerHook
        self.losses.append(outputs['loss'].item())
        due = min(runner.max_iters, int(runner.max_iters * elapsed / self.seconds))
        while self.place < due:
            for scheduler in runner.param_schedulers:
                scheduler.step()
            self.place += 1

        finished = self.place >= runner.max_iters
        if finished:
            runner.train_loop.stop_training = True
        if finished or self.done == 1 or now - self.spoke >= self.every:
            left = elapsed / self.place * (runner.max_iters - self.place)
            loss = sum(self.losses) / len(self.losses)
            self.say(f'  iteration {self.done:4d} of {runner.max_iters}   loss {loss:6.3f}   '
                     f'{clock(elapsed)} gone, {clock(left)} to go')
            self.spoke, self.losses = now, []
        self.elapsed = elapsed


def clock(seconds):
    """Minutes and seconds, as 4:05."""
    return '{}:{:02d}'.format(*divmod(round(seconds), 60))
