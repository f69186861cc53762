import os
import subprocess
import sys
from pathlib import Path

import dm_env
import numpy as np
import plain
import pytest
from absl.testing import absltest, parameterized
from dm_env import StepType, TimeStep, test_utils
from fakes import FakeDemos, FakeEnv, FakeTranslator

import contexts
import dmc
from utils import UserError

ROOT = Path(__file__).parent.parent


class Contract(test_utils.EnvironmentTestMixin, parameterized.TestCase):
    """dm_env's own: specs, first/mid/last, a step after the last begins anew."""

    def make_object_under_test(self):
        return dmc.make('cartpole_balance', obs='states')


class PixelsContract(Contract):
    def make_object_under_test(self):
        env = dmc.make('cartpole_balance', im_size=16)
        env._env._env._env._step_limit = 12  # a short episode: each frame is rendered
        return env

    def make_action_sequence(self):
        for _ in range(8):
            yield self.environment.action_spec().generate_value()


class ImitationContract(Contract):
    def make_object_under_test(self):
        return make_imitation()


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


def test_filming_in_contexts_leaves_physics_alone(scenery):
    rng = np.random.default_rng(0)
    looks = [contexts.sample(rng, 'seen', scenery) for _ in range(2)]
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
    monkeypatch.setattr(dmc.Camera, '_gl', None)
    def broken(*size):
        raise RuntimeError('no display')
    monkeypatch.setattr(f"mujoco.{os.environ['MUJOCO_GL']}.GLContext", broken)
    with pytest.raises(UserError, match='apt-get install'):
        dmc.make('reacher_hard').reset()


@pytest.mark.parametrize('choice', ['off', ''])
def test_a_users_choice_of_gl_stands(choice):
    code = "import os, dmc; print(os.environ['MUJOCO_GL'])"
    run = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'MUJOCO_GL': choice},
                         cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == (choice or os.environ['MUJOCO_GL'])


def test_gl_backends_are_probed(monkeypatch):
    tried = []
    def run(command, env, **_):
        tried.append(env['MUJOCO_GL'])
        return type('Result', (), {'returncode': 0 if env['MUJOCO_GL'] == works else 1})
    monkeypatch.setattr(dmc.subprocess, 'run', run)
    for works in ('egl', 'osmesa', 'none'):
        assert dmc.probe_gl() == (works if works != 'none' else 'off')
    assert tried == ['egl', 'egl', 'osmesa', 'egl', 'osmesa']


# ------------------------------------------------------------------------------------- imitation

def make_imitation(length=4, evaluate=False, **changes):
    options = dict(im_size=8, num_frames=2, lookahead=[1, 3], time_power=2, w_feature=1.0,
                   w_img=0.5, evaluate=evaluate) | changes
    return dmc.Imitation(FakeEnv(length=100), FakeDemos(length), FakeTranslator(), **options)


def test_reward_is_maximal_when_the_agent_reproduces_the_targets():
    """The fake's frames at time t are all t, and so are its targets."""
    env = make_imitation()
    env.reset(episode_seed=0)
    perfect = [env.step(np.zeros(2)).reward for _ in range(4)]
    assert perfect == [0.0] * 4
    env.reset(episode_seed=0)
    env._env._time += 1  # one frame ahead of the demonstration
    late = [env.step(np.zeros(2)).reward for _ in range(4)]
    image = 0.5 * (1 / 255) ** 2 / FakeTranslator.image_var
    np.testing.assert_allclose(late, [-(t / 4) ** 2 * (1.0 + image) for t in (1, 2, 3, 4)])


def test_terms_have_their_weights():
    for weights in ({'w_feature': 0.0}, {'w_img': 0.0}, {'w_feature': 2.0, 'w_img': 0.0}):
        env = make_imitation(time_power=0, **weights)
        env.reset(episode_seed=0)
        env._env._time += 2
        weights = dict(w_feature=1.0, w_img=0.5) | weights
        expected = weights['w_feature'] * 4 + weights['w_img'] * (
            (2 / 255) ** 2 / FakeTranslator.image_var)
        assert env.step(np.zeros(2)).reward == pytest.approx(-expected)


def test_observation_holds_frames_targets_ahead_and_time_left():
    env = make_imitation(length=4)
    obs = env.reset(episode_seed=0).observation
    np.testing.assert_allclose(obs, [0, 0, 0, 0, 1, 1, 3, 3, 1.0])
    env.step(np.zeros(2))
    obs = env.step(np.zeros(2)).observation
    np.testing.assert_allclose(obs, [2, 2, 1, 1, 3, 3, 4, 4, 0.5])  # the last target stays
    assert obs.dtype == np.float32


def test_horizon_ends_the_sum_and_the_clock_is_observed():
    env = make_imitation(length=4)
    time_step = env.reset(episode_seed=0)
    for step in range(1, 5):
        assert not time_step.last()
        time_step = env.step(np.zeros(2))
        assert time_step.observation[-1] == 1 - step / 4
    assert time_step.last() and time_step.discount == 0.0
    assert env.step(np.zeros(2)).first()


def test_task_reward_shows_only_in_evaluation():
    env = make_imitation()
    env.reset(episode_seed=0)
    env.step(np.zeros(2))
    assert env.episode_info == {}
    env = make_imitation(evaluate=True)
    time_step, total = env.reset(episode_seed=0), 0.0
    plain, drawn = FakeEnv(length=100), env._translator.asked[0]
    plain.reset(episode_seed=FakeDemos(4).episode(drawn)['episode_seed'])
    while not time_step.last():
        action = np.full(2, 0.03)
        time_step, total = env.step(action), total + plain.step(action).reward
    info = env.episode_info
    assert info['task_return'] == pytest.approx(total)
    assert info['expert_return'] == 9.0
    assert info['random_return'] != info['task_return']
    assert info['psnr_translation'] > info['psnr_copy_first']


def test_the_seed_draws_demonstration_and_context():
    env = make_imitation()
    one, two = env.reset(episode_seed=3), env.reset(episode_seed=3)
    np.testing.assert_array_equal(one.observation, two.observation)
    drawn = []
    for seed in range(40):
        env.reset(episode_seed=seed)
        drawn.append(tuple(env._translator.asked))
    assert {i for i, _ in drawn} == {0, 1, 2}
    assert {sources for _, sources in drawn} == {(1, 2), (0, 2), (0, 1)}  # never the agent's own


def test_psnr():
    assert dmc.psnr(np.full((2, 2), 100, np.uint8), np.full((2, 2), 110, np.uint8)) == (
        pytest.approx(20 * np.log10(255 / 10)))


if __name__ == '__main__':
    absltest.main()
