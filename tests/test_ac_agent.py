import copy
from types import SimpleNamespace

import dm_env
import numpy as np
import pytest
import torch
from dm_env import specs
from fakes import differences, watch

from ac_agent import (
    NUM_LATER,
    ACAgent,
    Cloning,
    Critic,
    Discriminator,
    InverseModel,
    Learner,
    Policy,
    action_loss,
    draw_play,
    draw_replay,
)
from imitation import HISTORY, LOOKAHEAD, NUM_ACTIONS, Guide, Layout, Play, histories
from replay_buffer import ReplayBuffer

LAYOUT, CPU, SPEED = Layout(2, 2), torch.device('cpu'), 0.3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def expert(x, rng):
    """Circles inwards."""
    return np.clip(x @ np.array([[-0.4, -1.2], [1.2, -0.4]]), -1, 1)


def at_random(x, rng):
    return rng.uniform(-1, 1, x.shape)


def roll_out(policy, number: int, seed: int) -> Play:
    """Return episodes of a point: its code is its position, which moves by SPEED * action."""
    rng = np.random.default_rng(seed)
    codes, actions = [rng.uniform(-1, 1, (number, 2))], []
    for _ in range(12):
        actions.append(policy(codes[-1], rng))
        codes.append(codes[-1] + SPEED * actions[-1])
    return Play(*(torch.tensor(np.stack(part, 1), dtype=torch.float32)
                  for part in (codes, actions)))


DEMOS, HELD_OUT = (roll_out(expert, number, seed).codes for number, seed in ((50, 0), (8, 99)))
PLAY = roll_out(at_random, 100, 1)
GUIDE = Guide(DEMOS)


class TrueInverse:
    """Knows how the point moves."""

    def label(self, demos, i, steps, num):
        at = steps[:, None] - torch.arange(num)
        moves = demos[i[:, None], at.clamp(0) + 1] - demos[i[:, None], at.clamp(0)]
        return moves / SPEED * (at >= 0)[..., None]


def every_moment(demos) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the numbers of demonstrations (N, T+1, D) and the steps of all moments but their ends,
    (N T,), and what is seen there by one who acts as they show (N T, size)."""
    i = torch.arange(len(demos)).repeat_interleave(demos.shape[1] - 1)
    steps = torch.arange(demos.shape[1] - 1).repeat(len(demos))
    before = TrueInverse().label(demos, i, steps, NUM_ACTIONS + 1)[:, 1:]
    targets = Guide(demos).targets(i, steps)
    return i, steps, LAYOUT.join(histories(demos, i, steps), targets, before)


def own_observations(num: int) -> torch.Tensor:
    return draw_play(PLAY, GUIDE, LAYOUT, num).obs


def store(folder, play: Play) -> ReplayBuffer:
    """Return a replay buffer of these episodes."""
    ring = ReplayBuffer(folder, specs.Array((LAYOUT.size,), np.float32),
                        specs.BoundedArray((2,), np.float32, -1, 1), 100, 1, 0.9)
    for codes, actions in zip(*play, strict=True):
        before, none = torch.zeros(NUM_ACTIONS, 2), torch.zeros(len(LOOKAHEAD) + 1, 2)
        for t in range(len(codes)):
            history = histories(codes[None], torch.tensor([0]), torch.tensor([t]))[0]
            if t:
                before = torch.cat([actions[t - 1:t], before[:-1]])
            kind = dm_env.StepType.MID if 0 < t < len(actions) else dm_env.StepType(2 * (t > 0))
            ring.add(dm_env.TimeStep(kind, 0.0, 1.0, LAYOUT.join(history, none, before).numpy()),
                     actions[t - 1].numpy())
    return ring


# ------------------------------------------------------------------------------ own moments

COUNT = Play(*((100.0 * torch.arange(3)[:, None, None] + torch.arange(num)[:, None] + shift)
               .expand(-1, -1, 2) for num, shift in ((7, 0.0), (6, 0.5))))


@pytest.mark.parametrize('source', ['play', 'replay'])
def test_what_is_drawn_is_as_it_happened(source, tmp_path):
    """Codes are 0 to 6, the actions between them 0.5 to 5.5; other episodes' are 100 more."""
    own = (draw_play(COUNT, GUIDE, LAYOUT, 400) if source == 'play'
           else draw_replay(store(tmp_path, COUNT), LAYOUT, 400))
    drawn = set()
    for history, later, (action, _), obs, next_obs in zip(*own, strict=True):
        first, t = divmod(int(action), 100)
        drawn.add((first, t))
        assert torch.equal(history, LAYOUT.split(obs)[0])
        for now, (codes, actions) in ((t, LAYOUT.split(obs)), (t + 1, LAYOUT.split(next_obs))):
            assert (codes - 100 * first)[:, 0].tolist() == [
                max(now - back, 0) for back in range(HISTORY)]
            assert actions[:, 0].tolist() == [
                100 * first + now - back + 0.5 if now >= back else 0
                for back in range(1, NUM_ACTIONS + 1)]
        assert (later - 100 * first)[:, 1].tolist() == [min(t + 1 + k, 6) for k in range(NUM_LATER)]
    assert drawn == {(i, t) for i in range(3) for t in range(6)}


def targets_of(obs) -> torch.Tensor:
    """Return (B, n, D)."""
    seen = obs[:, :LAYOUT.num_seen].unflatten(1, (-1, 2))
    return seen[:, HISTORY:] + seen[:, :1]


def test_play_follows_a_demonstration_drawn_for_it_and_replay_the_one_that_it_followed(tmp_path):
    own = draw_play(PLAY, GUIDE, LAYOUT, 200)
    i = (targets_of(own.obs)[:, -1:] - DEMOS[:, -1]).square().sum(2).argmin(1)  # by their ends
    assert len(i.unique()) > 40
    for obs in (own.obs, own.next_obs):
        torch.testing.assert_close(targets_of(obs), GUIDE.shown(i, LAYOUT.split(obs)[0]))
    own = draw_replay(store(tmp_path, PLAY), LAYOUT, 50)
    for obs in (own.obs, own.next_obs):
        torch.testing.assert_close(targets_of(obs), torch.zeros(50, len(LOOKAHEAD) + 1, 2))


def test_action_loss_is_absolute_beyond_a_tenth():
    losses = action_loss(torch.tensor([[1.5, 1.5], [0.5, 0.5], [0.08, 0.0], [0.04, 0.0]]),
                         torch.zeros(4, 2))
    assert losses.shape == (4, 1)
    assert losses[0] - losses[1] == pytest.approx(1.0)
    assert losses[2] == pytest.approx(4 * losses[3])


# ------------------------------------------------------------------------------ learner and policy


def test_the_mean_is_plain_at_first_and_exponential_later():
    learner, weights, expected = Learner(torch.nn.Linear(3, 2), 0.1, CPU, rate=0.3), [], None
    for update in range(1, 8):
        learner.descend(learner.net(torch.randn(8, 3)).square().mean())
        weights.append(learner.net.weight.detach().clone())
        expected = (torch.stack(weights).mean(0) if update <= 3
                    else 0.7 * expected + 0.3 * weights[-1])
        torch.testing.assert_close(learner.mean.weight, expected)
    assert not torch.equal(learner.mean.weight, learner.net.weight)


def test_a_step_down_a_loss_changes_one_network_alone():
    one, other = (Learner(torch.nn.Linear(3, 2), 0.1, CPU) for _ in range(2))
    before, losses, x = copy.deepcopy(other.state_dict()), [], torch.randn(8, 3)
    for _ in range(20):
        losses.append((one.net(x) - other.net(x) - 1).square().mean())
        one.descend(losses[-1])
    assert losses[-1] < 0.5 * losses[0]
    assert not differences(before, other.state_dict())
    assert all(parameter.grad is None for parameter in other.net.parameters())


def test_noise_is_clipped_and_gradients_pass_the_bounds():
    policy, obs = Policy(3, 8, 2), torch.randn(50, 3)
    plain = policy(obs)
    assert plain.abs().max() < 1
    off = policy.noisy(obs, 0.2) - plain
    assert off.std() > 0.1 and off.abs().max() <= 0.2 + 1e-6
    noisy = policy.noisy(obs, 50.0)
    assert noisy.abs().max() <= 1 and (noisy.abs() == 1).float().mean() > 0.9
    weight = policy.net[-1].weight
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), weight)[0] for x in (noisy, plain)))


# ------------------------------------------------------------------------------ terms


def test_the_inverse_model_labels_demonstrations_of_a_system_that_it_played_in():
    inverse, (i, steps, _) = InverseModel(LAYOUT, 32, 3e-3, CPU), every_moment(HELD_OUT)

    def error():
        off = inverse.label(HELD_OUT, i, steps, 3) - TrueInverse().label(HELD_OUT, i, steps, 3)
        for back in range(3):  # newest first, zeros before the start
            assert ((off[:, back] == 0).all(1) == (steps < back)).all()
        return off.abs().mean((0, 2)).max()
    assert error() > 0.3
    for _ in range(400):
        inverse.fit(draw_play(PLAY, GUIDE, LAYOUT, 64))
    assert error() < 0.08


def test_cloning_reaches_the_labels():
    cloning, actor = Cloning(LAYOUT, GUIDE), Learner(Policy(LAYOUT.size, 32, 2), 3e-3, CPU)
    i, steps, obs = every_moment(HELD_OUT)

    def miss():
        return (actor.mean(obs) - TrueInverse().label(HELD_OUT, i, steps, 1)[:, 0]).abs().mean()
    assert miss() > 0.3
    for _ in range(400):
        actor.descend(cloning.loss(actor.net, TrueInverse(), 64))
    assert miss() < 0.1


def test_in_cloning_targets_are_shifted_and_actions_are_the_labels_before():
    line, seen = torch.arange(30.0)[None, :, None].expand(1, 30, 2) / 10, []  # each action is 1 / 3
    Cloning(LAYOUT, Guide(line)).loss(lambda obs: seen.append(obs) or obs[:, :2],
                                               TrueInverse(), 500)
    history, before = LAYOUT.split(seen[0])
    steps = (10 * history[:, 0, 0]).round()
    for back in range(NUM_ACTIONS):
        torch.testing.assert_close(before[:, back, 0], (steps > back) / 3)
    middle = (steps > 3) & (steps < 15)
    nearest = (10 * seen[0][middle, HISTORY * 2]).round() - LOOKAHEAD[0]  # from the agent's moment
    assert set(nearest.tolist()) == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize('earned', [0.0, 0.25])
def test_cloned_moments_that_see_others_targets_weigh_what_their_later_moments_earn(earned):
    judged, seen = [], []
    discriminator = SimpleNamespace(
        reward=lambda obs: judged.append(obs) or torch.full((len(obs), 1), earned))

    def actor(obs):  # is right for moments that see their own targets, and 1 off for the others
        seen.append(obs)
        history, before = LAYOUT.split(obs)
        own = (targets_of(obs)[:, -1:] - DEMOS[:, -1]).square().sum(2).argmin(1)
        at = torch.stack([(DEMOS - codes).square().sum(2).flatten().argmin()
                          for codes in history[:, 0]])
        i, steps = at // DEMOS.shape[1], at % DEMOS.shape[1]
        label = TrueInverse().label(DEMOS, i, steps, 1)[:, 0]
        return torch.where((own == i)[:, None], label, label + 1)
    loss = Cloning(LAYOUT, GUIDE).loss(actor, TrueInverse(), 200, discriminator)
    obs, later = seen[0], judged[0]
    assert (len(obs), len(later)) == (400, 200)
    others = targets_of(obs[:200])
    torch.testing.assert_close(others[:, -1], targets_of(later)[:, -1])  # the same one's
    demonstrated = torch.cdist(later[:, :2], DEMOS.flatten(0, 1)).argmin(1)
    paired = torch.cdist(obs[:200, :2], DEMOS.flatten(0, 1)).argmin(1)
    length = DEMOS.shape[1]
    assert torch.equal(demonstrated // length, paired // length)  # of one episode, but later
    assert (demonstrated % length > paired % length).all()
    assert float(loss) == pytest.approx(0.95 * earned / (1 + earned), rel=0.1)


@pytest.mark.parametrize('alike', [False, True])
def test_others_targets_weigh_much_only_if_demonstrations_have_one_goal(alike, monkeypatch):
    goals = np.random.default_rng(0).uniform(-1, 1, (50, 2)) * (not alike)
    demos = roll_out(lambda x, rng: np.clip((goals - x) / SPEED, -1, 1), 50, 0).codes
    guide = Guide(demos)
    discriminator = Discriminator(LAYOUT, guide, 32, 3e-3, CPU)
    for _ in range(300):
        discriminator.fit(draw_play(PLAY, guide, LAYOUT, 64).obs)
    judged = watch(monkeypatch, discriminator, 'reward')
    Cloning(LAYOUT, guide).loss(Policy(LAYOUT.size, 8, 2), TrueInverse(), 500, discriminator)
    others = discriminator.reward(*judged[0][0]).mean()
    own = discriminator.reward(discriminator._demonstrated(500)).mean()
    assert others > 0.8 * own if alike else others < 0.5 * own, (others, own)


def test_the_discriminator_rewards_demonstrated_moments_and_sees_no_actions():
    discriminator = Discriminator(LAYOUT, GUIDE, 32, 1e-3, CPU)
    *_, shown = every_moment(DEMOS)

    def advantage():
        rewards = discriminator.reward(shown), discriminator.reward(own_observations(500))
        assert all(((reward > 0) & (reward < 1)).all() for reward in rewards)
        return rewards[0].mean() - rewards[1].mean()
    assert abs(advantage()) < 0.1
    for _ in range(300):
        discriminator.fit(own_observations(64))
    assert advantage() > 0.2
    otherwise = shown.clone()
    otherwise[:, LAYOUT.num_seen:].uniform_()
    assert torch.equal(discriminator.reward(otherwise), discriminator.reward(shown))


def make_critic() -> tuple[Critic, Policy]:
    return Critic(LAYOUT, 8, 0.01, CPU, discount=0.9, stddev=0.0), Policy(LAYOUT.size, 8, 2)


def values(nets, obs, action) -> torch.Tensor:
    return torch.stack([net(torch.cat([obs, action], dim=1)) for net in nets]).detach()


def test_the_critics_target_by_hand():
    critic, actor = make_critic()
    own, reward = draw_play(PLAY, GUIDE, LAYOUT, 6), torch.rand(6, 1)
    for _ in range(4):
        next_values = values(critic.learner.mean, own.next_obs, actor(own.next_obs))
        now = values(critic.learner.net, own.obs, own.action)
        target = reward + 0.9 * torch.minimum(*next_values)
        metrics = critic.fit(own, reward, actor)
        torch.testing.assert_close(metrics['critic_target_q'], target.mean())
        torch.testing.assert_close(metrics['critic_loss'], 2 * (now - target).square().mean())
    assert differences(critic.learner.net.state_dict(), critic.learner.mean.state_dict())


def test_the_actor_climbs_the_lower_value_whatever_its_scale():
    (critic, actor), obs, results = make_critic(), own_observations(16), []
    value = torch.minimum(*values(critic.learner.net, obs, actor(obs)))
    for scale in (1, 1000):
        for net in critic.learner.net:
            net[-1].weight.data *= scale
            net[-1].bias.data *= scale
        loss = critic.loss(actor, obs)
        torch.testing.assert_close(loss.detach(), -value.mean() / value.abs().mean())
        results.append(torch.autograd.grad(loss, list(actor.parameters())))
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------ the agent


def make_agent(play=PLAY, **changes):
    torch.manual_seed(0)
    return ACAgent((LAYOUT.size,), 2, **{'demos': DEMOS, 'play': play, 'hidden_dim': 32,
                                         'lr': 3e-3, 'device': CPU, 'discount': 0.98,
                                         'stddev': 0.3} | changes)


def test_half_of_a_batch_is_replay_if_there_is_any(monkeypatch, tmp_path):
    agent = make_agent()
    fitted = watch(monkeypatch, agent.inverse, 'fit')
    agent.update(None, 16, 0)
    agent.update(store(tmp_path, Play(PLAY.codes[:3] + 100, PLAY.actions[:3])), 16, 0)
    for num_replayed, ((own,), _) in zip((0, 8), fitted, strict=True):
        assert all(len(part) == 16 for part in own)
        for codes in (own.history, own.later):
            assert (codes > 50).flatten(1).sum(1).tolist().count(0) == 16 - num_replayed


def test_a_term_that_weighs_nothing_is_left_out():
    parts = {}
    for w_clone, w_value in ((1.0, 0.0), (0.0, 1.0)):
        agent = make_agent(w_clone=w_clone, w_value=w_value)
        before = copy.deepcopy(agent.state_dict())
        metrics = agent.update(None, 16, 0)
        changed = {path[0] for path in differences(before, agent.state_dict())}
        parts[w_clone] = changed, ('inverse_loss' in metrics, 'critic_loss' in metrics)
    assert parts[1.0] == ({'actor', 'inverse'}, (True, False))
    assert parts[0.0] == ({'actor', 'discriminator', 'critic'}, (False, True))


@pytest.mark.parametrize('w_clone, whole', [(1.0, 2), (0.0, 10)])
def test_pretraining_clones_at_first_if_it_is_to_clone(w_clone, whole, monkeypatch):
    agent = make_agent(w_clone=w_clone)
    cloned, judged = (watch(monkeypatch, term, 'fit') for term in (agent.inverse, agent.critic))
    for done in agent.pretrain(10, 16):
        assert len(cloned) == w_clone * done
        assert len(judged) == max(0, done - 10 + whole)


def test_the_actors_loss_is_the_weighted_sum_of_its_terms():
    def loss(*weights):
        agent = make_agent(**dict(zip(('w_clone', 'w_value'), weights, strict=True)))
        return float(agent.update(None, 16, 0)['actor_loss'])
    clone, value = loss(2, 1) - loss(1, 1), loss(1, 2) - loss(1, 1)
    assert abs(clone) > 0.01 < abs(value)
    assert loss(3, 0.5) == pytest.approx(3 * clone + 0.5 * value, rel=1e-4)


def follow(agent, speed=SPEED) -> float:
    """Return how far the point stays from the moments of demonstrations that are held out."""
    guide, i = Guide(HELD_OUT), torch.arange(8)
    codes, before = HELD_OUT[:, :1], torch.zeros(8, NUM_ACTIONS, 2)
    for t in range(HELD_OUT.shape[1] - 1):
        history = histories(codes, i, torch.full((8,), t))
        obs = LAYOUT.join(history, guide.shown(i, history), before).numpy()
        action = torch.tensor(np.stack([agent.act(each, 0, eval_mode=True) for each in obs]))
        codes = torch.cat([codes, codes[:, -1:] + speed * action[:, None]], dim=1)
        before = torch.stack([action, before[:, 0]], dim=1)
    return float(torch.cdist(HELD_OUT, codes).amin(2).mean())


@pytest.mark.parametrize('options, sign', [
    ({}, 1), ({}, -1),  # the same demonstrations, but its own actions move it the other way
    ({'w_clone': 0.0}, 1)])
def test_after_play_alone_it_follows_demonstrations_that_are_held_out(options, sign):
    agent = make_agent(Play(PLAY.codes, sign * PLAY.actions), **options)
    others = follow(agent, sign * SPEED), follow(SimpleNamespace(
        act=lambda *args, **kwargs: torch.empty(2).uniform_(-1, 1).numpy()))
    assert list(agent.pretrain(300, 64)) == list(range(1, 301))
    assert follow(agent, sign * SPEED) < (0.7 if options else 0.3) * min(others)


def test_it_acts_by_its_mean_actor_with_noise_unless_it_is_evaluated():
    agent, obs = make_agent(stddev=0.5), own_observations(1)[0].numpy()
    for _ in range(5):
        agent.update(None, 16, 0)
    sure = agent.act(obs, 0, eval_mode=True)
    assert sure.dtype == np.float32 and sure.shape == (2,)
    np.testing.assert_array_equal(sure, agent.act(obs, 0, eval_mode=True))
    mean, net = (part(torch.from_numpy(obs)[None])[0].detach().numpy()
                 for part in (agent.actor.mean, agent.actor.net))
    assert np.array_equal(sure, mean) and not np.allclose(sure, net)
    noisy = np.stack([agent.act(obs, 0, eval_mode=False) for _ in range(300)])
    assert (abs(noisy) <= 1).all() and (noisy.std(0) > 0.3).all()
    assert abs(np.median(noisy, 0) - sure).max() < 0.15


def test_an_agent_goes_on_from_its_state(tmp_path):
    agent, other = make_agent(), make_agent()

    def go_on(each, name):
        torch.manual_seed(7)
        replay = store(tmp_path / name, Play(PLAY.codes[:3], PLAY.actions[:3]))
        return [each.update(replay, 16, step) for step in range(3)], each.state_dict()
    go_on(agent, 'first')
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert not differences(go_on(agent, 'one'), go_on(other, 'other'))


def test_the_actors_mean_suffices_to_act():
    agent, obs = make_agent(), own_observations(1)[0].numpy()
    for _ in range(3):
        agent.update(None, 16, 0)
    state = agent.state_dict()
    for kept in (state, {'actor': {'mean': state['actor']['mean']}}):
        alone = make_agent(None, demos=None)
        alone.load_state_dict(kept)
        np.testing.assert_array_equal(*(each.act(obs, 0, eval_mode=True)
                                        for each in (agent, alone)))
