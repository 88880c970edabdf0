"""Code blocks of Markdown pages, and how they are checked: the README's and the documentation's.

Blocks of a page run in order, in one namespace and one folder, as a reader would run them. What a block is:

- ```python``` runs, and where its first line names a file (`# train.py`) is written there; one that has a line
  `_base_ = ...` is an MMEngine config: it is loaded, and its model, optimizer and hooks are built on the meta device;
- ```console``` holds commands, `$ ` before each: programs, files, targets, extras and options must exist;
- `% run` before a ```console``` block has its commands run, too;
- `% needs MODULE` before a block leaves it alone where that is not installed;
- `% run by FILE` before a block leaves it to that test;
- `% not run: REASON` before a block leaves it alone.
"""
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any, NamedTuple

from tests import ROOT

FENCE = re.compile(r'^(?:% (run|run by \S+|needs \w+|not run: \S[^\n]*)\n)?```(\w+)\n(.*?)^```$', re.M | re.S)


class Block(NamedTuple):
    page: pathlib.Path
    line: int  # of the block's first line of code in the page
    language: str
    text: str
    mark: str  # '', 'run', 'run by FILE', 'needs MODULE' or 'not run: REASON'

    @property
    def is_config(self) -> bool:
        return self.language == 'python' and re.search('^_base_ = ', self.text, re.M) is not None

    @property
    def runs(self) -> bool:
        if self.mark.startswith('needs '):
            return importlib.util.find_spec(self.mark[6:]) is not None
        return not self.mark.startswith(('run by', 'not run'))

    @property
    def file(self) -> str:
        """Returns the file that the first line of a block names, or ''."""
        named = re.match(r'# (\S+\.py)\n', self.text)
        return named[1] if named else ''

    def commands(self) -> list[str]:
        """Returns the commands of a console block, with continued lines joined."""
        return [line[2:] for line in self.text.replace('\\\n', ' ').splitlines() if line.startswith('$ ')]


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    return [Block(page, text.count('\n', 0, found.start(3)) + 1, found[2], found[3], found[1] or '')
            for found in FENCE.finditer(text)]


def link_checkout(folder: pathlib.Path) -> None:
    """Puts what pages name by relative paths into `folder`."""
    for name in ('mm_configs', 'demo', 'weights', 'docs'):
        (folder / name).symlink_to(ROOT / name)


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """Runs a block in the current folder; tracebacks name the page and the line in it."""
    if block.file:
        pathlib.Path(block.file).write_text(block.text)
    exec(compile('\n' * (block.line - 1) + block.text, str(block.page), 'exec'), namespace)


def check_config(block: Block, folder: pathlib.Path) -> Any:
    """Writes the config into `folder`, loads it, builds what it describes, and returns it."""
    import torch
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import HOOKS, MODELS, init_default_scope

    import san_backbones.mm  # noqa: F401
    path = folder / (block.file or 'config.py')
    path.write_text(block.text)
    config = Config.fromfile(path)
    if config.model.get('type'):
        init_default_scope(config.default_scope)
        with torch.device('meta'):
            model = MODELS.build(config.model)
        assert type(model.backbone).__name__ == 'SANBackbone'
        if config.get('strategy', {}).get('type') != 'FSDPStrategy':  # which wraps the model first
            build_optim_wrapper(model, config.optim_wrapper)
        for hook in config.get('custom_hooks', []):
            HOOKS.build(hook)
    return config


# --- commands --------------------------------------------------------------------------------------------------------

def _require(condition: Any, command: str, what: str) -> None:
    assert condition, f'{what}, in: {command}'


def _source_of_module(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(name + '.__main__') or spec
    return '' if spec is None or spec.origin is None else pathlib.Path(spec.origin).read_text()


def _source_of_script(name: str) -> str:
    """The text of a script of the checkout, or of MMDetection's and MMSegmentation's tools/."""
    if (ROOT / name).is_file():
        text = (ROOT / name).read_text()
        called = re.search(r'from (san_backbones[\w.]+) import main', text)  # the command that a thin script calls
        return text + (_source_of_module(called[1]) if called else '')
    origins = (importlib.util.find_spec(package) for package in ('mmdet', 'mmseg'))
    paths = [pathlib.Path(spec.origin).parent / '.mim' / name for spec in origins if spec and spec.origin]
    return '\n'.join(path.read_text() for path in paths if path.is_file())


def _check_options(words: list[str], source: str, command: str) -> None:
    for word in words:
        if word.startswith('--'):
            option = word.partition('=')[0]
            known = re.search(rf'{option.replace("_", "-")}(?![\w-])', source.replace('_', '-'))
            _require(known, command, f'there is no option {option}')


def _check_script(words: list[str], command: str) -> None:
    """words: SCRIPT [ARGUMENTS], or -m MODULE [ARGUMENTS]."""
    if words[0] == '-m':
        source = _source_of_module(words[1])
        _require(source, command, f'there is no module {words[1]}')
        if words[1] in ('san_backbones.run', 'san_backbones.mm.run'):
            _check_script(words[2:], command)
        elif words[1] == 'san_backbones':
            _check_own_command(words[2:], command)
        elif words[1] == 'san_backbones.weights':
            _check_own_command(['weights', *words[2:]], command)
        else:
            _check_options(words[2:], source, command)
        return
    if words[0] == '-c':
        compile(words[1], command, 'exec')
        for module in re.findall(r'\bsan_backbones[\w.]*', words[1]):
            _require(_source_of_module(module), command, f'there is no module {module}')
        return
    if (pathlib.Path.cwd() / words[0]).is_file() and not (ROOT / words[0]).is_file():
        _check_options(words[1:], pathlib.Path(words[0]).read_text(), command)  # a block wrote it
        return
    source = _source_of_script(words[0])
    _require(source, command, f'there is no script {words[0]}')
    _check_options(words[1:], source, command)
    _check_config_options(words, command)


def _check_config_options(words: list[str], command: str) -> None:
    """`--cfg-options KEY=VALUE ...` after a config that is there: each key but its last part must be in the config."""
    configs = [word for word in words[1:] if word.endswith('.py') and pathlib.Path(word).is_file()]
    if '--cfg-options' not in words or not configs:
        return
    from mmengine.config import Config
    config = Config.fromfile(configs[0])
    for word in words[words.index('--cfg-options') + 1:]:
        if '=' in word and not word.startswith(('--', 'model_wrapper_cfg.')):  # an argument of the Runner
            part = config
            for key in word.partition('=')[0].split('.')[:-1]:
                part = part[int(key)] if isinstance(part, list) else part.get(key)
                _require(part is not None, command, f'{configs[0]} has no {key} of {word}')


def _check_own_command(words: list[str], command: str) -> None:
    """words: [COMMAND [ARGUMENTS]] of `san-backbones`."""
    from typer.main import get_command

    from san_backbones_cli.app import app
    found = get_command(app)
    if words[:1] == ['weights']:  # whose commands parse by themselves
        from san_backbones.weights.__main__ import COMMANDS
        _require(len(words) > 1 and words[1] in {*COMMANDS, '--help'}, command, f'there is no command {words[1:2]}')
        _check_options(words[2:], _source_of_module(f'san_backbones.weights.{words[1]}'), command)
        return
    if words and not words[0].startswith('-'):
        _require(words[0] in found.commands, command, f'there is no command {words[0]}')
        found = found.commands[words.pop(0)]
    known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith('-'):
            _require(word.partition('=')[0] in {*known, '--help', '-h'}, command, f'there is no option {word}')


def check_command(command: str) -> None:
    """Raises AssertionError if a command names something that does not exist."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
        words.pop(0)
    program, rest = words[0], words[1:]
    if program == 'make':
        targets = [word for word in rest if '=' not in word]
        makefile = (ROOT / 'Makefile').read_text()
        for target in targets:
            _require(re.search(rf'^(?:[\w-]+ )*{re.escape(target)}(?: [\w-]+)*:', makefile, re.M), command,
                     f'the Makefile has no target {target}')
    elif program == 'pip':
        for extras in re.findall(r'\[([\w,-]+)\]', command):
            for extra in extras.split(','):
                _require(re.search(rf'^{extra} =', (ROOT / 'setup.cfg').read_text(), re.M), command,
                         f'setup.cfg has no extra {extra}')
    elif program in ('python', 'python3'):
        _check_script(rest[rest[0] == '-u':], command)
    elif program in ('torchrun', 'accelerate', 'srun'):
        at = next(i for i, word in enumerate(rest) if word == '-m' or word.endswith('.py') or word == 'python')
        if program != 'srun':
            launcher = 'torch.distributed.run' if program == 'torchrun' else 'accelerate.commands.launch'
            _check_options(rest[:at], _source_of_module(launcher), command)
        check_command('python ' + shlex.join(rest[at + (rest[at] == 'python'):]))
    elif program == 'san-backbones':
        _check_own_command(rest, command)
    else:
        _require(program in ('cd', 'export', 'git', 'hf', 'mim', 'sphinx-build'), command, f'unknown program {program}')


def run_command(command: str, folder: pathlib.Path) -> str:
    """Runs `[NAME=VALUE ...] python ...` with this Python, in `folder`, and returns what it printed."""
    words, environment = shlex.split(command, comments=True), {}
    while re.fullmatch(r'[A-Z_]+=.*', words[0]):
        name, _, environment[name] = words.pop(0).partition('=')
    assert words[0] == 'python', command
    import os
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, env={**os.environ, **environment}, text=True,
                          capture_output=True)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def run_page(page: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    """Runs all blocks of a page in `folder`, which must be the current one, and returns their names."""
    namespace: dict[str, Any] = {'__name__': page.stem}
    for block in blocks(page):
        if not block.runs:
            continue
        if block.is_config:
            check_config(block, folder)
        elif block.language == 'python':
            run_python(block, namespace)
        elif block.language == 'console':
            for command in block.commands():
                check_command(command)
                if block.mark == 'run':
                    run_command(command, folder)
    return namespace
