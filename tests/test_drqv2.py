import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drqv2 import DrQV2Agent, Encoder, TruncatedNormal, random_shift
from utils import UserError


def reference_shift(obs, pad, shift):
    """The published augmentation: replicate-pad, then bilinear sampling at shifted places."""
    n, _, h, _ = obs.shape
    x = F.pad(obs.float(), (pad,) * 4, 'replicate')
    eps = 1.0 / (h + 2 * pad)
    line = torch.linspace(-1.0 + eps, 1.0 - eps, h + 2 * pad)[:h]
    line = line[None].repeat(h, 1)[..., None]
    grid = torch.cat([line, line.transpose(0, 1)], dim=2)[None].repeat(n, 1, 1, 1)
    offset = shift.view(n, 1, 1, 2) * 2.0 / (h + 2 * pad)
    return F.grid_sample(x, grid + offset, padding_mode='zeros', align_corners=False)


def test_random_shift_equals_the_published_one_but_for_rounding():
    obs = torch.randint(0, 256, (16, 9, 84, 84), dtype=torch.uint8)
    torch.manual_seed(0)
    ours = random_shift(obs, pad=4)
    torch.manual_seed(0)
    rows, cols = torch.randint(0, 9, (2, 16, 1))
    published = reference_shift(obs, 4, torch.cat([cols, rows], dim=1).float())
    assert ours.dtype == torch.uint8
    assert (ours.float() - published).abs().max() < 0.05  # of 255
    assert ours.float().sub(obs.float()).abs().mean() > 10  # and it does shift


def test_truncated_normal_clips_its_noise_and_passes_gradients_straight():
    mean = torch.tensor([[0.95, 0.0]], requires_grad=True)
    dist = TruncatedNormal(mean, torch.full_like(mean, 5.0))
    for _ in range(20):
        action = dist.sample(clip=0.3)
        assert (action <= 1).all() and (action[0, 1].abs() <= 0.3 + 1e-6)
    action.sum().backward()
    assert torch.equal(mean.grad, torch.ones(1, 2))


def test_encoder_sizes():
    assert Encoder((9, 84, 84)).repr_dim == 39200
    out = Encoder((9, 84, 84))(torch.zeros(2, 9, 84, 84, dtype=torch.uint8))
    assert out.shape == (2, 39200)
    with pytest.raises(UserError, match='im_size'):
        Encoder((9, 8, 8))
    states = torch.randn(2, 6)
    assert Encoder((6,))(states) is states


class OneBatch:
    def __init__(self, *batch):
        self.batch = batch

    def sample(self, batch_size):
        return self.batch


def batch_of(obs_shape, size=32, action_dim=2):
    def obs():
        if len(obs_shape) == 3:
            return torch.randint(0, 256, (size, *obs_shape), dtype=torch.uint8)
        return torch.randn(size, *obs_shape)
    return OneBatch(obs(), torch.rand(size, action_dim) * 2 - 1, torch.rand(size, 1),
                    torch.full((size, 1), 0.97), obs())


def plain_update(agent, batch, step, seed):
    """The published update, written the plain way: separate optimisers, autograd on everything."""
    torch.manual_seed(seed)
    obs, action, reward, discount, next_obs = batch
    if obs.dim() == 4:
        obs, next_obs = random_shift(obs), random_shift(next_obs)
    params = list(agent.encoder.parameters())
    encoder_opt, critic_opt, actor_opt = agent.plain_opts
    stddev = 1.0 - 0.9 * step / 500000
    z, next_z = agent.encoder(obs), agent.encoder(next_obs).detach()
    next_action = agent.actor(next_z, stddev).sample(0.3).detach()
    q1, q2 = agent.critic_target(next_z, next_action)
    target = (reward + discount * torch.min(q1, q2)).detach()
    q1, q2 = agent.critic(z, action)
    loss = ((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean()
    for opt in (encoder_opt, critic_opt):
        opt and opt.zero_grad()
    loss.backward()
    for opt in (encoder_opt, critic_opt):
        opt and opt.step()
    action = agent.actor(z.detach(), stddev).sample(0.3)
    actor_loss = -torch.min(*agent.critic(z.detach(), action)).mean()
    actor_opt.zero_grad()
    actor_loss.backward()
    actor_opt.step()
    with torch.no_grad():
        for p, t in zip(agent.critic.parameters(), agent.critic_target.parameters(), strict=True):
            t.copy_(0.01 * p + 0.99 * t)
    assert params == list(agent.encoder.parameters())
    return loss.item(), actor_loss.item()


@pytest.mark.parametrize('obs_shape', [(9, 24, 24), (6,)])
def test_update_equals_the_plain_one(obs_shape):
    torch.manual_seed(0)
    agent = DrQV2Agent(obs_shape, 2, hidden_dim=32)
    plain = DrQV2Agent(obs_shape, 2, hidden_dim=32)
    plain.load_state_dict(copy.deepcopy(agent.state_dict()))
    encoder = list(plain.encoder.parameters())
    plain.plain_opts = (torch.optim.Adam(encoder, 1e-4, foreach=False) if encoder else None,
                        torch.optim.Adam(plain.critic.parameters(), 1e-4, foreach=False),
                        torch.optim.Adam(plain.actor.parameters(), 1e-4, foreach=False))
    replay = batch_of(obs_shape)
    for step in (0, 2, 4):
        torch.manual_seed(step)
        metrics = agent.update(replay, 32, step)
        critic_loss, actor_loss = plain_update(plain, replay.batch, step, seed=step)
        assert metrics['critic_loss'].item() == pytest.approx(critic_loss, rel=1e-4)
        assert metrics['actor_loss'].item() == pytest.approx(actor_loss, rel=1e-3, abs=1e-5)
    assert not any(p.requires_grad for p in agent.critic_target.parameters())  # no graph grows
    for name in ('encoder', 'actor', 'critic', 'critic_target'):
        for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(),
                              strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_updates_come_every_other_step():
    agent = DrQV2Agent((6,), 2, hidden_dim=8)
    replay = batch_of((6,))
    assert agent.update(replay, 32, 3) == {}
    assert agent.update(replay, 32, 4) != {}


def test_act_explores_uniformly_then_by_schedule_and_not_at_all_in_evaluation():
    torch.manual_seed(0)
    agent = DrQV2Agent((6,), 2, hidden_dim=32, num_expl_steps=10, stddev_schedule='0.01')
    obs = np.ones(6, np.float32)
    mean = agent.act(obs, 0, eval_mode=True)
    early = np.stack([agent.act(obs, 0, eval_mode=False) for _ in range(300)])
    late = np.stack([agent.act(obs, 10, eval_mode=False) for _ in range(300)])
    assert early.dtype == np.float32 and early.min() < -0.9 and early.max() > 0.9
    assert abs(late - mean).max() < 0.06
    np.testing.assert_array_equal(mean, agent.act(obs, 99, eval_mode=True))


def test_it_learns_a_bandit():
    """Reward is minus the squared distance of the action from (0.5, -0.5)."""
    torch.manual_seed(0)
    agent = DrQV2Agent((3,), 2, lr=3e-3, hidden_dim=32, feature_dim=None, stddev_schedule='0.1')
    class Replay:
        def sample(self, n):
            obs, action = torch.zeros(n, 3), torch.rand(n, 2) * 2 - 1
            reward = -((action - torch.tensor([0.5, -0.5])) ** 2).sum(1, keepdim=True)
            return obs, action, reward, torch.zeros(n, 1), obs
    for step in range(0, 1600, 2):
        agent.update(Replay(), 64, step)
    np.testing.assert_allclose(agent.act(np.zeros(3, np.float32), 0, True), [0.5, -0.5], atol=0.15)
