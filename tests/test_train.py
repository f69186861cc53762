import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import (
    FakeEnv,
    Killed,
    agent_of,
    die,
    differences,
    learned_alike,
    rows,
    settings,
    start,
    terminate,
    wait_until,
)
from omegaconf import OmegaConf

import snapshots
import train
import utils
from drqv2 import DrQV2Agent
from generate_expert_video import load_expert
from train import Loop, Workspace
from utils import UserError

CFG = OmegaConf.create(dict(
    task_name='fake_walk', seed=1, device='cpu', use_tb=False, num_train_frames=400,
    frame_stack=3, batch_size=16, eval_every_frames=100, num_eval_episodes=2, save_video=False,
    log_every_frames=40, snapshot_every_frames=120))
LOOP = Loop(action_repeat=2, num_seed_frames=60, nstep=3, replay_buffer_size=1000)


def make(work_dir, pixels=False, length=10, events=(), loop=LOOP, **changes):
    env = FakeEnv(length, pixels, events)
    agent_args = dict(obs_shape=list(env.observation_spec().shape), action_dim=2, hidden_dim=16,
                      num_expl_steps=20)
    work_dir.mkdir(exist_ok=True)
    return Workspace(OmegaConf.merge(CFG, changes), work_dir, 'expert', env,
                     FakeEnv(pixels=pixels), DrQV2Agent, agent_args, loop, {'seed': 1},
                     snapshots.load_last(work_dir, 'expert', CFG.task_name))


@pytest.mark.parametrize('pixels, changes', [
    (False, {}), (True, {}),
    (False, {'loop': LOOP._replace(replay_buffer_size=60), 'snapshot_every_frames': 100})])
def test_a_killed_and_resumed_run_ends_as_one_that_ran_through(tmp_path, pixels, changes,
                                                               monkeypatch, capsys):
    """Also where the newest snapshot is damaged: from the one before it."""
    if changes:  # the ring goes round: no more than what is needed may lie beyond its capacity
        monkeypatch.setattr(train, 'LONGEST_EPISODE', 11)
    make(tmp_path / 'whole', pixels, **changes).train()
    with pytest.raises(Killed):
        make(tmp_path / 'killed', pixels, events={157: die}, **changes).train()
    newest = shutil.copytree(tmp_path / 'killed', tmp_path / 'damaged') / 'snapshot.pt'
    newest.write_bytes(newest.read_bytes()[:-100])
    for run, before, damaged in (('killed', 157, False), ('damaged', 110, True)):
        resumed = make(tmp_path / run, pixels, **changes)
        assert 0 < resumed.global_step < before
        assert ('goes on from the snapshot before it' in capsys.readouterr().err) == damaged
        assert (tmp_path / run / 'snapshot.damaged.pt').exists() == damaged
        resumed.train()
        assert learned_alike(tmp_path / 'whole', tmp_path / run, 'expert')
        for name in ('train.csv', 'eval.csv'):
            assert rows(tmp_path / 'whole' / name) == rows(tmp_path / run / name)


def test_the_ring_reaches_back_to_the_last_snapshot_but_one(tmp_path, monkeypatch):
    """Also where it goes round, and at worst: an episode of one step takes two rows."""
    monkeypatch.setattr(train, 'LONGEST_EPISODE', 2)
    changes = {'loop': LOOP._replace(replay_buffer_size=60), 'snapshot_every_frames': 100}
    make(tmp_path / 'whole', length=1, **changes).train()
    with pytest.raises(Killed):
        make(tmp_path / 'killed', length=1, events={199: die}, **changes).train()
    os.truncate(tmp_path / 'killed/snapshot.pt', 1000)
    resumed = make(tmp_path / 'killed', length=1, **changes)
    assert resumed.global_step == 100
    resumed.train()
    assert learned_alike(tmp_path / 'whole', tmp_path / 'killed', 'expert')


def test_a_resume_that_is_refused_takes_nothing_away(tmp_path):
    with pytest.raises(Killed):
        make(tmp_path, events={157: die}).train()
    for name in ('replay_buffer_size', 'num_seed_frames', 'nstep', 'discount', 'action_repeat'):
        with pytest.raises(UserError, match=f'{name}={getattr(LOOP, name)}, not 1;?'):
            make(tmp_path, loop=LOOP._replace(**{name: 1}))
    with pytest.raises(UserError, match='num_train_frames=400, not 600'):
        make(tmp_path, num_train_frames=600)
    make(tmp_path).train()


def test_a_snapshot_with_other_contents_is_refused_and_takes_nothing_away(tmp_path):
    with pytest.raises(Killed):
        make(tmp_path, events={157: die}).train()
    path = tmp_path / 'snapshot.pt'
    whole, payload = path.read_bytes(), torch.load(path, weights_only=True)
    for key in ('agent_args', 'agent', 'made_by', 'replay_buffer', 'global_step', 'evaluations',
                'elapsed', 'rng'):
        for changes in ({}, {key: None}, {key: 'absurd'}):
            others = {name: value for name, value in payload.items() if name != key}
            torch.save(others | changes, path)
            with pytest.raises(UserError, match='snapshot.pt|the run in'):
                make(tmp_path)
    path.write_bytes(whole)
    make(tmp_path).train()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_after_the_step_with_a_snapshot(tmp_path, number):
    with pytest.raises(utils.Interrupted) as error, utils.raise_interrupts():
        make(tmp_path, events={157: lambda: os.kill(os.getpid(), number)}).train()
    assert error.value.signal == number
    resumed = make(tmp_path)
    assert resumed.global_step == 157
    assert len(resumed.replay_buffer) == 15 * 11  # whole episodes; the broken-off one is dropped
    resumed.train()
    assert resumed.global_step == 200
    assert [row['frame'] for row in rows(tmp_path / 'eval.csv')] == [
        '0', '100', '200', '300', '400']


@pytest.mark.parametrize('at, evaluating', [(130, False), (150, True)])
def test_actions_that_are_not_finite_end_the_run_in_a_sentence(tmp_path, at, evaluating):
    """They reach the physics before their weights reach a snapshot."""
    workspace = make(tmp_path)
    act = workspace.agent.act
    workspace.agent.act = lambda obs, step, eval_mode: act(obs, step, eval_mode) * (
        np.nan if (step, eval_mode) == (at, evaluating) else 1)
    with pytest.raises(UserError, match='nan or infinite.*snapshot.pt is from before'):
        workspace.train()
    assert make(tmp_path).global_step == 120


def test_a_run_interrupted_while_it_evaluates_makes_up_for_it(tmp_path):
    workspace = make(tmp_path)
    workspace.eval_env = FakeEnv(events={45: terminate})  # ten steps an episode, two an evaluation
    with pytest.raises(utils.Interrupted), utils.raise_interrupts():
        workspace.train()
    resumed = make(tmp_path)
    assert resumed.global_step == 100
    resumed.train()
    assert [row['frame'] for row in rows(tmp_path / 'eval.csv')] == [
        '0', '100', '220', '300', '400']  # after the next episode


def test_no_update_outlives_the_loop(tmp_path):
    """Else it would go on drawing random numbers, those of a run resumed in the same process."""
    workspace, running = make(tmp_path, events={60: die}), []
    workspace.overlap = True

    def slow_update(*_):
        running.append(True)
        time.sleep(0.05)
        running.pop()
        return {}
    workspace.agent.update = slow_update
    with pytest.raises(Killed):
        workspace.train()
    assert not running


def test_what_the_agent_learns_from_is_what_the_environment_showed(tmp_path):
    """Flat states are stored whole, not as if they were stacked frames."""
    workspace = make(tmp_path, num_train_frames=40)
    time_step = workspace.start_episode()
    seen = [time_step.observation]
    while not time_step.last():
        time_step = workspace.train_env.step(np.zeros(2))
        workspace.replay_buffer.add(time_step, np.zeros(2))
        seen.append(time_step.observation)
    for obs in workspace.replay_buffer.sample(30)[0].numpy():
        assert any(np.array_equal(obs, other) for other in seen)


def test_every_evaluation_plays_the_same_episodes_to_their_ends(tmp_path):
    workspace = make(tmp_path, num_train_frames=40)
    before = list(workspace.play(1))
    workspace.train()
    after = list(workspace.play(1))
    assert np.array_equal(before[0].observation, after[0].observation)
    assert len(after) == 11 and after[-1].last()
    returns = [sum(time_step.reward for time_step in list(workspace.play(episode))[1:])
               for episode in range(CFG.num_eval_episodes)]
    assert workspace.evaluations[-1] == [40, pytest.approx(np.mean(returns)),
                                         pytest.approx(np.std(returns))]


def test_the_end_of_a_run(tmp_path):
    workspace = make(tmp_path)
    workspace.train()
    assert not (tmp_path / 'buffer').exists()
    frames = [int(row['frame']) for row in rows(tmp_path / 'eval.csv')]
    assert frames == [0, 100, 200, 300, 400]
    assert workspace.global_step == 200


def test_a_disk_too_small_for_the_snapshots_is_told_before_anything_is_written(tmp_path,
                                                                               monkeypatch):
    workspace = make(tmp_path / 'run')
    row = 5 * 4 + 2 * 4 + 2 * 4 + 3 * 8
    ring = (1000 + 4 * 60 + 5 * 1001 + 1) * row
    snapshot = 3 * snapshots.num_bytes(workspace.agent.state_dict())
    workspace.train()
    saved = (tmp_path / 'run/snapshot.pt').stat().st_size
    assert saved / 1.5 < snapshot < 1.5 * saved
    disk = SimpleNamespace(free=3 * snapshot + ring // 2)
    monkeypatch.setattr(utils.shutil, 'disk_usage', lambda _: disk)
    with pytest.raises(UserError, match='the replay buffer with snapshots in .* needs .* KiB and '
                                        '.* are free: set replay_buffer_size'):
        make(tmp_path / 'new')
    assert not list((tmp_path / 'new').iterdir())
    disk.free = 3 * snapshot + ring
    make(tmp_path / 'new')


def test_a_finished_run_can_be_looked_at_again_but_not_prolonged(tmp_path):
    make(tmp_path).train()
    before = agent_of(tmp_path, 'expert')
    make(tmp_path).train()
    assert differences(agent_of(tmp_path, 'expert'), before) == []
    with pytest.raises(UserError, match='start a new run'):
        make(tmp_path, num_train_frames=500)


def test_videos_are_filmed(tmp_path):
    make(tmp_path, save_video=True, num_train_frames=20).train()
    assert len(list((tmp_path / 'eval_video').glob('*.mp4'))) == 2


def test_other_sizes_are_refused_on_resume(tmp_path):
    make(tmp_path).train()
    with pytest.raises(UserError, match='hidden_dim'):
        env = FakeEnv()
        args = dict(obs_shape=[5], action_dim=2, hidden_dim=32, num_expl_steps=20)
        Workspace(CFG, tmp_path, 'expert', env, env, DrQV2Agent, args, LOOP, {},
                  snapshots.load_last(tmp_path, 'expert', CFG.task_name))


@pytest.mark.parametrize('key', ['num_train_frames', 'batch_size', 'nstep', 'num_eval_episodes'])
def test_budgets_below_one_are_refused(key):
    with pytest.raises(UserError, match=f'{key}=0'):
        train.check_settings(settings('train', **{key: 0}))


def test_actions_that_last_no_frame_are_refused(tmp_path):
    with pytest.raises(UserError, match='action_repeat=0'):
        train.make_workspace(settings('train', action_repeat=0), tmp_path)


def test_less_than_one_step_is_refused(tmp_path):
    with pytest.raises(UserError, match='num_train_frames=1 is not even one step of 2 frames'):
        train.make_workspace(settings('train', num_train_frames=1), tmp_path)


def test_a_script_says_how_an_interrupted_run_goes_on(tmp_path):
    options = ['task=reacher_easy', 'obs=states', 'use_tb=false', 'save_video=false', 'device=cpu',
               'num_eval_episodes=1', 'num_seed_frames=1000', 'hidden_dim=32']
    run, log = start('train', *options, f'hydra.run.dir={tmp_path}/run', cwd=tmp_path), (
        tmp_path / 'run/train.csv')
    # updates go on: they began after the first episode, of 1000 frames
    wait_until(lambda: run.poll() is not None or log.exists() and len(rows(log)) >= 2)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=30)
    assert run.returncode == 143 and 'Traceback' not in error
    assert (f"to resume: python train.py {' '.join(options)} hydra.run.dir={tmp_path}/run"
            in error)
    assert snapshots.load_snapshot(tmp_path / 'run/snapshot.pt', 'expert')['global_step'] > 0


def test_kill_9_in_the_middle_then_resume_on_a_real_task(tmp_path):
    options = ['task=reacher_easy', 'obs=states', 'use_tb=false', 'num_train_frames=2400',
               'num_seed_frames=1000', 'snapshot_every_frames=1200', 'eval_every_frames=2400',
               'num_eval_episodes=1', 'save_video=false', 'device=cpu', 'batch_size=32',
               'hidden_dim=32']
    def run(name):
        return start('train', *options, f'hydra.run.dir={tmp_path / name}',
                     env={**os.environ, 'OMP_NUM_THREADS': '1'})
    whole, killed = run('whole'), run('killed')
    wait_until(lambda: (tmp_path / 'killed/snapshot.pt').exists() or killed.poll() is not None)
    assert killed.poll() is None
    with pytest.raises(UserError, match='another process'), snapshots.only_one_at_work(
            tmp_path / 'killed'):  # held as long as the run goes on
        pass
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    resumed = run('killed')
    assert 'eval at frame 0 ' not in resumed.communicate()[0]  # it went on, and began not anew
    out, _ = whole.communicate()
    assert 'eval at frame 0 ' in out
    assert resumed.returncode == whole.returncode == 0
    assert learned_alike(tmp_path / 'whole', tmp_path / 'killed', 'expert')
    path = tmp_path / 'whole/snapshot.pt'
    assert snapshots.load_snapshot(path, 'expert')['command'] == ' '.join(['train.py', *options])
    assert f'next: python generate_expert_video.py task=reacher_easy expert={path}\n' in out
    load_expert(path, 'reacher_easy')
