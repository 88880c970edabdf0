"""Builds the optional C loops; everything else about the package is in setup.cfg."""
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# SAN_BACKBONES_PLATFORM=TAG compiles for another platform, with zig (the package ziglang), whose names these are
PLATFORMS = {
    'manylinux_2_17_x86_64.manylinux2014_x86_64': 'x86_64-linux-gnu.2.17',
    'manylinux_2_17_aarch64.manylinux2014_aarch64': 'aarch64-linux-gnu.2.17',
    'musllinux_1_2_x86_64': 'x86_64-linux-musl',
    'musllinux_1_2_aarch64': 'aarch64-linux-musl',
    'macosx_11_0_arm64': 'aarch64-macos.11.0-none',
    'win_amd64': 'x86_64-windows-gnu',
}
PLATFORM = os.environ.get('SAN_BACKBONES_PLATFORM', '')
if PLATFORM not in ('', *PLATFORMS):
    sys.exit(f'SAN_BACKBONES_PLATFORM={PLATFORM}: expected one of {", ".join(PLATFORMS)}')
MACHINE = PLATFORMS[PLATFORM].partition('-')[0] if PLATFORM else platform.machine().lower()
WINDOWS = PLATFORM.startswith('win') if PLATFORM else sys.platform == 'win32'
# set to 1, an installation without the loops fails; otherwise it goes on, and the package says so at first use
REQUIRED = PLATFORM or os.environ.get('SAN_BACKBONES_REQUIRE_LOOPS', '') not in ('', '0')
# one build for each instruction set: san_backbones.ops.native takes the best that the processor has
INSTRUCTION_SETS = {'baseline': []}
if MACHINE in ('x86_64', 'amd64'):
    INSTRUCTION_SETS.update(avx2=['-march=x86-64-v3'], avx512=['-march=x86-64-v4', '-mprefer-vector-width=512'])
SOURCES = ('footprint', 'backward', 'differences', 'linear', 'pointwise', 'threads')
FLAGS = ['-O3', '-g0', '-std=gnu11', '-fno-math-errno', '-ffp-contract=fast', '-Wno-psabi',
         '-Werror=switch']  # a relation that a switch over them leaves out


class BuildLibrary(build_ext):
    """Plain shared libraries: no Python module is in them, so neither its name's suffix nor its entry point."""

    def get_ext_filename(self, fullname):
        return fullname.replace('.', '/') + ('.dll' if WINDOWS else '.so')

    def get_export_symbols(self, ext):
        runs = (f'{name}_{what}'
                for name in ('san', 'san_backward', 'san_differences', 'san_linear', 'san_normed', 'san_scaled',
                             'san_stem')
                for what in ('run', 'bytes'))
        return ['san_width', 'san_panel', 'san_int8', 'san_unchanged', 'san_relations', 'san_kmp_use',
                'san_kmp_parallel', *runs]

    def build_extension(self, ext):
        if not PLATFORM:
            super().build_extension(ext)
            return
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = [flag.replace('-march=x86-64-', '-mcpu=x86_64_') for flag in ext.extra_compile_args]  # zig's names
        named = [f'-Wl,-install_name,@rpath/{target.name}'] if PLATFORM.startswith('macosx') else []
        with tempfile.TemporaryDirectory() as folder:  # for Windows a second file comes out
            library = pathlib.Path(folder, target.name)
            subprocess.run([sys.executable, '-m', 'ziglang', 'cc', '-target', PLATFORMS[PLATFORM], '-shared', '-fPIC',
                            '-s', *flags, *named, '-o', library, *ext.sources], check=True)
            shutil.copyfile(library, target)


class PlatformWheel(bdist_wheel):
    """The libraries fit a platform, not a Python."""

    def get_tag(self):
        return 'py3', 'none', PLATFORM or super().get_tag()[2]


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
                  depends=[f'san_backbones/ops/native/{file}.h' for file in (
                      'footprint', 'linear', 'planes', 'planes_backward', 'relations')],
                  extra_compile_args=[*FLAGS, *flags], optional=not REQUIRED)
        for name, flags in INSTRUCTION_SETS.items()],
    cmdclass={'build_py': BuildPackage, 'build_ext': BuildLibrary, 'bdist_wheel': PlatformWheel},
)
