"""What the workflows call exists, and they run no code of others but what a digest names."""
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests import ROOT
from tools import run_versions, wheels

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / '.github' / 'workflows').glob('*.yml')}
JOBS = [(workflow, name, job) for workflow, content in WORKFLOWS.items() for name, job in content['jobs'].items()]


def test_every_command_is_a_target_of_the_makefile():
    targets = set(re.findall(r'^([a-z][a-z-]*(?: [a-z][a-z-]*)*):', (ROOT / 'Makefile').read_text(), re.M))
    targets = {target for line in targets for target in line.split()}
    commands = []
    for _, _, job in JOBS:
        for step in job.get('steps', ()):
            if 'run' in step:
                command = re.fullmatch(r'make ("\$TARGET"|[a-z-]+)( [A-Z]+="\$[^"]*")*', step['run'])
                assert command, step['run']
                commands += job['strategy']['matrix']['target'] if '$TARGET' in command[1] else [command[1]]
    least = {'test', 'lint', 'docs-check', 'test-versions', 'test-package', 'wheels', 'release-check'}
    assert least <= {*commands} <= targets


def test_workflows_take_nothing_on_trust():
    for workflow, name, job in JOBS:
        assert WORKFLOWS[workflow]['permissions'] == {}
        assert job['permissions'].pop('contents') == 'read'
        assert job['permissions'] == ({'id-token': 'write'} if name == 'publish' else {})
        for step in job.get('steps', ()):
            if 'uses' in step:
                assert re.fullmatch(r'[\w-]+/[\w/-]+@[0-9a-f]{40}', step['uses'])
                if 'actions/checkout' in step['uses']:
                    assert step['with'] == {'persist-credentials': False}
            assert '${{' not in step.get('run', '')  # a name could hold a command
    for path in (ROOT / '.github').rglob('*.yml'):
        if path.parent.name == 'workflows':
            pinned = re.findall(r'@[0-9a-f]{40}.*', path.read_text())
            assert all(re.fullmatch(r'@[0-9a-f]{40} # v\d+\.\d+\.\d+', line) for line in pinned)


def test_the_workflow_tries_every_corner():
    job = WORKFLOWS['tests']['jobs']['corners']
    assert job['strategy']['matrix']['corner'] == [corner.name for corner in run_versions.CORNERS]
    python, = (step['with']['python-version'] for step in job['steps'] if 'setup-python' in step.get('uses', ''))
    assert {corner.python for corner in run_versions.CORNERS} <= {*python.split()}


def test_the_workflow_tries_a_wheel_of_each_system():
    tags = wheels.platforms_of_setup()
    tried = [entry['tag'] for entry in WORKFLOWS['wheels']['jobs']['try']['strategy']['matrix']['include']]
    assert {tag.partition('.')[0] for tag in tags if not tag.startswith('musllinux')} == {*tried}


@pytest.mark.parametrize('tag, found', [('solaris', 'expected one of manylinux_2_17_x86_64'), ('win_amd64', '')])
def test_a_platform_that_is_not_known(tag, found):
    done = subprocess.run([sys.executable, 'setup.py', '--name'], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'SAN_BACKBONES_PLATFORM': tag})
    assert (done.returncode != 0) == bool(found) and found in done.stderr, done.stderr
