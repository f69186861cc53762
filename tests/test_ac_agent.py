import numpy as np
import torch

from ac_agent import ACAgent, TrackingEncoder


def test_tracking_encoder_shows_motion_and_what_is_missing():
    now, before, target, left = [1.0, 2.0], [0.5, 1.0], [4.0, 4.0], [0.25]
    obs = torch.tensor([now + before + target + left])
    encoded = TrackingEncoder(7, 2)(obs)
    assert encoded.tolist() == [[1.0, 2.0, -0.5, -1.0, 3.0, 2.0, 0.25]]


def test_it_learns_to_go_where_the_target_is():
    """One step, reward minus the squared distance that is left after moving by the action."""
    torch.manual_seed(0)
    agent = ACAgent((5,), 2, z_dim=2, lr=1e-3, feature_dim=None, hidden_dim=64,
                    stddev_schedule='0.2')

    class Replay:
        def sample(self, n):
            obs = torch.cat([torch.randn(n, 2), torch.zeros(n, 2), torch.ones(n, 1)], 1)
            obs[:, 2:4] = obs[:, :2] + torch.rand(n, 2) - 0.5
            action = torch.rand(n, 2) * 2 - 1
            reward = -(obs[:, 2:4] - obs[:, :2] - action).square().sum(1, keepdim=True)
            return obs, action, reward, torch.zeros(n, 1), obs

    for step in range(0, 2000, 2):
        agent.update(Replay(), 128, step)
    rng, misses = np.random.default_rng(0), []
    for _ in range(50):
        now, way = rng.normal(size=2), rng.uniform(-0.5, 0.5, 2)
        obs = np.array([*now, *(now + way), 1], np.float32)
        misses.append(abs(agent.act(obs, 0, eval_mode=True) - way).mean())
    assert np.mean(misses) < 0.1  # no action at all misses by 0.25
