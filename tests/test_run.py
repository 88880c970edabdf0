"""`python -m san_backbones.run`: programs that know nothing of SAN run as under Python alone, and find the models."""
import importlib.util
import os
import subprocess
import sys

import pytest

from san_backbones.run import start

PROGRAM = '''
import sys

import timm
import torch


class Models(torch.utils.data.Dataset):
    """Defined in the main module, as what scripts give to workers that are spawned."""

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return timm.is_model('san15_patchwise')


if __name__ == '__main__':
    at_once = timm.is_model('san15_patchwise')
    in_workers = [list(torch.utils.data.DataLoader(Models(), num_workers=1, batch_size=None,
                                                   multiprocessing_context='spawn'))]
    print(at_once, in_workers, sys.argv[1:])
    sys.exit(3)
'''


@pytest.mark.parametrize('as_module', [False, True])
def test_a_program_and_its_workers_find_the_models(as_module, tmp_path):
    (tmp_path / 'package').mkdir()
    (tmp_path / 'package' / '__init__.py').touch()
    (tmp_path / 'package' / 'sibling.py').touch()
    script = tmp_path / 'package' / '__main__.py'
    script.write_text(('from . import sibling\n' if as_module else 'import sibling\n') + PROGRAM)
    words = ['-m', 'package'] if as_module else [str(script)]
    result = subprocess.run([sys.executable, '-W', 'error::DeprecationWarning:__main__', '-m', 'san_backbones.run',
                             *words, '--model', '-m'], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.stdout == "True [[True]] ['--model', '-m']\n", result.stdout + result.stderr
    assert result.returncode == 3


@pytest.fixture
def main(monkeypatch):
    """Starts the runner as main module: a function of the command line that returns the names there afterwards."""
    def run(*words, prepare=None):
        monkeypatch.setattr(sys, 'argv', ['run.py', *map(str, words)])
        monkeypatch.setattr(sys, 'path', list(sys.path))
        spec = importlib.util.find_spec('san_backbones.run')
        namespace = dict(__name__='__main__', __doc__='the usage', __spec__=spec, left_over=1)
        start(namespace, prepare)
        return namespace
    monkeypatch.setenv('_SAN_BACKBONES_RUN', '')
    return run


def test_the_main_module_is_the_program(main, tmp_path, monkeypatch):
    script = tmp_path / 'script.py'
    script.write_text('import sys\nnames, argv, first = sorted(globals()), sys.argv[:], sys.path[0]\n'
                      'prepared = list(done)')
    done = []
    monkeypatch.setattr('builtins.done', done, raising=False)
    monkeypatch.chdir(tmp_path)
    names = main('script.py', 'a', '-m', prepare=lambda: done.append(1))
    assert names['argv'] == [str(script), 'a', '-m'] and names['first'] == str(tmp_path)
    assert set(names['names']) <= {'__builtins__', '__doc__', '__file__', '__name__', '__package__', '__spec__', 'sys'}
    assert names['__file__'] == str(script) and names['__doc__'] is None and names['prepared'] == [1]


@pytest.mark.parametrize('words', [
    (), ('nowhere.py',), ('-m',), ('-m', 'no_such_package.module'), ('-m', 'os.path.no')])
def test_what_is_not_there_is_named(words, main):
    with pytest.raises(SystemExit) as error:
        main(*words, prepare=lambda: pytest.fail('nothing to prepare for'))
    assert str(error.value).startswith('the usage')
    assert f'given: {" ".join(words) or "nothing"}; expected the path of a Python script' in str(error.value)


def test_an_error_of_the_program_is_its_own(main, tmp_path):
    (tmp_path / 'script.py').write_text('raise ZeroDivisionError("of the script")')
    with pytest.raises(ZeroDivisionError, match='of the script') as error:
        main(tmp_path / 'script.py')
    assert error.traceback[-1].path == tmp_path / 'script.py'
