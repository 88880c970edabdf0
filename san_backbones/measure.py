"""Measures time and memory on this machine, for the command line and benchmarks/.

Times are medians over rounds in which every case runs once, in turns, so that load on the machine affects all cases
alike. Peak memory is measured in a separate process per case: on the CPU the highest resident size above that after the
imports, on CUDA torch's peak, weights included.
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
    """Returns the processor's name as the operating system reports it."""
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as info:
            for line in info:
                if line.startswith('model name'):
                    return line.split(':')[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """Describes the device, and for a CPU its threads and instructions, with torch's version."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    return f'{name}, torch {torch.__version__}'


def _synchronise(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Times one call, including the work that it queued on the device."""
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
        warm: bool = False,
) -> dict[str, float]:
    """Measures the median seconds of each case, in turns, after one warm-up call.

    Args:
        cases: Functions to run, by name.
        rounds: How often every case runs.
        device: Where they run.
        patience: A case that has taken more seconds than this in total skips the remaining rounds.
        report: Called with a line of text for a case that fails.
        warm: Whether each timed call follows one of the same case. Otherwise it finds the caches and the heap as the
            case before has left them.

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
                if warm:
                    function()
                taken.append(seconds(function, device))
    return {name: statistics.median(taken) if taken else math.nan for name, taken in times.items()}


def _resident(field: str) -> int:
    with open(_STATUS) as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def measure_peak(make: Callable[[], Callable[[], Any]], device: torch.device, calls: int = 2) -> int:
    """Returns the peak bytes of calling `make()` and then its result. Run it in a separate process.

    Raises:
        RuntimeError: The device is a CPU, and the system is not Linux.
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
    """Runs `command` in a separate process and reads the bytes from the last word of its output.

    Args:
        command: The program and its arguments.
        name: What it measures, for messages.
        report: Called with a line of text if it fails.

    Returns:
        The bytes; None if it failed.
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
    """Returns a function that runs a timm model with random weights once, in float32 and channels_last.

    Args:
        name: Name of the model.
        batch_size: Images per call.
        image_size: (height, width) in pixels.
        device: Where it runs.
        training: Run forward and backward instead of inference.
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
    """Prints the peak memory of `make` with arguments given as JSON; runs in a separate process."""
    arguments = json.loads(sys.argv[1])
    threads, device = arguments.pop('threads'), torch.device(arguments.pop('device'))
    if threads:
        torch.set_num_threads(threads)
    print(measure_peak(lambda: make(device=device, **arguments), device))


if __name__ == '__main__':
    _main()
