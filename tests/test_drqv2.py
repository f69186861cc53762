from types import SimpleNamespace

import numpy as np
import plain
import pytest
import torch
from fakes import Stored

import utils
from drqv2 import ConvStack, DrQV2Agent, Encoder, TruncatedNormal, random_shift
from utils import UserError


def test_random_shift_equals_the_published_one_but_for_rounding():
    obs = torch.randint(0, 256, (16, 9, 84, 84), dtype=torch.uint8)
    torch.manual_seed(0)
    ours = random_shift(obs, pad=4)
    torch.manual_seed(0)
    published = plain.random_shift(obs, pad=4)
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
    states = torch.randn(2, 6)
    assert Encoder((6,))(states) is states


def batch_of(obs_shape, size=32, action_dim=2):
    def obs():
        if len(obs_shape) == 3:
            return torch.randint(0, 256, (size, *obs_shape), dtype=torch.uint8)
        return torch.randn(size, *obs_shape)
    return Stored([obs(), torch.rand(size, action_dim) * 2 - 1, torch.rand(size, 1),
                   torch.full((size, 1), 0.97), obs()])


def updated(obs_shape, precision, steps=3):
    """Agents from the same weights after updates from the same batches, the fast and the plain
    way; and the losses of both, (critic, actor) each."""
    torch.manual_seed(0)
    agent = DrQV2Agent(obs_shape, 2, hidden_dim=32, stddev_schedule='1.0', precision=precision)
    slow, losses = plain.PlainAgent(agent, shift=random_shift), []
    replay = batch_of(obs_shape)
    for step in range(0, 2 * steps, 2):
        torch.manual_seed(step)
        utils.set_precision(precision)
        metrics = agent.update(replay, 32, step)
        torch.manual_seed(step)
        utils.set_precision('fp32')
        losses.append([(metrics['critic_loss'].item(), metrics['actor_loss'].item()),
                       slow.update(*replay.batch)])
    return agent, slow, np.array(losses)


PARTS = 'encoder', 'actor', 'critic', 'critic_target'


@pytest.mark.parametrize('obs_shape', [(9, 24, 24), (6,)])
def test_update_equals_the_plain_one(obs_shape):
    agent, slow, losses = updated(obs_shape, 'fp32')
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-3, atol=1e-5)
    assert not any(p.requires_grad for p in agent.critic_target.parameters())  # no autograd graph
    for name in PARTS:
        for one, other in zip(getattr(agent, name).parameters(), getattr(slow, name).parameters(),
                              strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


needs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
                                reason='this CPU multiplies no bf16: both paths would be the same')


@needs_bf16
def test_the_bf16_encoder_has_the_features_and_gradients_of_the_fp32_one(monkeypatch):
    monkeypatch.setattr(ConvStack, 'chunk', 5)
    torch.manual_seed(0)
    exact, fast = Encoder((9, 32, 32), 'fp32'), Encoder((9, 32, 32), 'bf16')
    fast.load_state_dict(exact.state_dict())
    for conv in [*exact.convs, *fast.convs]:
        conv.bias.data.fill_(0.1)  # they start at 0, which would hide them
    obs = torch.randint(0, 256, (12, 9, 32, 32), dtype=torch.uint8)
    weights = torch.randn(12, exact.repr_dim)
    features = [encoder(obs) for encoder in (exact, fast)]
    for out in features:
        (out * weights).sum().backward()
    assert (features[0] - features[1]).norm() < 0.01 * features[0].norm()
    with torch.no_grad():
        assert torch.equal(fast(obs), features[1])
    for one, other in zip(exact.parameters(), fast.parameters(), strict=True):
        # those near 0 pass another ReLU for their rounding
        assert (one.grad - other.grad).norm() < 0.15 * one.grad.norm()


@needs_bf16
def test_where_the_cpu_has_no_bf16_the_encoder_goes_round(monkeypatch):
    encoder = Encoder((9, 32, 32), 'bf16')
    obs = torch.randint(0, 256, (4, 9, 32, 32), dtype=torch.uint8)
    fused = encoder(obs)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)
    monkeypatch.setattr(ConvStack, 'apply', None)
    plainly = encoder(obs)
    assert plainly.dtype == fused.dtype
    assert (plainly - fused).norm() < 0.01 * fused.norm()


@pytest.mark.parametrize('for_backward', [True, False])
def test_activations_are_kept_only_for_a_backward_pass(for_backward, monkeypatch):
    kept = []
    monkeypatch.setattr(ConvStack, 'apply', lambda *args: ConvStack.forward(
        SimpleNamespace(save_for_backward=lambda *tensors: kept.extend(tensors)), *args))
    encoder = Encoder((9, 32, 32), 'bf16')
    with torch.set_grad_enabled(for_backward):
        features = encoder(torch.zeros(2, 9, 32, 32, dtype=torch.uint8))
    assert kept[0] is features and len(kept) == 1 + 4 + (4 if for_backward else 0)  # and weights


@pytest.mark.parametrize('obs_shape', [(9, 24, 24), (6,)])
def test_bf16_stays_close_to_the_plain_update(obs_shape, monkeypatch):
    monkeypatch.setattr(ConvStack, 'chunk', 12)  # the last one of a batch of 32 is smaller
    agent, slow, losses = updated(obs_shape, 'bf16')
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=0.03, atol=0.01)
    for name in PARTS:
        for one, other in zip(getattr(agent, name).parameters(), getattr(slow, name).parameters(),
                              strict=True):
            # Adam's first steps are of size lr whatever the gradient: at worst they go both ways
            torch.testing.assert_close(one, other, rtol=0, atol=2 * 3 * 1e-4 + 1e-6)
            assert (one - other).abs().mean() < 5e-5
    assert torch.backends.mkldnn.matmul.fp32_precision == 'ieee'


@pytest.mark.parametrize('wrong, words', [
    ({'stddev_schedule': 'linear(1.0,0.1,0)'}, 'duration above 0'),
    ({'precision': 'fp8'}, 'precision=fp8 is neither bf16 nor fp32')])
def test_settings_with_which_it_cannot_learn_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        DrQV2Agent((6,), 2, hidden_dim=8, **wrong)


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
