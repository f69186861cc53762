import functools
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import (
    CFGS,
    SCENERY,
    FakeEnv,
    edit,
    kind_of,
    save_expert,
    save_translator,
    settings,
    start,
    wait_until,
)

import generate_expert_video as script  # first: it imports dmc, which chooses the OpenGL backend

# isort: split
import contexts
import dmc
import snapshots
import train_ac
import utils
import video
from ac_agent import load_imitator
from imitation import load_translator

SIZES = ['task=reacher_easy', 'num_train=2', 'num_valid=1', 'num_play=2', 'num_play_valid=1',
         'num_contexts=2', 'episode_len=5', 'im_size=32']
NUMS = {'train': 2, 'valid': 1, 'play': 2, 'play_valid': 1}


def config(*overrides):
    return settings('generate_expert_video', *SIZES, *overrides)


class OneWorker:
    """In place of a pool with one process, which takes seconds to start: this process."""

    def __init__(self, cfg):
        script.studio = functools.cache(functools.partial(script.Studio, cfg))
        self.map, self._num_threads = map, torch.get_num_threads()
        torch.set_num_threads(1)

    def shutdown(self, cancel_futures):
        torch.set_num_threads(self._num_threads)


@pytest.fixture(autouse=True, scope='module')
def only_several_workers_are_processes():
    with pytest.MonkeyPatch.context() as patch:
        open_pool = script.open_pool
        patch.setattr(script, 'studio', None, raising=False)
        patch.setattr(script, 'open_pool', lambda cfg, num_workers: (
            OneWorker(cfg) if num_workers == 1 else open_pool(cfg, num_workers)))
        yield


@pytest.fixture(scope='module')
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp('experts') / 'reacher_easy.pt'
    save_expert(path)
    return path


@pytest.fixture(scope='module')
def dataset(snapshot, tmp_path_factory):
    """Of two workers; what is compared with it comes of one."""
    out_dir = tmp_path_factory.mktemp('videos')
    script.generate(config(f'expert={snapshot}', f'out_dir={out_dir}', 'num_workers=2'))
    return out_dir


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.*')}


def test_dataset_is_whole(dataset, snapshot):
    assert sorted(contents(dataset)) == sorted(
        [f'{split}/meta.json' for split in NUMS]
        + [f'{split}/{name}' for split, num in NUMS.items() for i in range(num)
           for name in (f'episode_{i:05d}.json', f'episode_{i:05d}.npy', f'preview_{i:05d}.mp4')])
    for split, num in NUMS.items():
        clips = video.Clips(dataset / split, task='reacher_easy', im_size=32)
        kind = 'held_out' if split.endswith('valid') else 'seen'
        actor = 'play' if split.startswith('play') else 'expert'
        assert len(clips) == num
        assert clips.meta['split'] == split and clips.meta['action_repeat'] == 2
        assert (clips.meta['contexts'], clips.meta['actor']) == (kind, actor)
        assert clips.meta['joints'] == ['hinge', 'hinge']
        assert clips.meta['expert_sha256'] == snapshots.sha256(snapshot)
        assert clips.meta['versions'] == snapshots.versions()
        for i in range(len(clips)):
            episode, frames = clips.episode(i), clips.frames(i)
            assert frames.shape == (2, 6, 32, 32, 3)
            assert (frames[0] != frames[1]).any() and (frames[:, 0] != frames[:, 5]).any()
            assert np.shape(episode['qpos']) == (6, 2)
            for context in episode['contexts']:
                assert kind_of(contexts.Scenery(clips.meta['scenery']), np.array(context)) == kind


def test_demonstrations_keep_no_actions_and_play_keeps_no_rewards(dataset):
    always = {'index', 'episode_seed', 'qpos', 'contexts', 'frames_crc32'}
    for split in NUMS:
        clips = video.Clips(dataset / split)
        for i in range(len(clips)):
            episode = clips.episode(i)
            if split.startswith('play'):
                assert episode.keys() == always | {'actions'}
                assert np.shape(episode['actions']) == (5, 2)
            else:
                assert episode.keys() == always | {'rewards', 'expert_return'}
                assert len(episode['rewards']) == 5
                assert episode['expert_return'] == sum(episode['rewards'])


@pytest.mark.parametrize('split', ['play', 'train'])
def test_poses_belong_to_the_frames_and_actions_lead_from_one_to_the_next(dataset, snapshot, split):
    clips = video.Clips(dataset / split)
    agent, env_args = script.load_expert(snapshot, 'reacher_easy')
    env = dmc.make('reacher_easy', scenery=contexts.Scenery(clips.meta['scenery']), **env_args)
    episode, frames = clips.episode(1), clips.frames(1)[0]
    time_step = env.reset(episode_seed=episode['episode_seed'],
                          context=np.array(episode['contexts'][0]))
    for t in range(6):
        assert env.qpos().tolist() == episode['qpos'][t]
        assert np.array_equal(env.render(32), frames[t])
        if t < 5:
            time_step = env.step(np.array(episode['actions'][t], np.float32) if split == 'play'
                                 else agent.act(time_step.observation, 0, eval_mode=True))


def test_without_play_there_is_no_folder_of_it(dataset, snapshot, tmp_path):
    """And one worker makes the same demonstrations as two."""
    script.generate(config(f'expert={snapshot}', f'out_dir={tmp_path}', 'num_workers=1',
                           'num_play=0', 'num_play_valid=0'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['train', 'valid']
    assert contents(tmp_path) == {name: data for name, data in contents(dataset).items()
                                  if not name.startswith('play')}


@pytest.fixture(scope='module')
def player(dataset, tmp_path_factory):
    """Options that have an imitator play, one that has not trained yet."""
    run = tmp_path_factory.mktemp('ac_local')
    save_translator(run / 'ct.pt', 'reacher_easy', im_size=32)
    cfg = settings('train_ac', 'task=reacher_easy', f'translator={run}/ct.pt', 'device=cpu',
                   f'data_dir={dataset}', 'hidden_dim=16', 'use_tb=false')
    train_ac.make_workspace(cfg, run).save_snapshot()
    return [f'player={run}/snapshot.pt', f'translator={run}/ct.pt']


def test_an_imitator_goes_on_with_play_from_demonstrated_starts(dataset, snapshot, player,
                                                                tmp_path):
    for num_workers in (1, 2):
        out_dir = tmp_path / str(num_workers)
        shutil.copytree(dataset, out_dir)
        script.generate(config(f'expert={snapshot}', f'out_dir={out_dir}', 'num_play=3', *player,
                               'num_play_valid=2', f'num_workers={num_workers}'))
    assert contents(tmp_path / '1') == contents(tmp_path / '2')
    before, after = contents(dataset), contents(out_dir)
    assert all(after[name] == data for name, data in before.items() if 'meta' not in name)

    sha256 = snapshots.sha256(player[0].removeprefix('player='))
    for split, demos, i in (('play', 'train', 2), ('play_valid', 'valid', 1)):
        clips, demos = video.Clips(out_dir / split), video.Clips(out_dir / demos)
        episode, frames = clips.episode(i), clips.frames(i)
        assert episode['player_sha256'] == sha256 and 'player_sha256' not in clips.episode(0)
        assert episode['episode_seed'] in [demos.episode(k)['episode_seed']
                                           for k in range(len(demos))]
        env = dmc.make('reacher_easy', obs='states', action_repeat=2,
                       scenery=contexts.Scenery(clips.meta['scenery']))
        env.reset(episode_seed=episode['episode_seed'], context=np.array(episode['contexts'][1]))
        for t in range(6):
            assert env.qpos().tolist() == episode['qpos'][t]
            assert np.array_equal(env.render(32), frames[1, t])
            if t < 5:
                env.step(np.array(episode['actions'][t], np.float32))


def test_a_player_takes_demonstrations_and_may_have_nothing_to_do(dataset, snapshot, player,
                                                                  tmp_path):
    with pytest.raises(utils.UserError, match='train lacks episodes.*without player'):
        script.generate(config(f'expert={snapshot}', f'out_dir={tmp_path}', *player))
    assert not any(tmp_path.iterdir())
    before = {path: path.read_bytes() for path in dataset.rglob('episode_*')}
    script.generate(config(f'expert={snapshot}', f'out_dir={dataset}', *player))
    assert before == {path: path.read_bytes() for path in dataset.rglob('episode_*')}
    with pytest.raises(utils.UserError, match='train lacks episodes'):  # those ordered now
        script.generate(config(f'expert={snapshot}', f'out_dir={dataset}', 'num_train=9',
                               'num_play=3', *player))


def test_a_player_goes_with_its_translator_and_action_repeat(dataset, snapshot, player, tmp_path):
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    other = tmp_path / 'other.pt'
    made = torch.load(player[1].removeprefix('translator='), weights_only=True)
    torch.save(made | {'command': 'another'}, other)
    options = [f'expert={snapshot}', f'out_dir={tmp_path}', 'num_play=3', *player]
    with pytest.raises(utils.UserError, match='was trained with another translator than .*other'):
        script.generate(config(*options, f'translator={other}'))
    edit(tmp_path / 'train/meta.json', action_repeat=3)
    with pytest.raises(utils.UserError, match='action_repeat=3'):
        load_imitator(player[0].removeprefix('player='), player[1].removeprefix('translator='),
                      tmp_path / 'train', 'reacher_easy')


ABSURD = {
    'expert': [{'hidden_dim': 60_000}, {'hidden_dim': 10 ** 12}, {'feature_dim': 10 ** 7},
               {'obs_shape': [10 ** 9]}, {'obs_shape': [10 ** 5, 84, 84]},
               {'obs_shape': [3, 10 ** 6, 10 ** 6]}, {'action_dim': 10 ** 7}],
    'translator': [{'z_dim': 10 ** 6}, {'channels': [10 ** 6] * 4}, {'hidden': 60_000},
                   {'code_dim': 10 ** 6}, {'im_size': 16 * 10 ** 5}, {'kernel': 10 ** 5}],
    'imitator': [{'hidden_dim': 60_000}, {'hidden_dim': 10 ** 12}, {'obs_shape': [10 ** 9]},
                 {'action_dim': 10 ** 7}, {'action_dim': 10 ** 12}, {'action_dim': -1}]}


@pytest.mark.parametrize('kind', ABSURD)
def test_absurd_sizes_are_refused_before_they_take_memory(dataset, snapshot, player, tmp_path,
                                                          kind):
    paths = {'expert': snapshot, **{name: Path(option.partition('=')[2]) for name, option in
                                    zip(('imitator', 'translator'), player, strict=True)}}
    made = torch.load(paths[kind], weights_only=True)
    paths[kind] = tmp_path / 'absurd.pt'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for sizes in ABSURD[kind]:
        args = 'model_args' if kind == 'translator' else 'agent_args'
        torch.save({**made, args: made[args] | sizes}, paths[kind])
        with pytest.raises(utils.UserError, match='absurd.pt does not hold what it should'):
            if kind == 'expert':
                script.load_expert(paths['expert'], 'reacher_easy')
            else:
                load_imitator(paths['imitator'], paths['translator'], dataset / 'train',
                              'reacher_easy')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_noise_is_a_function_of_the_seed_and_differs_by_episode():
    def actions(seed):
        still = SimpleNamespace(act=lambda obs, step, eval_mode: np.zeros(2, np.float32))
        player = script.NoisyPlay(still, seed)
        return np.array([player.act(None, 0, True) for _ in range(200)])
    assert np.array_equal(actions(1), actions(1))
    stddevs = [actions(seed).std() for seed in range(30)]
    assert min(stddevs) < 0.15 and 0.45 < max(stddevs) < 0.65
    assert actions(1).dtype == np.float32


def test_goes_on_where_it_stopped_and_play_can_follow(dataset, snapshot, tmp_path):
    """One worker makes the same play as two."""
    out_dir = tmp_path / 'videos'
    shutil.copytree(dataset, out_dir)
    train = out_dir / 'train'
    kept = (train / 'episode_00000.npy').stat()
    (train / 'episode_00001.json').unlink()  # killed after the frames, before the json
    (train / 'episode_00001.npy').write_bytes(b'of another time')
    (train / '.tmp-episode_00002.npy').write_bytes(b'cut')
    play = out_dir / 'play'
    for i in range(2):
        (play / f'episode_{i:05d}.json').unlink()
        (play / f'episode_{i:05d}.npy').unlink()
    shutil.rmtree(out_dir / 'play_valid')  # was not asked for
    script.generate(config(f'expert={snapshot}', f'out_dir={out_dir}', 'num_workers=1'))
    assert contents(out_dir) == contents(dataset)
    now = (train / 'episode_00000.npy').stat()
    assert (now.st_mtime_ns, now.st_ino) == (kept.st_mtime_ns, kept.st_ino)


def test_a_whole_dataset_is_left_alone(dataset, snapshot):
    before = contents(dataset)
    script.generate(config(f'expert={snapshot}', f'out_dir={dataset}', 'num_train=1',
                           'num_play=1', 'num_play_valid=0'))
    assert contents(dataset) == before


def test_an_episode_can_be_entered_again(dataset, snapshot):
    """Same start, and so the same film, from an environment that has done other things before."""
    clips = video.Clips(dataset / 'train')
    agent, env_args = script.load_expert(snapshot, 'reacher_easy')
    env = dmc.make('reacher_easy', scenery=contexts.Scenery(clips.meta['scenery']), **env_args)
    env.reset()
    env.step(np.ones(2, np.float32))
    starts = []
    for c in range(2):
        episode, frames = clips.episode(1), clips.frames(1)[c]
        time_step = env.reset(episode_seed=episode['episode_seed'],
                              context=np.array(episode['contexts'][c]))
        starts.append((env.physics.get_state(), env.physics.model.geom_pos.copy()))
        for t, reward in enumerate(episode['rewards']):
            assert np.array_equal(env.render(32), frames[t])
            time_step = env.step(agent.act(time_step.observation, 0, eval_mode=True))
            assert time_step.reward == reward
        assert np.array_equal(env.render(32), frames[5])
    for one, other in zip(*starts, strict=True):  # joints, and the target's place
        assert np.array_equal(one, other)


def test_episodes_are_functions_of_seed_split_and_number():
    scenery = contexts.Scenery(config().scenery)
    drawn = {}
    for split in NUMS:
        kind = 'held_out' if split.endswith('valid') else 'seen'
        for i in range(50):
            episode_seed, drawn_for = script.draw_episode(1, split, i, 3, scenery)
            assert drawn_for.shape == (3, contexts.DIM)
            assert {kind_of(scenery, context) for context in drawn_for} == {kind}
            assert episode_seed % 2 == (kind == 'held_out')
            drawn[split, i] = episode_seed
    assert len(set(drawn.values())) == 200 and all(seed < 2**32 for seed in drawn.values())
    again, first = script.draw_episode(1, 'train', 7, 3, scenery)
    assert again == drawn['train', 7]
    assert np.array_equal(first[:2], script.draw_episode(1, 'train', 7, 2, scenery)[1])
    assert script.draw_episode(2, 'train', 7, 3, scenery)[0] != again


def play_actions(episode_seed, num_steps=50, shape=(2,)):
    play = script.RandomPlay(episode_seed, shape)
    return np.stack([play.act(None, 0, eval_mode=True) for _ in range(num_steps)])


def test_play_is_a_function_of_the_seed():
    actions = play_actions(3)
    assert actions.dtype == np.float32 and actions.shape == (50, 2)
    assert np.array_equal(actions, play_actions(3))
    assert not np.array_equal(actions, play_actions(4))
    assert not np.array_equal(actions[:, 0], actions[:, 1])
    assert play_actions(0, shape=(6,)).shape == (50, 6)


def test_play_is_smooth_and_differs_by_episode():
    """Amplitudes reach from weak to saturated, correlations from one step to fifty."""
    many = np.stack([play_actions(seed, num_steps=1000)[:, 0] for seed in range(60)])
    assert (abs(many) <= 1).all() and abs(many.mean()) < 0.05
    spreads, saturated = many.std(1), (abs(many) == 1).mean(1)
    assert spreads.min() < 0.35 and spreads.max() > 0.65
    assert saturated.min() < 0.01 and saturated.max() > 0.4
    correlations = np.array([np.corrcoef(each[:-1], each[1:])[0, 1] for each in many])
    assert correlations.min() < 0.6 and correlations.max() > 0.9
    assert np.median(correlations) > 0.7  # uncorrelated actions have 0
    assert abs(np.corrcoef(spreads, correlations)[0, 1]) < 0.5  # drawn apart


class GoesHome:
    """An agent whose action is minus its position, without noise."""

    def act(self, obs, step, eval_mode):
        assert eval_mode
        return -obs[:2]


class FakeCamera:
    def __init__(self, env):
        self.env, self.seen = env, []

    def render(self, context):
        self.seen.append(context)
        return self.env.render(2) + np.uint8(context[0])


def test_film_with_one_camera_for_each_context():
    env = FakeEnv(length=3)  # may end with the clip, not before
    cameras = [FakeCamera(env), FakeCamera(env)]
    frames, happened = script.film(env, GoesHome(), cameras, 3, 5, [[0], [100]])
    assert frames[:, :, 0, 0, 0].tolist() == [[0, 1, 2, 3], [100, 101, 102, 103]]
    assert frames.shape == (2, 4, 2, 2, 3) and frames.dtype == np.uint8
    again = FakeEnv(length=3)
    again.reset(episode_seed=5)
    poses, rewards = [again.qpos()], []
    for _ in range(3):
        rewards.append(again.step(-np.float32(poses[-1])).reward)
        poses.append(again.qpos())
    assert happened == {'actions': (-np.float32(poses[:3])).tolist(), 'rewards': rewards,
                        'qpos': np.array(poses).tolist()}
    json.dumps(happened)  # plain numbers
    for camera in cameras:  # the very same object, so that textures are uploaded once
        assert all(context is camera.seen[0] for context in camera.seen)


def test_film_of_an_episode_that_ends_too_early():
    env = FakeEnv(length=2)
    with pytest.raises(utils.UserError, match='ends after 2 steps: set episode_len=2 or less'):
        script.film(env, GoesHome(), [FakeCamera(env)], 3, 0, [[0]])


@pytest.mark.parametrize('override, sentence', [
    ('seed=2', 'made with seed=1, not 2: rm -r .*train'),
    ('im_size=64', 'made with im_size=32, not 64'),
    ('num_contexts=3', 'made with num_contexts=2, not 3'),
    ('scenery.sky.enabled=false', 'made with scenery.sky.enabled=True, not False')])
def test_other_settings_in_the_same_folder(dataset, snapshot, override, sentence):
    before = contents(dataset)
    with pytest.raises(utils.UserError, match=sentence):
        script.generate(config(f'expert={snapshot}', f'out_dir={dataset}', override))
    assert contents(dataset) == before


def test_episodes_without_their_settings(dataset, snapshot, tmp_path):
    shutil.copytree(dataset / 'valid', tmp_path / 'valid')
    (tmp_path / 'valid' / 'meta.json').unlink()
    with pytest.raises(utils.UserError, match='valid holds episodes, but meta.json'):
        script.generate(config(f'expert={snapshot}', f'out_dir={tmp_path}'))


@pytest.mark.parametrize('override, sentence', [
    ('expert=none.pt', 'no expert at none.pt: python train.py task=reacher_easy'),
    ('task=reacher_hard', 'for task reacher_easy, not reacher_hard'),
    ('num_train=0', 'num_train=0'), ('num_valid=0', 'num_valid=0'),
    ('num_play=-1', 'num_play=-1'), ('num_play_valid=0.5', 'num_play_valid=0.5'),
    ('num_contexts=0', 'num_contexts=0'), ('episode_len=1', 'episode_len=1'),
    ('num_workers=0', 'num_workers=0'), ('episode_len=501', 'set episode_len=500 or less'),
    ('scenery.sky.value=[1,0]', 'scenery.sky.value'),
    ('num_train=1_000_000_000_000', 'GiB are free: set num_train'),
    ('num_play=1_000_000_000_000', 'GiB are free: set num_train')])
def test_bad_settings_write_nothing(snapshot, tmp_path, override, sentence):
    out_dir = tmp_path / 'videos'
    with pytest.raises(utils.UserError, match=sentence):
        script.generate(config(f'expert={snapshot}', f'out_dir={out_dir}', override))
    assert not out_dir.exists()


# ------------------------------------------------------------------------------ own videos

@pytest.fixture(scope='module')
def mp4s(dataset, tmp_path_factory):
    """Play of the dataset, filmed in two contexts, as files of 96 pixels and 50 frames a second."""
    folder = tmp_path_factory.mktemp('mp4')
    for i, (split, k) in enumerate([('play', 0), ('play', 1), ('play_valid', 0)]):
        for c, frames in enumerate(video.Clips(dataset / split).frames(k)):
            large = frames.repeat(2, 0).repeat(3, 1).repeat(3, 2)
            video.save(folder / f'look{c}' / f'clip{i}.mp4', large, fps=50)
    return folder


@pytest.fixture(scope='module')
def imported(mp4s, tmp_path_factory):
    """Neither an expert nor a translator is needed."""
    out_dir = tmp_path_factory.mktemp('videos')
    script.generate(config(f'from_mp4={mp4s}', f'out_dir={out_dir}', 'expert=none.pt',
                           'translator=none.pt', 'num_workers=1'))
    return out_dir


def test_own_videos_become_demonstrations(dataset, mp4s, imported):
    originals = [video.Clips(dataset / split).frames(k)
                 for split, k in (('play', 0), ('play', 1), ('play_valid', 0))]
    seen = []
    for split, num, look in (('train', 2, 'seen'), ('valid', 1, 'held_out')):
        clips = video.Clips(imported / split, task='reacher_easy', im_size=32)
        assert len(clips) == num and clips.imported
        assert (clips.meta['contexts'], clips.meta['actor']) == (look, None)
        assert clips.meta['expert_sha256'] is None and clips.meta['action_repeat'] == 2
        for i in range(num):
            episode = clips.episode(i)
            assert episode.keys() == {'index', 'files', 'fps', 'frames_crc32'}  # nothing made up
            assert episode['fps'] == [50, 50]
            k = int(episode['files'][0].removeprefix('look0/clip').removesuffix('.mp4'))
            assert episode['files'] == [f'look{c}/clip{k}.mp4' for c in range(2)]
            seen.append(k)
            assert abs(clips.frames(i).astype(int) - originals[k]).mean() < 6  # H.264
    assert sorted(seen) == [0, 1, 2]
    for split in ('play', 'play_valid'):  # as ever
        assert not video.Clips(imported / split).imported
        assert {name: data for name, data in contents(imported / split).items()
                if name != 'meta.json'} == {
                    name: data for name, data in contents(dataset / split).items()
                    if name != 'meta.json'}


def test_an_import_that_is_whole_is_left_alone_and_other_files_are_told(mp4s, imported, tmp_path):
    before = contents(imported)
    options = [f'out_dir={imported}', 'num_workers=1']
    script.generate(config(f'from_mp4={mp4s}', *options))
    assert contents(imported) == before
    shutil.copytree(mp4s, tmp_path / 'other')
    shutil.copy(tmp_path / 'other/look0/clip0.mp4', tmp_path / 'other/look1/clip0.mp4')
    shutil.copy(tmp_path / 'other/look0/clip1.mp4', tmp_path / 'other/look1/clip1.mp4')
    with pytest.raises(utils.UserError, match='made with mp4_sha256='):
        script.generate(config(f'from_mp4={tmp_path}/other', *options))
    assert contents(imported) == before


def test_an_interrupted_import_goes_on(mp4s, imported, tmp_path):
    shutil.copytree(imported, tmp_path / 'videos')
    kept = tmp_path / 'videos/train/episode_00000.npy'
    before = kept.stat()
    video.frames_path(tmp_path / 'videos/train', 1).with_suffix('.json').unlink()
    script.generate(config(f'from_mp4={mp4s}', f'out_dir={tmp_path}/videos', 'num_workers=1'))
    assert contents(tmp_path / 'videos') == contents(imported)
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_h264_changes_no_codes(tmp_path):
    """With the translator that ships, in held-out contexts."""
    scene, rng = contexts.Scenery(SCENERY), np.random.default_rng(1)
    env = dmc.ActionRepeat(dmc.load_suite('reacher_hard', scene), 2)
    originals = []
    for i in range(2):
        env.reset(episode_seed=i, context=scene.sample(rng, 'held_out'))
        frames = [env.render(64)]
        for _ in range(10):
            env.step(rng.uniform(-1, 1, 2))
            frames.append(env.render(64))
        originals.append(np.stack(frames))
        large = originals[-1].repeat(2, 0).repeat(4, 1).repeat(4, 2)  # 256 pixels, twice the rate
        video.save(tmp_path / f'mp4/{i}.mp4', large, fps=50)
    script.generate(config('task=reacher_hard', f'from_mp4={tmp_path}/mp4', 'num_play=0',
                           'num_play_valid=0', 'im_size=64', 'episode_len=10',
                           f'out_dir={tmp_path}/videos', 'num_workers=1'))
    splits = [video.Clips(tmp_path / 'videos' / split) for split in ('train', 'valid')]
    model, _ = load_translator(CFGS.parent / 'ct/reacher_hard.pt', 'reacher_hard', 'pose_code',
                               torch.device('cpu'), 'bf16')
    order = [int(clips.episode(0)['files'][0].removesuffix('.mp4')) for clips in splits]
    there, here = (model.code(model.encode(torch.from_numpy(np.stack(episodes)))) for episodes in (
        [originals[i] for i in order], [clips.frames(0)[0] for clips in splits]))
    assert (there - here).square().mean() < 0.02 * here.var((0, 1)).mean()


@pytest.mark.parametrize('damage, overrides, sentence', [
    (lambda folder: shutil.rmtree(folder), [], 'holds no videos'),
    (lambda folder: (folder / 'look1/clip0.mp4').unlink(), [], 'look1/clip0.mp4 is missing'),
    (lambda folder: (folder / 'look1/clip0.mp4').write_bytes(b'x'), [], 'clip0.mp4 is no video'),
    (lambda folder: None, ['episode_len=9'], 'lasts 0.24 s.*set episode_len=5 or less'),
    (lambda folder: None, ['action_repeat=0'], 'action_repeat=1')])
def test_videos_that_do_not_do_are_named_before_any_work(mp4s, tmp_path, damage, overrides,
                                                         sentence):
    shutil.copytree(mp4s, tmp_path / 'mp4')
    damage(tmp_path / 'mp4')
    with pytest.raises(utils.UserError, match=sentence):
        script.generate(config(f'from_mp4={tmp_path}/mp4', f'out_dir={tmp_path}/videos',
                               *overrides))
    assert not (tmp_path / 'videos').exists()


@pytest.mark.parametrize('overrides, words', [
    ([], 'train_ct.py task=reacher_easy data_dir=here'), (['num_play=0'], 'recipe=liu2017'),
    (['num_play_valid=0'], 'train_ac.py'),
    (['from_mp4=x', 'translator=y.pt'],
     'train_ac.py task=reacher_easy data_dir=here translator=y.pt'),
    (['from_mp4=x', 'num_play=0'], 'the same command with num_play=1000')])
def test_what_comes_next_works_with_what_was_filmed(overrides, words):
    assert words in script.next_command(config('out_dir=here', *overrides))


def test_an_expert_has_an_action_repeat_of_its_own(snapshot, tmp_path):
    with pytest.raises(utils.UserError, match='goes with from_mp4'):
        script.generate(config(f'expert={snapshot}', f'out_dir={tmp_path}', 'action_repeat=4'))


@pytest.mark.parametrize('num, overrides, counts', [
    (2, [], (1, 1)), (12, [], (10, 2)), (12, ['num_valid=1', 'num_train=4'], (4, 1))])
def test_a_fifth_of_ones_videos_is_held_out(tmp_path, num, overrides, counts):
    for i in range(num):
        (tmp_path / f'{i}.mp4').touch()
    found = script.find_mp4s(config(f'from_mp4={tmp_path}', 'num_valid=100', 'num_train=1000',
                                    *overrides))
    assert (len(found['train']), len(found['valid'])) == counts
    names = [path for episodes in found.values() for files in episodes for path in files]
    assert len(set(names)) == len(names) == sum(counts)


def descendants(pid):
    """Return the ids of its child processes, of theirs, and so on."""
    children = map(int, Path(f'/proc/{pid}/task/{pid}/children').read_text().split())
    return [other for child in children for other in (child, *descendants(child))]


def is_forkserver(pid):
    """Tell whether it is the process from which workers are forked, or one of these."""
    return b'forkserver' in Path(f'/proc/{pid}/cmdline').read_bytes()


@pytest.mark.parametrize('sig, num_workers', [(signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_interrupted(snapshot, tmp_path, sig, num_workers):
    process = start('generate_expert_video', *SIZES, 'num_train=400', f'num_workers={num_workers}',
                    f'expert={snapshot}', f'out_dir={tmp_path / "videos"}', cwd=tmp_path)
    wait_until(lambda: process.poll() is not None or list(tmp_path.rglob('episode_*.json')))
    assert process.poll() is None, process.stderr.read()
    workers = descendants(process.pid)
    forkserver = next(filter(is_forkserver, workers))
    assert 'libtorch' in Path(f'/proc/{forkserver}/maps').read_text()  # imported once for all
    process.send_signal(sig)
    _, error = process.communicate(timeout=60)
    wait_until(lambda: not any(Path(f'/proc/{pid}').exists() for pid in workers))
    root = tmp_path / 'videos' / 'train'
    with pytest.raises(utils.UserError, match='interrupted: python generate_expert_video.py'):
        video.Clips(root)
    there = video.episode_numbers(root)
    assert 1 <= len(there) < 400
    for i in there:  # what is there is whole
        assert np.load(video.frames_path(root, i)).shape == (2, 6, 32, 32, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['videos']
    if sig == signal.SIGINT:
        assert process.returncode == 130
        assert 'to resume: python generate_expert_video.py task=' in error
        assert 'Traceback' not in error and not list(tmp_path.rglob('.tmp-*'))
    assert json.loads((root / 'meta.json').read_text())['num_episodes'] == 400
    assert len(workers) >= num_workers + 2 and os.getpid() not in workers


@pytest.mark.parametrize('starting', ['main', 'workers'])
def test_ctrl_c_while_modules_are_imported(snapshot, tmp_path, starting):
    """A terminal sends it to all processes, also to the one from which the workers are forked."""
    process = start('generate_expert_video', *SIZES, 'num_workers=2', f'expert={snapshot}',
                    f'out_dir={tmp_path / "videos"}', cwd=tmp_path, start_new_session=True)

    if starting == 'workers':
        wait_until(lambda: process.poll() is not None
                   or any(map(is_forkserver, descendants(process.pid))))

    def blocked():  # from here on imports go on; before, Python itself is starting
        status = Path(f'/proc/{process.pid}/status').read_text()
        return int(status.split('SigBlk:')[1].split()[0], 16) >> signal.SIGINT - 1 & 1
    if starting == 'main':
        wait_until(blocked)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and 'Traceback' not in error
    assert 'to resume: python generate_expert_video.py task=' in error
    assert (tmp_path / 'videos').exists() == (starting == 'workers')


def test_a_file_is_no_out_dir(snapshot):
    with pytest.raises(utils.UserError, match=f'{snapshot} is a file: set out_dir to another'):
        script.generate(config(f'expert={snapshot}', f'out_dir={snapshot}'))


def test_two_generations_do_not_share_a_folder(dataset, snapshot):
    with (snapshots.only_one_at_work(dataset),
          pytest.raises(utils.UserError, match='another process')):
        script.generate(config(f'expert={snapshot}', f'out_dir={dataset}', 'num_train=3'))
    assert len(video.episode_numbers(dataset / 'train')) == 2


def test_an_expert_of_other_pictures_is_refused(tmp_path):
    snapshots.save_snapshot(tmp_path / 'expert.pt', 'expert', 'reacher_hard', {
        'made_by': {'env_args': {'obs': 'pixels'}, 'quality': [2048, 28, 16]}, 'agent_args': {}})
    with pytest.raises(utils.UserError, match='2048'):
        script.load_expert(tmp_path / 'expert.pt', 'reacher_hard')
