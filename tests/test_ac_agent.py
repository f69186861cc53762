import copy
from types import SimpleNamespace

import dm_env
import numpy as np
import pytest
import torch
from absl.testing import parameterized
from dm_env import specs, test_utils
from fakes import FakeClips, FakeDemos, FakeEnv, Stored, make_translator

import video
from ac_agent import (
    ACAgent,
    Demonstrations,
    Imitation,
    Layout,
    Play,
    Reward,
    TrackingEncoder,
    action_loss,
    past_actions,
)
from ct_model import ContextTranslator, Dynamics, to_uint8
from drqv2 import DrQV2Agent
from replay_buffer import ReplayBuffer

# ------------------------------------------------------------------------------ layout and reward


@pytest.mark.parametrize('batch', [(), (5,), (2, 3)])
def test_split_is_the_inverse_of_join(batch):
    layout = Layout(4, 3, (1, 2), 2, 5)
    parts = [torch.randn(*batch, *shape) for shape in ((3, 4), (2, 4), (1,), (2, 5))]
    obs = layout.join(*parts)
    assert obs.shape == (*batch, layout.size)
    assert all(map(torch.equal, layout.split(obs), parts))
    assert torch.equal(layout.join(*layout.split(obs)), obs)


def test_what_split_returns_can_be_written_to():
    layout = Layout(2, 1, (1,))
    obs = torch.zeros(3, layout.size)
    _, targets, left, _ = layout.split(obs)
    targets[:], left[:] = 2.0, 1.0
    assert obs.tolist() == [[0, 0, 2, 2, 1]] * 3


def test_targets_stand_still_beyond_both_ends():
    layout = Layout(1, 1, (1, 3))
    demo = torch.arange(5.0)[:, None]  # features 0 to 4
    for step, expected in ((0, [1, 3]), (2, [3, 4]), (4, [4, 4]), (9, [4, 4]), (-2, [0, 1]),
                           (-9, [0, 0])):
        targets = layout.targets(demo[None], torch.tensor([0]), torch.tensor([step]))
        assert targets[0, :, 0].tolist() == expected
    demos = torch.stack([demo, 10 + demo])
    targets = layout.targets(demos, torch.tensor([0, 1]), torch.tensor([0, 3]))
    assert targets[..., 0].tolist() == [[1, 3], [14, 14]]


def test_both_forms_of_the_reward():
    distance, time = torch.tensor([0.0, 0.1, 2.0]), torch.tensor([0.5, 0.5, 1.0])
    expected = [0.5, 0.5 * np.exp(-0.5), np.exp(-10)]
    np.testing.assert_allclose(Reward(0.2, 1.0)(distance, time), expected, rtol=1e-5)
    np.testing.assert_allclose(Reward(None, 2.0)(distance, time), [0, -0.25 * 0.1, -2], rtol=1e-6)


def test_with_a_scale_rewards_are_bounded():
    distance = torch.tensor([0.0, 1e-9, 0.1, 1.0, 1e9])
    for time_power in (0.0, 2.0):
        for time in (0.01, 0.5, 1.0):
            rewards = Reward(0.1, time_power)(distance, torch.tensor(time))
            assert ((rewards >= 0) & (rewards <= 1)).all()
            assert (rewards.diff() <= 0).all()  # further is never better
    assert Reward(0.1, 0.0)(torch.tensor(0.0), torch.tensor(0.01)) == 1


def test_tracking_encoder_shows_motion_and_what_is_missing():
    now, before, target, left = [1.0, 2.0], [0.5, 1.0], [4.0, 4.0], [0.25]
    obs = torch.tensor([now + before + target + left])
    encoder = TrackingEncoder(Layout(2, 2, (1,)))
    assert encoder(obs).tolist() == [[1.0, 2.0, -0.5, -1.0, 3.0, 2.0, 0.25]]
    assert encoder.repr_dim == 7


# ------------------------------------------------------------------------------ demonstrations

SIZE = 16


# Two episodes of five frames, each in three contexts.
NOISE = np.random.default_rng(0).integers(0, 256, (2, 3, 5, SIZE, SIZE, 3), np.uint8)


def make_model(code: bool):
    model, _ = make_translator(SIZE, code)
    return model.only_answer(torch.device('cpu'), torch.float32)


@pytest.fixture(params=['liu2017', 'pose_code'])
def model(request):
    return make_model(request.param == 'pose_code')


@pytest.fixture
def demos(model):
    return Demonstrations(model, FakeClips(NOISE))


def test_translation_is_the_mean_over_sources_in_the_agents_context(demos, model):
    clips = demos.clips
    first = clips.frames(1)[0, 0]
    features, images = demos.translate(1, [1, 2], first, images=True)
    z3, codes, pictures = [], [], []
    context = model.context(torch.from_numpy(first)[None])
    for source in (1, 2):
        z1 = model.encode(torch.from_numpy(clips.frames(1)[source])[None])
        z3.append(model.translate(z1, context))
        codes.append(model.code(z1)[0] if model.code else None)
        pictures.append(model.decode(z3[-1], context)[0])
    if model.code:  # is the same in all contexts
        expected = sum(codes) / 2
    else:
        expected = (sum(z3)[0] / 2 - torch.tensor(demos.scale[0])) / demos.scale[1]
    assert features.shape == (5, demos.feature_dim) and features.dtype == torch.float32
    np.testing.assert_allclose(features, expected, atol=1e-4)
    assert images.dtype == np.uint8
    assert abs(images.astype(int) - to_uint8(sum(pictures) / 2).numpy()).max() <= 1


def test_images_are_decoded_only_when_asked_for(demos, monkeypatch):
    first = demos.clips.frames(0)[0, 0]
    features, images = demos.translate(0, [1, 2], first, images=True)
    monkeypatch.delattr(ContextTranslator, 'decode')
    again = demos.translate(0, [1, 2], first)
    assert again.images is None and images is not None
    assert torch.equal(again.features, features)


def test_features_have_zero_mean_and_unit_variance():
    """The paper's; a code is normalised by the translator."""
    demos = Demonstrations(make_model(code=False), FakeClips(NOISE))
    z = torch.stack([demos.encode(frame) for i in range(2) for clip in demos.clips.frames(i)
                     for frame in clip])
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    assert float(z.var(0).mean()) == pytest.approx(1, abs=1e-3)


def test_features_are_the_mean_over_contexts(demos):
    expected = torch.stack([torch.stack([demos.encode(frame) for frame in clip])
                            for clip in demos.clips.frames(1)]).mean(0)
    features = demos.features()
    assert features.shape == (2, 5, demos.feature_dim)
    np.testing.assert_allclose(features[1], expected, atol=1e-4)


def test_a_given_scale_gives_the_same_features(demos, model):
    frame = demos.clips.frames(0)[0, 0]
    other = Demonstrations(model, FakeClips(NOISE // 2), demos.scale)
    assert torch.equal(other.encode(frame), demos.encode(frame))


def test_demonstrations_are_encoded_once(demos, monkeypatch):
    demos.translate(0, [1], np.zeros((SIZE, SIZE, 3), np.uint8))
    monkeypatch.delattr(ContextTranslator, 'encode')
    for _ in range(3):
        demos.translate(0, [1], np.zeros((SIZE, SIZE, 3), np.uint8))


def test_image_variance_is_that_within_a_demonstration():
    fading = np.zeros((2, 2, 2, 4, 4, 3), np.uint8)
    fading[:, :, 1] = 51
    fading[:, :, :, :2] += 100  # what differs between pixels and contexts does not count
    fading[:, 1] += 50
    demos = Demonstrations(make_model(code=True), FakeClips(fading))
    assert demos.image_variance() == pytest.approx(0.1 ** 2)  # 0 and 0.2, in turn


# ------------------------------------------------------------------------------ environment


class Ahead(FakeEnv):
    """Shows frames that are `ahead` of the clock, after the first."""

    def __init__(self, ahead):
        super().__init__(length=100)
        self.ahead = ahead

    def render(self, im_size):
        frame = super().render(im_size)
        return frame + np.uint8(self.ahead) * (frame > 0)


PAPER = Reward(None, 2.0)


def make_imitation(length=4, env=None, reward=PAPER, w_img=0.5, num_actions=0, **options):
    """-> the environment, and the demonstrations in it."""
    demos, layout = FakeDemos(length), Layout(2, 2, (1, 3), num_actions, 2)
    return Imitation(env or FakeEnv(length=100), demos, layout, reward, 8, w_img, **options), demos


class ImitationContract(test_utils.EnvironmentTestMixin, parameterized.TestCase):
    """dm_env's own: specs, first/mid/last, a step after the last begins anew."""

    def make_object_under_test(self):
        return make_imitation()[0]


@pytest.mark.parametrize('reward, best', [
    (PAPER, [0.0] * 4), (Reward(0.1, 0.0), [1.0] * 4),
    (Reward(0.1, 1.0), [0.25, 0.5, 0.75, 1.0])])
def test_reward_is_maximal_when_the_agent_reproduces_the_targets(reward, best):
    """The fake's frames at time t are all t, and so are its targets."""
    env, _ = make_imitation(reward=reward)
    env.reset(episode_seed=0)
    assert [env.step(np.zeros(2)).reward for _ in range(4)] == best
    env, demos = make_imitation(reward=reward, env=Ahead(1))
    env.reset(episode_seed=0)
    late = [env.step(np.zeros(2)).reward for _ in range(4)]
    distance = 1.0 + 0.5 * (1 / 255) ** 2 / demos.image_variance()
    worth = -distance if reward.scale is None else np.exp(-distance / reward.scale)
    np.testing.assert_allclose(
        late, [(t / 4) ** reward.time_power * worth for t in (1, 2, 3, 4)], rtol=1e-5)


def test_terms_have_their_weights():
    for w_feature, w_img in ((0.0, 0.5), (1.0, 0.0), (2.0, 0.0)):
        env, demos = make_imitation(reward=Reward(None, 0.0, w_feature), env=Ahead(2), w_img=w_img)
        env.reset(episode_seed=0)
        expected = w_feature * 4 + w_img * (2 / 255) ** 2 / demos.image_variance()
        assert env.step(np.zeros(2)).reward == pytest.approx(-expected)


def test_images_are_asked_for_where_they_are_compared_or_shown():
    for options, asked in (({'w_img': 0.0}, False), ({'w_img': 0.5}, True),
                           ({'w_img': 0.0, 'evaluate': True}, True)):
        env, demos = make_imitation(**options)
        env.reset(episode_seed=0)
        assert demos.asked[2] == asked


def test_observation_holds_frames_targets_ahead_and_time_left():
    env, _ = make_imitation(length=4)
    obs = env.reset(episode_seed=0).observation
    np.testing.assert_allclose(obs, [0, 0, 0, 0, 1, 1, 3, 3, 1.0])
    env.step(np.zeros(2))
    obs = env.step(np.zeros(2)).observation
    np.testing.assert_allclose(obs, [2, 2, 1, 1, 3, 3, 4, 4, 0.5])  # the last target stays
    assert obs.dtype == np.float32


class Stuck(FakeEnv):
    """Nothing moves after the first step."""

    def render(self, im_size):
        return np.minimum(super().render(im_size), 1)


@pytest.mark.parametrize('timing, targets, rewards', [
    ('clock', [[1, 3], [2, 4], [3, 4], [4, 4]], [0, -1, -4, -9]),
    ('nearest', [[1, 3], [2, 4], [2, 4], [2, 4]], [0, -1, -1, -1])])
def test_a_demonstration_waits_for_an_agent_that_is_late(timing, targets, rewards):
    env, _ = make_imitation(env=Stuck(length=100), reward=Reward(None), w_img=0.0, timing=timing)
    seen = [env.reset(episode_seed=0)] + [env.step(np.zeros(2)) for _ in range(4)]
    assert [step.observation[4:8:2].tolist() for step in seen[:4]] == targets
    assert [step.reward for step in seen[1:]] == pytest.approx(rewards)


def test_observation_holds_the_last_actions_of_this_episode():
    env, _ = make_imitation(num_actions=2)
    for _ in range(2):
        seen = [env.reset(episode_seed=0)]
        seen += [env.step(np.full(2, action)) for action in (0.5, -0.25, 0.75)]
        assert [time_step.observation[9:].tolist() for time_step in seen] == [
            [0, 0, 0, 0], [0.5, 0.5, 0, 0], [-0.25, -0.25, 0.5, 0.5], [0.75, 0.75, -0.25, -0.25]]


def test_horizon_ends_the_sum_and_the_clock_is_observed():
    env, _ = make_imitation(length=4)
    time_step = env.reset(episode_seed=0)
    for step in range(1, 5):
        assert not time_step.last()
        time_step = env.step(np.zeros(2))
        assert time_step.observation[-1] == 1 - step / 4
    assert time_step.last() and time_step.discount == 0.0
    assert env.step(np.zeros(2)).first()


@pytest.mark.parametrize('evaluate', [False, True])  # a random policy plays it as well
def test_an_episode_that_ends_early_ends_here_as_well(evaluate):
    env, _ = make_imitation(length=4, env=FakeEnv(length=2), evaluate=evaluate)
    env.reset(episode_seed=0)
    assert not env.step(np.zeros(2)).last()
    assert env.step(np.zeros(2)).last() and env.step(np.zeros(2)).first()


def test_task_reward_shows_only_in_evaluation():
    env, _ = make_imitation()
    env.reset(episode_seed=0)
    env.step(np.zeros(2))
    assert env.episode_info == {}
    env, demos = make_imitation(evaluate=True)
    time_step, total = env.reset(episode_seed=0), 0.0
    plain, drawn = FakeEnv(length=100), demos.asked[0]
    plain.reset(episode_seed=demos.clips.episode(drawn)['episode_seed'])
    while not time_step.last():
        action = np.full(2, 0.03)
        time_step, total = env.step(action), total + plain.step(action).reward
    info = env.episode_info
    assert info['task_return'] == pytest.approx(total)
    assert info['expert_return'] == 9.0
    assert info['random_return'] != info['task_return']
    assert info['psnr_translation'] > info['psnr_copy_first']


def test_evaluation_sees_and_rewards_as_training_does():
    steps = []
    for evaluate in (False, True):
        env, _ = make_imitation(evaluate=evaluate, env=Ahead(1))
        steps.append([env.reset(episode_seed=5)] + [env.step(np.zeros(2)) for _ in range(4)])
    for one, other in zip(*steps, strict=True):
        np.testing.assert_array_equal(one.observation, other.observation)
        assert (one.reward, one.discount) == (other.reward, other.discount)


def test_the_seed_draws_demonstration_and_context():
    env, demos = make_imitation()
    one, asked = env.reset(episode_seed=3), demos.asked
    env.reset()
    env.step(np.ones(2))
    two = env.reset(episode_seed=3)  # whatever came between
    np.testing.assert_array_equal(one.observation, two.observation)
    assert demos.asked == asked
    drawn = []
    for seed in range(40):
        env.reset(episode_seed=seed)
        drawn.append(demos.asked)
    assert {i for i, _, _ in drawn} == {0, 1, 2}
    assert {sources for _, sources, _ in drawn} == {(1, 2), (0, 2), (0, 1)}  # never the agent's own


def test_it_starts_where_the_expert_started_in_the_context_that_is_not_a_source():
    starts = []

    class Watched(FakeEnv):
        def reset(self, episode_seed=0, context=None):
            starts.append((episode_seed, context))
            return super().reset(episode_seed, context)

    env, demos = make_imitation(env=Watched())
    for seed in range(10):
        env.reset(episode_seed=seed)
        (i, sources, _), (own,) = demos.asked, {0, 1, 2} - set(demos.asked[1])
        assert len(sources) == 2
        episode_seed, context = starts[-1]
        assert episode_seed == demos.clips.episode(i)['episode_seed']
        np.testing.assert_array_equal(context, demos.clips.episode(i)['contexts'][own])


def test_panels_show_source_translation_and_agent():
    env, _ = make_imitation(evaluate=True, env=Ahead(5))
    env.reset(episode_seed=0)
    env.step(np.zeros(2))
    panels = env.panels(64)
    assert [int(frame.max()) for frame in panels.values()] == [1, 1, 6]
    assert video.panels_side_by_side([panels]).shape[0] == 1


# ------------------------------------------------------------------------------ relabelling

LAYOUT = Layout(2, 2, (1, 2))
REWARD = Reward(50.0, 2.0, w_feature=0.5)


class Walk(FakeEnv):
    """Shows where it is: red and green are 10 (1 + state)."""

    def render(self, im_size):
        frame = np.zeros((im_size, im_size, 3), np.uint8)
        frame[..., :2] = np.round(10 * (1 + np.array(self._state)))
        return frame


class Standing(FakeEnv):
    """Shows the same features all the time."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def render(self, im_size):
        frame = np.zeros((im_size, im_size, 3), np.uint8)
        frame[..., :2] = self.features
        return frame


def imitate(env, reward=REWARD):
    return Imitation(env, FakeDemos(4), LAYOUT, reward, 8)


def make_agent(relabel=0.0, hindsight=0.0, reward=REWARD, **changes):
    options = dict(reward_scale=reward.scale, time_power=reward.time_power,
                   w_feature=reward.w_feature, hidden_dim=8, feature_dim=None) | changes
    return ACAgent((LAYOUT.size,), 2, feature_dim_of_frame=2, num_frames=2, lookahead=[1, 2],
                   relabel=relabel, hindsight=hindsight, **options)


def gather(reward):
    """Every transition of a few episodes, by an agent that is seldom where the target is."""
    env, rng, rows = imitate(Walk(), reward), np.random.default_rng(0), []
    for seed in range(5):
        time_step = env.reset(episode_seed=seed)
        while not time_step.last():
            obs, action = time_step.observation, rng.uniform(-1, 1, 2)
            time_step = env.step(action)
            rows.append((obs, action, [time_step.reward], [time_step.discount],
                         time_step.observation))
    return [torch.tensor(np.array(column), dtype=torch.float32)
            for column in zip(*rows, strict=True)]


@pytest.fixture
def batch():
    return gather(REWARD)


@pytest.mark.parametrize('reward', [REWARD, PAPER])
def test_relabelling_with_its_own_targets_changes_nothing(reward, monkeypatch):
    monkeypatch.setattr(torch, 'randperm', torch.arange)
    batch = gather(reward)
    assert batch[2].std() > 0.1
    agent = make_agent(1.0, reward=reward)
    for relabelled, stored in zip(agent.draw(Stored(batch), len(batch[0])), batch, strict=True):
        torch.testing.assert_close(relabelled, stored)


@pytest.mark.parametrize('reward', [REWARD, PAPER])
def test_relabelled_rewards_are_those_of_the_environment(reward, monkeypatch):
    monkeypatch.setattr(torch, 'randperm', lambda n, device: torch.arange(n).roll(1))
    batch = gather(reward)
    obs, _, rewards, discount, next_obs = make_agent(1.0, reward=reward).draw(
        Stored(batch), len(batch[0]))
    assert rewards.std() > 0.1 and not torch.allclose(rewards, batch[2])
    for i in range(len(obs)):
        step = round(4 * (1 - float(obs[i, -1])))
        env = imitate(Standing(next_obs[i, :2].numpy()), reward)
        env.reset(episode_seed=0)  # demonstrations are all alike
        for _ in range(step + 1):
            time_step = env.step(np.zeros(2))
        assert float(rewards[i]) == pytest.approx(time_step.reward, rel=1e-4)
        assert float(discount[i]) == time_step.discount
        np.testing.assert_allclose(time_step.observation[4:], next_obs[i, 4:])


def test_relabelling_keeps_what_was_seen_and_asks_for_something_else(batch, monkeypatch):
    monkeypatch.setattr(torch, 'randperm', lambda n, device: torch.arange(n).roll(1))
    obs, action, _, discount, next_obs = make_agent(1.0).draw(Stored(batch), len(batch[0]))
    assert torch.equal(obs[:, :4], batch[0][:, :4]) and torch.equal(action, batch[1])
    assert torch.equal(next_obs[:, :4], batch[4][:, :4])
    for i in range(len(obs)):  # targets and clock are those of the transition before
        assert torch.equal(obs[i, 4:], batch[0][i - 1, 4:])
        assert torch.equal(next_obs[i, 4:], batch[4][i - 1, 4:])
        assert discount[i] == batch[3][i - 1] == float(next_obs[i, -1] > 0)


def test_without_relabelling_batches_are_left_alone(batch):
    n = len(batch[0])
    assert all(map(torch.equal, make_agent().draw(Stored(batch), n), batch))
    half = make_agent(0.5).draw(Stored(batch), n)
    assert all(torch.equal(part[n // 2:], was[n // 2:])
               for part, was in zip(half, batch, strict=True))


def test_each_share_of_a_batch_is_its_own(batch):
    n = len(batch[0])
    later = {step: torch.full_like(batch[0], 100.0 + step) for step in (1, 2, 3)}
    batch[4][:, :2] = 101.0  # what is achieved a step later
    obs, _, reward, _, next_obs = make_agent(0.25, 0.5).draw(Stored(batch, later), n)
    first, last = n // 4, n // 4 + n // 2
    assert (obs[:first, 4:8] < 50).all() and not torch.equal(obs[:first], batch[0][:first])
    assert (obs[first:last, 4:8] > 100).all()
    time = 1 - next_obs[first:last, -1:]
    torch.testing.assert_close(reward[first:last], time ** 2)  # that of distance 0
    assert torch.equal(obs[last:], batch[0][last:]) and torch.equal(reward[last:], batch[2][last:])


@pytest.mark.parametrize('reward', [Reward(0.1, 0.0), PAPER])
def test_in_hindsight_the_targets_are_what_came_of_it(tmp_path, reward):
    """A ring with one episode of known features: 1, 2, ..., 6, then 6 for ever."""
    spec = specs.Array((9,), np.float32)
    ring = ReplayBuffer(tmp_path, spec, FakeEnv().action_spec(), 20, 1, 0.9)
    for t in range(7):
        obs = np.array([t, t, t - 1, t - 1, 50, 50, 50, 50, 1 - t / 6], np.float32)
        step = dm_env.restart(obs) if t == 0 else (
            dm_env.transition(-9.0, obs) if t < 6 else dm_env.termination(-9.0, obs))
        ring.add(step, None if t == 0 else np.full(2, t / 10))
    agent = make_agent(hindsight=1.0, reward=reward)
    obs, action, rewards, discount, next_obs = agent.draw(ring, 64)
    perfect = 1 if reward.scale else 0
    for t, left in enumerate(1 - np.arange(6) / 6):
        rows = obs[:, 0] == t
        assert rows.any()
        assert (obs[rows, :4] == torch.tensor([t, t, t - 1, t - 1])).all()
        after, later = min(t + 2, 6), min(t + 3, 6)
        assert (obs[rows, 4:8] == torch.tensor([t + 1, t + 1, after, after])).all()
        assert (next_obs[rows, 4:8] == torch.tensor([after, after, later, later])).all()
        torch.testing.assert_close(obs[rows, 8], torch.full_like(obs[rows, 8], left))
        assert (rewards[rows] == perfect).all()
        assert (discount[rows] == (0.9 if t < 5 else 0)).all()
        torch.testing.assert_close(action[rows], torch.full_like(action[rows], (t + 1) / 10))


# ------------------------------------------------------------------------------ learning


def test_it_learns_to_go_where_the_target_is():
    """One step, reward minus the squared distance that is left after moving by the action."""
    torch.manual_seed(0)
    agent = ACAgent((5,), 2, feature_dim_of_frame=2, num_frames=1, lookahead=[1],
                    reward_scale=None, lr=1e-3, feature_dim=None, hidden_dim=64,
                    stddev_schedule='0.2')

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


TURN = np.array([[-0.4, 1.2], [-1.2, -0.4]])


def expert(x, rng):
    """Circles inwards."""
    return np.clip(x @ TURN.T, -1, 1)


def at_random(x, rng):
    return rng.uniform(-1, 1, x.shape)


def roll_out(policy, num_episodes, seed, length=12, speed=0.3):
    """A linear system: features move by `speed` times the action.

    Returns: features (N, T+1, 2) and actions (N, T, 2), float32.
    """
    rng = np.random.default_rng(seed)
    features, actions = [rng.uniform(-1, 1, (num_episodes, 2))], []
    for _ in range(length):
        actions.append(policy(features[-1], rng))
        features.append(features[-1] + speed * actions[-1])
    return [torch.tensor(np.stack(part, axis=1), dtype=torch.float32)
            for part in (features, actions)]


def observe(features, demo, t, layout=LAYOUT, actions=None):
    """Return the observation of one episode at step t, which follows `demo`."""
    history = torch.stack([features[max(t - back, 0)] for back in range(layout.num_frames)])
    left = torch.tensor([1 - t / (len(features) - 1)])
    targets = layout.targets(demo[None], torch.tensor([0]), torch.tensor([t]))[0]
    before = torch.zeros(layout.num_actions, 2)
    for back in range(min(t, layout.num_actions)):
        before[back] = actions[t - 1 - back]
    return layout.join(history, targets, left, before).numpy()


def store(folder, features, actions, demos, layout=LAYOUT):
    """A replay buffer that holds these episodes, each on the track of a demonstration."""
    reward = Reward(0.1, 0.0)
    ring = ReplayBuffer(folder, specs.Array((layout.size,), np.float32), FakeEnv().action_spec(),
                        10_000, 1, 0.9)
    for x, action, demo in zip(features, actions, demos, strict=False):
        ring.add(dm_env.restart(observe(x, demo, 0, layout)))
        for t in range(1, len(x)):
            worth = float(reward((x[t] - demo[t]).square().mean(), torch.tensor(t / len(action))))
            step = dm_env.termination if t == len(action) else dm_env.transition
            ring.add(step(worth, observe(x, demo, t, layout, action)), action[t - 1].numpy())
    return ring


def make_cloner(demos, play, num_frames=2, **changes):
    torch.manual_seed(0)
    options = dict(reward_scale=0.1, w_feature=1.0, w_critic=0.0, w_clone=1.0, hidden_dim=64,
                   lr=3e-3, feature_dim=None, update_every_steps=1) | changes
    lookahead = options.pop('lookahead', [1, 2])
    agent = ACAgent((Layout(2, num_frames, tuple(lookahead)).size,), 2, feature_dim_of_frame=2,
                    num_frames=num_frames, lookahead=lookahead, demos=demos, play=play, **options)
    agent.MEAN_RATE = 0.02  # there are fewer updates than in use
    return agent


def miss(agent, sign=1, layout=LAYOUT):
    """How far it acts from the expert where the expert goes, in episodes that are held out."""
    features, actions = roll_out(expert, 8, seed=99)
    return np.mean([abs(agent.act(observe(x, x, t, layout), 0, eval_mode=True)
                        - sign * action[t].numpy()).mean()
                    for x, action in zip(features, actions, strict=True)
                    for t in range(len(action))])


@pytest.fixture
def demo_features():
    features, actions = roll_out(expert, 50, seed=0)
    assert actions.abs().mean() > 0.3  # to do nothing is no way to clone
    return features


@pytest.mark.parametrize('options', [
    {}, {'max_shift': 2}, {'w_critic': 0.1}, {'w_critic': 1.0, 'relabel': 0.4, 'hindsight': 0.4}])
def test_it_clones_actions_that_it_was_never_shown(tmp_path, demo_features, options):
    play = Play(*roll_out(at_random, 50, seed=1))
    own = store(tmp_path, *roll_out(at_random, 50, seed=2), demo_features)
    agent = make_cloner(demo_features, play, **options)
    assert miss(agent) > 0.3
    for step in range(500):
        metrics = agent.update(own, 64, step)
    assert {'inverse_loss', 'actor_loss'} <= metrics.keys()
    assert ('critic_loss' in metrics) == ('w_critic' in options)
    assert miss(agent) < 0.1


LONGER = Layout(2, Dynamics.HISTORY, (1, 2), 0, 2)  # dynamics look further back


class Moves(Dynamics):
    """The linear system itself."""

    def forward(self, history, action):
        return history[:, :, -1] + 0.3 * action


@pytest.mark.parametrize('num_own', [0, 20])  # episodes in the replay buffer
def test_it_practises_in_imagination(tmp_path, demo_features, num_own):
    """Without cloning, in dynamics that are known."""
    play = Play(*roll_out(at_random, 50, seed=1))
    own = num_own and store(tmp_path, *roll_out(at_random, num_own, seed=2), demo_features, LONGER)
    agent = make_cloner(demo_features, play, LONGER.num_frames, w_clone=1e-6, w_imagine=1.0,
                        reward_scale=1.0, dynamics=Moves(2, 2))
    assert miss(agent, layout=LONGER) > 0.3
    before = float(agent.imagined_reward(own or None).detach())
    for _ in range(300):
        agent.step_actor(-agent.imagined_reward(own or None))
    assert float(agent.imagined_reward(own or None).detach()) > before
    assert miss(agent, layout=LONGER) < 0.1


@pytest.mark.parametrize('has_own', [False, True])
def test_an_imagined_step_follows_from_the_last(tmp_path, demo_features, has_own):
    """Each step sees where the last one led, the next targets and the last actions; the gradient
    passes from step to step."""
    layout = Layout(2, 4, (1, 2), 2, 2)
    play = Play(*roll_out(at_random, 50, seed=1))
    own = has_own and store(tmp_path, *roll_out(at_random, 9, seed=2), demo_features, layout)
    moves, has_gradient = Moves(2, 2), []
    torch.manual_seed(0)
    agent = ACAgent((layout.size,), 2, 2, 4, [1, 2], 2, w_critic=0.0, w_clone=1.0, w_imagine=1.0,
                    max_shift=2, hidden_dim=8, feature_dim=None, demos=demo_features, play=play,
                    dynamics=moves)
    agent.dynamics.register_forward_pre_hook(
        lambda module, args: has_gradient.append(args[0].requires_grad))
    seen, actions = [], []
    agent.encoder.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    agent.actor.register_forward_hook(lambda module, args, out: actions.append(out.mean))
    agent.imagined_reward(own or None)
    assert has_gradient == [False] + [True] * (agent.NUM_IMAGINED - 1)
    for one, other, action in zip(seen[:-1], seen[1:], actions, strict=False):
        features, targets, left, before = layout.split(one)
        next_features, next_targets, next_left, next_before = layout.split(other)
        torch.testing.assert_close(next_features[:, 0], features[:, 0] + 0.3 * action)
        torch.testing.assert_close(next_features[:, 1:], features[:, :-1])
        assert torch.equal(next_left, left)
        assert torch.equal(next_before, torch.stack([action, before[:, 0]], dim=1))
        assert torch.equal(next_targets[:, 0], targets[:, 1])


def test_what_follows_without_a_critic_is_cloned_and_imagined(demo_features):
    play = Play(*roll_out(at_random, 50, seed=1))
    agent = make_cloner(demo_features, play, LONGER.num_frames, w_clone=0.5, w_imagine=2.0,
                        w_critic=1.0)
    losses = []
    for loss in (lambda: agent.loss_without_critic(16),
                 lambda: 0.5 * agent.clone_loss(16) - 2.0 * agent.imagined_reward(None)):
        torch.manual_seed(0)
        losses.append(float(loss().detach()))
    assert losses[0] == pytest.approx(losses[1])

    # With one, its value counts beside them, in units of its size.
    features, action = torch.randn(16, LONGER.size), torch.zeros(16, 2)
    value = torch.min(*agent.critic(features, action)).detach()
    torch.manual_seed(0)
    loss = agent.actor_loss(features, SimpleNamespace(sample=lambda clip: action)).detach()
    assert float(loss) == pytest.approx(losses[0] - float(value.mean() / value.abs().mean()))


def test_dynamics_are_fitted_further_to_own_steps(tmp_path, demo_features):
    """In play nothing moved. Those that were given stay as they were: they are the translator's."""
    play = Play(*roll_out(at_random, 50, seed=1, speed=0.0))
    own = store(tmp_path, *roll_out(at_random, 50, seed=2), demo_features, LONGER)
    given = Dynamics(2, 2, hidden=64).requires_grad_(False)
    at_first = copy.deepcopy(given.state_dict())
    agent = make_cloner(demo_features, play, LONGER.num_frames, w_imagine=1.0, dynamics=given,
                        lr=1e-2)
    features, actions = roll_out(at_random, 20, seed=3)
    codes, actions = features[:, 2:6], actions[:, 2:5]

    def error():
        with torch.no_grad():
            return float(agent.dynamics.loss(codes, actions))
    before = error()
    for _ in range(200):
        agent.update_dynamics(own, 64)
    assert error() < 0.3 * before
    assert all(torch.equal(value, at_first[name]) for name, value in given.state_dict().items())


def test_what_acts_and_what_labels_are_running_means(demo_features):
    agent = make_cloner(demo_features, Play(*roll_out(at_random, 5, seed=1)))
    pairs = ('policy', 'actor'), ('labeller', 'inverse')
    means = {}
    for step in range(1, 60):
        agent.update_inverse(None, 16)
        agent.update_without_critic(16)
        for mean, net in pairs:
            weights = getattr(agent, net).state_dict()
            rate = max(0.02, 1 / step)
            means[mean] = {key: torch.lerp(means[mean][key], value, rate) if step > 1
                           else value.clone() for key, value in weights.items()}
    for mean, net in pairs:
        for key, value in getattr(agent, mean).state_dict().items():
            torch.testing.assert_close(value, means[mean][key])
            assert not torch.equal(value, getattr(agent, net).state_dict()[key])

    obs = np.ones(LAYOUT.size, np.float32)
    acts = agent.act(obs, 0, eval_mode=True)
    features = agent.encoder(torch.from_numpy(obs)[None])
    with torch.no_grad():
        np.testing.assert_allclose(acts, agent.policy(features, 0.0).mean[0])
        assert not np.allclose(acts, agent.actor(features, 0.0).mean[0])

    def loss():
        torch.manual_seed(0)
        return float(agent.clone_loss(64).detach())
    before = loss()
    agent.inverse[-1].bias.data += 1
    assert loss() == before
    agent.labeller[-1].bias.data += 1
    assert loss() != before


def test_it_clones_without_targets(demo_features):
    """Then the actor learns to do what is done on average, and observations hold no targets."""
    agent = make_cloner(demo_features, Play(*roll_out(at_random, 50, seed=1)), lookahead=[])
    before = float(agent.clone_loss(256).detach())
    for _ in range(200):
        agent.update_inverse(None, 64)
        agent.update_without_critic(64)
    assert float(agent.clone_loss(256).detach()) < before
    assert agent.act(np.ones(2 * 2 + 1, np.float32), 0, eval_mode=True).shape == (2,)


@pytest.mark.parametrize('num_actions', [0, 2])
def test_without_targets_transitions_are_the_agents_own(tmp_path, demo_features, num_actions):
    """In this system, features move by 0.3 times the action."""
    play = Play(*roll_out(at_random, 50, seed=1))
    agent = make_cloner(demo_features, play, lookahead=[], w_critic=1.0, num_actions=num_actions,
                        discount=0.9)
    layout = Layout(2, 2, (), num_actions, 2)
    own = store(tmp_path, *roll_out(at_random, 20, seed=2), demo_features, layout)
    for replay in (None, own):
        obs, action, reward, discount, next_obs = agent.draw(replay, 64)
        features, _, left, before = layout.split(obs)
        next_features, _, next_left, next_before = layout.split(next_obs)
        torch.testing.assert_close(next_features[:, 0], features[:, 0] + 0.3 * action)
        torch.testing.assert_close(next_features[:, 1], features[:, 0])
        torch.testing.assert_close(next_left, left)
        if num_actions:
            torch.testing.assert_close(features[:, 0], features[:, 1] + 0.3 * before[:, 0])
            torch.testing.assert_close(next_before[:, 0], action)
            torch.testing.assert_close(next_before[:, 1], before[:, 0])
        assert ((reward > 0) & (reward < 1)).all() and (discount == 0.9).all()


def test_past_actions_are_the_newest_first_and_zero_before_the_start():
    actions = torch.arange(1, 13).view(2, 6, 1)
    past = past_actions(actions, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 5]), 2)
    assert past[..., 0].tolist() == [[0, 0], [1, 0], [8, 7], [11, 10]]


def test_in_cloning_the_actions_before_are_the_labels_before(demo_features):
    play = Play(*roll_out(at_random, 50, seed=1))
    agent = make_cloner(demo_features, play, num_actions=2)
    for _ in range(300):
        agent.update_inverse(None, 64)
    seen = []
    agent.actor.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    agent.clone_loss(64)
    features, _, _, before = Layout(2, 2, (1, 2), 2, 2).split(seen[0])
    first = (features[:, 1] == 0).all(1)  # by which it has moved
    assert (features[~first, 1] / -0.3 - before[~first, 0]).abs().mean() < 0.08
    assert first.any() and (before[first] == 0).all()


def goes_on(agent, start, num_steps=6, speed=0.3):
    """Where it ends, from features (2,)."""
    seen = [start, start]
    for _ in range(num_steps):
        action = agent.act(np.array([*seen[-1], *seen[-2], 0.5], np.float32), 0, eval_mode=True)
        seen.append(seen[-1] + speed * action)
    return seen[-1]


def test_without_targets_the_critic_leads_to_where_demonstrations_are(tmp_path):
    """Demonstrations show a corner only, so cloning does not say how to get there."""
    corner, rng = np.array([1.0, -1.0]), np.random.default_rng(0)
    demos = torch.tensor(corner + rng.normal(0, 0.05, (20, 13, 2)), dtype=torch.float32)
    play = Play(*roll_out(at_random, 100, seed=1))
    misses = {}
    for w_critic in (0.0, 1.0):
        agent = make_cloner(demos, play, lookahead=[], w_critic=w_critic, w_clone=1e-3,
                            num_pretrain_updates=600, stddev_schedule='0.2',
                            discount=0.9)
        agent.update(None, 64, 0)
        misses[w_critic] = np.mean([abs(goes_on(agent, start) - corner).mean()
                                    for start in rng.uniform(-1, 0, (20, 2)) * [1, -1]])
    assert misses[1.0] < 0.4
    assert misses[0.0] > 0.8


def test_the_agents_own_steps_show_what_play_did_not(tmp_path, demo_features):
    """In play, the second joint stands still. There is much of it, and little of the own steps."""
    def one_joint(x, rng):
        return at_random(x, rng) * [1, 0]
    agent = make_cloner(demo_features, Play(*roll_out(one_joint, 200, seed=1)),
                        num_pretrain_updates=400)
    own = store(tmp_path, *roll_out(at_random, 10, seed=2), demo_features)
    agent.update(own, 64, 0)
    assert miss(agent) > 0.15
    for step in range(1, 800):
        agent.update(own, 64, step)
    assert miss(agent) < 0.1


def test_half_of_the_inverse_models_batch_is_replay_once_there_is_any(tmp_path, demo_features,
                                                                      monkeypatch):
    agent = make_cloner(demo_features, Play(*roll_out(at_random, 50, seed=1)))
    own = store(tmp_path, *roll_out(at_random, 1, seed=2), demo_features)
    sizes, sample = [], own.sample
    monkeypatch.setattr(own, 'sample', lambda n, ahead: (sizes.append(n), sample(n, ahead))[1])
    agent.update_inverse(own, 64)
    agent.update_inverse(None, 64)
    empty = store(tmp_path / 'empty', [], [], [])
    agent.update_inverse(empty, 64)
    assert sizes == [32]


def test_demonstrations_alone_do_not_say_how_the_agent_moves(tmp_path, demo_features):
    """The same demonstrations, by two agents: what each does to follow them is its own."""
    for sign in (1, -1):
        features, actions = roll_out(at_random, 50, seed=1)
        agent = make_cloner(demo_features, Play(features, sign * actions))
        own = store(tmp_path / str(sign), features, sign * actions, demo_features)
        for step in range(400):
            agent.update(own, 64, step)
        assert miss(agent, sign) < 0.1


def test_it_is_pretrained_once(tmp_path, demo_features):
    play = Play(*roll_out(at_random, 5, seed=1))
    own = store(tmp_path, *play, demo_features)
    trained, loss = [], []
    for num in (0, 200):
        agent = make_cloner(demo_features, play, num_pretrain_updates=num)
        loss.append([float(agent.update(own, 64, step)['inverse_loss']) for step in range(2)])
        trained.append(agent.state_dict()['inverse_opt']['state'][0]['step'])
    assert [int(steps) for steps in trained] == [2, 202]
    assert loss[1][0] < 0.5 * loss[0][0]


def test_no_update_between_updates(tmp_path, demo_features):
    play = Play(*roll_out(at_random, 5, seed=1))
    own = store(tmp_path, *play, demo_features)
    agent = make_cloner(demo_features, play, update_every_steps=3, num_pretrain_updates=2)
    assert agent.update(own, 8, 1) == {}
    assert agent.update(own, 8, 3) and agent.update(own, 8, 4) == {}
    assert agent.state_dict()['num_updates'] == 1


class Plain(DrQV2Agent):
    """DrQ-v2 on the same observation."""

    def make_encoder(self, obs_shape):
        return TrackingEncoder(LAYOUT)


def test_without_cloning_and_relabelling_it_is_drqv2(tmp_path, demo_features):
    options = dict(hidden_dim=16, feature_dim=None, lr=1e-3, update_every_steps=2)
    updated = []
    for name in ('imitator', 'plain'):
        torch.manual_seed(0)
        agent = (make_agent(**options) if name == 'imitator'
                 else Plain((LAYOUT.size,), 2, **options))
        own = store(tmp_path / name, *roll_out(at_random, 5, seed=1), demo_features)
        metrics = [agent.update(own, 16, step) for step in range(12)]
        updated.append((agent.state_dict(), metrics))
    (imitator, shown), (plain, expected) = updated
    assert shown == expected and shown[0] and not shown[1]
    for part, weights in plain.items():
        if not part.endswith('opt'):
            assert all(torch.equal(imitator[part][name], value) for name, value in weights.items())
    assert 'inverse' not in imitator


@pytest.mark.parametrize('lookahead', [[1, 2], []])
def test_an_agent_goes_on_from_its_state(tmp_path, demo_features, lookahead):
    layout = Layout(2, 2, tuple(lookahead))
    play = Play(*roll_out(at_random, 5, seed=1))
    own = store(tmp_path, *play, demo_features, layout)
    options = dict(num_pretrain_updates=5, w_critic=0.5, lookahead=lookahead)
    agent, other = (make_cloner(demo_features, play, **options) for _ in range(2))
    for step in range(3):
        agent.update(own, 16, step)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    losses = []
    for each, name in ((agent, 'one'), (other, 'two')):
        own = store(tmp_path / name, *play, demo_features, layout)
        torch.manual_seed(7)
        losses.append([each.update(own, 16, step) for step in range(3, 6)])
    assert losses[0] == losses[1]
    obs = np.ones(layout.size, np.float32)
    np.testing.assert_array_equal(*(each.act(obs, 0, eval_mode=True) for each in (agent, other)))


def test_of_a_slim_snapshot_it_can_act(demo_features):
    agent = make_cloner(demo_features, Play(*roll_out(at_random, 5, seed=1)))
    for _ in range(3):
        agent.update_without_critic(16)
    state = {name: agent.state_dict()[name] for name in ('encoder', 'policy')}
    alone = make_cloner(None, None)
    for parameter in alone.policy.parameters():
        parameter.data.zero_()
    with pytest.raises(KeyError, match='policy'):
        alone.load_state_dict({'encoder': {}, 'actor': agent.state_dict()['actor']})
    alone.load_state_dict(state)
    obs = np.ones(LAYOUT.size, np.float32)
    np.testing.assert_array_equal(*(each.act(obs, 0, eval_mode=True) for each in (agent, alone)))


def test_action_loss_is_absolute_beyond_a_tenth():
    zero = torch.zeros(1)
    far, further = (float(action_loss(torch.tensor([x]), zero)) for x in (0.5, 1.5))
    assert further - far == pytest.approx(1.0)
    near, nearer = (float(action_loss(torch.tensor([x]), zero)) for x in (0.08, 0.04))
    assert near == pytest.approx(4 * nearer)
