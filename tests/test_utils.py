import ast
import contextlib
import errno
import functools
import gc
import graphlib
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import ROOT, run, run_in_turn, start

import train
import utils
from ac_agent import ACAgent
from imitation import Layout, Play
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


def test_atomic_write_leaves_nothing_half_written(tmp_path):
    path = tmp_path / 'file'
    with utils.atomic_write(path) as tmp:
        tmp.write_text('old')
    with pytest.raises(ZeroDivisionError), utils.atomic_write(path) as tmp:
        tmp.write_text('half')
        raise ZeroDivisionError
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['file']


def save(path, value, kind='expert', task='reacher_hard'):
    utils.save_snapshot(path, kind, task, {'value': torch.tensor(value), 'made_by': {}})


def test_snapshots_keep_the_previous_one_and_survive_its_loss(tmp_path):
    path = tmp_path / 'snapshot.pt'
    save(path, 1)
    save(path, 2)
    assert utils.load_snapshot(path, 'expert', 'reacher_hard')['value'] == 2
    path.unlink()  # as a kill between the two renames would leave it
    assert utils.newest_snapshot(path)
    assert utils.load_snapshot(path, 'expert', 'reacher_hard')['value'] == 1


class Payload:
    def __reduce__(self):
        return os.system, ('touch hacked',)


def test_bad_snapshots_are_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'snapshot.pt'
    with pytest.raises(UserError, match='there is no expert .*python train.py'):
        utils.load_snapshot(path, 'expert', remedy='python train.py')
    save(path, 1)
    with pytest.raises(UserError, match=f'{tmp_path} is a folder: name .*{path}'):
        utils.load_snapshot(tmp_path, 'expert')
    with pytest.raises(UserError, match='of kind expert, not translator'):
        utils.load_snapshot(path, 'translator')
    with pytest.raises(UserError, match='for task reacher_hard, not finger_spin'):
        utils.load_snapshot(path, 'expert', 'finger_spin')
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match='damaged'):
        utils.load_snapshot(path, 'expert')
    torch.save({'format': 99}, path)
    with pytest.raises(UserError, match='format'):
        utils.load_snapshot(path, 'expert')
    for save_code in (lambda: torch.save(Payload(), path),
                      lambda: path.write_bytes(pickle.dumps(Payload()))):
        save_code()
        with pytest.raises(UserError, match='code'):
            utils.load_snapshot(path, 'expert')
    assert not (tmp_path / 'hacked').exists()
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr('archive/data/0', bytes(10 ** 7))
    with pytest.raises(UserError, match='damaged'):
        utils.load_snapshot(path, 'expert')
    with (pytest.raises(UserError, match=r'does not hold .*KeyError.*agent_args.*: mend it'),
          utils.must_fit(path, 'mend it')):
        {}['agent_args']


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    """Copied, they would take their whole size."""
    path = tmp_path / 'snapshot.pt'
    for bomb in (torch.zeros(1).expand(10 ** 12), torch.empty(10 ** 12, device='meta'),
                 torch.zeros(8, 8).as_strided((10 ** 5, 10 ** 5), (0, 0))):
        for nested in (bomb, {'w': bomb}, [(bomb,)]):
            torch.save({'format': 1, 'kind': 'expert', 'task': 'x', 'made_by': {},
                        'agent': nested}, path)
            with pytest.raises(UserError, match='is damaged.*ValueError'):
                utils.load_snapshot(path, 'expert')


class Half(torch.nn.Linear):
    """Its weights are but half of what it needs, as in a slim snapshot."""

    def __init__(self, size, spare=10):
        super().__init__(size, size)
        self.spare = torch.nn.Linear(spare, spare)

    def load_state_dict(self, weights):
        super().load_state_dict(weights, strict=False)


def test_no_more_is_built_than_belongs_to_the_weights():
    weights = torch.nn.Linear(10, 10).state_dict()
    state = torch.get_rng_state()
    rebuilt = utils.rebuild(Half, {'size': 10}, weights)
    assert torch.equal(rebuilt.weight, weights['weight']) and rebuilt.weight.device.type == 'cpu'
    torch.set_rng_state(state)
    assert torch.equal(Half(10).spare.weight, rebuilt.spare.weight)  # as if made only once
    for args in ({'size': 10 ** 6}, {'size': 10 ** 9}, {'size': 10, 'spare': 10 ** 6}):
        with pytest.raises((RuntimeError, ValueError)):
            utils.rebuild(Half, args, weights)


def test_a_runs_folder_alone_stands_for_its_options(tmp_path):
    folder = f'hydra.run.dir={tmp_path}'
    assert utils.with_own_options([folder]) == [folder]  # a new run
    (tmp_path / '.hydra').mkdir()
    (tmp_path / '.hydra/overrides.yaml').write_text('- task=finger_spin\n- channels=[1,2]\n')
    assert utils.with_own_options([folder]) == [folder, 'task=finger_spin', 'channels=[1,2]']
    for others in ([folder, 'seed=2'], ['task=reacher_hard'], []):
        assert utils.with_own_options(others) == others
    for damaged in (b'- [', b'- 3', b'\x00', b'\xff', b'word'):
        (tmp_path / '.hydra/overrides.yaml').write_bytes(damaged)
        with pytest.raises(utils.Damaged, match='overrides.yaml is damaged: write the run'):
            utils.with_own_options([folder])


def test_what_differs_is_named_with_both_values():
    before = {'seed': 1, 'sha256': 'a' * 64, 'scenery': {'camera': {'zoom': [1, 2]}}, 'same': 0}
    now = {'seed': 2, 'sha256': 'b' * 64, 'scenery': {'camera': {'zoom': [1, 3]}}, 'same': 0}
    utils.require_same('it', before, dict(before), 'do this')
    with pytest.raises(UserError) as raised:
        utils.require_same('it', before, now, 'do this')
    assert str(raised.value) == (
        'it was made with scenery.camera.zoom=[1, 2], not [1, 3]; seed=1, not 2; '
        'sha256=aaaaaaaaaaaa..., not bbbbbbbbbbbb...: do this.')


def test_a_run_that_differs_is_told_its_command(tmp_path):
    last = {'made_by': {'seed': 1}, 'agent_args': {'lr': 1}, 'command': 'train.py task=a seed=1'}
    with pytest.raises(UserError, match=f'train.py task=a seed=1 hydra.run.dir={tmp_path} and'):
        utils.require_same_run(tmp_path, last, {'seed': 2, 'lr': 1})


def test_what_may_not_be_read_is_told(tmp_path, monkeypatch):
    save(tmp_path / 'snapshot.pt', 1)

    def refuse(*_, **__):
        raise PermissionError
    for owner, name in ((utils.zipfile, 'ZipFile'), (Path, 'exists')):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(UserError, match='snapshot.pt may not be read by this user'):
                utils.load_snapshot(tmp_path / 'snapshot.pt', 'expert')


def test_a_path_is_typed_so_that_shell_and_hydra_read_it():
    for path in ('exp_local/a-1/seed1/snapshot.pt', 'a b/channels[1,2]/x.pt', 'k=v/linear(1,2)'):
        [typed] = shlex.split(utils.typed_path('snapshot', path))
        assert utils.parse_override(typed).value() == path


def test_a_run_of_another_task_is_told(tmp_path):
    save(tmp_path / 'snapshot.pt', 1, task='finger_spin')
    with pytest.raises(UserError, match='of finger_spin, not reacher_hard.*alone'):
        utils.load_last(tmp_path, 'expert', 'reacher_hard')


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / 'snapshot.pt'
    utils.save_snapshot(path, 'expert', 'reacher_hard', {
        'made_by': {}, 'agent': {'w': torch.arange(1000.0)}})
    whole = path.read_bytes()
    for at in (whole.index(torch.arange(500.0, 510.0).numpy().tobytes()),
               whole.index(b'reacher_hard')):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(UserError, match='damaged'):
            utils.load_snapshot(path, 'expert')


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, bad):
    path = tmp_path / 'snapshot.pt'
    save = functools.partial(utils.save_snapshot, path, 'expert', 'reacher_hard')
    state = {'made_by': {}, 'agent': {'actor': {'w': torch.ones(3)}, 'num_updates': 5}}
    save(state)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f'{path} is from before.*lower learning'):
        save({**state, 'agent': {'actor': {'w': torch.tensor([1.0, bad])}}})
    assert path.read_bytes() == before and not list(tmp_path.glob('.tmp*'))


def test_a_full_disk_is_told_and_costs_no_snapshot(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'snapshot.pt'
    utils.save_snapshot(path, 'expert', 'x', {'made_by': {}, 'step': 1})
    monkeypatch.setattr(utils.shutil, 'disk_usage', lambda _: SimpleNamespace(free=1000))

    def save(payload, tmp):  # PyTorch's error does not tell the cause
        tmp.write_bytes(b'half')
        raise RuntimeError('unexpected pos')
    monkeypatch.setattr(utils.torch, 'save', save)
    with pytest.raises(SystemExit) as end, utils.exit_on_user_error():
        utils.save_snapshot(path, 'expert', 'x', {'made_by': {}, 'step': 2})
    assert end.value.code == 2 and f'disk of {path} is full' in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ['snapshot.pt']
    assert utils.load_snapshot(path, 'expert')['step'] == 1
    with pytest.raises(UserError, match='needs 2.0 KiB and 1.0 KiB are free: wait'):
        utils.check_disk(tmp_path, 2048, 'it', 'wait')


def test_the_next_snapshot_is_written_beside_the_last_two(tmp_path):
    path = tmp_path / 'snapshot.pt'
    for num, needed in enumerate((300, 200, 100)):
        assert utils.snapshot_space(path, 100) == needed
        (path if not num else utils.previous(path)).write_bytes(bytes(100))


def test_a_full_disk_is_told_wherever_it_is_met(capsys):
    with pytest.raises(SystemExit) as end, utils.exit_on_user_error():
        raise OSError(errno.ENOSPC, 'no space', 'train.csv')
    assert end.value.code == 2 and 'disk of train.csv is full' in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), utils.exit_on_user_error():
        Path('/nowhere').read_bytes()


def test_slim_keeps_what_acting_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, 'command', lambda: 'train.py seed=2')
    made = {'agent_args': {'obs_shape': [6]}, 'made_by': {}, 'global_step': 5}
    agent = {name: {'w': torch.ones(2), 'small': torch.ones(4095), 'large': torch.ones(64, 64)}
             for name in ('encoder', 'actor', 'critic', 'actor_opt')}
    utils.save_snapshot(tmp_path / 'run.pt', 'expert', 'reacher_hard',
                        {'agent': agent, **made})
    utils.slim(tmp_path / 'run.pt', tmp_path / 'slim.pt')
    slim = utils.load_snapshot(tmp_path / 'slim.pt', 'expert', 'reacher_hard')
    assert slim['agent'].keys() == {'encoder', 'actor'}
    assert slim['agent']['actor']['w'].dtype == torch.float32
    assert slim['agent']['actor']['small'].dtype == torch.float32
    assert slim['agent']['actor']['large'].dtype == torch.float16
    assert slim['agent_args'] == {'obs_shape': [6]}
    assert slim['command'] == 'train.py seed=2'

    (tmp_path / 'folder.pt').mkdir()
    for target in ('.', 'experts', 'folder.pt'):
        with pytest.raises(UserError, match='is a folder, or does not end in .pt'):
            utils.slim(tmp_path / 'run.pt', tmp_path / target)


@pytest.mark.parametrize('demos, play', [
    (None, None), (torch.zeros(2, 5, 3), Play(torch.zeros(1, 5, 3), torch.zeros(1, 4, 2)))])
def test_a_slim_imitator_acts_as_the_whole_one_does(tmp_path, demos, play):
    args = {'obs_shape': [Layout(3, 2).size], 'action_dim': 2, 'hidden_dim': 64, 'discount': 0.9,
            'stddev': 0.3}
    agent = ACAgent(**args, demos=demos, play=play)
    utils.save_snapshot(tmp_path / 'run.pt', 'imitator', 'reacher_hard',
                        {'agent': agent.state_dict(), 'agent_args': args, 'made_by': {}})
    utils.slim(tmp_path / 'run.pt', tmp_path / 'slim.pt')
    slim = utils.load_snapshot(tmp_path / 'slim.pt', 'imitator', 'reacher_hard')
    assert slim['agent'].keys() == {'actor'} and slim['agent']['actor'].keys() == {'mean'}
    obs = np.ones(args['obs_shape'], np.float32)
    acts = utils.rebuild(ACAgent, slim['agent_args'], slim['agent']).act(obs, 0, True)
    np.testing.assert_allclose(acts, agent.act(obs, 0, True), atol=1e-3)


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


def test_two_runs_do_not_share_a_folder(tmp_path):
    runs = {script: tmp_path / script for script in ('train', 'train_ct', 'train_ac')}
    with contextlib.ExitStack() as others:
        for folder in runs.values():
            others.enter_context(utils.only_one_at_work(folder))
        results = run_in_turn(*([script, f'hydra.run.dir={folder}']
                                for script, folder in runs.items()))
    for folder, (code, _, error) in zip(runs.values(), results, strict=True):
        assert code == 2
        assert not folder.exists()  # nothing was written, and an empty folder does not stay
        assert f'error: another process is at work in {folder}: wait for it, or set' in error


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
