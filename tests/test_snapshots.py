import contextlib
import functools
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import run_in_turn

import snapshots
import utils
from ac_agent import ACAgent
from imitation import Layout, Play
from utils import UserError


def test_atomic_write_leaves_nothing_half_written(tmp_path):
    path = tmp_path / 'file'
    with snapshots.atomic_write(path) as tmp:
        tmp.write_text('old')
    with pytest.raises(ZeroDivisionError), snapshots.atomic_write(path) as tmp:
        tmp.write_text('half')
        raise ZeroDivisionError
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['file']


def save(path, value, kind='expert', task='reacher_hard'):
    snapshots.save_snapshot(path, kind, task, {'value': torch.tensor(value), 'made_by': {}})


def test_snapshots_keep_the_previous_one_and_survive_its_loss(tmp_path):
    path = tmp_path / 'snapshot.pt'
    save(path, 1)
    save(path, 2)
    assert snapshots.load_snapshot(path, 'expert', 'reacher_hard')['value'] == 2
    path.unlink()  # as a kill between the two renames would leave it
    assert snapshots.newest_snapshot(path)
    assert snapshots.load_snapshot(path, 'expert', 'reacher_hard')['value'] == 1


class Payload:
    def __reduce__(self):
        return os.system, ('touch hacked',)


def test_bad_snapshots_are_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'snapshot.pt'
    with pytest.raises(UserError, match='there is no expert .*python train.py'):
        snapshots.load_snapshot(path, 'expert', remedy='python train.py')
    save(path, 1)
    with pytest.raises(UserError, match=f'{tmp_path} is a folder: name .*{path}'):
        snapshots.load_snapshot(tmp_path, 'expert')
    with pytest.raises(UserError, match='of kind expert, not translator'):
        snapshots.load_snapshot(path, 'translator')
    with pytest.raises(UserError, match='for task reacher_hard, not finger_spin'):
        snapshots.load_snapshot(path, 'expert', 'finger_spin')
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match='damaged'):
        snapshots.load_snapshot(path, 'expert')
    torch.save({'format': 99}, path)
    with pytest.raises(UserError, match='format'):
        snapshots.load_snapshot(path, 'expert')
    for save_code in (lambda: torch.save(Payload(), path),
                      lambda: path.write_bytes(pickle.dumps(Payload()))):
        save_code()
        with pytest.raises(UserError, match='code'):
            snapshots.load_snapshot(path, 'expert')
    assert not (tmp_path / 'hacked').exists()
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr('archive/data/0', bytes(10 ** 7))
    with pytest.raises(UserError, match='damaged'):
        snapshots.load_snapshot(path, 'expert')
    with (pytest.raises(UserError, match=r'does not hold .*KeyError.*agent_args.*: mend it'),
          snapshots.must_fit(path, 'mend it')):
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
                snapshots.load_snapshot(path, 'expert')


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
    rebuilt = snapshots.rebuild(Half, {'size': 10}, weights)
    assert torch.equal(rebuilt.weight, weights['weight']) and rebuilt.weight.device.type == 'cpu'
    torch.set_rng_state(state)
    assert torch.equal(Half(10).spare.weight, rebuilt.spare.weight)  # as if made only once
    for args in ({'size': 10 ** 6}, {'size': 10 ** 9}, {'size': 10, 'spare': 10 ** 6}):
        with pytest.raises((RuntimeError, ValueError)):
            snapshots.rebuild(Half, args, weights)


def test_what_differs_is_named_with_both_values():
    before = {'seed': 1, 'sha256': 'a' * 64, 'scenery': {'camera': {'zoom': [1, 2]}}, 'same': 0}
    now = {'seed': 2, 'sha256': 'b' * 64, 'scenery': {'camera': {'zoom': [1, 3]}}, 'same': 0}
    snapshots.require_same('it', before, dict(before), 'do this')
    with pytest.raises(UserError) as raised:
        snapshots.require_same('it', before, now, 'do this')
    assert str(raised.value) == (
        'it was made with scenery.camera.zoom=[1, 2], not [1, 3]; seed=1, not 2; '
        'sha256=aaaaaaaaaaaa..., not bbbbbbbbbbbb...: do this.')


def test_a_run_that_differs_is_told_its_command(tmp_path):
    last = {'made_by': {'seed': 1}, 'agent_args': {'lr': 1}, 'command': 'train.py task=a seed=1'}
    with pytest.raises(UserError, match=f'train.py task=a seed=1 hydra.run.dir={tmp_path} and'):
        snapshots.require_same_run(tmp_path, last, {'seed': 2, 'lr': 1})


def test_what_may_not_be_read_is_told(tmp_path, monkeypatch):
    save(tmp_path / 'snapshot.pt', 1)

    def refuse(*_, **__):
        raise PermissionError
    for owner, name in ((snapshots.zipfile, 'ZipFile'), (Path, 'exists')):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(UserError, match='snapshot.pt may not be read by this user'):
                snapshots.load_snapshot(tmp_path / 'snapshot.pt', 'expert')


def test_a_run_of_another_task_is_told(tmp_path):
    save(tmp_path / 'snapshot.pt', 1, task='finger_spin')
    with pytest.raises(UserError, match='of finger_spin, not reacher_hard.*alone'):
        snapshots.load_last(tmp_path, 'expert', 'reacher_hard')


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / 'snapshot.pt'
    snapshots.save_snapshot(path, 'expert', 'reacher_hard', {
        'made_by': {}, 'agent': {'w': torch.arange(1000.0)}})
    whole = path.read_bytes()
    for at in (whole.index(torch.arange(500.0, 510.0).numpy().tobytes()),
               whole.index(b'reacher_hard')):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(UserError, match='damaged'):
            snapshots.load_snapshot(path, 'expert')


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, bad):
    path = tmp_path / 'snapshot.pt'
    save = functools.partial(snapshots.save_snapshot, path, 'expert', 'reacher_hard')
    state = {'made_by': {}, 'agent': {'actor': {'w': torch.ones(3)}, 'num_updates': 5}}
    save(state)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f'{path} is from before.*lower learning'):
        save({**state, 'agent': {'actor': {'w': torch.tensor([1.0, bad])}}})
    assert path.read_bytes() == before and not list(tmp_path.glob('.tmp*'))


def test_a_full_disk_is_told_and_costs_no_snapshot(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'snapshot.pt'
    snapshots.save_snapshot(path, 'expert', 'x', {'made_by': {}, 'step': 1})
    monkeypatch.setattr(snapshots.shutil, 'disk_usage', lambda _: SimpleNamespace(free=1000))

    def save(payload, tmp):  # PyTorch's error does not tell the cause
        tmp.write_bytes(b'half')
        raise RuntimeError('unexpected pos')
    monkeypatch.setattr(snapshots.torch, 'save', save)
    with pytest.raises(SystemExit) as end, utils.exit_on_user_error():
        snapshots.save_snapshot(path, 'expert', 'x', {'made_by': {}, 'step': 2})
    assert end.value.code == 2 and f'disk of {path} is full' in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ['snapshot.pt']
    assert snapshots.load_snapshot(path, 'expert')['step'] == 1
    with pytest.raises(UserError, match='needs 2.0 KiB and 1.0 KiB are free: wait'):
        utils.check_disk(tmp_path, 2048, 'it', 'wait')


def test_the_next_snapshot_is_written_beside_the_last_two(tmp_path):
    path = tmp_path / 'snapshot.pt'
    for num, needed in enumerate((300, 200, 100)):
        assert snapshots.snapshot_space(path, 100) == needed
        (path if not num else snapshots.previous(path)).write_bytes(bytes(100))


def test_slim_keeps_what_acting_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, 'command', lambda: 'train.py seed=2')
    made = {'agent_args': {'obs_shape': [6]}, 'made_by': {}, 'global_step': 5}
    agent = {name: {'w': torch.ones(2), 'small': torch.ones(4095), 'large': torch.ones(64, 64)}
             for name in ('encoder', 'actor', 'critic', 'actor_opt')}
    snapshots.save_snapshot(tmp_path / 'run.pt', 'expert', 'reacher_hard',
                            {'agent': agent, **made})
    snapshots.slim(tmp_path / 'run.pt', tmp_path / 'slim.pt')
    slim = snapshots.load_snapshot(tmp_path / 'slim.pt', 'expert', 'reacher_hard')
    assert slim['agent'].keys() == {'encoder', 'actor'}
    assert slim['agent']['actor']['w'].dtype == torch.float32
    assert slim['agent']['actor']['small'].dtype == torch.float32
    assert slim['agent']['actor']['large'].dtype == torch.float16
    assert slim['agent_args'] == {'obs_shape': [6]}
    assert slim['command'] == 'train.py seed=2'

    (tmp_path / 'folder.pt').mkdir()
    for target in ('.', 'experts', 'folder.pt'):
        with pytest.raises(UserError, match='is a folder, or does not end in .pt'):
            snapshots.slim(tmp_path / 'run.pt', tmp_path / target)


@pytest.mark.parametrize('demos, play', [
    (None, None), (torch.zeros(2, 5, 3), Play(torch.zeros(1, 5, 3), torch.zeros(1, 4, 2)))])
def test_a_slim_imitator_acts_as_the_whole_one_does(tmp_path, demos, play):
    args = {'obs_shape': [Layout(3, 2).size], 'action_dim': 2, 'hidden_dim': 64, 'discount': 0.9,
            'stddev': 0.3}
    agent = ACAgent(**args, demos=demos, play=play)
    snapshots.save_snapshot(tmp_path / 'run.pt', 'imitator', 'reacher_hard',
                            {'agent': agent.state_dict(), 'agent_args': args, 'made_by': {}})
    snapshots.slim(tmp_path / 'run.pt', tmp_path / 'slim.pt')
    slim = snapshots.load_snapshot(tmp_path / 'slim.pt', 'imitator', 'reacher_hard')
    assert slim['agent'].keys() == {'actor'} and slim['agent']['actor'].keys() == {'mean'}
    obs = np.ones(args['obs_shape'], np.float32)
    acts = snapshots.rebuild(ACAgent, slim['agent_args'], slim['agent']).act(obs, 0, True)
    np.testing.assert_allclose(acts, agent.act(obs, 0, True), atol=1e-3)


def test_two_runs_do_not_share_a_folder(tmp_path):
    runs = {script: tmp_path / script for script in ('train', 'train_ct', 'train_ac')}
    with contextlib.ExitStack() as others:
        for folder in runs.values():
            others.enter_context(snapshots.only_one_at_work(folder))
        results = run_in_turn(*([script, f'hydra.run.dir={folder}']
                                for script, folder in runs.items()))
    for folder, (code, _, error) in zip(runs.values(), results, strict=True):
        assert code == 2
        assert not folder.exists()  # nothing was written, and an empty folder does not stay
        assert f'error: another process is at work in {folder}: wait for it, or set' in error
