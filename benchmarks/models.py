"""Measures throughput and peak memory of whole models, ours and their peers in turns, in inference and training.

    python benchmarks/models.py            # everything; --only 224 or --only 800x1344 for a part

Inference at 224 x 224 runs the classifier. At 800 x 1344, and in training, models return the four feature maps of a
detection backbone; at 800 x 1344 norms are frozen (running statistics), as in detectors. Inputs and peers are in
channels_last. `reference` is SAN by its plain definition, `compiled` the same under torch.compile, `fused` ours after
`fuse_for_inference()`. The floor is the model's multiply-adds, three times for training, over the rate of a large
matrix product that takes its turns with them.
"""

import harness
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import san_backbones
from san_backbones.count import count_multiply_adds

SETTINGS = {  # name: batch, height, width, training
    '224 inference, batch 8': (8, 224, 224, False),
    '224 inference, batch 1': (1, 224, 224, False),
    '224 training step, batch 8': (8, 224, 224, True),
    '800x1344 inference, batch 1': (1, 800, 1344, False),
    '800x1344 training step, frozen norms, batch 1': (1, 800, 1344, True),
}
LARGE_BATCHES = {  # for GPUs
    '224 inference, batch 64': (64, 224, 224, False),
    '224 training step, batch 64': (64, 224, 224, True),
    '800x1344 training step, frozen norms, batch 4': (4, 800, 1344, True),
}
OURS = ('san15_pairwise', 'san15_patchwise')
PEERS = ('resnet50', 'convnext_tiny', 'swin_tiny_patch4_window7_224')
BASELINE = 'resnet50'


def names(training, compile_too):
    """Returns the cases: a model's name, a space and how it runs."""
    ways = ['', *([] if training else [' fused']), ' reference', *([' compiled'] if compile_too else [])]
    return [*PEERS, *(name + way for name in OURS for way in ways)]


def is_large(setting):
    return setting[1] > 224


def build(case, setting, device):
    """Builds the model of a case."""
    name, _, way = case.partition(' ')
    batch, height, width, training = setting
    options = dict(img_size=(height, width)) if name.startswith('swin') and is_large(setting) else {}
    if training or is_large(setting):
        options.update(features_only=True, out_indices=(0, 1, 2, 3) if not name.startswith(('san', 'resnet')) else
                       (1, 2, 3, 4))
    torch.manual_seed(0)
    model = timm.create_model(name, **options).to(device, memory_format=torch.channels_last).train(training)
    if training and is_large(setting):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    if way == 'fused':
        san_backbones.fuse_for_inference(model)
    return model


def make(case, setting, dtype):
    """Returns a function that runs the case once."""
    batch, height, width, training = setting
    model = build(case, setting, harness.DEVICE)
    way = case.partition(' ')[2]
    images = torch.randn(batch, 3, height, width, device=harness.DEVICE).to(memory_format=torch.channels_last)
    called = torch.compile(model, dynamic=False) if way == 'compiled' else model
    path = 'reference' if way in ('reference', 'compiled') else 'auto'

    def call():
        with san_backbones.ops.use_backend(path), harness.autocast(dtype):
            if not training:
                with torch.inference_mode():
                    called(images)
                return
            model.zero_grad(set_to_none=True)
            sum(features.mean() for features in called(images)).backward()
    return call


def operations(case, setting):
    """Counts floating point operations of a call: linear maps, convolutions and aggregations."""
    batch, height, width, training = setting
    name = case.partition(' ')[0]
    if name.startswith('san'):
        forward = 2 * batch * count_multiply_adds(timm.create_model(name, device='meta'), (height, width))
    else:
        model = build(name, setting, 'meta')
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(batch, 3, height, width, device='meta'))
        forward = counter.get_total_flops()
    return forward * (3 if training else 1)


def main():
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument('--only', default='', help='run the settings whose name begins so')
    options.add_argument('--without', nargs='*', default=[], help='leave out cases whose name contains one of these')
    options = options.parse_args()
    if harness.asked_for_memory(options, make):
        return
    rows, machine, dtype = [], harness.machine(), harness.set_precision(options.precision)
    print(machine)
    settings = SETTINGS if harness.DEVICE.type == 'cpu' else {**SETTINGS, **LARGE_BATCHES}
    for title, setting in settings.items():
        if not title.startswith(options.only):
            continue
        print(f'\n{title}', flush=True)
        floors = harness.Floor(dtype)
        cases = [case for case in names(setting[3], not options.no_compile and not is_large(setting) and setting[0] > 1)
                 if not any(word in case for word in options.without)]
        # on the CPU the compiler's memory would count too
        peaks = {case: None if case.endswith(' compiled') and harness.DEVICE.type == 'cpu' else
                 harness.peak_memory((case, setting, options.precision)) for case in cases}
        functions = {case: make(case, setting, dtype) for case in cases}
        medians = harness.alternate({**functions, **floors.cases}, options.rounds)
        for case in cases:
            floor = floors.seconds(medians, operations(case, setting))
            milliseconds, peak = medians[case] * 1e3, peaks[case]
            row = dict(
                setting=title, model=case, milliseconds=harness.figure(milliseconds, 1),
                images_per_second=harness.ratio(setting[0], medians[case]),
                throughput_to_resnet50=harness.ratio(medians[BASELINE], medians[case]),
                floor_milliseconds=harness.figure(floor * 1e3, 1), times_floor=harness.ratio(medians[case], floor, 1),
                peak_megabytes=harness.figure(peak and peak / 1e6),
                peak_to_resnet50=harness.ratio(peak, peaks.get(BASELINE)), machine=machine)
            rows.append(row)
            harness.show(row)
        del functions
    harness.write(options.results / f'models-{harness.suffix(options.precision)}.csv', rows)


if __name__ == '__main__':
    main()
