"""Compares SAN15 in its fastest form with ResNet-50 in the runtimes that people deploy, at 224 x 224 in float32.

    python benchmarks/runtimes.py                  # batches of 8 and of 1
    python benchmarks/runtimes.py --batch 1 --rounds 20
    python benchmarks/runtimes.py --low            # in 8 bits and in bfloat16 beside float32

`eager` is the model as timm makes it, in channels_last; `fused` SAN after `fuse_for_inference()`; `frozen`
torch.compile with `torch._inductor.config.freezing`; `onnxruntime` and `OpenVINO` run ONNX files with fixed sizes.
`int8` is `fuse_for_inference(int8=True)`, or the ONNX file after `quantize_onnx`, its weights in whole 8 bits; `bf16`
the model in bfloat16, or OpenVINO's hint for it.
Every case is a process of its own with the same number of threads, so that no runtime's waiting threads disturb
another; in a round each of them runs a few times, one process after the other. OpenVINO needs the extra `openvino`.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

CASES = [('resnet50', way) for way in ('eager', 'frozen', 'onnxruntime', 'OpenVINO')] + [
    (model, way) for model in ('san15_pairwise', 'san15_patchwise') for way in ('fused', 'onnxruntime', 'OpenVINO')]
CASES_LOW = [  # not files of the pairwise form: it was not quantised within 100 s
    *(('resnet50', way) for way in ('eager', 'eager bf16', 'OpenVINO', 'OpenVINO bf16', 'OpenVINO int8')),
    *(('san15_pairwise', way) for way in ('fused', 'fused bf16', 'fused int8')),
    *(('san15_patchwise', way) for way in ('fused', 'fused bf16', 'fused int8', 'OpenVINO', 'OpenVINO bf16',
                                           'OpenVINO int8'))]
SIZE = 224
CALLS = {8: 3, 1: 10}  # in a round, by batch


def build(name, way, batch, threads):
    """Returns a function that classifies one batch."""
    import timm
    import torch

    import san_backbones
    from san_backbones.export import KEEP_FLOAT, export_onnx, quantize_onnx
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False).eval()  # a runtime might leave out what is times zero
    images = torch.randn(batch, 3, SIZE, SIZE)
    way, _, precision = way.partition(' ')
    int8, bf16 = precision == 'int8', precision == 'bf16'
    if way in ('onnxruntime', 'OpenVINO'):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, 'model.onnx')
            if name.startswith('san'):
                export_onnx(model, path, SIZE, batch, dynamic=False, verify=False)
            else:
                torch.onnx.export(model, (images,), path, dynamo=False)
            if int8:
                quantize_onnx(path, path, [images], KEEP_FLOAT if 'pairwise' in name else (), reduce_range=False)
            if way == 'onnxruntime':
                return onnxruntime_of(str(path), images.numpy(), threads)
            return openvino_of(str(path), images.numpy(), threads, 'bf16' if bf16 else 'f32')
    model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    if bf16:
        model, images = model.bfloat16(), images.bfloat16()
    if way == 'fused':
        san_backbones.fuse_for_inference(model, int8)
    if way == 'frozen':
        import torch._inductor.config
        torch._inductor.config.freezing = True
        model = torch.compile(model, dynamic=False)

    def call():
        with torch.inference_mode():
            model(images)
    return call


def onnxruntime_of(path, images, threads):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def openvino_of(path, images, threads, precision):
    import openvino
    model = openvino.Core().compile_model(path, 'CPU', {
        'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': precision})
    request = model.create_infer_request()
    return lambda: request.infer({0: images})


def serve(case):
    """Runs the case as often as each line of the standard input says, and prints the seconds of each call."""
    call = build(*case)
    for _ in range(3):
        call()
    print('ready', flush=True)
    for line in sys.stdin:
        call()  # wakes threads, fills caches
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def start(case, threads):
    environment = {name: value for name, value in os.environ.items() if name != 'OMP_WAIT_POLICY'}
    environment['OMP_NUM_THREADS'] = str(threads)
    return subprocess.Popen([sys.executable, __file__, '--case', json.dumps(case)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=environment)


def answer(process):
    """The next line that means something: exporters print, too."""
    for line in process.stdout:
        if line.startswith(('ready', '[')):
            return line
    raise SystemExit('a case failed, see above')


def main():
    import harness
    import torch
    options = harness.parser(__doc__.splitlines()[0], precisions=False)
    options.add_argument('--batch', type=int, nargs='+', default=[8, 1])
    options.add_argument('--only', default='', help='run what contains this, as "pairwise fused", and resnet50')
    options.add_argument('--low', action='store_true', help='in 8 bits and in bfloat16, and float32 beside them')
    options = options.parse_args()
    threads, machine, rows = torch.get_num_threads(), harness.machine(), []
    print(machine)
    left_out = {'frozen'} if options.no_compile else set()
    left_out |= {package for package in ('onnxruntime', 'OpenVINO') if not importlib.util.find_spec(package.lower())}
    for batch in options.batch:
        cases = [(model, way) for model, way in (CASES_LOW if options.low else CASES)
                 if way.partition(' ')[0] not in left_out and (options.only in f'{model} {way}' or model == 'resnet50')]
        processes = []
        for case in cases:  # one after the other: compilers and exporters need memory
            processes.append(start([*case, batch, threads], threads))
            answer(processes[-1])
        times = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case, process in zip(cases, processes):
                process.stdin.write(f'{CALLS.get(batch, 3)}\n')
                process.stdin.flush()
                times[case] += json.loads(answer(process))
        for process in processes:
            process.stdin.close()
            process.wait()
        medians = {case: statistics.median(found) for case, found in times.items()}
        best = min(medians[case] for case in cases if case[0] == 'resnet50')  # with --low in 8 bits
        for case in cases:
            rows.append(dict(
                batch=batch, model=case[0], runtime=case[1], milliseconds=harness.figure(medians[case] * 1e3, 1),
                fastest_milliseconds=harness.figure(min(times[case]) * 1e3, 1),
                images_per_second=harness.figure(batch / medians[case], 1),
                speed_to_best_resnet50=harness.ratio(best, medians[case]), machine=machine))
            harness.show(rows[-1])
    precision = 'low-' if options.low else ''
    harness.write(options.results / f'runtimes-{precision}{harness.suffix("fp32")}.csv', rows)


if __name__ == '__main__':
    child = argparse.ArgumentParser(add_help=False)
    child.add_argument('--case')
    found = child.parse_known_args()[0].case
    if found:
        serve(json.loads(found))
    else:
        main()
