"""Builds the optional C loops; everything else about the package is in setup.cfg."""
import os
import pathlib
import platform
import shutil
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# one build for each instruction set: san_backbones.ops.native takes the best that the processor has
INSTRUCTION_SETS = {'baseline': []}
if platform.machine().lower() in ('x86_64', 'amd64'):
    INSTRUCTION_SETS.update(avx2=['-march=x86-64-v3'], avx512=['-march=x86-64-v4', '-mprefer-vector-width=512'])
SOURCES = ('footprint', 'backward', 'pointwise', 'threads')
# set to 1, an installation without them fails; otherwise it goes on, and the package says so at first use
REQUIRED = os.environ.get('SAN_BACKBONES_REQUIRE_LOOPS', '') not in ('', '0')
FLAGS = ['-O3', '-std=gnu11', '-fno-math-errno', '-ffp-contract=fast', '-Wno-psabi']


class BuildLibrary(build_ext):
    """Plain shared libraries: no Python module is in them, so neither its name's suffix nor its entry point."""

    def get_ext_filename(self, fullname):
        return fullname.replace('.', '/') + ('.dll' if sys.platform == 'win32' else '.so')

    def get_export_symbols(self, ext):
        runs = (f'{name}_{what}' for name in ('san', 'san_backward', 'san_stem', 'san_scaled')
                for what in ('run', 'bytes'))
        return ['san_width', 'san_kmp_use', 'san_kmp_parallel', *runs]


class PlatformWheel(bdist_wheel):
    """The libraries fit a platform, not a Python."""

    def get_tag(self):
        return 'py3', 'none', super().get_tag()[2]


class BuildPackage(build_py):
    """Adds the configs as `san_backbones/.mim`, where OpenMMLab's mim looks for them, and the weights that ship."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib) / 'san_backbones' / '.mim'
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build left: a renamed config would ship twice
            shutil.copytree('mm_configs', target / 'mm_configs', ignore=shutil.ignore_patterns('__pycache__'))
            shutil.copy('model-index.yml', target)
            (target / 'tools').mkdir()
            for tool in ('train.py', 'test.py'):
                shutil.copy('san_backbones/mm/mim_tool.py', target / 'tools' / tool)
            weights = target.parent / '.weights'
            code = shutil.ignore_patterns('*.py', '__pycache__')
            shutil.copytree('weights', weights, dirs_exist_ok=True, ignore=code)


setup(
    ext_modules=[
        Extension(f'san_backbones.ops.native._{name}', [f'san_backbones/ops/native/{file}.c' for file in SOURCES],
                  depends=['san_backbones/ops/native/footprint.h'],
                  extra_compile_args=[*FLAGS, *flags], optional=not REQUIRED)
        for name, flags in INSTRUCTION_SETS.items()],
    cmdclass={'build_py': BuildPackage, 'build_ext': BuildLibrary, 'bdist_wheel': PlatformWheel},
)
