"""Measures of a translator with true pictures and true poses, of held-out videos: evaluation only.

Neither losses nor samplers import this: no pose enters any training.
"""
import numpy as np
import scipy  # scipy.stats is loaded when it is first used
import torch
import torch.nn.functional as F

import video
from ct_model import ContextTranslator, moving, normed_mlp, to_uint8


class Evaluator:
    """Held-out clips, the same at every evaluation, and what can be said without a model."""

    def __init__(self, clips: video.Clips, train_clips: video.Clips, num_clips: int,
                 device: torch.device):
        num_clips, num_contexts = min(num_clips, len(clips)), clips.meta['num_contexts']
        self._device = device
        self._source = self._load(clips.frames(i)[i % num_contexts] for i in range(num_clips))
        self._target = self._load(clips.frames(i)[(i + 1) % num_contexts]
                                  for i in range(num_clips))
        self._moved = moving(self._target, self._target[:, 0])
        known = self._load(train_clips.frames(i)[i % num_contexts]
                           for i in range(min(num_clips, len(train_clips))))
        first = self._target[:, :1].expand_as(self._target)
        mean_video = known.float().mean(0).round().byte().expand_as(self._target)
        self.baselines = {**self._measure(first, '_copy_first'),
                          **self._measure(mean_video, '_mean_video')}

    def _load(self, clips) -> torch.Tensor:
        return torch.from_numpy(np.stack(list(clips))).to(self._device)

    def _measure(self, prediction: torch.Tensor, suffix: str = '') -> dict[str, float]:
        """PSNR in dB and SSIM, over all pixels and over those that move."""
        truth, moved = self._target, self._moved
        maps = torch.cat([ssim_map(p, t) for p, t in zip(prediction, truth, strict=True)])
        error = torch.cat([((p.float() - t.float()) / 255).square().mean(-1)
                           for p, t in zip(prediction, truth, strict=True)])
        return {f'psnr{suffix}': video.psnr(float(error.mean())),
                f'psnr_moving{suffix}': video.psnr(float(error[moved.flatten(0, 1)].mean())),
                f'ssim{suffix}': float(maps.mean()),
                f'ssim_moving{suffix}': float(maps[moved[..., 3:-3, 3:-3].flatten(0, 1)].mean())}

    @torch.no_grad()
    def __call__(self, model: ContextTranslator, foreground: float, autocast
                 ) -> tuple[dict[str, float], torch.Tensor]:
        """Return metrics, and the predicted clips, uint8 (N, T, H, W, 3).

        Feature errors are in units of the features' variance over the targets: 1 means that the
        translator predicts nothing. `shuffled` hands it the source of another clip.
        """
        with autocast:
            sums, z3, z_shuffled, z_target, images = {}, [], [], [], []
            shuffled = self._source.roll(1, 0)
            for i in range(0, len(self._target), 4):  # clips at once
                source, target = self._source[i:i + 4], self._target[i:i + 4]
                _, losses = model.losses(source, target, target[:, 0], foreground=foreground)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(loss) * len(target)
                context = model.context(target[:, 0])
                z3.append(model.translate(model.encode(source), context))
                z_shuffled.append(model.translate(model.encode(shuffled[i:i + 4]), context))
                z_target.append(model.encode(target))
                images.append(to_uint8(model.decode(z3[-1], context)))
        z3, z_shuffled, z_target = (torch.cat(z).float() for z in (z3, z_shuffled, z_target))
        variance = z_target.flatten(0, 1).var(0).mean()
        images = torch.cat(images)
        return {**{name: total / len(images) for name, total in sums.items()},
                'feature_error': float(F.mse_loss(z3, z_target) / variance),
                'feature_error_shuffled': float(F.mse_loss(z_shuffled, z_target) / variance),
                'feature_var': float(variance), **self._measure(images)}, images

    def film(self, images: torch.Tensor, num_clips: int) -> np.ndarray:
        """Return the first clips one after another: source, prediction and truth side by side."""
        clips = [part[:num_clips].flatten(0, 1).cpu().numpy()
                 for part in (self._source, images, self._target)]
        return video.side_by_side(clips, ['source', 'prediction', 'truth'])


def ssim_map(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) in windows of 7x7 pixels, mean over the channels.

    uint8 (N, H, W, 3), twice -> float32 (N, H - 6, W - 6), in [-1, 1]; 1 is alike.
    """
    x, y = (part.permute(0, 3, 1, 2).float() / 255 for part in (images, others))
    mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(part, 7, stride=1)
                                  for part in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    covariance = xy - mean_x * mean_y
    variances = xx - mean_x ** 2 + yy - mean_y ** 2
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
            / ((mean_x ** 2 + mean_y ** 2 + c1) * (variances + c2))).mean(1)


def pose_vectors(qpos: np.ndarray, joints: list[str], scale: np.ndarray | float = 1.0,
                 times: np.ndarray | int = 1) -> np.ndarray:
    """Return poses (..., nq) as vectors (..., n) that are close when poses are: sine and cosine of
    `times` the angles, and lengths in units of `scale`, (nq,).

    Args:
      joints: what each number of a pose is, see `dmc.SuiteEpisodes.joints`.
    """
    kinds = np.array(joints)
    angles = qpos[..., kinds == 'hinge'] * times
    lengths = (qpos / scale)[..., np.isin(kinds, ('slide', 'other'))]
    return np.concatenate([np.sin(angles), np.cos(angles), lengths], axis=-1)


class PoseProbe:
    """Measures how well features tell the physical pose, with held-out videos: evaluation only.

    No pose enters any training: a probe is fitted to features that stay as they are. A picture
    cannot tell the angle of a body that looks the same after half a turn (finger_spin's spinner),
    only twice the angle. A joint is judged by that where, on what it was fitted to, the probe
    reads twice the angle well (less than 10% gross errors) and the angle badly (more than 30%).
    """

    NUM_STEPS = 3000  # updates that fit the probe

    def __init__(self, splits: dict[str, video.Clips], num_episodes: int = 50,
                 device: torch.device | str = 'cpu'):
        """Take the poses to fit to and to measure on.

        Args:
          splits: 'train' and 'valid', with or without 'play' and 'play_valid'.
          num_episodes: to measure on, of each split; the probe is fitted on twice as many.
        """
        self._device, self._splits = torch.device(device), splits
        self._joints = splits['train'].meta['joints']
        self._poses = {}
        for name, clips in splits.items():
            num = num_episodes if name.endswith('valid') else 2 * num_episodes
            episodes = range(min(num, len(clips)))
            self._poses[name] = np.array([clips.episode(i)['qpos'] for i in episodes])
        fitted = np.concatenate([poses.reshape(-1, len(self._joints)) for name, poses
                                 in self._poses.items() if not name.endswith('valid')])
        self._scale = fitted.std(0) + 1e-6
        self._angles = [k for k, joint in enumerate(self._joints) if joint == 'hinge']
        self._lengths = [k for k, joint in enumerate(self._joints) if joint in ('slide', 'other')]

    def _vectors(self, qpos: np.ndarray, times: np.ndarray | int) -> np.ndarray:
        """Return `pose_vectors` of qpos (..., nq), lengths in standard deviations."""
        return pose_vectors(qpos, self._joints, self._scale, times)

    def _errors(self, vectors: np.ndarray, qpos: np.ndarray, times: np.ndarray | int
                ) -> np.ndarray:
        """Return the error of each joint, of vectors read out (..., n) against qpos (..., nq): rad,
        or standard deviations of a length."""
        num = len(self._angles)
        angles = np.arctan2(vectors[..., :num], vectors[..., num:2 * num])
        off = angles - qpos[..., self._angles] * times
        off = ((off + np.pi) % (2 * np.pi) - np.pi) / times
        lengths = vectors[..., 2 * num:] - (qpos / self._scale)[..., self._lengths]
        return np.abs(np.concatenate([off, lengths], axis=-1))

    @torch.no_grad()
    def _encode(self, encode, name: str) -> torch.Tensor:
        """Return codes (N, C, T+1, D); of the splits that the probe is fitted on, two contexts."""
        contexts = slice(None) if name.endswith('valid') else slice(2)
        return torch.stack([
            encode(torch.from_numpy(np.array(self._splits[name].frames(i)[contexts])).to(
                self._device)).float() for i in range(len(self._poses[name]))])

    def __call__(self, encode, dynamics=None, seed: int = 0) -> dict[str, float]:
        """Measure features; the names of those on play end in _play.

        Args:
          encode: uint8 (C, T+1, H, W, 3) -> (C, T+1, D).
          dynamics: `Dynamics` on these features, to be measured open loop.

        Returns:
          'agreement': the squared distance of one moment in two contexts over that of two random
            moments; 'rank': the Spearman correlation of squared distances of features and of poses;
          'probe', 'probe_gross': of the joint that is read worst, the median error and the share
            above 0.3 (rad, or standard deviations of a length);
          'open_loop': the median error for what `dynamics` predicts 10 steps ahead, beside
            'open_loop_still' for a pose that does not move.
        """
        rng, scores = np.random.default_rng(seed), {}
        codes = {name: self._encode(encode, name) for name in self._splits}
        poses = {name: np.repeat(qpos[:, None], codes[name].shape[1], axis=1)
                 for name, qpos in self._poses.items()}
        fitted = [name for name in codes if not name.endswith('valid')]
        read, times = self._fit(fitted, codes, poses, seed)
        for name in codes:
            if not name.endswith('valid'):
                continue
            suffix, z = name.removeprefix('valid').removesuffix('_valid'), codes[name]
            suffix = f'_{suffix}' if suffix else ''
            flat, qpos = z.flatten(0, 2).cpu().numpy(), poses[name].reshape(-1, len(self._joints))
            one, other = rng.integers(len(flat), size=(2, 20_000))
            apart = ((flat[one] - flat[other]) ** 2).sum(1)
            vectors = self._vectors(qpos, times)
            pose_apart = ((vectors[one] - vectors[other]) ** 2).sum(1)
            same_moment = (z - z.roll(1, 1)).square().sum(-1).mean()
            scores[f'agreement{suffix}'] = float(same_moment) / float(apart.mean())
            scores[f'rank{suffix}'] = float(scipy.stats.spearmanr(apart, pose_apart).statistic)
            errors = self._errors(read(z.flatten(0, 2)), qpos, times)
            scores[f'probe{suffix}'] = float(np.median(errors, axis=0).max())
            scores[f'probe_gross{suffix}'] = float((errors > 0.3).mean(0).max())
        if dynamics is not None and 'play_valid' in codes:
            scores |= self._open_loop(dynamics, read, times, codes['play_valid'],
                                      poses['play_valid'])
        return scores

    def _fit(self, names: list[str], codes: dict, poses: dict, seed: int):
        """Return a function that reads pose vectors (N, n) out of features (N, D), and for each
        angle 1, or 2 where twice the angle is read."""
        z = torch.cat([codes[name].flatten(0, 2) for name in names])
        qpos = np.concatenate([poses[name].reshape(-1, len(self._joints)) for name in names])
        truth = np.concatenate([self._vectors(qpos, times) for times in (1, 2)], axis=1)
        truth = torch.from_numpy(truth).float().to(z.device)
        mean, std = z.mean(0), z.std(0) + 1e-6
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = normed_mlp(z.shape[1], 256, truth.shape[1]).to(z.device)
            optimizer = torch.optim.Adam(net.parameters(), 1e-3)
            for step in range(self.NUM_STEPS):
                optimizer.param_groups[0]['lr'] = 1e-3 * (1 - step / self.NUM_STEPS)
                rows = torch.randint(len(z), (512,)).to(z.device)
                loss = F.mse_loss(net((z[rows] - mean) / std), truth[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        @torch.no_grad()
        def read_both(features: torch.Tensor) -> list[np.ndarray]:
            return np.split(net((features - mean) / std).cpu().numpy(), 2, axis=1)

        once, twice = ((self._errors(vectors, qpos, times) > 0.3).mean(0)[:len(self._angles)]
                       for times, vectors in enumerate(read_both(z), start=1))
        times = np.where((once > 0.3) & (twice < 0.1), 2, 1)
        doubled = np.concatenate([times == 2, times == 2, np.zeros(len(self._lengths), bool)])

        def read(features: torch.Tensor) -> np.ndarray:
            once, twice = read_both(features)
            return np.where(doubled, twice, once)
        return read, times

    @torch.no_grad()
    def _open_loop(self, dynamics, read, times: np.ndarray, codes: torch.Tensor, poses: np.ndarray,
                   num_steps: int = 10) -> dict[str, float]:
        """Predict from every tenth moment of play, in one context each; {} where clips are too
        short."""
        history = dynamics.HISTORY
        starts = range(0, codes.shape[2] - history - num_steps + 1, 10)
        if not starts:
            return {}
        actions = torch.tensor([self._splits['play_valid'].episode(i)['actions']
                                for i in range(len(codes))], device=codes.device)
        predicted, truth, before = [], [], []
        for start in starts:
            now = start + history - 1
            ahead = dynamics.rollout(codes[:, 0, start:now + 1], actions[:, now:now + num_steps])
            predicted.append(ahead[:, :, -1].mean(0))
            truth.append(poses[:, 0, now + num_steps])
            before.append(poses[:, 0, now])
        truth, before = np.concatenate(truth), np.concatenate(before)
        moved = self._errors(read(torch.cat(predicted)), truth, times)
        still = self._errors(self._vectors(before, times), truth, times)
        return {'open_loop': float(np.median(moved, axis=0).max()),
                'open_loop_still': float(np.median(still, axis=0).max())}


def measure_code(model: ContextTranslator, splits: dict[str, video.Clips], autocast
                 ) -> dict[str, float]:
    """Return the code's scores, see `PoseProbe`."""
    def encode(frames: torch.Tensor) -> torch.Tensor:
        with autocast:
            z = model.encode(frames)
        return model.code(z)
    device = next(model.parameters()).device
    model.eval()
    scores = PoseProbe(splits, device=device)(encode, model.code.dynamics)
    model.train()
    return scores
