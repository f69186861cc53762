import os

import numpy as np
import plain
import pytest
from dm_env import StepType, TimeStep
from fakes import FakeEnv

import utils
from replay_buffer import ReplayBuffer
from utils import UserError

DISCOUNT = 0.9


def make(root, env=None, **changes):
    env = env or FakeEnv()
    options = dict(capacity=100, nstep=3, discount=DISCOUNT, slack=20, seed=0) | changes
    return ReplayBuffer(root, env.observation_spec(), env.action_spec(), **options)


def play(buffer, env, num_episodes, first_seed=0):
    """-> the episodes: lists of (time_step, action)."""
    rng, episodes = np.random.default_rng(first_seed), []
    for seed in range(first_seed, first_seed + num_episodes):
        time_step = env.reset(episode_seed=seed)
        buffer.add(time_step)
        episode = [(time_step, None)]
        while not time_step.last():
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            time_step = env.step(action)
            buffer.add(time_step, action)
            episode.append((time_step, action))
        episodes.append(episode)
    return episodes


def find(episodes, obs):
    """Where an observation comes from: (episode, time)."""
    [place] = [(e, t) for e, episode in enumerate(episodes)
               for t, (time_step, _) in enumerate(episode)
               if np.array_equal(time_step.observation, obs)]
    return place


@pytest.mark.parametrize('pixels', [False, True])
def test_sample_equals_hand_arithmetic(tmp_path, pixels):
    env = FakeEnv(pixels=pixels)
    buffer = make(tmp_path, env, frame_stack=3 if pixels else 1)
    episodes = play(buffer, env, 4)
    obs, action, reward, discount, next_obs = (x.numpy() for x in buffer.sample(64))
    times = set()
    for b in range(64):
        e, t = find(episodes, obs[b])
        steps = min(3, env.length - t)  # a return never reaches into the next episode
        later = episodes[e][t + 1:t + 1 + steps]
        np.testing.assert_array_equal(action[b], later[0][1])
        expected = sum(DISCOUNT ** k * step.reward for k, (step, _) in enumerate(later))
        assert reward[b, 0] == pytest.approx(expected, rel=1e-5)
        assert discount[b, 0] == pytest.approx(DISCOUNT ** steps)
        np.testing.assert_array_equal(next_obs[b], later[-1][0].observation)
        times.add(t)
    assert times == set(range(env.length))  # every step is a start, the last transition too


def test_the_ring_holds_the_transitions_of_the_plain_list(tmp_path):
    np.random.seed(0)
    env = FakeEnv(pixels=True)
    ours, theirs = make(tmp_path, env, frame_stack=3), plain.Replay(nstep=3, discount=DISCOUNT)
    for episode in play(ours, env, 3):
        for time_step, action in episode:
            theirs.add(time_step, action)
    transitions = []
    for replay in (ours, theirs):
        batch = [part.numpy().astype(np.float32).reshape(500, -1) for part in replay.sample(500)]
        transitions.append(np.unique(np.concatenate(batch, axis=1).round(4), axis=0))
    assert len(transitions[0]) == 3 * env.length
    np.testing.assert_allclose(*transitions, atol=2e-4)


def test_terminal_discount_stops_the_return(tmp_path):
    buffer = make(tmp_path)
    def obs(x):
        return np.full(5, x, np.float32)
    buffer.add(TimeStep(StepType.FIRST, None, None, obs(0)))
    buffer.add(TimeStep(StepType.MID, 1.0, 1.0, obs(1)), np.zeros(2))
    buffer.add(TimeStep(StepType.LAST, 10.0, 0.0, obs(2)), np.zeros(2))
    start, _, reward, discount, _ = (x.numpy() for x in buffer.sample(50))
    assert set(discount.ravel()) == {0.0}
    returns = {float(s[0]): float(r) for s, r in zip(start, reward[:, 0], strict=True)}
    assert returns == pytest.approx({0.0: 1.0 + DISCOUNT * 10, 1.0: 10.0})


def test_only_the_newest_are_sampled_once_the_ring_is_full(tmp_path):
    env = FakeEnv(pixels=True)
    buffer = make(tmp_path, env, capacity=33, slack=11, frame_stack=3)
    episodes = play(buffer, env, 20)
    assert len(buffer) == 33
    for obs in buffer.sample(200)[0].numpy():
        assert find(episodes, obs)[0] >= 17


def test_an_episode_in_progress_is_not_sampled_and_dropped_when_broken_off(tmp_path):
    env = FakeEnv()
    buffer = make(tmp_path, env)
    episodes = play(buffer, env, 1)
    buffer.add(env.reset(episode_seed=99))
    buffer.add(env.step([0.1, 0.1]), np.zeros(2, np.float32))
    assert len(buffer) == 11
    episodes += play(buffer, env, 1, first_seed=5)
    assert len(buffer) == 22
    for obs in buffer.sample(100)[0].numpy():
        find(episodes, obs)


def test_reopened_buffer_goes_on_as_if_never_closed(tmp_path):
    env = FakeEnv()
    buffer = make(tmp_path / 'a', env)
    play(buffer, env, 3)
    buffer.sample(8)
    state = buffer.state_dict()
    play(buffer, env, 1, first_seed=50)  # lost: written after the snapshot
    again = make(tmp_path / 'a', env, resume=True)
    again.load_state_dict(state)
    reference = make(tmp_path / 'b', env)
    play(reference, env, 3)
    reference.sample(8)
    for one, other in zip(again.sample(32), reference.sample(32), strict=True):
        assert one.equal(other)


def test_slack_keeps_what_the_last_snapshot_still_samples(tmp_path):
    env = FakeEnv()
    buffer = make(tmp_path, env, capacity=33, slack=22)
    play(buffer, env, 10)
    state = buffer.state_dict()
    expected = buffer.sample(200)
    play(buffer, env, 2, first_seed=50)  # two episodes past the snapshot
    again = make(tmp_path, env, capacity=33, slack=22, resume=True)
    again.load_state_dict(state)
    for one, other in zip(again.sample(200), expected, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize('name', ['obs', 'action', 'reward', 'discount', 'first', 'last',
                                  'checksum'])
@pytest.mark.parametrize('byte, bit', [(0, 0), (-1, 7)])
def test_a_changed_byte_is_found(tmp_path, name, byte, bit):
    """In any row that can be sampled; what was written since the snapshot does not matter."""
    buffer, env = make(tmp_path), FakeEnv()
    play(buffer, env, 3)
    state = buffer.state_dict()
    play(buffer, env, 1, first_seed=50)
    make(tmp_path, resume=True).load_state_dict(state)
    rows = np.lib.format.open_memmap(tmp_path / f'{name}.npy', 'r+')
    for row, found in ((0, True), (17, True), (32, True), (33, False), (40, False)):
        place = rows[row:row + 1].view(np.uint8).reshape(-1)[byte:][:1]
        place ^= 1 << bit
        if found:
            with pytest.raises(UserError, match='damaged'):
                make(tmp_path, resume=True).load_state_dict(state)
        else:
            make(tmp_path, resume=True).load_state_dict(state)
        place ^= 1 << bit


@pytest.mark.parametrize('name, bit', [('first', 62), ('first', 20), ('first', 3), ('last', 20),
                                       ('obs', 5)])
def test_a_changed_bit_is_found_once_the_ring_has_gone_round(tmp_path, name, bit):
    buffer, env = make(tmp_path, capacity=60, slack=33), FakeEnv()
    play(buffer, env, 20)
    state = buffer.state_dict()

    def resume():
        make(tmp_path, capacity=60, slack=33, resume=True).load_state_dict(state)
    resume()
    rows = np.lib.format.open_memmap(tmp_path / f'{name}.npy', 'r+')
    for time in (219, 215, 170, 162):  # the last in the oldest episode, whose start is not sampled
        place = rows[time % len(rows):][:1].view(np.uint8).reshape(-1)[bit // 8:][:1]
        place ^= 1 << bit % 8
        with pytest.raises(UserError, match='damaged'):
            resume()
        place ^= 1 << bit % 8
    with pytest.raises(UserError, match='damaged'):
        make(tmp_path, capacity=60, slack=33, resume=True).load_state_dict(state | {'end': 10 ** 9})


@pytest.mark.parametrize('change', ['size', 'gone', 'cut short'])
def test_other_files_are_refused_and_stay_as_they_are(tmp_path, change):
    play(make(tmp_path), FakeEnv(), 1)
    if change == 'gone':
        (tmp_path / 'obs.npy').unlink()
    if change == 'cut short':
        os.truncate(tmp_path / 'obs.npy', 1000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):  # what the first start leaves must not look right to the second
        with pytest.raises(UserError, match='start a new run'):
            make(tmp_path, capacity=50 if change == 'size' else 100, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.shutil, 'disk_usage', lambda _: type('', (), {'free': 10}))
    with pytest.raises(UserError, match='replay_buffer_size'):
        make(tmp_path / 'buffer')
    assert not (tmp_path / 'buffer').exists()


def test_the_rings_files_have_their_blocks_from_the_start(tmp_path):
    """A disk that fills up later would otherwise end the process, through the memory map."""
    make(tmp_path / 'ring', capacity=100_000)
    for path in (tmp_path / 'ring').iterdir():
        assert path.stat().st_blocks * 512 >= path.stat().st_size
