"""How fast something runs on this machine and how much memory it takes: used by the command line and by benchmarks/.

Times are medians over rounds in which every case runs once, one after the other, so that all of them see the same
machine. Peak memory is that of a process of its own for each case: on the CPU the highest resident size above that of
the process when everything is imported and nothing is built, on CUDA torch's own peak, weights included.
"""
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch

from . import fuse

__all__ = ['alternate', 'machine', 'make', 'measure_peak', 'peak_memory', 'processor', 'seconds']

_STATUS = '/proc/self/status'  # Linux only


def processor() -> str:
    """The processor's name, as the operating system has it."""
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as info:
            for line in info:
                if line.startswith('model name'):
                    return line.split(':')[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """The device and what drives it, in words."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    return f'{name}, torch {torch.__version__}'


def _synchronise(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, work that it left on the device included."""
    _synchronise(device)
    start = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - start


def _say(line: str) -> None:
    print(line, flush=True)


def alternate(
        cases: Mapping[str, Callable[[], Any]],
        rounds: int,
        device: torch.device,
        patience: float = 20.,
        report: Callable[[str], Any] = _say,
) -> dict[str, float]:
    """Median seconds of each case, measured in turns after one call to warm up.

    Args:
        cases: What runs, by name.
        rounds: Times that every case runs.
        device: Where it runs.
        patience: A case whose calls have taken more seconds than this sits out the rest of the rounds.
        report: Called with a line of text about a case that fails.

    Returns:
        Seconds by name; NaN for a case that failed.
    """
    times: dict[str, list[float] | None] = {name: [] for name in cases}
    for name, function in cases.items():
        try:
            function()
        except Exception as error:
            report(f'  {name} failed: {(str(error).strip().splitlines() or [repr(error)])[0][:200]}')
            times[name] = None
    for _ in range(rounds):
        for name, function in cases.items():
            taken = times[name]
            if taken is not None and sum(taken) < patience:
                taken.append(seconds(function, device))
    return {name: statistics.median(taken) if taken else math.nan for name, taken in times.items()}


def _resident(field: str) -> int:
    with open(_STATUS) as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def measure_peak(make: Callable[[], Callable[[], Any]], device: torch.device, calls: int = 2) -> int:
    """Bytes at the peak of building `make()` and calling its result. For a process of its own.

    Raises:
        RuntimeError: The device is a CPU and the system does not say how much memory a process has (it is not Linux).
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        function = make()
        for _ in range(calls):
            function()
        return torch.cuda.max_memory_allocated(device)
    if not os.path.exists(_STATUS):
        raise RuntimeError(f'peak memory on the CPU is measured on Linux only ({_STATUS} is not here)')
    idle = _resident('VmRSS')
    function = make()
    for _ in range(calls):
        function()
    return _resident('VmHWM') - idle


def peak_memory(command: Sequence[str], name: str, report: Callable[[str], Any] = _say) -> int | None:
    """Runs `command`, whose last word of output is bytes, in a process of its own.

    Args:
        command: The program and its arguments.
        name: What it measures, for messages.
        report: Called with a line of text where it fails.

    Returns:
        The bytes; None where it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        report(f'  {name}: no memory figure: {(done.stderr.strip().splitlines() or ["killed"])[-1]}')
        return None
    return int(done.stdout.split()[-1])


def make(
        name: str,
        batch_size: int,
        image_size: tuple[int, int],
        device: torch.device,
        training: bool = False,
        fused: bool = False,
) -> Callable[[], Any]:
    """A function that runs a timm model of random weights once, in float32 and channels_last.

    Args:
        name: The model.
        batch_size: Images in a call.
        image_size: (height, width) in pixels.
        device: Where it runs.
        training: Forward and backward of the classifier instead of its inference.
        fused: Fold for inference first (`fuse_for_inference`).
    """
    torch.manual_seed(0)
    model: Any = timm.create_model(name)
    model.to(device, memory_format=torch.channels_last).train(training)
    if fused:
        fuse.fuse_for_inference(model)
    channels = model.pretrained_cfg.get('input_size', (3,))[0]
    images = torch.randn(batch_size, channels, *image_size, device=device).to(memory_format=torch.channels_last)

    def call() -> Any:
        if not training:
            with torch.inference_mode():
                return model(images)
        model.zero_grad(set_to_none=True)
        model(images).mean().backward()
        return None
    return call


def _main() -> None:
    """In a process of its own: prints the peak of `make` with the arguments given as JSON."""
    arguments = json.loads(sys.argv[1])
    threads, device = arguments.pop('threads'), torch.device(arguments.pop('device'))
    if threads:
        torch.set_num_threads(threads)
    print(measure_peak(lambda: make(device=device, **arguments), device))


if __name__ == '__main__':
    _main()
