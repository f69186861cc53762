import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import dmc
import train_ct
import utils
import video
from train_ct import PairSampler, psnr, ssim_map, train
from utils import UserError

SIZE, LENGTH = 16, 9
CFGS = Path(__file__).parent.parent / 'cfgs'


def film(root, split='train', num_episodes=5, num_contexts=3, seed=0):
    """A square wanders: a way for each episode, colours for each context.

    The upper left pixel tells (episode, context, frame).
    """
    rng = np.random.default_rng(seed)
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    video.write_json(folder / 'meta.json', {
        'format': utils.FORMAT, 'task': 'fake_walk', 'split': split, 'im_size': SIZE,
        'episode_len': LENGTH, 'num_contexts': num_contexts, 'num_episodes': num_episodes,
        'expert_sha256': '0', 'quality': dmc.CONTEXT_QUALITY,
        'versions': utils.versions()})
    for i in range(num_episodes):
        place = rng.integers(1, SIZE - 5, (2, 2))
        frames = np.empty((num_contexts, LENGTH + 1, SIZE, SIZE, 3), np.uint8)
        for c in range(num_contexts):
            frames[c], square = rng.integers(0, 100, 3), rng.integers(150, 256, 3)
            for t in range(LENGTH + 1):
                y, x = (place[0] + (place[1] - place[0]) * t / LENGTH).round().astype(int)
                frames[c, t, y:y + 4, x:x + 4] = square
                frames[c, t, 0, 0] = i, c, t
        video.write_episode(folder, i, frames, {'expert_return': 0.0})


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('videos')
    film(root)
    film(root, 'valid', num_episodes=3, seed=1)
    return root


def config(data, *overrides):
    with initialize_config_dir(str(CFGS), version_base='1.3'):
        return compose('train_ct', [
            'task_name=fake_walk', f'data_dir={data}', 'device=cpu', 'use_tb=false',
            'precision=fp32', 'batch_size=3', 'frames_per_clip=4', 'num_train_steps=12',
            'log_every=2', 'eval_every=4', 'snapshot_every=3', 'num_eval_videos=1', 'lr=1e-3',
            'model.channels=[4,6,8,10]', 'model.z_dim=5', 'model.hidden=12', *overrides])


def sampler(data, pairs='same_episode', **changes):
    options = dict(frames_per_clip=4, augment_mirror=False, augment_colours=False, seed=1)
    return PairSampler(video.Clips(data / 'train'), pairs, **{**options, **changes})


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


class Killed(Exception):
    pass


def rows(path):
    with open(path) as file:
        return [{key: value for key, value in row.items() if key != 'total_time'}
                for row in csv.DictReader(file)]


@pytest.mark.parametrize('die_at', [5, 8, 11])
def test_a_killed_and_resumed_run_ends_as_one_that_ran_through(data, tmp_path, monkeypatch, die_at):
    """Killed between snapshots, after a snapshot, and after an evaluation."""
    cfg = config(data, 'augment_colours=true')
    train(cfg, tmp_path / 'whole')
    sample, calls = PairSampler.sample, []

    def dying(self, batch_size):
        calls.append(batch_size)
        if len(calls) == die_at:
            raise Killed
        return sample(self, batch_size)
    monkeypatch.setattr(PairSampler, 'sample', dying)
    with pytest.raises(Killed):
        train(cfg, tmp_path / 'killed')
    train(cfg, tmp_path / 'killed')
    assert len(calls) == die_at + 12 - 3 * ((die_at - 1) // 3)  # resumed from the last snapshot

    for name in ('snapshot.pt', 'best.pt'):
        whole, again = (utils.load_snapshot(tmp_path / run / name, 'translator', 'fake_walk')
                        for run in ('whole', 'killed'))
        assert whole['step'] == again['step']
        assert whole['model'].keys() == again['model'].keys()
        for key, value in whole['model'].items():
            assert torch.equal(value, again['model'][key]), key
    whole, again = (utils.load_snapshot(tmp_path / run / 'snapshot.pt', 'translator')
                    for run in ('whole', 'killed'))
    assert whole['best'] == again['best'] and whole['sampler'] == again['sampler']
    for key, moments in whole['optimizer']['state'].items():
        for name, value in moments.items():
            assert torch.equal(value, again['optimizer']['state'][key][name])
    for name in ('train.csv', 'eval.csv'):
        assert rows(tmp_path / 'whole' / name) == rows(tmp_path / 'killed' / name)


def test_what_a_run_leaves(data, tmp_path):
    cfg = config(data, 'snapshot_every=4')
    train(cfg, tmp_path)
    scores = rows(tmp_path / 'eval.csv')
    assert [int(row['step']) for row in scores] == [4, 8, 12]
    assert [int(row['step']) for row in rows(tmp_path / 'train.csv')] == [2, 4, 6, 8, 10, 12]
    assert len(list((tmp_path / 'eval_video').glob('*.mp4'))) == 3
    best = utils.load_snapshot(tmp_path / 'best.pt', 'translator', 'fake_walk')
    assert float(best['scores']['trans']) == min(float(row['trans']) for row in scores)
    assert 'optimizer' not in best

    utils.slim(tmp_path / 'best.pt', tmp_path / 'slim.pt')
    slim = utils.load_snapshot(tmp_path / 'slim.pt', 'translator', 'fake_walk')
    model = train_ct.ContextTranslator(**slim['model_args'])
    model.load_state_dict(slim['model'])
    frames = video.Clips(data / 'train').frames(0)
    assert model.encode(torch.from_numpy(np.array(frames))).shape == (3, LENGTH + 1, 5)

    train(cfg, tmp_path)  # nothing is left to do
    assert rows(tmp_path / 'eval.csv') == scores


def test_frames_that_change_are_drawn_more_often(data):
    pairs = sampler(data, frames_per_clip=1)
    still = np.zeros((3, LENGTH + 1, SIZE, SIZE, 3), np.uint8)
    still[:, 2:] = 9  # at frame 2 all changes, and nothing else ever
    pairs._clips.frames = lambda i: still
    drawn = np.bincount([int(pairs.draw()[4][0]) for _ in range(600)], minlength=LENGTH + 1) / 600
    assert abs(drawn[2] - (0.5 + 0.05)) < 0.08
    assert (drawn > 0.01).all()


def test_the_best_stays_the_best_over_a_resume(data, tmp_path):
    train(config(data, 'num_train_steps=4'), tmp_path)
    train(config(data, 'num_train_steps=8', 'lr=10'), tmp_path)  # all is lost
    best, last = (utils.load_snapshot(tmp_path / name, 'translator')
                  for name in ('best.pt', 'snapshot.pt'))
    assert best['step'] == 4 and last['step'] == 8
    assert best['scores']['trans'] == last['best']


def test_examination(data):
    """A model that knows the answer; one that copies; what a shuffled source brings."""
    clips = video.Clips(data / 'valid')
    exam = train_ct.Examination(clips, video.Clips(data / 'train'), 'same_episode', 3,
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
    scores, images = exam(Oracle(), 0.5, autocast)
    assert scores['psnr'] == scores['psnr_moving'] == pytest.approx(100)
    assert scores['ssim'] == scores['ssim_moving'] == pytest.approx(1)
    assert scores['trans'] == 0.5
    assert scores['feature_error'] == 0
    # episodes 0, 1, 2 against 2, 0, 1: squares 4, 1, 1, over two dimensions
    frames = np.arange(LENGTH + 1)
    variance = (np.var([0, 1, 2], ddof=0) * 30 / 29 + np.var(np.tile(frames, 3), ddof=1)) / 2
    assert scores['feature_var'] == pytest.approx(variance)
    assert scores['feature_error_shuffled'] == pytest.approx(1 / variance)
    assert torch.equal(images, exam._target)
    assert exam.baselines['psnr_moving_copy_first'] < exam.baselines['psnr_copy_first'] < 40
    film = exam.film(images, 2)
    assert len(film) == 2 * (LENGTH + 1)


def test_measures_by_hand():
    assert psnr(torch.tensor([0.01, 0.03])) == pytest.approx(-10 * np.log10(0.02))
    grey, white = (torch.full((1, 9, 10, 3), value, dtype=torch.uint8) for value in (51, 255))
    same = ssim_map(grey, grey)
    assert same.shape == (1, 3, 4)
    torch.testing.assert_close(same, torch.ones(1, 3, 4))
    # no variance: what is left is the comparison of the means, 0.2 and 1
    torch.testing.assert_close(ssim_map(grey, white), torch.full(
        (1, 3, 4), (2 * 0.2 + 1e-4) / (0.04 + 1 + 1e-4)), rtol=1e-3, atol=0)
    noise = torch.randint(0, 256, (1, 9, 10, 3), dtype=torch.uint8)
    assert ssim_map(noise, 255 - noise).mean() < 0  # the structure is turned round


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


def test_too_little_data_is_refused(tmp_path):
    film(tmp_path, num_episodes=1, num_contexts=1)
    film(tmp_path, 'valid', num_episodes=1, num_contexts=1)
    with pytest.raises(UserError, match='num_contexts=4'):
        train(config(tmp_path), tmp_path / 'run')
    with pytest.raises(UserError, match='num_train=100'):
        train(config(tmp_path, 'pairs=random'), tmp_path / 'run')


def test_another_model_is_refused_on_resume(data, tmp_path):
    train(config(data, 'num_train_steps=1'), tmp_path)
    with pytest.raises(UserError, match='another z_dim'):
        train(config(data, 'model.z_dim=6'), tmp_path)
