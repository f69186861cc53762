import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeClips, FakeDemos, FakeEnv, Stored
from oracles import (
    PoseBesideFrame,
    PoseDemonstrations,
    RewardedAgent,
    RewardedImitation,
    check_rewarded,
)

from ac_agent import Layout, Play, Reward
from utils import UserError

LAYOUT = Layout(2, 1, (1,), 0, 2)


def test_the_reward_is_the_task_s():
    env, plain = RewardedImitation(FakeEnv(), FakeDemos(), LAYOUT, Reward(), 8), FakeEnv()
    start = env.reset(episode_seed=3)
    assert start.first() and start.reward is None
    plain.reset(episode_seed=env.start_seed)
    action = np.array([0.5, -0.5], np.float32)
    for _ in range(4):
        time_step = env.step(action)
        assert time_step.reward == plain.step(action).reward
    assert time_step.last() and env.step(action).first()


def test_without_targets_the_critic_learns_from_what_is_replayed():
    agent = RewardedAgent([3], 2, 2, 1, [], w_critic=1.0, w_clone=1.0, hidden_dim=8, relabel=0.4,
                          hindsight=0.4, feature_dim=None, demos=torch.zeros(1, 5, 2),
                          play=Play(torch.zeros(1, 5, 2), torch.zeros(1, 4, 2)))
    obs, rewards = torch.zeros(4, 3), torch.full((4, 1), 7.0)
    replay = Stored([obs, torch.zeros(4, 2), rewards, torch.ones(4, 1), obs])
    assert (agent.draw(replay, 4)[2] == 7).all()


@pytest.mark.parametrize('w_critic, words', [(0, 'w_critic=0 leaves no critic .*: set w_critic=1'),
                                             (1, None)])
def test_the_reward_takes_a_critic(w_critic, words):
    cfg, checked = SimpleNamespace(w_critic=w_critic), []
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        check_rewarded(cfg, checked.append)
    assert checked == [cfg]


POSES = [[9.0, 1.0, 0.0], [5.0, 2.0, np.pi / 2], [7.0, 6.0, np.pi]]


@pytest.fixture
def demos():
    """Three poses of an arm on a cart that has travelled."""
    clips = FakeClips([None], [{'qpos': POSES}], joints=['travel', 'slide', 'hinge'])
    model = SimpleNamespace(feature_dim=9, code=True, parameters=lambda: iter([torch.zeros(1)]))
    return PoseDemonstrations(model, clips)


def test_features_are_the_pose_without_travel(demos):
    features = demos.features()
    assert demos.feature_dim == 3 and features.shape == (1, 3, 3)  # sine, cosine, length
    torch.testing.assert_close(features.mean(1), torch.zeros(1, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(features.std(1, correction=0), torch.ones(1, 3), atol=1e-4, rtol=0)
    assert features[0, 1, 0] == features[0].amax(0)[0]  # the sine of a right angle


def test_a_rendered_frame_is_encoded_as_its_pose(demos):
    env = SimpleNamespace(render=lambda im_size: np.zeros((im_size, im_size, 3), np.uint8),
                          qpos=lambda: np.array(POSES[2]))
    frame = PoseBesideFrame(env, demos).render(8)
    torch.testing.assert_close(demos.encode(frame), demos.features()[0, 2])
