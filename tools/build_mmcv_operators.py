"""Compiles the CPU operators of mmcv that `record_mmcv_cases.py` records, in about two minutes on one core.

Compiling all of mmcv 2.1.0 takes half an hour, and its setup does not support today's torch. In the repository's root:

    pip download --no-deps --no-binary mmcv --no-build-isolation mmcv==2.1.0
    tar xzf mmcv-2.1.0.tar.gz
    MAX_JOBS=1 nice python -m tools.build_mmcv_operators mmcv-2.1.0 build

The last command needs a C++ compiler and ninja, and writes `build/_ext.so`.
"""
import re
import sys
from pathlib import Path

from torch.utils.cpp_extension import load

# Each has one file that selects the device and one for the CPU. The last one defines macros `min` and `max`.
SOURCES = ['bbox_overlaps', 'box_iou_rotated', 'deform_conv', 'modulated_deform_conv', 'nms', 'nms_rotated',
           'roi_align', 'psamask']
OPERATORS = {
    'bbox_overlaps', 'box_iou_rotated', 'deform_conv_backward_input', 'deform_conv_backward_parameters',
    'deform_conv_forward', 'modulated_deform_conv_backward', 'modulated_deform_conv_forward', 'nms', 'nms_match',
    'nms_rotated', 'psamask_backward', 'psamask_forward', 'roi_align_backward', 'roi_align_forward', 'softnms'}


def extension(source: Path) -> str:
    """Returns one C++ file: mmcv's files of `SOURCES`, and the bindings of `OPERATORS` in `source / 'pybind.cpp'`."""
    files = [file for name in SOURCES
             for file in (f'{name}.cpp', f'cpu/{name}_cpu.cpp' if name == 'bbox_overlaps' else f'cpu/{name}.cpp')]
    declarations, definitions = (source / 'pybind.cpp').read_text().split('PYBIND11_MODULE')
    bindings = [binding for binding in re.findall(r'm\.def\(.*?\);', definitions, re.DOTALL)
                if re.match(r'm\.def\("(\w+)"', binding)[1] in OPERATORS]
    assert len(bindings) == len(OPERATORS), 'this is not the pybind.cpp of mmcv 2.1.0'
    return '\n'.join([declarations, *(f'#include "{source / file}"' for file in files),
                      'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {', *bindings, '}'])


def build(mmcv: Path, folder: Path) -> None:
    """Compiles the operators from the unpacked sources `mmcv` to `folder / '_ext.so'`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = mmcv.resolve() / 'mmcv/ops/csrc'
    whole = folder / 'operators.cpp'
    whole.write_text(extension(source / 'pytorch'))
    load('_ext', [str(whole)], extra_cflags=['-O1', '-std=c++20'], build_directory=str(folder),
         extra_include_paths=[str(source), str(source / 'common'), str(source / 'pytorch')], verbose=True)


if __name__ == '__main__':
    build(*map(Path, sys.argv[1:]))
