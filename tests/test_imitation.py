import dm_env
import numpy as np
import pytest
import torch
from absl.testing import parameterized
from dm_env import test_utils
from fakes import SCENERY, FakeClips, FakeDemos, FakeEnv, kind_of, make_translator, watch

import contexts
import dmc
import video
from ct_model import ContextTranslator, to_uint8
from imitation import (
    HISTORY,
    LOOKAHEAD,
    NUM_ACTIONS,
    Demonstrations,
    Guide,
    Imitation,
    Layout,
    PaperImitation,
    encode_play,
    from_now,
    histories,
    make_env,
    moments,
)

# ------------------------------------------------------------------------------ layout


def test_moments_stand_still_beyond_both_ends():
    episodes = torch.stack([torch.arange(5.0), 10 + torch.arange(5.0)])[..., None]
    seen = moments(episodes, torch.tensor([0, 1, 1]), torch.tensor([0, 3, 9]), (-2, 0, 1, 3))
    assert seen[..., 0].tolist() == [[0, 0, 1, 3], [11, 13, 14, 14], [14, 14, 14, 14]]
    seen = histories(episodes, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 4, -2]))
    assert seen[..., 0].tolist() == [[0, 0, 0], [1, 0, 0], [14, 13, 12], [10, 10, 10]]


def test_an_observation_by_hand():
    history, actions = torch.tensor([[3.0], [2.0], [0.0]]), torch.tensor([[0.5], [-0.25]])
    targets = torch.arange(4.0, 11.0)[:, None]
    assert from_now(history).tolist() == [[3], [-1], [-3]]
    obs = Layout(1, 1).join(history, targets, actions)
    assert obs.tolist() == [3, -1, -3, 1, 2, 3, 4, 5, 6, 7, 0.5, -0.25]
    assert obs[:Layout(1, 1).num_seen].tolist() == obs[:-NUM_ACTIONS].tolist()


@pytest.mark.parametrize('batch', [(), (5,), (2, 3)])
def test_split_is_the_inverse_of_join(batch):
    layout = Layout(4, 3)
    history = torch.randint(-9, 9, (*batch, HISTORY, 4)).float()  # sums are exact
    actions = torch.randn(*batch, NUM_ACTIONS, 3)
    obs = layout.join(history, torch.randn(*batch, len(LOOKAHEAD) + 1, 4), actions)
    assert obs.shape == (*batch, layout.size)
    assert all(map(torch.equal, layout.split(obs), (history, actions)))
    assert Layout.of(layout.size, 3) == layout


# ------------------------------------------------------------------------------ guide


def test_nearest_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    demos, history = torch.randn(3, 9, 2).cumsum(1), torch.randn(40, HISTORY, 2) * 2
    i = torch.randint(3, (40,))
    steps = Guide(demos).nearest(i, history)
    for b in range(40):
        off = []
        for t in range(9):
            past = torch.stack([demos[i[b], max(t - back, 0)] for back in range(HISTORY)])
            off.append(float(((past - history[b]) ** 2).mean()))
        assert steps[b] == np.argmin(off)
    assert len(steps.unique()) > 3


def test_motion_tells_moments_of_equal_pose_apart_and_of_equals_the_first_is_taken():
    swing = torch.tensor([0.0, 1, 2, 3, 2, 1, 0, 1, 2, 3])[None, :, None]
    seen = torch.tensor([[2.0, 1, 0], [2, 3, 2], [0, 1, 2]])[..., None]  # newest first
    steps = Guide(swing).nearest(torch.zeros(3, dtype=torch.long), seen)
    assert steps.tolist() == [2, 4, 6]
    still = torch.zeros(1, 5, 1)
    assert Guide(still).nearest(torch.tensor([0]), torch.zeros(1, HISTORY, 1)).tolist() == [0]


def test_targets_stand_still_at_the_end_and_the_last_one_is_the_end():
    demos = torch.stack([torch.arange(20.0), 100 + torch.arange(20.0)])[..., None]
    guide = Guide(demos)
    for step in (0, 7, 15, 19):
        seen = guide.targets(torch.tensor([0, 1]), torch.tensor([step, step]))[..., 0]
        expected = [min(step + ahead, 19) for ahead in LOOKAHEAD] + [19]
        assert seen.tolist() == [expected, [100 + t for t in expected]]
    history = torch.tensor([[[7.0], [6.0], [5.0]]])
    shown = guide.shown(torch.tensor([1]), 100 + history)
    assert torch.equal(shown, guide.targets(torch.tensor([1]), torch.tensor([7])))


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


def test_features_have_zero_mean_and_unit_variance_or_a_given_scale():
    """The paper's; a code is normalised by the translator."""
    demos = Demonstrations(model := make_model(code=False), FakeClips(NOISE))
    z = torch.stack([demos.encode(frame) for i in range(2) for clip in demos.clips.frames(i)
                     for frame in clip])
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    assert float(z.var(0).mean()) == pytest.approx(1, abs=1e-3)
    other = Demonstrations(model, FakeClips(NOISE // 2), demos.scale)
    assert torch.equal(other.encode(NOISE[0, 0, 0]), z[0])


def test_features_are_the_mean_over_contexts(demos):
    expected = torch.stack([torch.stack([demos.encode(frame) for frame in clip])
                            for clip in demos.clips.frames(1)]).mean(0)
    features = demos.features()
    assert features.shape == (2, 5, demos.feature_dim)
    np.testing.assert_allclose(features[1], expected, atol=1e-4)


def test_demonstrations_are_encoded_once_and_decoded_only_when_asked_for(demos, monkeypatch):
    first = np.zeros((SIZE, SIZE, 3), np.uint8)
    features, images = demos.translate(0, [1], first, images=True)
    for name in ('encode', 'decode'):
        monkeypatch.delattr(ContextTranslator, name)
    for _ in range(3):
        again = demos.translate(0, [1], first)
        assert again.images is None and images is not None
        assert torch.equal(again.features, features)


def test_play_is_its_codes_and_actions():
    model, actions = make_model(code=True), np.random.default_rng(0).uniform(-1, 1, (2, 4, 2))
    play = encode_play(model, FakeClips(NOISE, [{'actions': part.tolist()} for part in actions]))
    assert torch.equal(play.codes, Demonstrations(model, FakeClips(NOISE)).features())
    assert play.actions.dtype == torch.float32
    np.testing.assert_allclose(play.actions, actions, rtol=1e-6)


# ------------------------------------------------------------------------------ environment


class Ahead(FakeEnv):
    """Shows frames that are `ahead` of the clock, after the first; `last` is the last it shows."""

    def __init__(self, ahead=0, last=99, at_first=0):
        super().__init__(length=100)
        self.ahead, self.last, self.at_first = ahead, last, at_first
        self.starts = []

    def reset(self, episode_seed=0, context=None):
        self.starts.append((episode_seed, context))
        return super().reset(episode_seed, context)

    def render(self, im_size):
        frame = super().render(im_size)
        moved = np.minimum(frame + np.uint8(self.ahead), np.uint8(self.last))
        return np.where(frame > 0, moved, np.uint8(self.at_first))


def make(env=None, length=4, w_img=None, evaluate=False, demos=None):
    """Return the environment, and the demonstrations in it; with `w_img` the paper's."""
    env, demos = env or Ahead(), demos or FakeDemos(length)
    if w_img is None:
        return Imitation(env, demos, 8, evaluate), demos
    return PaperImitation(env, demos, 8, evaluate, w_img), demos


def play_still(env, num_steps, seed=0) -> list[dm_env.TimeStep]:
    return [env.reset(episode_seed=seed)] + [env.step(np.zeros(2)) for _ in range(num_steps)]


def targets_of(observation) -> list[float]:
    """Return the moments that an observation of FakeDemos shows, absolute."""
    codes = observation[:Layout(2, 2).num_seen].reshape(-1, 2)
    return (codes[HISTORY:] + codes[0])[:, 0].tolist()


class ImitationContract(test_utils.EnvironmentTestMixin, parameterized.TestCase):
    """dm_env's own: specs, first/mid/last, a step after the last begins anew."""

    def make_object_under_test(self):
        return make()[0]


class PaperContract(ImitationContract):
    def make_object_under_test(self):
        return make(w_img=0.5)[0]


def test_observation_holds_codes_and_targets():
    env, _ = make(length=20)
    seen = [step.observation for step in play_still(env, 3)]
    for t, obs in enumerate(seen):
        assert obs.dtype == np.float32
        past = [max(t - back, 0) - t for back in range(1, HISTORY)]
        assert obs[:2 * HISTORY:2].tolist() == obs[1:2 * HISTORY:2].tolist() == [t, *past]
        assert targets_of(obs) == [t + ahead for ahead in LOOKAHEAD] + [20]


def test_observation_holds_the_last_actions_of_this_episode():
    env, _ = make()
    for _ in range(2):
        seen = [env.reset(episode_seed=0)]
        seen += [env.step(np.array([action, 1])) for action in (0.5, -0.25, 0.75)]
        assert [time_step.observation[-4:].tolist() for time_step in seen] == [
            [0, 0, 0, 0], [0.5, 1, 0, 0], [-0.25, 1, 0.5, 1], [0.75, 1, -0.25, 1]]


def test_a_demonstration_waits_for_an_agent_that_stands_still():
    env, _ = make(Ahead(last=3), length=20)
    seen = [step.observation.tolist() for step in play_still(env, 15)]
    assert targets_of(np.array(seen[3])) == [3 + ahead for ahead in LOOKAHEAD] + [20]
    assert all(obs == seen[5] for obs in seen[5:])  # as soon as no code in sight moves
    paper, _ = make(Ahead(last=3), length=20, w_img=0.0)
    seen = [step.observation.tolist() for step in play_still(paper, 15)]
    assert all(one != other for one, other in zip(seen[5:], seen[6:], strict=False))


@pytest.mark.parametrize('phase', [0, 1, 4, 9, 17])
def test_an_agent_may_start_at_any_phase(phase):
    env, _ = make(Ahead(phase, at_first=phase), length=20)
    obs = play_still(env, 2)[-1].observation
    now = phase + 2
    assert targets_of(obs) == [min(now + ahead, 20) for ahead in LOOKAHEAD] + [20]


def test_reward_is_minus_the_distance_from_the_nearest_moment():
    env, _ = make(Ahead(2))
    assert [step.reward for step in play_still(env, 4)[1:]] == [0, 0, -1, -4]  # codes 3, 4, 5, 6
    env, _ = make(Ahead(last=1))
    assert [step.reward for step in play_still(env, 4)[1:]] == [0] * 4


def test_papers_reward_by_hand():
    """Frames at time t are t all over, and their pixels' variance is 2 / 255^2."""
    for ahead, w_img, distance in ((0, 0.5, 0.0), (1, 0.0, 1.0), (1, 0.5, 1.25), (2, 0.5, 5.0),
                                   (2, 3.0, 10.0)):
        env, _ = make(Ahead(ahead), w_img=w_img)
        rewards = [step.reward for step in play_still(env, 4)[1:]]
        np.testing.assert_allclose(rewards, [-distance * (t / 4) ** 2 for t in (1, 2, 3, 4)],
                                   rtol=1e-5)


def test_papers_images_count_in_units_of_their_variance_over_time():
    fading = np.zeros((3, 3, 2, 8, 8, 3), np.uint8)
    fading[:, :, 1] = 51
    fading[:, :, :, :4] += 100  # what differs between pixels and contexts does not count
    fading[:, 1] += 50
    rewards = []
    for w_img in (0.0, 1.0):
        demos = FakeDemos(1)
        demos.clips = FakeClips(fading, [demos.clips.episode(i) for i in range(3)])
        env, _ = make(w_img=w_img, demos=demos)
        rewards.append(play_still(env, 1)[-1].reward)
    square = (50 ** 2 + 150 ** 2) / 2 / 255 ** 2  # the agent shows 1, the translation 51 and 151
    assert rewards[0] - rewards[1] == pytest.approx(square / 0.1 ** 2, rel=1e-3)  # 0 and 0.2


def test_papers_observation_holds_codes_targets_by_the_clock_and_time_left():
    env, _ = make(w_img=0.5)
    seen = play_still(env, 4)
    assert seen[0].observation.dtype == np.float32
    assert seen[0].observation[::2].tolist() == [0, 0, 0, 1, 3, 4, 4, 1.0]
    assert seen[2].observation[::2].tolist() == [2, -1, -2, 1, 2, 2, 2, 0.5]
    assert [step.observation[-1] for step in seen] == [1, 0.75, 0.5, 0.25, 0]


def test_images_are_asked_for_if_they_are_compared_or_shown(monkeypatch):
    for options, asked in (({}, False), ({'evaluate': True}, True), ({'w_img': 0.0}, False),
                           ({'w_img': 0.5}, True), ({'w_img': 0.0, 'evaluate': True}, True)):
        env, demos = make(**options)
        asked_for = watch(monkeypatch, demos, 'translate')
        env.reset(episode_seed=0)
        assert asked_for[0][1]['images'] == asked


@pytest.mark.parametrize('w_img', [None, 0.5])
@pytest.mark.parametrize('evaluate', [False, True])  # a random policy plays it as well
def test_an_episode_ends_with_its_demonstration_or_the_tasks(w_img, evaluate):
    for length, end in ((100, 4), (2, 2)):
        env, _ = make(FakeEnv(length), w_img=w_img, evaluate=evaluate)
        *before, last = play_still(env, end)
        assert not any(step.last() for step in before)
        assert last.last() and last.discount == 0.0
        assert env.step(np.zeros(2)).first()


def test_task_reward_shows_only_in_evaluation():
    env, _ = make()
    play_still(env, 4)
    assert env.episode_info == {}
    env, _ = make(evaluate=True)
    time_step, total = env.reset(episode_seed=0), 0.0
    plain = FakeEnv(length=100)
    plain.reset(episode_seed=env.start_seed)
    while not time_step.last():
        action = np.full(2, 0.03)
        time_step, total = env.step(action), total + plain.step(action).reward
    info = env.episode_info
    assert info['task_return'] == pytest.approx(total)
    assert info['expert_return'] == 9.0
    assert info['random_return'] != info['task_return']
    assert info['psnr_translation'] > info['psnr_copy_first']


@pytest.mark.parametrize('w_img', [None, 0.5])
def test_evaluation_sees_and_rewards_as_training_does(w_img):
    steps = [play_still(make(Ahead(1), w_img=w_img, evaluate=evaluate)[0], 4, seed=5)
             for evaluate in (False, True)]
    for one, other in zip(*steps, strict=True):
        np.testing.assert_array_equal(one.observation, other.observation)
        assert (one.reward, one.discount) == (other.reward, other.discount)


class Apart(FakeDemos):
    """Demonstrations that lie 10 apart from each other."""

    def translate(self, i, sources, first, images=False):
        translation = super().translate(i, sources, first, images)
        return translation._replace(features=translation.features + 10 * i)


def test_evaluation_tells_how_near_it_came_to_its_own_and_to_another():
    off = [pytest.approx(np.mean([min((10 * i + t - code) ** 2 for code in (0, 1))
                                  for t in range(5)])) for i in range(3)]  # its codes are 0 and 1
    env, _ = make(Ahead(last=1), evaluate=True, demos=Apart())
    seen = set()
    for seed in range(30):
        play_still(env, 4, seed)
        seen.add(tuple(off.index(env.episode_info[name])
                       for name in ('distance', 'distance_other')))
        assert env.episode_info['distance'] == off[env.start_seed - 10]
    assert seen == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}


def test_where_there_is_one_demonstration_there_is_no_other_to_compare_with():
    class Only(FakeDemos):
        def __len__(self):
            return 1
    env, _ = make(evaluate=True, demos=Only())
    play_still(env, 4, 0)
    assert 'distance' in env.episode_info and 'distance_other' not in env.episode_info


def test_the_seed_draws_demonstration_and_context():
    env, demos = make()
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
    env, demos = make(watched := Ahead())
    for seed in range(10):
        env.reset(episode_seed=seed)
        (i, sources, _), (own,) = demos.asked, {0, 1, 2} - set(demos.asked[1])
        assert len(sources) == 2
        start_seed, context = watched.starts[-1]
        assert start_seed == env.start_seed == demos.clips.episode(i)['episode_seed']
        np.testing.assert_array_equal(context, demos.clips.episode(i)['contexts'][own])


@pytest.mark.parametrize('kind', ['seen', 'held_out'])
def test_of_own_videos_it_starts_from_a_reset_of_its_own_in_a_context_of_their_kind(kind):
    env, demos = make(watched := Ahead(), evaluate=True)
    demos.clips.imported, demos.clips.meta = True, {'scenery': SCENERY, 'contexts': kind}
    for seed in (*range(12), 0):
        play_still(env, 4, seed)
        assert demos.asked[1] == (0, 1, 2)  # all are sources
        assert watched.starts[-1][0] == env.start_seed
        assert kind_of(contexts.Scenery(SCENERY), watched.starts[-1][1]) == kind
        assert not {'expert_return', 'psnr_translation'} & env.episode_info.keys()
        assert {'task_return', 'random_return', 'distance'} <= env.episode_info.keys()
    starts = [(seed, *context) for seed, context in watched.starts[1::2]]  # not random policies'
    assert starts[0] == starts[-1]
    assert len({seed for seed, *_ in starts}) == len({tuple(rest) for _, *rest in starts}) == 12


def test_panels_show_source_translation_and_agent():
    env, _ = make(Ahead(5), evaluate=True)
    play_still(env, 1)
    panels = env.panels(64)
    assert [int(frame.max()) for frame in panels.values()] == [1, 1, 6]
    assert video.panels_side_by_side([panels]).shape[0] == 1


@pytest.mark.parametrize('w_img, kind', [(None, Imitation), (0.5, PaperImitation)])
def test_an_agent_acts_and_looks_as_the_expert_did(w_img, kind):
    scenery = contexts.Scenery(SCENERY)
    context = scenery.sample(np.random.default_rng(0), 'seen')
    clips = FakeClips(NOISE, [{'episode_seed': 7 + i, 'expert_return': 1.0,
                               'contexts': [context.tolist()] * 3} for i in range(2)],
                      task='reacher_hard', scenery=SCENERY, action_repeat=3, im_size=SIZE)
    env = make_env(Demonstrations(make_model(code=True), clips), w_img, evaluate=True)
    assert type(env) is kind
    env.reset(episode_seed=0)
    plain = dmc.load_suite('reacher_hard', scenery)
    plain.reset(episode_seed=env.start_seed, context=context)
    shown = [env.panels(SIZE)['imitator, target context'], plain.render(SIZE)]
    np.testing.assert_array_equal(*shown)
    env.step(np.ones(2, np.float32))
    for _ in range(3):
        plain.step(np.ones(2, np.float32))
    np.testing.assert_array_equal(env.qpos(), plain.qpos())
