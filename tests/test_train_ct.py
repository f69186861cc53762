import functools
import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import (
    FakeClips,
    Killed,
    die,
    differences,
    edit,
    rows,
    settings,
    terminate,
    terminate_at_once,
    watch,
    write_split,
)

import snapshots
import train_ct
import utils
import video
from ct_model import PoseCode
from train_ct import FeatureWindows, PairSampler, PoseProbe, ssim_map, train
from utils import UserError

SIZE, LENGTH = 16, 9


def film(root, split='train', num_episodes=5, num_contexts=3, seed=0, pose_seed=0):
    """A square wanders: a way for each episode, colours for each context.

    The upper left pixel tells (episode, context, frame), and an action of play (episode, step).
    Poses have nothing to do with any of it.
    """
    rng, episodes = np.random.default_rng(seed), []
    for i in range(num_episodes):
        place = rng.integers(1, SIZE - 5, (2, 2))
        frames = np.empty((num_contexts, LENGTH + 1, SIZE, SIZE, 3), np.uint8)
        for c in range(num_contexts):
            frames[c], square = rng.integers(0, 100, 3), rng.integers(150, 256, 3)
            for t in range(LENGTH + 1):
                y, x = (place[0] + (place[1] - place[0]) * t / LENGTH).round().astype(int)
                frames[c, t, y:y + 4, x:x + 4] = square
                frames[c, t, 0, 0] = i, c, t
        qpos = np.random.default_rng([pose_seed, seed, i]).normal(size=(LENGTH + 1, 2))
        episodes.append((frames, {
            'qpos': qpos.tolist(), **({'actions': [[i / 10, t / 10] for t in range(LENGTH)]}
                                      if split.startswith('play') else {'expert_return': 0.0})}))
    write_split(root / split, episodes, task='fake_walk', joints=['hinge', 'slide'])


def film_all(root, **options):
    for seed, (split, num) in enumerate((('train', 5), ('valid', 3), ('play', 4),
                                         ('play_valid', 3))):
        film(root, split, num, seed=seed, **options)
    return root


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return film_all(tmp_path_factory.mktemp('videos'))


def config(data, *overrides, recipe='liu2017'):
    if recipe == 'pose_code':
        overrides = ['code.num_steps=7', 'code.batch_size=8', 'code.window=5', 'model.code_dim=3',
                     *overrides]
    return settings(
        'train_ct', f'recipe={recipe}', 'task_name=fake_walk', f'data_dir={data}', 'device=cpu',
        'use_tb=false', 'precision=fp32', 'batch_size=3', 'frames_per_clip=4',
        'num_train_steps=12', 'log_every=2', 'eval_every=4', 'snapshot_every=3',
        'num_eval_videos=1', 'lr=1e-3', 'model.channels=[4,6,8,10]', 'model.z_dim=5',
        'model.hidden=12', *overrides)


def sampler(data, pairs='same_episode', **changes):
    options = dict(clips=video.Clips(data / 'train'), frames_per_clip=4, augment_mirror=False,
                   augment_colours=False, seed=1)
    return PairSampler(pairs=pairs, **{**options, **changes})


def labels(frames):
    """-> episodes, contexts, frame numbers, of the pixel that `film` put there."""
    return frames[..., 0, 0, :].long().unbind(-1)


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


def test_random_pairs_show_two_episodes(data):
    source, target, first = sampler(data, 'random').sample(200)
    episodes, contexts, frames = labels(source)
    other_episodes, other_contexts, other_frames = labels(target)
    assert (episodes != other_episodes).all()
    assert torch.equal(frames, other_frames)
    assert (contexts == other_contexts).any() and (contexts != other_contexts).any()
    assert torch.equal(labels(first)[0], other_episodes[:, 0])


def test_pairs_are_a_function_of_the_seed(data):
    one, same, other = (sampler(data, seed=seed).sample(20)[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_colours_are_changed_alike_in_a_whole_clip(data):
    """Source and target of a pair apart; the first frame along with the target."""
    ways = [(list(order), torch.tensor(flips, dtype=torch.uint8) * 255)
            for order in itertools.permutations(range(3))
            for flips in itertools.product((0, 1), repeat=3)]
    before, seen = sampler(data).sample(1), set()
    draw = sampler(data).draw()
    for seed in range(100):
        recolouring = sampler(data, augment_colours=True, seed=seed)
        recolouring.draw = lambda: draw
        source, target, first = recolouring.sample(1)
        of_source, of_target, of_first = (
            {i for i, (order, flips) in enumerate(ways)
             if torch.equal(after, plain[..., order] ^ flips)}
            for after, plain in zip((source, target, first), before, strict=True))
        assert of_source and of_target & of_first
        seen.add((min(of_source), min(of_target)))
    assert len(seen) > 80  # of 48 * 48, if both are drawn, and apart


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


@pytest.fixture
def linear_probe(monkeypatch):
    """Poses are read by a linear map, which is fitted within a second."""
    monkeypatch.setattr(train_ct, 'normed_mlp',
                        lambda size, _, out_dim: torch.nn.Linear(size, out_dim))


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
    cfg = config(data, 'augment_colours=true', recipe=recipe)
    expected = whole('augment_colours=true', recipe=recipe)
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


def test_codes_are_measured_in_evaluation_mode(data, monkeypatch):
    model = train_ct.ContextTranslator(SIZE, [4, 6, 8, 10], 5, 12, code_dim=3, action_dim=2)
    frames = torch.from_numpy(np.array(video.Clips(data / 'valid').frames(0)))

    class Probe:
        def __init__(self, splits, device):
            assert splits == 'splits'

        def __call__(self, encode, dynamics):
            assert dynamics is model.code.dynamics and not model.code.norm.training
            assert encode(frames).shape == (3, LENGTH + 1, 3)
            return {'rank': 1.0}

    monkeypatch.setattr(train_ct, 'PoseProbe', Probe)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=False)
    assert train_ct.measure_code(model, 'splits', autocast) == {'rank': 1.0}
    assert model.training and model.code.norm.training
    assert differences(before, dict(model.state_dict())) == []


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
    drawn = np.bincount([int(pairs.draw()[4][0]) for _ in range(600)], minlength=LENGTH + 1) / 600
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


def test_evaluation(data):
    """A model that knows the answer; one that copies; what a shuffled source brings."""
    clips = video.Clips(data / 'valid')
    evaluator = train_ct.Evaluator(clips, video.Clips(data / 'train'), 'same_episode', 3,
                                   torch.device('cpu'))

    class Oracle:
        """Features are the pixels of the episode's first filmed context."""
        answers = {tuple(labels(torch.from_numpy(np.array(clips.frames(i)[c, t])))): (i, t)
                   for i in range(3) for c in range(3) for t in range(LENGTH + 1)}

        def encode(self, frames):
            z = torch.zeros(*frames.shape[:-3], 2)
            z[..., 0], _, z[..., 1] = (part.float() for part in labels(frames))
            return z

        def context(self, first):
            return labels(first)[1]

        def translate(self, z1, context):
            return z1

        def decode(self, z, context):
            images = [clips.frames(int(i))[c, int(t)] for clip, c in zip(z, context, strict=True)
                      for i, t in clip]
            images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
            return images.unflatten(0, z.shape[:2])

        def losses(self, source, target, first, foreground):
            return None, {'trans': torch.tensor(0.5)}

    autocast = torch.autocast('cpu', torch.bfloat16, enabled=False)
    scores, images = evaluator(Oracle(), 0.5, autocast)
    assert scores['psnr'] == scores['psnr_moving'] == pytest.approx(100)
    assert scores['ssim'] == scores['ssim_moving'] == pytest.approx(1)
    assert scores['trans'] == 0.5
    assert scores['feature_error'] == 0
    # episodes 0, 1, 2 against 2, 0, 1: squares 4, 1, 1, over two dimensions
    frames = np.arange(LENGTH + 1)
    variance = (np.var([0, 1, 2], ddof=0) * 30 / 29 + np.var(np.tile(frames, 3), ddof=1)) / 2
    assert scores['feature_var'] == pytest.approx(variance)
    assert scores['feature_error_shuffled'] == pytest.approx(1 / variance)
    for i in range(3):
        assert np.array_equal(images[i], clips.frames(i)[(i + 1) % 3])
    copied = evaluator.baselines
    assert copied['psnr_moving_copy_first'] < copied['psnr_copy_first'] < 40
    film = evaluator.film(images, 2)
    assert len(film) == 2 * (LENGTH + 1)


def test_ssim_by_hand():
    grey, white = (torch.full((1, 9, 10, 3), value, dtype=torch.uint8) for value in (51, 255))
    same = ssim_map(grey, grey)
    assert same.shape == (1, 3, 4)
    torch.testing.assert_close(same, torch.ones(1, 3, 4))
    # no variance: what is left is the comparison of the means, 0.2 and 1
    torch.testing.assert_close(ssim_map(grey, white), torch.full(
        (1, 3, 4), (2 * 0.2 + 1e-4) / (0.04 + 1 + 1e-4)), rtol=1e-3, atol=0)
    noise = torch.randint(0, 256, (1, 9, 10, 3), dtype=torch.uint8)
    assert ssim_map(noise, 255 - noise).mean() < 0  # the structure is turned round


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip('skimage.metrics')
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 24, 3), np.uint8)
    other = (0.7 * image + 0.3 * rng.integers(0, 256, image.shape)).astype(np.uint8)
    _, theirs = metrics.structural_similarity(image, other, full=True, channel_axis=2,
                                              use_sample_covariance=False)
    [ours] = ssim_map(*(torch.from_numpy(part)[None] for part in (image, other)))
    np.testing.assert_allclose(ours, theirs.mean(2)[3:-3, 3:-3], atol=1e-5)


@pytest.mark.parametrize('overrides, words', [
    (['num_train_steps=0'], 'num_train_steps=0'),
    (['frames_per_clip=11'], 'frames_per_clip=10'),
    (['precision=fp8'], 'precision=fp8'),
    (['pairs=other'], 'pairs=other'),
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
    (['code.num_steps=0'], 'num_steps=0'), (['code.batch_size=1'], 'batch_size=1'),
    (['code.window=3'], 'window=3'), (['code.window=11'], 'fewer than code.window=11'),
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
    for pairs, words in (('same_episode', 'from_mp4=<folder of several contexts>'),
                         ('random', 'from_mp4=<folder of more videos>')):
        with pytest.raises(UserError, match=words):
            train(config(tmp_path, f'pairs={pairs}'), tmp_path / 'run')
    film(tmp_path, 'play')
    with pytest.raises(UserError, match='num_contexts=3, not 1.* the from_mp4 of its neighbour'):
        train(config(tmp_path, 'play_share=0.5'), tmp_path / 'run')


def test_too_little_data_is_refused(tmp_path):
    film(tmp_path, num_episodes=1, num_contexts=1)
    film(tmp_path, 'valid', num_episodes=1, num_contexts=1)
    with pytest.raises(UserError, match='num_contexts=4'):
        train(config(tmp_path), tmp_path / 'run')
    with pytest.raises(UserError, match='num_train=100'):
        train(config(tmp_path, 'pairs=random'), tmp_path / 'run')


def test_another_model_is_refused_on_resume(data, tmp_path):
    train(config(data, 'num_train_steps=1'), tmp_path)
    with pytest.raises(UserError, match='z_dim=5, not 6'):
        train(config(data, 'num_train_steps=1', 'model.z_dim=6'), tmp_path)
    with pytest.raises(UserError, match='num_train_steps=1, not 2'):
        train(config(data, 'num_train_steps=2'), tmp_path)


def test_another_code_is_refused_on_resume(data, tmp_path, unmeasured):
    few = 'num_train_steps=1', 'code.num_steps=1'
    train(config(data, *few, recipe='pose_code'), tmp_path)
    with pytest.raises(UserError, match='code.window=5, not 6'):
        train(config(data, *few, 'code.window=6', recipe='pose_code'), tmp_path)
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


def windows(data, window=5):
    splits = {name: video.Clips(data / name) for name in ('train', 'valid', 'play', 'play_valid')}
    return FeatureWindows(Tells(), splits, window,
                          torch.autocast('cpu', torch.bfloat16, enabled=False))


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


def test_windows_can_be_as_long_as_a_clip(data):
    source, _, _, actions = windows(data, LENGTH + 1).sample(2)
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


# -------------------------------------------------------------------------- measures of the pose

JOINTS = ['slide', 'hinge', 'travel']
EPISODES = {'train': 40, 'valid': 30, 'play': 40, 'play_valid': 30}


class PoseClips(FakeClips):
    """A hinge turns steadily, actions move a slide, and the body travels, which is not to be seen.

    A frame is one pixel of four channels that tell (split, episode, context, moment).
    """

    def __init__(self, number, num_episodes, num_frames=25):
        rng = np.random.default_rng(number)
        actions = rng.normal(size=(num_episodes, num_frames - 1, 1))
        slide = np.pad(actions[..., 0].cumsum(1), ((0, 0), (1, 0))) + rng.normal(
            size=(num_episodes, 1))
        speed = rng.uniform(-0.3, 0.3, (num_episodes, 1))
        hinge = rng.uniform(-3, 3, (num_episodes, 1)) + speed * np.arange(num_frames)
        self.qpos = np.stack([slide, hinge, 100 * rng.normal(size=slide.shape)], axis=-1)
        frames = np.zeros((num_episodes, 3, num_frames, 1, 1, 4), np.uint8)
        for axis, index in enumerate(np.indices(frames.shape[:3]), start=1):
            frames[..., 0, 0, axis] = index
        frames[..., 0] = number
        super().__init__(frames, [{'qpos': pose.tolist(), 'actions': each.tolist()}
                                  for pose, each in zip(self.qpos, actions, strict=True)],
                         joints=JOINTS)


def pose_splits(*names, **options):
    return {name: PoseClips(k, EPISODES[name], **options) for k, name in enumerate(names)}


class TrueFeatures:
    """Features are the pose that is to be seen: a length in standard deviations, sine, cosine."""

    HISTORY = 3

    def __init__(self, splits):
        self._splits = list(splits.values())
        self.scale = np.concatenate([clips.qpos[..., 0].ravel() for name, clips in splits.items()
                                     if not name.endswith('valid')]).std()

    def __call__(self, frames):
        split, i, _, t = frames[..., 0, 0, :].numpy().astype(int).transpose(2, 0, 1)
        slide, hinge, _ = self._splits[split[0, 0]].qpos[i, t].transpose(2, 0, 1)
        return torch.from_numpy(np.stack([slide / self.scale, np.sin(hinge), np.cos(hinge)],
                                         axis=-1)).float()

    def rollout(self, codes, actions):
        """Knows how the slide and the hinge move; two members err by the same to either side."""
        angles = torch.atan2(codes[..., 1], codes[..., 2])
        ahead = torch.arange(1, actions.shape[1] + 1)
        hinge = angles[:, -1:] + (angles[:, -1:] - angles[:, -2:-1]) * ahead
        slide = codes[:, -1:, 0] + actions[..., 0].cumsum(1) / self.scale
        exact = torch.stack([slide, hinge.sin(), hinge.cos()], dim=-1).float()
        return torch.stack([exact + 0.1, exact - 0.1])


def test_the_true_pose_has_the_best_scores(monkeypatch):
    monkeypatch.setattr(PoseProbe, 'NUM_STEPS', 500)
    splits = pose_splits('train', 'valid', 'play', 'play_valid')
    features = TrueFeatures(splits)
    random_state = torch.get_rng_state()
    scores = PoseProbe(splits)(features, features)
    assert torch.equal(torch.get_rng_state(), random_state)  # what trains may go on as it was
    for suffix in ('', '_play'):
        assert scores[f'rank{suffix}'] > 0.999
        assert scores[f'agreement{suffix}'] == 0
        assert scores[f'probe{suffix}'] < 0.05
        assert scores[f'probe_gross{suffix}'] < 0.05
    assert scores['open_loop'] < 0.05
    played = splits['play_valid']  # from moments 2 and 12 on
    moved = np.concatenate([played.qpos[:, now + 10] - played.qpos[:, now] for now in (2, 12)])
    moved[:, 0] /= features.scale
    still = np.abs(moved[:, :2])  # a hinge moves by less than half a turn
    assert scores['open_loop_still'] == pytest.approx(np.median(still, axis=0).max(), rel=1e-3)


def test_what_looks_the_same_after_half_a_turn_is_read_by_twice_its_angle(linear_probe):
    splits = pose_splits('train', 'valid', 'play', 'play_valid')
    features = TrueFeatures(splits)

    def encode(frames):
        slide, sine, cosine = features(frames).unbind(-1)
        return torch.stack([slide, 2 * sine * cosine, cosine ** 2 - sine ** 2], dim=-1)
    scores = PoseProbe(splits)(encode)
    assert scores['rank'] > 0.999 and scores['probe'] < 0.05 and scores['probe_gross'] < 0.05
    assert scores['rank_play'] > 0.999 and scores['probe_play'] < 0.1


def test_noise_has_the_worst_scores(linear_probe):
    torch.manual_seed(0)
    scores = PoseProbe(pose_splits('train', 'valid'))(
        lambda frames: torch.randn(*frames.shape[:2], 3))
    assert scores.keys() == {'rank', 'agreement', 'probe', 'probe_gross'}
    assert abs(scores['rank']) < 0.05
    assert scores['agreement'] == pytest.approx(1, abs=0.1)
    assert scores['probe'] > 0.7 and scores['probe_gross'] > 0.7


def test_clips_too_short_to_predict_are_measured_without(linear_probe):
    splits = pose_splits('train', 'valid', 'play', 'play_valid', num_frames=12)
    features = TrueFeatures(splits)
    assert 'open_loop' not in PoseProbe(splits, num_episodes=2)(features, features)
