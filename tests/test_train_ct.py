import functools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import (
    LENGTH,
    SIZE,
    Killed,
    die,
    differences,
    edit,
    film,
    film_all,
    labels,
    rows,
    settings,
    terminate,
    terminate_at_once,
    watch,
)

import snapshots
import train_ct
import utils
import video
from ct_model import PoseCode
from train_ct import FeatureWindows, PairSampler, train
from utils import UserError


@pytest.fixture(scope='module', autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('WINDOW', 5), ('NUM_WINDOWS', 8), ('LOG_EVERY', 2),
                            ('NUM_EVAL_VIDEOS', 1)):
            patch.setattr(train_ct, name, value)
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return film_all(tmp_path_factory.mktemp('videos'))


def config(data, *overrides, recipe='liu2017'):
    if recipe == 'pose_code':
        overrides = ['code.num_steps=7', 'model.code_dim=3', *overrides]
    return settings(
        'train_ct', f'recipe={recipe}', 'task_name=fake_walk', f'data_dir={data}', 'device=cpu',
        'use_tb=false', 'precision=fp32', 'batch_size=3', 'frames_per_clip=4',
        'num_train_steps=12', 'eval_every=4', 'snapshot_every=3', 'lr=1e-3',
        'model.channels=[4,6,8,10]', 'model.z_dim=5', 'model.hidden=12', *overrides)


def sampler(data, **changes):
    options = dict(clips=video.Clips(data / 'train'), frames_per_clip=4, augment_mirror=False,
                   seed=1)
    return PairSampler(**{**options, **changes})


def test_same_episode_pairs_show_one_episode_in_two_contexts(data):
    source, target, first = sampler(data).sample(200)
    assert source.shape == target.shape == (200, 4, SIZE, SIZE, 3)
    assert source.dtype == torch.uint8
    (episodes, contexts, frames), (other_episodes, other_contexts, other_frames) = (
        labels(source), labels(target))
    assert torch.equal(episodes, other_episodes)
    assert torch.equal(frames, other_frames)
    assert (contexts != other_contexts).all()
    assert (frames.diff(dim=1) > 0).all()  # sorted, no frame twice
    assert set(frames.flatten().tolist()) == set(range(LENGTH + 1))
    assert len(set(zip(contexts[:, 0].tolist(), other_contexts[:, 0].tolist(),
                       strict=True))) == 6
    assert set(episodes.flatten().tolist()) == set(range(5))
    first_episodes, first_contexts, first_frames = labels(first)
    assert torch.equal(first_episodes, episodes[:, 0])
    assert torch.equal(first_contexts, other_contexts[:, 0])
    assert (first_frames == 0).all()


def test_pairs_are_a_function_of_the_seed(data):
    one, same, other = (sampler(data, seed=seed).sample(20)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_mirrored_pairs_are_mirrored_whole_and_half_of_them(data):
    plain, mirrored = sampler(data), sampler(data, augment_mirror=True)
    flips = []
    for _ in range(40):
        state = mirrored.rng.bit_generator.state
        pairs = [part.numpy()[0] for part in mirrored.sample(1)]
        plain.rng.bit_generator.state = state
        truth = [part.numpy()[0] for part in plain.sample(1)]
        flips.append(not np.array_equal(pairs[0], truth[0]))
        for pair, true in zip(pairs, truth, strict=True):
            assert np.array_equal(pair, true[..., ::-1, :] if flips[-1] else true)
    assert 10 < sum(flips) < 30


def leave_measurement_out(patch):
    """Skip that of codes, which takes seconds, and films, each of which would start ffmpeg."""
    def touch(path, *_):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    patch.setattr(train_ct, 'measure_code', lambda *_: {'rank': 0.5})
    patch.setattr(video, 'save', touch)


@pytest.fixture
def unmeasured(monkeypatch):
    leave_measurement_out(monkeypatch)


def diverge_from(monkeypatch, step):
    """From that step on the translator's learning rate is far too high."""
    schedule = utils.schedule
    monkeypatch.setattr(utils, 'schedule', lambda spec, at: (
        0.3 if spec == 1e-3 and at >= step else schedule(spec, at)))


def load(path):
    """A snapshot, without the time that it took."""
    snapshot = snapshots.load_snapshot(path, 'translator', 'fake_walk')
    snapshot.pop('elapsed', None)
    return snapshot


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """-> a function of `config`'s arguments: the folder of a run that nothing ended, trained once.

    Codes are not measured, and films are empty, see `unmeasured`.
    """
    @functools.cache
    def trained(*overrides, **options):
        with pytest.MonkeyPatch.context() as patch:
            leave_measurement_out(patch)
            folder = tmp_path_factory.mktemp('whole')
            train(config(data, *overrides, **options), folder)
        return folder
    return trained


def assert_ended_alike(one, other):
    """Two runs' folders hold the same, to the bit."""
    for name in ('snapshot.pt', 'best.pt'):
        assert differences(load(one / name), load(other / name)) == [], name
    for name in ('train.csv', 'eval.csv'):
        assert rows(one / name) == rows(other / name)


@pytest.mark.parametrize('recipe, die_at', [
    # between snapshots, after a snapshot, and after an evaluation
    ('liu2017', 5), ('liu2017', 8), ('liu2017', 11),
    ('pose_code', 5), ('pose_code', 8), ('pose_code', 11),
    # in the code's first step, between its snapshots, after one, and in its last step
    ('pose_code', 13), ('pose_code', 15), ('pose_code', 16), ('pose_code', 19)])
def test_a_killed_and_resumed_run_ends_as_one_that_ran_through(data, whole, tmp_path, monkeypatch,
                                                               unmeasured, recipe, die_at):
    cfg = config(data, recipe=recipe)
    expected = whole(recipe=recipe)
    num_steps = 12 if recipe == 'liu2017' else 19
    steps = watch(monkeypatch, train_ct, 'update', die_at, die)
    with pytest.raises(Killed):
        train(cfg, tmp_path)
    train(cfg, tmp_path)
    # resumed from the last snapshot
    assert len(steps) == die_at + num_steps - 3 * ((die_at - 1) // 3)
    assert_ended_alike(expected, tmp_path)
    assert load(tmp_path / 'best.pt')['step'] == num_steps or recipe == 'liu2017'


# in the translator's steps, before an evaluation, before the code, in its steps, and in the last
@pytest.mark.parametrize('at', [5, 8, 12, 14, 19])
def test_an_interrupted_and_resumed_run_ends_as_one_that_ran_through(data, whole, tmp_path,
                                                                     monkeypatch, unmeasured, at):
    cfg, expected = config(data, recipe='pose_code'), whole(recipe='pose_code')
    steps = watch(monkeypatch, train_ct, 'update', at, terminate)
    with pytest.raises(utils.Interrupted), utils.raise_interrupts():
        train(cfg, tmp_path)
    train(cfg, tmp_path)
    assert len(steps) == 19
    assert differences(load(expected / 'best.pt'), load(tmp_path / 'best.pt')) == []


@pytest.mark.parametrize('owner, name, saved', [
    (train_ct.Evaluator, '__init__', None), (train_ct.Evaluator, '__call__', 3),
    (FeatureWindows, '__init__', 12), (PoseCode, 'fit_scales', 12),
    (train_ct, 'measure_code', 18)])
def test_long_work_is_broken_off_at_once_and_done_again(data, whole, tmp_path, monkeypatch,
                                                        unmeasured, owner, name, saved):
    cfg = config(data, recipe='pose_code')
    with (monkeypatch.context() as patch, pytest.raises(utils.Interrupted),
          utils.raise_interrupts()):
        watch(patch, owner, name, 1, terminate_at_once)
        train(cfg, tmp_path / 'run')
    path = tmp_path / 'run/snapshot.pt'
    assert (load(path)['step'] if path.exists() else None) == saved
    train(cfg, tmp_path / 'run')
    assert_ended_alike(whole(recipe='pose_code'), tmp_path / 'run')


def test_a_disk_too_small_for_what_is_saved_is_told_before_anything_is_written(data, tmp_path,
                                                                               monkeypatch):
    cfg = config(data, recipe='pose_code')
    monkeypatch.setattr(utils.shutil, 'disk_usage', lambda _: SimpleNamespace(free=2 ** 19))
    with pytest.raises(UserError, match=r'needs \d+\.\d MiB and 512.0 KiB are free: make room'):
        train(cfg, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_the_code_is_fitted_to_the_best_translator(data, tmp_path, monkeypatch, unmeasured):
    """The translator gets worse after its first evaluation, and its weights stay as they were
    there."""
    diverge_from(monkeypatch, 4)
    cfg = config(data, 'snapshot_every=4', recipe='pose_code')
    with monkeypatch.context() as patch, pytest.raises(Killed):
        watch(patch, train_ct, 'update', 13, die)
        train(cfg, tmp_path)
    at_best = load(tmp_path / 'best.pt')
    assert at_best['step'] == 4
    train(cfg, tmp_path)
    end, last = (load(tmp_path / name) for name in ('best.pt', 'snapshot.pt'))
    assert differences(end['model'], last['model']) == []
    for key, value in at_best['model'].items():
        # scales, discriminants and all weights of the code are fitted, and nothing else
        assert torch.equal(value, end['model'][key]) != key.startswith('code.'), key
    assert end['step'] == 19 and end['scores'] == at_best['scores'] | {'rank': 0.5}


def test_no_training_reads_the_pose(data, tmp_path, linear_probe):
    """Other poses beside the same videos bring the same weights and other measurements."""
    film_all(tmp_path / 'other', pose_seed=1)
    runs = {'same': data, 'other': tmp_path / 'other'}
    ends = {}
    for name, root in runs.items():
        assert (video.Clips(root / 'play').episode(0)['qpos']
                == video.Clips(data / 'play').episode(0)['qpos']) == (name == 'same')
        train(config(root, 'num_train_steps=4', recipe='pose_code'), tmp_path / name / 'run')
        ends[name] = [load(tmp_path / name / 'run' / file) for file in ('best.pt', 'snapshot.pt')]
    for one, other in zip(*ends.values(), strict=True):
        assert differences(one['model'], other['model']) == []
        assert one['scores']['trans'] == other['scores']['trans']
        assert one['scores']['agreement'] == other['scores']['agreement']
        assert one['scores']['rank'] != other['scores']['rank']


def test_what_a_run_with_a_code_leaves(data, whole, tmp_path):
    shutil.copytree(whole(recipe='pose_code'), tmp_path, dirs_exist_ok=True)
    scores = rows(tmp_path / 'eval.csv')
    assert [int(row['step']) for row in scores] == [4, 8, 12, 19]
    assert float(scores[-1]['rank']) == 0.5
    assert len(list((tmp_path / 'eval_video').glob('*.mp4'))) == 3
    losses = {int(row['step']): row for row in rows(tmp_path / 'train.csv')}
    assert all(losses[12][name] and not losses[14][name] for name in ('trans', 'rec'))
    assert all(losses[14][f'code_{name}'] for name in ('trans', 'agree', 'forward', 'inverse'))
    best = load(tmp_path / 'best.pt')
    assert best['model_args']['code_dim'] == 3 and best['model_args']['action_dim'] == 2
    assert best['made_by']['recipe'] == 'pose_code' and best['made_by']['num_play'] == 4
    assert best['made_by']['code']['num_steps'] == 7

    snapshots.slim(tmp_path / 'best.pt', tmp_path / 'slim.pt')
    slim = load(tmp_path / 'slim.pt')
    assert slim['scores'] == best['scores']
    model = train_ct.ContextTranslator(**slim['model_args'])
    model.load_state_dict(slim['model'])
    frames = torch.from_numpy(np.array(video.Clips(data / 'train').frames(0)))
    model.only_answer(torch.device('cpu'), torch.bfloat16)
    assert model.code(model.encode(frames)).shape == (3, LENGTH + 1, 3)

    train(config(data, recipe='pose_code'), tmp_path)  # nothing is left to do
    assert rows(tmp_path / 'eval.csv') == scores


def test_play_has_its_share_of_a_batch(data, tmp_path, monkeypatch, unmeasured):
    sample, drawn = PairSampler.sample, []

    def noting(self, batch_size):
        pairs = sample(self, batch_size)
        drawn.append((batch_size, len(pairs[0])))
        return pairs
    monkeypatch.setattr(PairSampler, 'sample', noting)
    for share, expected in ((0.25, [6, 2]), (0, [8]), (1, [8])):
        drawn.clear()
        train(config(data, f'play_share={share}', 'batch_size=8', 'num_train_steps=1',
                     'code.num_steps=1', recipe='pose_code'), tmp_path / str(share))
        assert drawn == [(num, num) for num in expected]


def test_what_a_run_leaves(data, tmp_path):
    cfg = config(data, 'snapshot_every=4')
    train(cfg, tmp_path)
    scores = rows(tmp_path / 'eval.csv')
    assert [int(row['step']) for row in scores] == [4, 8, 12]
    assert [int(row['step']) for row in rows(tmp_path / 'train.csv')] == [2, 4, 6, 8, 10, 12]
    assert len(list((tmp_path / 'eval_video').glob('*.mp4'))) == 3
    best = load(tmp_path / 'best.pt')
    assert float(best['scores']['trans']) == min(float(row['trans']) for row in scores)
    assert 'optimizers' not in best
    assert 'code' not in best['model'] and best['model_args']['code_dim'] is None

    snapshots.slim(tmp_path / 'best.pt', tmp_path / 'slim.pt')
    slim = load(tmp_path / 'slim.pt')
    model = train_ct.ContextTranslator(**slim['model_args'])
    model.load_state_dict(slim['model'])
    frames = video.Clips(data / 'train').frames(0)
    assert model.encode(torch.from_numpy(np.array(frames))).shape == (3, LENGTH + 1, 5)

    train(cfg, tmp_path)  # nothing is left to do
    assert rows(tmp_path / 'eval.csv') == scores


def test_frames_that_change_are_drawn_more_often(data):
    clips = video.Clips(data / 'train')
    still = np.zeros((3, LENGTH + 1, SIZE, SIZE, 3), np.uint8)
    still[:, 2:] = 9  # at frame 2 all changes, and nothing else ever
    clips.frames = lambda i: still
    pairs = sampler(data, clips=clips, frames_per_clip=1)
    drawn = np.bincount([int(pairs.draw()[3][0]) for _ in range(600)], minlength=LENGTH + 1) / 600
    assert abs(drawn[2] - (0.5 + 0.05)) < 0.08
    assert (drawn > 0.01).all()


def test_the_best_stays_the_best_over_a_resume(data, tmp_path, monkeypatch):
    diverge_from(monkeypatch, 4)
    cfg = config(data, 'num_train_steps=8', 'snapshot_every=4')
    watch(monkeypatch, train_ct, 'update', 6, die)
    with pytest.raises(Killed):
        train(cfg, tmp_path)
    train(cfg, tmp_path)
    best, last = (load(tmp_path / name) for name in ('best.pt', 'snapshot.pt'))
    assert best['step'] == 4 and last['step'] == 8
    assert best['scores']['trans'] == last['best']


@pytest.mark.parametrize('overrides, words', [
    (['num_train_steps=0'], 'num_train_steps=0'),
    (['frames_per_clip=11'], 'frames_per_clip=10'),
    (['precision=fp8'], 'precision=fp8'),
    (['weights.foreground=2'], 'weights.foreground=2'),
    (['weights.trans=0', 'weights.rec=0', 'weights.align=0'], 'weights.trans=1'),
    (['model.channels=[4,8]'], 'channels'),
    (['task_name=other_walk'], 'other_walk'),
    (['data_dir=nowhere'], 'python generate_expert_video.py task=fake_walk')])
def test_bad_settings_are_refused_before_anything_is_written(data, tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        train(config(data, *overrides), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('overrides, words', [
    (['num_train_steps=0'], 'num_train_steps=0'),
    (['play_share=1.5'], 'play_share=1.5 must be .* 0 to 1: set play_share=0.5'),
    (['play_share=-0.1'], 'play_share=-0.1 must be .* 0 to 1: set'),
    (['code.num_steps=0'], 'num_steps=0'),
    (['code.weights.agree=-1'], 'code.weights'), (['code.weights.noise=-0.1'], 'code.weights')])
def test_bad_settings_of_the_code_are_refused_before_anything_is_written(data, tmp_path, overrides,
                                                                         words):
    with pytest.raises(UserError, match=words):
        train(config(data, *overrides, recipe='pose_code'), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('split', ['play', 'play_valid'])
@pytest.mark.parametrize('overrides', [[], ['play_share=0'], ['model.code_dim=null']])
def test_a_recipe_that_takes_play_is_refused_without_it(data, tmp_path, split, overrides):
    shutil.copytree(data, tmp_path / 'videos')
    shutil.rmtree(tmp_path / 'videos' / split)
    with pytest.raises(UserError, match=f'videos/{split}: python generate_expert_video.py'):
        train(config(tmp_path / 'videos', *overrides, recipe='pose_code'), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_the_papers_recipe_needs_no_play(tmp_path):
    film(tmp_path)
    film(tmp_path, 'valid', seed=1)
    train(config(tmp_path, 'num_train_steps=1'), tmp_path / 'run')
    best = load(tmp_path / 'run/best.pt')
    assert best['made_by']['num_play'] == 0 and best['made_by']['code'] is None


def test_play_that_is_drawn_otherwise_is_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / 'videos')
    edit(tmp_path / 'videos/play/meta.json', quality=[1, 2, 3])
    with pytest.raises(UserError, match='videos/play was made with quality='):
        train(config(tmp_path / 'videos', recipe='pose_code'), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_code_is_not_trained_on_videos_without_poses(data, tmp_path):
    shutil.copytree(data, tmp_path / 'videos')
    for split in ('train', 'valid'):
        edit(tmp_path / 'videos' / split / 'meta.json', mp4_sha256='0')
    with pytest.raises(UserError, match='videos/train holds your own videos'):
        train(config(tmp_path / 'videos', recipe='pose_code'), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_too_few_videos_of_ones_own_are_told(tmp_path):
    for split in ('train', 'valid'):
        film(tmp_path, split, num_episodes=1, num_contexts=1)
        edit(tmp_path / split / 'meta.json', mp4_sha256='0')
    with pytest.raises(UserError, match='from_mp4=<folder of several contexts>'):
        train(config(tmp_path), tmp_path / 'run')
    film(tmp_path, 'play')
    with pytest.raises(UserError, match='num_contexts=3, not 1.* the from_mp4 of its neighbour'):
        train(config(tmp_path, 'play_share=0.5'), tmp_path / 'run')


def test_a_dataset_of_one_context_is_refused(tmp_path):
    film(tmp_path, num_episodes=1, num_contexts=1)
    film(tmp_path, 'valid', num_episodes=1, num_contexts=1)
    with pytest.raises(UserError, match='num_contexts=4'):
        train(config(tmp_path), tmp_path / 'run')


def test_clips_shorter_than_a_window_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_ct, 'WINDOW', LENGTH + 2)
    with pytest.raises(UserError, match=f'{LENGTH + 1} frames, .*episode_len={LENGTH + 1}'):
        train(config(data, recipe='pose_code'), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_another_model_is_refused_on_resume(data, tmp_path):
    train(config(data, 'num_train_steps=1'), tmp_path)
    with pytest.raises(UserError, match='z_dim=5, not 6'):
        train(config(data, 'num_train_steps=1', 'model.z_dim=6'), tmp_path)
    with pytest.raises(UserError, match='num_train_steps=1, not 2'):
        train(config(data, 'num_train_steps=2'), tmp_path)


def test_another_code_is_refused_on_resume(data, tmp_path, unmeasured):
    few = 'num_train_steps=1', 'code.num_steps=1'
    train(config(data, *few, recipe='pose_code'), tmp_path)
    with pytest.raises(UserError, match='code.num_steps=1, not 2'):
        train(config(data, few[0], 'code.num_steps=2', recipe='pose_code'), tmp_path)
    with pytest.raises(UserError, match='code_dim=.*, not None.*recipe=pose_code, not liu2017'):
        train(config(data, 'num_train_steps=1'), tmp_path)


# ---------------------------------------------------------------------------- windows of features

class Tells(torch.nn.Module):
    """Features are what the upper left pixel tells: episode, context, frame."""

    def __init__(self):
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def encode(self, frames):
        return torch.stack(labels(frames), dim=-1).float() + self.parameter

    def context(self, first):
        return SimpleNamespace(z2=self.encode(first))


def windows(data):
    splits = {name: video.Clips(data / name) for name in ('train', 'valid', 'play', 'play_valid')}
    return FeatureWindows(Tells(), splits, torch.autocast('cpu', torch.bfloat16, enabled=False))


def test_windows_are_of_successive_frames_in_two_contexts(data):
    torch.manual_seed(0)
    source, target, z2, actions = windows(data).sample(400)
    assert source.shape == target.shape == (400, 5, 3) and z2.shape == (400, 3)
    assert not source.requires_grad and source.dtype == torch.float32
    (episodes, contexts, frames), (other_episodes, other_contexts, other_frames) = (
        part.long().unbind(-1) for part in (source, target))
    assert torch.equal(episodes, other_episodes) and torch.equal(frames, other_frames)
    assert (episodes == episodes[:, :1]).all() and (contexts == contexts[:, :1]).all()
    assert (other_contexts == other_contexts[:, :1]).all()
    assert (frames.diff(dim=1) == 1).all()
    assert set(frames[:, 0].tolist()) == set(range(LENGTH + 1 - 5 + 1))
    assert (contexts != other_contexts).all()
    assert len(set(zip(contexts[:, 0].tolist(), other_contexts[:, 0].tolist(),
                       strict=True))) == 6
    assert torch.equal(z2.long(), torch.stack(
        [episodes[:, 0], other_contexts[:, 0], torch.zeros_like(frames[:, 0])], dim=1))
    # the first half is of five demonstrations, the second of four episodes of play
    assert set(episodes[:200, 0].tolist()) == set(range(5))
    assert set(episodes[200:, 0].tolist()) == set(range(4))


def test_windows_of_play_have_the_actions_between_their_frames(data):
    torch.manual_seed(0)
    source, _, _, actions = windows(data).sample(60)
    assert actions.shape == (30, 4, 2) and actions.dtype == torch.float32
    torch.testing.assert_close(actions * 10, source[30:, :-1][..., [0, 2]])


def test_windows_can_be_as_long_as_a_clip(data, monkeypatch):
    monkeypatch.setattr(train_ct, 'WINDOW', LENGTH + 1)
    source, _, _, actions = windows(data).sample(2)
    assert source.shape == (2, LENGTH + 1, 3) and actions.shape == (1, LENGTH, 2)


def test_all_features_of_both_actors(data):
    z, z2 = windows(data).all()
    assert z.shape == (9, 3, LENGTH + 1, 3) and z2.shape == (9, 3, 3)
    assert torch.equal(z[:, :, 0], z2)
    assert z[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    torch.manual_seed(0)
    one = windows(data).sample(8)
    torch.manual_seed(0)
    for part, again in zip(one, windows(data).sample(8), strict=True):
        assert torch.equal(part, again)
