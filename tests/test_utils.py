import ast
import errno
import graphlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import ROOT

import utils
from utils import UserError


def test_schedule():
    assert utils.schedule('linear(1.0,0.1,100)', 50) == pytest.approx(0.55)
    assert utils.schedule('linear(1.0,0.1,100)', 500) == pytest.approx(0.1)
    assert utils.schedule('0.2', 7) == utils.schedule(0.2, 7) == 0.2
    with pytest.raises(UserError, match='cosine'):
        utils.schedule('cosine(1)', 0)
    for wrong in ('linear(1,x,5)', 'linear(1,2)', 'linear(1,0.1,0)', 'linear(1,0.1,-5)',
                  'linear(1,0.1,nan)', None):
        with pytest.raises(UserError, match='linear'):
            utils.schedule(wrong, 0)


def test_until_and_every_count_in_frames():
    until, every = utils.Until(10, action_repeat=2), utils.Every(6, action_repeat=2)
    assert [step for step in range(20) if until(step)] == [0, 1, 2, 3, 4]
    assert [step for step in range(10) if every(step)] == [3, 6, 9]
    every = utils.Every(6, action_repeat=2)
    assert [step for step in (0, 2, 5, 7, 8, 30) if every(step)] == [5, 7, 30]  # uneven checks
    assert not utils.Every(6, 2, step=5)(5)  # a resumed run does not repeat what was due before


def test_derived_seeds_are_stable_and_apart():
    assert utils.derive_seed(1, 0, 5) == utils.derive_seed(1, 0, 5)
    assert len({utils.derive_seed(1, stream, i) for stream in (0, 1) for i in range(500)}) == 1000


def test_a_full_disk_is_told_wherever_it_is_met(capsys):
    with pytest.raises(SystemExit) as end, utils.exit_on_user_error():
        raise OSError(errno.ENOSPC, 'no space', 'train.csv')
    assert end.value.code == 2 and 'disk of train.csv is full' in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), utils.exit_on_user_error():
        Path('/nowhere').read_bytes()


def test_signals_are_raised_and_held_back():
    with utils.raise_interrupts(), pytest.raises(utils.Interrupted) as error:
        os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with utils.raise_interrupts(), pytest.raises(utils.Interrupted), utils.Stop() as stop:
        stop.raise_if_asked()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # at once: belongs to the first
        assert stop.asked == signal.SIGINT  # and still here
        stop.raise_if_asked()
        raise AssertionError
    with utils.Stop() as stop:  # nobody asked for signals to be answered
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_ends_the_process(tmp_path):
    code = ("import os, signal, time, utils\n"
            "with utils.raise_interrupts(), utils.Stop() as stop:\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    time.sleep(1.1)\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    time.sleep(9)\n")
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, check=False)
    assert run.returncode == -signal.SIGTERM


def test_what_leaves_nothing_half_done_can_be_ended_at_once():
    with utils.raise_interrupts(), utils.Stop() as stop:
        with pytest.raises(utils.Interrupted), stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError('it was held back')
        assert not stop.asked
    with utils.raise_interrupts(), utils.Stop() as stop:
        with stop.at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # held back again
        assert stop.asked == signal.SIGTERM
        with pytest.raises(utils.Interrupted), stop.at_once():
            raise AssertionError('it was asked before')
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_is_ignored_or_answered_by_a_launcher_stays_so(monkeypatch):
    """But its requeueing waits for the snapshot."""
    calls, before = [], {number: signal.getsignal(number) for number in (
        signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    monkeypatch.setattr(utils.HydraConfig, 'get', lambda: SimpleNamespace(
        run=SimpleNamespace(dir='.')))
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: calls.append('bypassed'))
        signal.signal(signal.SIGUSR2, lambda *_: calls.append('requeued'))
        with (pytest.raises(SystemExit), utils.exit_on_user_error(), utils.raise_interrupts(),
              utils.Stop() as stop):
            for number in before:
                os.kill(os.getpid(), number)
            calls.append('saved')
            stop.raise_if_asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert calls == ['bypassed', 'saved', 'requeued']


def test_device():
    assert utils.pick_device('cpu').type == 'cpu'
    if not torch.cuda.is_available():
        assert utils.pick_device('auto').type == 'cpu'
        with pytest.raises(UserError, match='device=auto'):
            utils.pick_device('cuda')


def test_imports_run_downward():
    """No module imports, at whatever depth, one that imports it."""
    modules = {path.stem: path for path in ROOT.glob('*.py')}
    imports = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module)
        imports[name] = found & modules.keys()
    assert imports['utils'] == set() and 'dmc' in imports['train']
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError
