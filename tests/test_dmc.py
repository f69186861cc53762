import os
import shutil
import subprocess
import sys

import dm_env
import numpy as np
import plain
import pytest
from absl.testing import absltest, parameterized
from dm_control import suite
from dm_env import StepType, TimeStep, test_utils
from fakes import ROOT, SCENERY, run, run_in_turn, save_expert

import contexts
import dmc
import video
from utils import UserError


class Contract(test_utils.EnvironmentTestMixin, parameterized.TestCase):
    """dm_env's own: specs, first/mid/last, a step after the last begins anew."""

    def make_object_under_test(self):
        return dmc.make('cartpole_balance', obs='states')


class PixelsContract(Contract):
    def make_object_under_test(self):
        short = suite.load('cartpole', 'balance', {'time_limit': 0.12})  # each frame is rendered
        return dmc.Pixels(dmc.ActionRepeat(dmc.SuiteEpisodes(short, 0), 2), 16, 3)

    def make_action_sequence(self):
        for _ in range(8):
            yield self.environment.action_spec().generate_value()


class Scripted(dm_env.Environment):
    """Plays back (reward, discount, last)."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def reset(self):
        return TimeStep(StepType.FIRST, None, None, np.zeros(1))

    def step(self, action):
        reward, discount, last = self.steps.pop(0)
        return TimeStep(StepType.LAST if last else StepType.MID, reward, discount, np.zeros(1))

    def observation_spec(self):
        pass

    def action_spec(self):
        pass


def test_action_repeat_adds_rewards_and_keeps_a_terminal_zero():
    env = dmc.ActionRepeat(Scripted((1.0, 1.0, False), (2.0, 0.0, True)), 3)
    time_step = env.step(None)
    assert (time_step.reward, time_step.discount, time_step.last()) == (3.0, 0.0, True)
    env = dmc.ActionRepeat(Scripted((1.0, 0.5, False), (2.0, 1.0, False)), 2)
    assert env.step(None).reward == 1.0 + 0.5 * 2.0
    assert dmc.ActionRepeat(Scripted(), 2).reset().reward is None


def test_an_actuator_without_limits_takes_actions_as_they_are():
    env = dmc.make('lqr_lqr_2_1', obs='states')
    assert env.action_spec().minimum == -1 and env.action_spec().maximum == 1
    env.reset()
    env.step(np.array([0.25], np.float32))
    assert env.physics.data.ctrl == 0.25


def test_actions_are_scaled_to_an_actuators_limits(own, monkeypatch):
    path = own / 'domains/dot.py'
    text = path.read_text()
    path.write_text(text.replace('ctrlrange="-1 1"', 'ctrlrange="1 5"'))
    assert path.read_text() != text
    monkeypatch.setattr(dmc, 'DOMAINS', dmc.load_domains(own / 'domains'))
    monkeypatch.setattr(dmc, 'ALL_TASKS', [('dot', 'push')])
    env = dmc.make('dot_push', obs='states')
    env.reset()
    env.step(np.array([-1, 0.5], np.float32))
    assert env.physics.data.ctrl.tolist() == [1, 4]


def test_pixels_are_stacked_newest_last_and_begin_with_copies():
    env = dmc.make('cartpole_balance', im_size=24, frame_stack=3)
    first = env.reset(episode_seed=1).observation
    assert first.shape == (9, 24, 24) and first.dtype == np.uint8
    assert np.array_equal(first[:3], first[3:6]) and np.array_equal(first[:3], first[6:])
    second = env.step(np.array([1.0], np.float32)).observation
    third = env.step(np.array([1.0], np.float32)).observation
    assert np.array_equal(third[:6], second[3:])
    assert not np.array_equal(third[6:], third[3:6])


def test_a_seed_names_an_episode():
    env, other = (dmc.make('reacher_hard', obs='states') for _ in range(2))
    env.reset(episode_seed=1)
    for _ in range(5):
        env.step(np.ones(2, np.float32))
    again = env.reset(episode_seed=7)
    fresh = other.reset(episode_seed=7)
    np.testing.assert_array_equal(again.observation, fresh.observation)
    np.testing.assert_array_equal(env.physics.model.geom_pos, other.physics.model.geom_pos)
    assert not np.array_equal(again.observation, env.reset(episode_seed=8).observation)
    for _ in range(3):
        one, two = env.reset(), env.reset()  # without a seed, every episode is another
        assert not np.array_equal(one.observation, two.observation)


@pytest.mark.parametrize('task, bound', [('reacher_hard', 0.1), ('cup_catch', 0.1),
                                         ('walker_walk', 0.1), ('finger_spin', 0.15)])
def test_camera_shows_what_the_suite_shows(task, bound):
    env, suite = dmc.make(task, obs='states'), dmc.make(task, obs='states')
    for each in (env, suite):
        each.reset(episode_seed=3)
        for _ in range(3):
            each.step(each.action_spec().generate_value())
    theirs = plain.render(suite.physics, 84, 0).astype(int)  # first: see bench.difference
    ours = env.render(84).astype(int)
    assert abs(ours - theirs).mean() < bound  # of 255: shadows and spheres are coarser
    plain.render(suite.physics, 84, 0)
    assert np.array_equal(ours, env.render(84))  # also when another renderer was at work between


def test_filming_in_contexts_leaves_physics_alone():
    rng, scenery = np.random.default_rng(0), contexts.Scenery(SCENERY)
    looks = [scenery.sample(rng, 'seen') for _ in range(2)]
    env, plain = dmc.make('reacher_hard', obs='states', scenery=scenery), dmc.make(
        'reacher_hard', obs='states')
    env.reset(episode_seed=5, context=looks[0])
    plain.reset(episode_seed=5)
    camera = env.camera(32)
    for _ in range(10):
        pictures = [camera.render(look) for look in looks]
        assert abs(pictures[0].astype(int) - pictures[1]).mean() > 1
        np.testing.assert_array_equal(env.render(32), pictures[0])
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        np.testing.assert_array_equal(env.step(action).observation, plain.step(action).observation)
    assert abs(camera.render().astype(int) - plain.render(32)).mean() < 1  # undone; coarser


def test_names():
    assert dmc.split_name('cup_catch') == ('ball_in_cup', 'catch')
    assert dmc.split_name('point_mass_easy') == ('point_mass', 'easy')
    with pytest.raises(UserError, match='no task'):
        dmc.split_name('reacher_harder')
    with pytest.raises(UserError, match='sounds'):
        dmc.make('reacher_hard', obs='sounds')


def test_no_working_gl_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setattr(dmc.Camera, 'gl', None)
    def broken(*size):
        raise RuntimeError('no display')
    monkeypatch.setattr(f"mujoco.{os.environ['MUJOCO_GL']}.GLContext", broken)
    with pytest.raises(UserError, match='apt-get install'):
        dmc.make('reacher_hard').reset()


def test_a_gl_that_does_not_work_ends_a_script_in_a_sentence():
    for code, out, error in run_in_turn(
            *([script, '--help'] for script in ('train', 'train_ct', 'train_ac',
                                                'generate_expert_video')),
            env={**os.environ, 'MUJOCO_GL': 'bad'}):
        assert code == 2 and out == ''
        assert error.startswith('error: MUJOCO_GL=bad does not work')
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize('choice', ['OFF', ''])
def test_a_users_choice_of_gl_stands(choice):
    code = "import os, dmc; print(os.environ['MUJOCO_GL'])"
    run = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'MUJOCO_GL': choice},
                         cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == (choice.lower() or os.environ['MUJOCO_GL'])


def test_gl_backends_are_probed(monkeypatch):
    tried = []
    def run(command, env, **_):
        tried.append(env['MUJOCO_GL'])
        return type('Result', (), {'returncode': 0 if env['MUJOCO_GL'] == works else 1})
    monkeypatch.setattr(dmc.subprocess, 'run', run)
    for works in ('egl', 'osmesa', 'none'):
        assert dmc.probe_gl() == (works if works != 'none' else 'off')
    assert tried == ['egl', 'egl', 'osmesa', 'egl', 'osmesa']


@pytest.mark.parametrize('task, joints', [
    ('reacher_hard', ['hinge', 'hinge']),
    ('cartpole_swingup', ['slide', 'hinge']),
    ('cheetah_run', ['travel', 'slide', *['hinge'] * 7]),
    ('walker_run', ['slide', 'travel', *['hinge'] * 7]),
    ('quadruped_run', [*['other'] * 7, *['hinge'] * 16])])
def test_every_number_of_a_pose_has_its_kind(task, joints):
    env = dmc.make(task, obs='states')
    assert env.joints() == joints
    assert env.qpos().shape == (len(joints),)


# ------------------------------------------------------------------------------ own domains

@pytest.fixture
def own(tmp_path):
    """A folder to start scripts in, with a domain of its own."""
    shutil.copytree(ROOT / 'tests/domains', tmp_path / 'domains')
    return tmp_path


def test_a_domain_of_ones_own_is_filmed_in_contexts_like_any(own):
    save_expert(own / 'experts/dot_push.pt', 'dot_push', num_states=4)
    code, _, error = run('generate_expert_video', 'task=dot_push', 'num_train=1', 'num_valid=1',
                         'num_play=1', 'num_play_valid=0', 'num_contexts=2', 'episode_len=5',
                         'im_size=32', 'num_workers=1', cwd=own)
    assert code == 0, error
    clips = video.Clips(own / 'videos/dot_push/play', task='dot_push', im_size=32)
    assert clips.meta['joints'] == ['slide', 'slide']
    frames, episode = clips.frames(0), clips.episode(0)
    assert (frames[0] != frames[1]).any() and (frames[:, 0] != frames[:, 5]).any()
    env = dmc.load_domains(own / 'domains')['dot']['push'](random=episode['episode_seed'])
    env.reset()
    assert env.physics.data.qpos.tolist() == episode['qpos'][0]


def test_each_script_takes_a_task_of_ones_own(own):
    for code, out, _ in run_in_turn(*([script, 'task=dot_push', '--cfg', 'job'] for script in (
            'train', 'train_ct', 'train_ac')), cwd=own):
        assert code == 0 and 'task_name: dot_push' in out


@pytest.mark.parametrize('name, text, words', [
    ('dot.py', 'tasks = {}', 'dot.py has no SUITE: add SUITE ='),
    ('dot.py', 'import nowhere', 'cannot be imported .ModuleNotFoundError: No .*: correct it'),
    ('dot.py', 'def f():\n', 'cannot be imported .IndentationError: expected.*line 1'),
    ('reacher.py', 'SUITE = {}', 'reacher.py has the name of a domain of the suite: rename it')])
def test_what_is_no_domain_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        dmc.load_domains(tmp_path)


def test_files_with_an_underscore_are_no_domains(tmp_path):
    (tmp_path / '_shared.py').write_text('raise ValueError')
    assert dmc.load_domains(tmp_path) == {}


def test_a_task_of_ones_own_may_have_the_name_of_an_alias(monkeypatch):
    monkeypatch.setattr(dmc, 'ALL_TASKS', [('ball_in_cup', 'catch'), ('cup', 'push')])
    assert dmc.split_name('cup_push') == ('cup', 'push')
    assert dmc.split_name('cup_catch') == ('ball_in_cup', 'catch')


def test_a_model_without_a_camera_is_told(own, monkeypatch):
    path = own / 'domains/dot.py'
    path.write_text(path.read_text().replace('<camera name="above" pos="0 0 1.2"/>', ''))
    monkeypatch.setattr(dmc, 'DOMAINS', dmc.load_domains(own / 'domains'))
    monkeypatch.setattr(dmc, 'ALL_TASKS', [('dot', 'push')])
    with pytest.raises(UserError, match='push in domains/dot.py has no camera'):
        dmc.make('dot_push', obs='states')


if __name__ == '__main__':
    absltest.main()
