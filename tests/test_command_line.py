import gc
import shlex
import signal
import sys
import time

import pytest
from fakes import run, start
from hydra.core.override_parser.overrides_parser import OverridesParser

import command_line
import train
import utils


def test_a_runs_folder_alone_stands_for_its_options(tmp_path):
    folder = f'hydra.run.dir={tmp_path}'
    assert command_line.with_own_options([folder]) == [folder]  # a new run
    (tmp_path / '.hydra').mkdir()
    (tmp_path / '.hydra/overrides.yaml').write_text('- task=finger_spin\n- channels=[1,2]\n')
    assert command_line.with_own_options([folder]) == [folder, 'task=finger_spin', 'channels=[1,2]']
    for others in ([folder, 'seed=2'], ['task=reacher_hard'], []):
        assert command_line.with_own_options(others) == others
    for damaged in (b'- [', b'- 3', b'\x00', b'\xff', b'word'):
        (tmp_path / '.hydra/overrides.yaml').write_bytes(damaged)
        with pytest.raises(utils.Damaged, match='overrides.yaml is damaged: write the run'):
            command_line.with_own_options([folder])


def test_a_path_is_typed_so_that_shell_and_hydra_read_it():
    for path in ('exp_local/a-1/seed1/snapshot.pt', 'a b/channels[1,2]/x.pt', 'k=v/linear(1,2)'):
        [typed] = shlex.split(utils.typed_path('expert', path))
        assert OverridesParser.create().parse_override(typed).value() == path


def test_scripts_end_with_one_sentence_and_code_2(tmp_path):
    """Other bad input, without a process for each: tests/test_cfgs.py."""
    code, _, error = run('train', 'task=reacher_hrad', f'hydra.run.dir={tmp_path}/run',
                         cwd=tmp_path)
    assert code == 2 and not list(tmp_path.iterdir())
    assert 'Traceback' not in error
    [line] = [line for line in error.splitlines() if line.startswith('error:')]
    assert 'reacher_hrad' in line and 'reacher_hard' in line


def test_garbage_is_collected_again_once_modules_are_imported(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--help'])
    gc.unfreeze()
    gc.disable()  # as the script does at its head
    try:
        with pytest.raises(SystemExit):
            train.main()
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.enable()


@pytest.mark.parametrize('script', ['train', 'train_ct', 'train_ac'])
def test_ctrl_c_while_modules_are_imported(script, tmp_path):
    process = start(script, f'hydra.run.dir={tmp_path}')
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and 'Traceback' not in error
    assert f'to resume: python {script}.py' in error and not any(tmp_path.iterdir())
