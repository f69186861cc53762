import numpy as np
import pytest
import torch
from fakes import LENGTH, SIZE, FakeClips, differences, film_all, labels

import probe
import video
from ct_model import ContextTranslator
from probe import Evaluator, PoseProbe, measure_code, ssim_map


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return film_all(tmp_path_factory.mktemp('videos'))


def test_evaluation(data):
    """A model that knows the answer; one that copies; what a shuffled source brings."""
    clips = video.Clips(data / 'valid')
    evaluator = Evaluator(clips, video.Clips(data / 'train'), 3, torch.device('cpu'))

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


def test_codes_are_measured_in_evaluation_mode(data, monkeypatch):
    model = ContextTranslator(SIZE, [4, 6, 8, 10], 5, 12, code_dim=3, action_dim=2)
    frames = torch.from_numpy(np.array(video.Clips(data / 'valid').frames(0)))

    class Probe:
        def __init__(self, splits, device):
            assert splits == 'splits'

        def __call__(self, encode, dynamics):
            assert dynamics is model.code.dynamics and not model.code.norm.training
            assert encode(frames).shape == (3, LENGTH + 1, 3)
            return {'rank': 1.0}

    monkeypatch.setattr(probe, 'PoseProbe', Probe)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=False)
    assert measure_code(model, 'splits', autocast) == {'rank': 1.0}
    assert model.training and model.code.norm.training
    assert differences(before, dict(model.state_dict())) == []
