import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import (
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

SIZES = ['task=reacher_easy', 'num_train=2', 'num_valid=1', 'num_play=2', 'num_play_valid=1',
         'num_contexts=2', 'episode_len=5', 'im_size=32']
NUMS = {'train': 2, 'valid': 1, 'play': 2, 'play_valid': 1}


def config(*overrides):
    return settings('generate_expert_video', *SIZES, *overrides)


class OneWorker:
    """This process, in place of a pool with one process, which takes seconds to start."""

    def __init__(self, cfg):
        script.studio = script.Studio(cfg)
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
    """Made by two workers; what tests compare with it is made by one."""
    out_dir = tmp_path_factory.mktemp('videos')
    script.generate(config(f'expert={snapshot}', f'out_dir={out_dir}', 'num_workers=2'))
    return out_dir


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.*')}


def test_dataset_is_whole(dataset, snapshot):
    """Demonstrations keep no actions, and play keeps no rewards."""
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
            kept = {'play': {'actions'}, 'expert': {'rewards', 'expert_return'}}[actor]
            assert episode.keys() == kept | {'index', 'episode_seed', 'qpos', 'contexts',
                                             'frames_crc32'}
            assert episode.get('expert_return', 0) == sum(episode.get('rewards', ()))
            for context in episode['contexts']:
                assert kind_of(contexts.Scenery(clips.meta['scenery']), np.array(context)) == kind


@pytest.mark.parametrize('split', ['play', 'train'])
def test_an_episode_can_be_entered_again(dataset, snapshot, split):
    """With its poses, actions and rewards, in each context and after another episode."""
    clips = video.Clips(dataset / split)
    agent, env_args = script.load_expert(snapshot, 'reacher_easy')
    env = dmc.make('reacher_easy', scenery=contexts.Scenery(clips.meta['scenery']), **env_args)
    env.reset()
    env.step(np.ones(2, np.float32))
    episode = clips.episode(1)
    for context, frames in zip(episode['contexts'], clips.frames(1), strict=True):
        time_step = env.reset(episode_seed=episode['episode_seed'], context=np.array(context))
        for t in range(6):
            assert env.qpos().tolist() == episode['qpos'][t]
            assert np.array_equal(env.render(32), frames[t])
            if t < 5:
                time_step = env.step(np.array(episode['actions'][t], np.float32) if split == 'play'
                                     else agent.act(time_step.observation, 0, eval_mode=True))
                assert split == 'play' or time_step.reward == episode['rewards'][t]


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


def play_actions(episode_seed, num_steps=50):
    play = script.RandomPlay(episode_seed, (2,))
    return np.stack([play.act(None, 0, eval_mode=True) for _ in range(num_steps)])


def test_play_is_smooth_and_differs_by_episode():
    """Amplitudes reach from weak to saturated, correlations from one step to fifty."""
    assert play_actions(3).dtype == np.float32
    assert np.array_equal(play_actions(3), play_actions(3))
    many = np.stack([play_actions(seed, num_steps=1000)[:, 0] for seed in range(60)])
    assert (abs(many) <= 1).all() and abs(many.mean()) < 0.05
    spreads, saturated = many.std(1), (abs(many) == 1).mean(1)
    assert spreads.min() < 0.35 and spreads.max() > 0.65
    assert saturated.min() < 0.01 and saturated.max() > 0.4
    correlations = np.array([np.corrcoef(each[:-1], each[1:])[0, 1] for each in many])
    assert correlations.min() < 0.6 and correlations.max() > 0.9
    assert np.median(correlations) > 0.7  # uncorrelated actions have 0
    assert abs(np.corrcoef(spreads, correlations)[0, 1]) < 0.5  # drawn apart


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
    with pytest.raises(utils.UserError, match='meta.json is damaged or missing: delete .*valid'):
        script.generate(config(f'expert={snapshot}', f'out_dir={tmp_path}'))


@pytest.mark.parametrize('override, sentence', [
    ('expert=none.pt', 'no expert at none.pt: python train.py task=reacher_easy'),
    ('task=reacher_hard', 'for task reacher_easy, not reacher_hard'),
    ('num_train=0', 'num_train=0'), ('episode_len=501', 'set episode_len=500 or less'),
    ('action_repeat=4', 'goes with from_mp4'),
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


@pytest.mark.parametrize('damage, overrides, sentence', [
    (lambda folder: shutil.rmtree(folder), [], 'holds no videos'),
    (lambda folder: (folder / 'look1/clip0.mp4').unlink(), [], 'look1/clip0.mp4 is missing'),
    (lambda folder: (folder / 'look1/clip0.mp4').write_bytes(b'x'), [], 'clip0.mp4 is no video'),
    (lambda folder: None, ['episode_len=9'], 'ends after 0.22 s.*set episode_len=5 or less'),
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
    (['from_mp4=x', 'num_play=0'], 'the same command with num_play=1000'),
    (['from_mp4=x', 'translator=y.pt'],
     'train_ac.py task=reacher_easy data_dir=here translator=y.pt')])
def test_what_comes_next(overrides, words):
    assert words in script.next_command(config('out_dir=here', *overrides))


@pytest.mark.parametrize('num, overrides, counts', [
    (2, [], (1, 1)), (12, [], (10, 2)), (12, ['num_valid=1', 'num_train=4'], (4, 1))])
def test_a_fifth_of_ones_videos_is_held_out(tmp_path, num, overrides, counts):
    for i in range(num):
        (tmp_path / f'{i}.mp4').touch()
    found = script.share_mp4s(config(f'from_mp4={tmp_path}', 'num_valid=100', 'num_train=1000',
                                     *overrides))
    assert (len(found['train']), len(found['valid'])) == counts
    names = [path for episodes in found.values() for files in episodes for path in files]
    assert len(set(names)) == len(names) == sum(counts)


def descendants(pid):
    """Return the ids of its child processes, of theirs, and so on."""
    children = map(int, Path(f'/proc/{pid}/task/{pid}/children').read_text().split())
    return [other for child in children for other in (child, *descendants(child))]


@pytest.mark.parametrize('sig, num_workers', [(signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_interrupted(snapshot, tmp_path, sig, num_workers):
    process = start('generate_expert_video', *SIZES, 'num_train=400', f'num_workers={num_workers}',
                    f'expert={snapshot}', f'out_dir={tmp_path / "videos"}', cwd=tmp_path,
                    start_new_session=True)
    wait_until(lambda: process.poll() is not None or list(tmp_path.rglob('episode_*.json')))
    assert process.poll() is None, process.stderr.read()
    workers = descendants(process.pid)
    forkserver = next(pid for pid in workers
                      if b'forkserver' in Path(f'/proc/{pid}/cmdline').read_bytes())
    assert 'libtorch' in Path(f'/proc/{forkserver}/maps').read_text()  # imported once for all
    if sig == signal.SIGINT:  # a terminal sends it to all processes
        os.killpg(process.pid, sig)
    else:
        process.kill()
    _, error = process.communicate(timeout=60)
    wait_until(lambda: not any(Path(f'/proc/{pid}').exists() for pid in workers))
    root = tmp_path / 'videos' / 'train'
    with pytest.raises(utils.UserError, match='lacks some of its 400 episodes'):
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
