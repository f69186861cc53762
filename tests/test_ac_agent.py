import tempfile

import dm_env
import numpy as np
import pytest
import torch
from dm_env import specs
from fakes import FakeDemos, FakeEnv, FakeTranslator

import dmc
from ac_agent import ACAgent, TrackingEncoder
from replay_buffer import ReplayBuffer


def test_tracking_encoder_shows_motion_and_what_is_missing():
    now, before, target, left = [1.0, 2.0], [0.5, 1.0], [4.0, 4.0], [0.25]
    obs = torch.tensor([now + before + target + left])
    encoded = TrackingEncoder(7, 2)(obs)
    assert encoded.tolist() == [[1.0, 2.0, -0.5, -1.0, 3.0, 2.0, 0.25]]


class Stored:
    """A replay buffer that always gives the same batch; `ahead` are its observations by steps."""

    def __init__(self, batch, ahead=None):
        self.batch, self.ahead = batch, ahead

    def sample(self, batch_size, ahead=()):
        return [part.clone() for part in [*self.batch, *(self.ahead[step] for step in ahead)]]


def test_it_learns_to_go_where_the_target_is():
    """One step, reward minus the squared distance that is left after moving by the action."""
    torch.manual_seed(0)
    agent = ACAgent((5,), 2, z_dim=2, num_frames=1, lookahead=[1], lr=1e-3, feature_dim=None,
                    hidden_dim=64, stddev_schedule='0.2')

    class Replay:
        def sample(self, n, ahead):
            obs = torch.cat([torch.randn(n, 2), torch.zeros(n, 2), torch.ones(n, 1)], 1)
            obs[:, 2:4] = obs[:, :2] + torch.rand(n, 2) - 0.5
            action = torch.rand(n, 2) * 2 - 1
            reward = -(obs[:, 2:4] - obs[:, :2] - action).square().sum(1, keepdim=True)
            return obs, action, reward, torch.zeros(n, 1), obs.clone()

    for step in range(0, 2000, 2):
        agent.update(Replay(), 128, step)
    rng, misses = np.random.default_rng(0), []
    for _ in range(50):
        now, way = rng.normal(size=2), rng.uniform(-0.5, 0.5, 2)
        obs = np.array([*now, *(now + way), 1], np.float32)
        misses.append(abs(agent.act(obs, 0, eval_mode=True) - way).mean())
    assert np.mean(misses) < 0.1  # no action at all misses by 0.25


def test_it_learns_the_way_from_what_it_did_itself():
    """Nothing is rewarded; each step moves by the action."""
    torch.manual_seed(0)
    agent = ACAgent((5,), 2, z_dim=2, num_frames=1, lookahead=[1], relabel=0.25, hindsight=0.5,
                    w_inverse=10.0, w_feature=0.0, lr=1e-3, feature_dim=None, hidden_dim=64,
                    stddev_schedule='0.2')

    class Replay:
        def sample(self, n, ahead):
            obs, action = torch.randn(n, 5), torch.rand(n, 2) * 2 - 1
            later = [torch.cat([obs[:, :2] + action, obs[:, 2:]], 1) for _ in ahead]
            zeros = torch.zeros(n, 1)
            return obs, action, zeros, zeros.clone(), later[0].clone(), *later

    for step in range(0, 2000, 2):
        agent.update(Replay(), 128, step)
    rng, misses = np.random.default_rng(0), []
    for _ in range(50):
        now, way = rng.normal(size=2), rng.uniform(-0.5, 0.5, 2)
        obs = np.array([*now, *(now + way), rng.normal()], np.float32)
        misses.append(abs(agent.act(obs, 0, eval_mode=True) - way).mean())
    assert np.mean(misses) < 0.1


def make_agent(relabel=0.0, hindsight=0.0):
    return ACAgent((2 * 4 + 1,), 2, z_dim=2, num_frames=2, lookahead=[1, 2], relabel=relabel,
                   hindsight=hindsight, w_feature=0.5, time_power=2, hidden_dim=8,
                   feature_dim=None)


@pytest.fixture
def batch():
    """Every transition of a few episodes, by an agent that is seldom where the target is."""
    env = dmc.Imitation(FakeEnv(), FakeDemos(4), FakeTranslator(), 8, 2, [1, 2], 2, 0.5, 0.0)
    rng, rows = np.random.default_rng(0), []
    for _ in range(5):
        time_step = env.reset()
        while not time_step.last():
            env._features[0] = rng.normal(size=2).astype(np.float32)
            obs, action = env._observation(), rng.uniform(-1, 1, 2)
            env._env.render = lambda im_size: np.full((8, 8, 3), rng.integers(9), np.uint8)
            time_step = env.step(action)
            rows.append((obs, action, [time_step.reward], [time_step.discount],
                         time_step.observation))
    return [torch.tensor(np.array(column), dtype=torch.float32)
            for column in zip(*rows, strict=True)]


def test_relabelling_with_its_own_targets_changes_nothing(batch, monkeypatch):
    monkeypatch.setattr(torch, 'randperm', torch.arange)
    assert batch[2].std() > 0.1
    for relabelled, stored in zip(make_agent(1.0).draw(Stored(batch), len(batch[0])), batch,
                                   strict=True):
        torch.testing.assert_close(relabelled, stored)


def test_relabelling_keeps_what_was_seen_and_asks_for_something_else(batch, monkeypatch):
    monkeypatch.setattr(torch, 'randperm', lambda n, device: torch.arange(n).roll(1))
    obs, action, reward, discount, next_obs = make_agent(1.0).draw(Stored(batch), len(batch[0]))
    assert torch.equal(obs[:, :4], batch[0][:, :4]) and torch.equal(action, batch[1])
    assert torch.equal(next_obs[:, :4], batch[4][:, :4])
    for i in range(len(obs)):  # targets and clock are those of the transition before
        assert torch.equal(obs[i, 4:], batch[0][i - 1, 4:])
        assert torch.equal(next_obs[i, 4:], batch[4][i - 1, 4:])
        assert discount[i] == batch[3][i - 1] == float(next_obs[i, -1] > 0)
        time, target = 1 - float(next_obs[i, -1]), obs[i, 4:6]
        expected = -0.5 * time ** 2 * float(((next_obs[i, :2] - target) ** 2).mean())
        assert float(reward[i]) == pytest.approx(expected, rel=1e-5)


def test_without_relabelling_batches_are_left_alone(batch):
    n = len(batch[0])
    assert all(map(torch.equal, make_agent().draw(Stored(batch), n), batch))
    half = make_agent(0.5).draw(Stored(batch), n)
    assert all(torch.equal(part[n // 2:], was[n // 2:])
               for part, was in zip(half, batch, strict=True))


def test_each_share_of_a_batch_is_its_own(batch):
    n = len(batch[0])
    later = {step: torch.full_like(batch[0], 100.0 + step) for step in (1, 2, 3)}
    obs, _, reward, _, _ = make_agent(0.25, 0.5).draw(Stored(batch, later), n)
    first, last = n // 4, n // 4 + n // 2
    assert (obs[:first, 4:8] < 50).all() and not torch.equal(obs[:first], batch[0][:first])
    assert (obs[first:last, 4:8] > 100).all() and (reward[first:last] == 0).all()
    assert torch.equal(obs[last:], batch[0][last:]) and torch.equal(reward[last:], batch[2][last:])


def test_in_hindsight_the_targets_are_what_came_of_it():
    """A ring with one episode of known features: 1, 2, ..., 6, then 6 for ever."""
    spec = specs.Array((9,), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        ring = ReplayBuffer(folder, spec, FakeEnv().action_spec(), 20, 1, 0.9)
        for t in range(7):
            obs = np.array([t, t, t - 1, t - 1, 50, 50, 50, 50, 1 - t / 6], np.float32)
            step = dm_env.restart(obs) if t == 0 else (
                dm_env.transition(-9.0, obs) if t < 6 else dm_env.termination(-9.0, obs))
            ring.add(step, None if t == 0 else np.full(2, t / 10))
        obs, action, reward, discount, next_obs = make_agent(hindsight=1.0).draw(ring, 64)
    for t, left in enumerate(1 - np.arange(6) / 6):
        rows = obs[:, 0] == t
        assert rows.any()
        assert (obs[rows, :4] == torch.tensor([t, t, t - 1, t - 1])).all()
        after, later = min(t + 2, 6), min(t + 3, 6)
        assert (obs[rows, 4:8] == torch.tensor([t + 1, t + 1, after, after])).all()
        assert (next_obs[rows, 4:8] == torch.tensor([after, after, later, later])).all()
        torch.testing.assert_close(obs[rows, 8], torch.full_like(obs[rows, 8], left))
        assert (reward[rows] == 0).all() and (discount[rows] == (0.9 if t < 5 else 0)).all()
        torch.testing.assert_close(action[rows], torch.full_like(action[rows], (t + 1) / 10))
