"""Train the context translator on videos: python train_ct.py task=reacher_hard [recipe=liu2017]

Supervised: clips of one episode in two contexts, of demonstrations and of play; see ct_model.py for
what is learnt. The translator comes first; the pose code is then fitted to its features, which stay
as they are and are worked out once. The folder of the run gets snapshot.pt, to resume from, and
best.pt, which is the one to use: the translator with the lowest loss on held-out episodes in
held-out contexts, with its code.
"""
import gc
import signal

if __name__ == '__main__':  # the imports below take seconds; settings.main turns both on again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy  # scipy.stats is loaded when it is first used
import torch
import torch.nn as nn
import torch.nn.functional as F
from omegaconf import OmegaConf

import dmc
import settings
import snapshots
import utils
import video
from ct_model import ContextTranslator, Dynamics, moving, normed_mlp, to_uint8
from logger import Logger
from utils import UserError


def check_settings(cfg):
    """Refuse settings with which there is no run (UserError)."""
    settings.check_settings(cfg, 'train_ct')
    for name, weights, others in (('weights', cfg.weights, 'foreground'),
                                  ('code.weights', cfg.code.weights, 'noise')):
        if not any(weight for loss, weight in weights.items() if loss != others):
            raise UserError(f'{name} are all 0: set {name}.trans=1.')


class PairSampler:
    """Draws source and target clips from a dataset; all its randomness is in `rng`."""

    def __init__(self, clips: video.Clips, pairs: str, frames_per_clip: int,
                 augment_mirror: bool, augment_colours: bool, seed: int):
        """Check that the dataset can give pairs of the kind `pairs`; else raise UserError."""
        num_contexts, num_frames = clips.meta['num_contexts'], clips.meta['episode_len'] + 1
        film = f"python generate_expert_video.py task={clips.meta['task']} "
        more_contexts, more = film + 'num_contexts=4', film + f"num_{clips.meta['split']}=100"
        if clips.imported:
            more_contexts = film + 'from_mp4=<folder of several contexts>'
            more = f'remove it and {film}from_mp4=<folder of more videos>'
        if pairs == 'same_episode' and num_contexts < 2:
            raise UserError(f'{clips.root} shows each episode in one context, and '
                            'pairs=same_episode takes two: set pairs=random, or remove it and '
                            f'{more_contexts}.')
        if pairs == 'random' and len(clips) < 2:
            raise UserError(f'{clips.root} holds one episode, and pairs=random takes two: '
                            f'{more}.')
        if frames_per_clip > num_frames:
            raise UserError(f'{clips.root} holds clips of {num_frames} frames: set '
                            f'frames_per_clip={num_frames} or less.')
        self._clips, self._pairs = clips, pairs
        self._augment_mirror, self._augment_colours = augment_mirror, augment_colours
        self._num_contexts, self._num_frames, self._probs = num_contexts, num_frames, {}
        self._frames_per_clip, self.rng = frames_per_clip, np.random.default_rng(seed)

    def draw(self) -> tuple[int, int, int, int, np.ndarray]:
        """Return source episode and context, target episode and context, frame numbers, sorted."""
        rng = self.rng
        if self._pairs == 'same_episode':
            episode = int(rng.integers(len(self._clips)))
            episodes = episode, episode
            contexts = rng.choice(self._num_contexts, 2, replace=False)
        else:
            episodes = rng.choice(len(self._clips), 2, replace=False)
            contexts = rng.integers(self._num_contexts, size=2)
        frames = np.sort(rng.choice(self._num_frames, self._frames_per_clip, replace=False,
                                    p=self._frame_probs(int(episodes[0]))))
        return episodes[0], contexts[0], episodes[1], contexts[1], frames

    def _frame_probs(self, i: int) -> np.ndarray:
        """Return the probability of drawing each frame of episode i: float64 (T+1,).

        Half of the probability is uniform, half in proportion to the change since the frame before.
        Experts soon stand where they want to be, and from then on all frames show the same.
        """
        if i not in self._probs:
            frames = self._clips.frames(i)[0].astype(np.int16)
            change = np.abs(np.diff(frames, axis=0, prepend=frames[:1])).mean((1, 2, 3)) + 1e-6
            self._probs[i] = 0.5 / len(change) + 0.5 * change / change.sum()
        return self._probs[i]

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        """Return source and target, uint8 (N, T, H, W, 3), the targets' first frames
        (N, H, W, 3)."""
        batch = [], [], []
        for _ in range(batch_size):
            i, source_context, j, target_context, frames = self.draw()
            target = self._clips.frames(j)[target_context]
            clip = np.concatenate([target[:1], target[frames]])
            source = self._clips.frames(i)[source_context][frames]
            if self._augment_mirror and self.rng.integers(2):
                source, clip = source[:, :, ::-1], clip[:, :, ::-1]
            if self._augment_colours:
                source, clip = self._recolour(source), self._recolour(clip)
            for part, values in zip(batch, (source, clip[1:], clip[0]), strict=True):
                part.append(values)
        return [torch.from_numpy(np.stack(part)) for part in batch]

    def _recolour(self, frames: np.ndarray) -> np.ndarray:
        """Colour channels in another order, each perhaps inverted, alike in the whole clip."""
        flip = 255 * self.rng.integers(2, size=3).astype(np.uint8)
        return frames[..., self.rng.permutation(3)] ^ flip


class FeatureWindows:
    """Windows of successive frames, as the features of a translator that stays as it is.

    Every frame of the train and play splits is encoded once.
    """

    def __init__(self, model: ContextTranslator, splits: dict[str, video.Clips], window: int,
                 autocast):
        self._window, self._features = window, {}
        device = next(model.parameters()).device
        for name in ('train', 'play'):
            z, z2 = [], []
            for i in range(len(splits[name])):
                frames = torch.from_numpy(np.array(splits[name].frames(i))).to(device)
                with torch.no_grad(), autocast:
                    z.append(model.encode(frames).float())
                    z2.append(model.context(frames[:, 0]).z2.float())
            self._features[name] = torch.stack(z), torch.stack(z2)    # (N, C, T+1, Z), (N, C, Z)
        actions = [splits['play'].episode(i)['actions'] for i in range(len(splits['play']))]
        self._actions = torch.tensor(actions, device=device)          # (N, T, A)

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z1 (N, C, T+1, Z) and z2 (N, C, Z) of all episodes."""
        return tuple(torch.cat(parts) for parts in zip(*self._features.values(), strict=True))

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        """Return what `PoseCode.losses` takes: half of the windows from demonstrations, half from
        play."""
        parts, actions = [], None
        for name, (z, z2) in self._features.items():
            num_episodes, num_contexts, num_frames = z.shape[:3]
            n = batch_size // 2
            i = torch.randint(num_episodes, (n,), device=z.device)
            source = torch.randint(num_contexts, (n,), device=z.device)
            target = torch.randint(1, num_contexts, (n,), device=z.device) + source
            target %= num_contexts
            start = torch.randint(num_frames - self._window + 1, (n, 1), device=z.device)
            steps = start + torch.arange(self._window, device=z.device)
            parts.append((z[i[:, None], source[:, None], steps],
                          z[i[:, None], target[:, None], steps], z2[i, target]))
            if name == 'play':
                actions = self._actions[i[:, None], steps[:, :-1]]
        return [torch.cat(part) for part in zip(*parts, strict=True)] + [actions]


class Evaluator:
    """Held-out clips, the same at every evaluation, and what can be said without a model."""

    def __init__(self, clips: video.Clips, train_clips: video.Clips, pairs: str, num_clips: int,
                 device: torch.device):
        num_clips, num_contexts = min(num_clips, len(clips)), clips.meta['num_contexts']
        self._device = device
        shift = int(pairs == 'random')
        self._source = self._load(clips.frames(i)[i % num_contexts] for i in range(num_clips))
        self._target = self._load(clips.frames((i + shift) % num_clips)[(i + 1) % num_contexts]
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


def update(loss: torch.Tensor, module: nn.Module, optimizer, lr: float, max_grad_norm: float):
    """Take one step of Adam, its gradient's norm clipped."""
    for group in optimizer.param_groups:
        group['lr'] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    # Batches differ: without this, one that is far off can undo all before it.
    nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    optimizer.step()


def open_splits(cfg) -> dict[str, video.Clips]:
    """Return the dataset's splits; those of play if play_share is above 0 or a code is learned.

    Raises: UserError where one is missing, or drawn otherwise than pictures are here.
    """
    root, splits = Path(cfg.data_dir), ['train', 'valid']
    if cfg.play_share or cfg.model.code_dim:
        splits += ['play', 'play_valid']
    clips = {}
    for name in splits:
        clips[name] = video.Clips(root / name, cfg.task_name,
                                  clips['train'].meta['im_size'] if clips else None,
                                  dmc.CONTEXT_QUALITY)
        if cfg.model.code_dim and clips[name].imported:
            raise UserError(f'{clips[name].root} holds your own videos, and a code is judged with '
                            'poses, which they lack: train on videos of an expert, python '
                            f'generate_expert_video.py task={cfg.task_name} '
                            'out_dir=<another folder>.')
        here, train = ({key: clips[split].meta.get(key) for key in (
            'num_contexts', 'episode_len', 'action_repeat')} for split in (name, 'train'))
        made_of = 'from_mp4' if clips['train'].imported else 'expert'
        snapshots.require_same(clips[name].root, here, train,
                               'remove it and python generate_expert_video.py '
                               f'task={cfg.task_name} out_dir={root}, with the options and the '
                               f'{made_of} of its neighbour train')
    if cfg.model.code_dim and clips['train'].meta['num_contexts'] < 2:
        raise UserError(f'{root} shows each episode in one context, and a pose code takes two: '
                        f'python generate_expert_video.py task={cfg.task_name} num_contexts=4 '
                        'out_dir=<another folder>, or set recipe=liu2017.')
    num_frames = clips['train'].meta['episode_len'] + 1
    if cfg.model.code_dim and cfg.code.window > num_frames:
        raise UserError(f'{root} holds clips of {num_frames} frames, fewer than code.window='
                        f'{cfg.code.window}: set it lower, but above {Dynamics.HISTORY}, or film '
                        'longer episodes.')
    return clips


class Run:
    """A run in its folder, which goes on from its last snapshot where there is one.

    Raises: UserError for bad settings or data, before anything is written.
    """

    def __init__(self, cfg, work_dir: Path):
        check_settings(cfg)
        self.cfg, self.work_dir, self.stop = cfg, work_dir, utils.Stop()
        utils.set_precision(cfg.precision)
        self.device = utils.pick_device(cfg.device)
        self.splits = splits = open_splits(cfg)
        clips = splits['train']
        self.num_pairs = {'play': round(cfg.play_share * cfg.batch_size)}
        self.num_pairs['train'] = cfg.batch_size - self.num_pairs['play']
        self.samplers = {name: PairSampler(splits[name], cfg.pairs, cfg.frames_per_clip,
                                           cfg.augment_mirror, cfg.augment_colours, cfg.seed)
                         for name in ('train', 'play') if self.num_pairs[name]}
        utils.prepare_cpu()
        utils.set_seed_everywhere(cfg.seed)
        model_args = {**OmegaConf.to_container(cfg.model), 'im_size': clips.meta['im_size']}
        if cfg.model.code_dim:
            model_args['action_dim'] = len(splits['play'].episode(0)['actions'][0])
        self.model = model = ContextTranslator(**model_args).to(self.device)
        self.evaluator = Evaluator(splits['valid'], clips, cfg.pairs, cfg.num_eval_clips,
                                   self.device)
        self.optimizers = {'translator': torch.optim.Adam(model.image_parameters(), fused=True)}
        self.num_steps = cfg.num_train_steps
        if model.code:
            self.optimizers['code'] = torch.optim.Adam(model.code.parameters(), fused=True)
            self.num_steps += cfg.code.num_steps
        self.autocast = torch.autocast(self.device.type, torch.bfloat16,
                                       enabled=cfg.precision == 'bf16')
        made_by = {'weights': OmegaConf.to_container(cfg.weights),
                   'code': OmegaConf.to_container(cfg.code) if model.code else None,
                   'expert_sha256': clips.meta['expert_sha256'],
                   'num_clips': len(clips), 'num_play': len(splits.get('play', ())),
                   'videos': clips.meta['versions'],  # the packages that drew them
                   'quality': clips.meta['quality'],
                   **{key: cfg[key] for key in (
                       'seed', 'recipe', 'pairs', 'num_train_steps', 'batch_size',
                       'frames_per_clip', 'play_share', 'augment_mirror', 'augment_colours',
                       'precision', 'lr', 'max_grad_norm')}}
        self.made = {'model_args': model_args, 'made_by': made_by}
        self.path, self.best_path = work_dir / 'snapshot.pt', work_dir / 'best.pt'
        self.step, self.best, self.scores, elapsed = 0, float('inf'), {}, 0.0
        if last := snapshots.load_last(work_dir, 'translator', cfg.task_name):
            with snapshots.must_fit(self.path, 'start a new run'):
                snapshots.require_same_run(work_dir, last, {**model_args, **made_by})
                model.load_state_dict(last['model'])
                for name, optimizer in self.optimizers.items():
                    optimizer.load_state_dict(last['optimizers'][name])
                for name, sampler in self.samplers.items():
                    sampler.rng.bit_generator.state = last['samplers'][name]
                self.step, self.best, self.scores = last['step'], last['best'], last['scores']
                elapsed = last['elapsed']
                utils.set_rng_states(last['rng'])
        if self.step < self.num_steps:
            size = snapshots.num_bytes(model.state_dict())
            utils.check_disk(work_dir, snapshots.snapshot_space(self.best_path, size)
                             + snapshots.snapshot_space(self.path, 3 * size),  # and Adam's moments
                             'what the run saves', 'make room, or set hydra.run.dir elsewhere')
        snapshots.keep_config(cfg)
        self.timer = utils.Timer(elapsed)
        self.logger = Logger(work_dir, self.num_steps, 'step', self.step, cfg.use_tb,
                             OmegaConf.to_container(cfg, resolve=True))

    def train_translator(self):
        cfg = self.cfg
        while self.step < cfg.num_train_steps:
            # draw pairs of clips, of demonstrations and of play
            pairs = [sampler.sample(self.num_pairs[name])
                     for name, sampler in self.samplers.items()]
            batch = [torch.cat(part).to(self.device, non_blocking=True)
                     for part in zip(*pairs, strict=True)]
            with self.autocast:
                loss, metrics = self.model.losses(*batch, **cfg.weights)
            update(loss, self.model, self.optimizers['translator'],
                   utils.schedule(cfg.lr, self.step), cfg.max_grad_norm)
            self.end_step(metrics, cfg.num_train_steps, self.evaluate, cfg.eval_every)

    def evaluate(self) -> dict[str, float]:
        scores, images = self.evaluator(self.model, self.cfg.weights.foreground, self.autocast)
        film = self.evaluator.film(images, self.cfg.num_eval_videos)
        video.save(self.work_dir / f'eval_video/{self.step}.mp4', film)
        self.logger.log_film(film, self.step)
        return scores

    def fit_code(self):
        """Fit the code to the features of the best translator."""
        cfg, model, begins = self.cfg, self.model, self.step == self.cfg.num_train_steps
        if begins:
            best = snapshots.load_snapshot(self.best_path, 'translator', cfg.task_name)['model']
            # Without a code's weights, which it has if the run was killed after the code's last
            # step, before a snapshot.
            model.load_state_dict({name: value for name, value in best.items()
                                   if not name.startswith('code.')}, strict=False)
        with self.stop.at_once():
            windows = FeatureWindows(model, self.splits, cfg.code.window, self.autocast)
            if begins:
                model.code.fit_scales(*windows.all())
        while self.step < self.num_steps:
            loss, metrics = model.code.losses(*windows.sample(cfg.code.batch_size),
                                              **cfg.code.weights)
            update(loss, model.code, self.optimizers['code'],
                   utils.schedule(cfg.code.lr, self.step - cfg.num_train_steps), cfg.max_grad_norm)
            self.end_step({f'code_{name}': value for name, value in metrics.items()},
                          self.num_steps,
                          lambda: self.scores | measure_code(model, self.splits, self.autocast))

    def end_step(self, metrics: dict, end: int, evaluate: Callable, evaluate_every: int = 0):
        """Count and log a step; evaluate and save when due, and at step `end`."""
        self.step += 1
        self.logger.log_metrics(metrics, self.step)
        at_end = self.step == end
        snapshot_now = at_end or self.step % self.cfg.snapshot_every == 0 or bool(self.stop.asked)
        # with each snapshot too: means over steps before and after it would not survive a kill
        if snapshot_now or self.step % self.cfg.log_every == 0:
            self.logger.log_metrics({'total_time': self.timer.total()}, self.step)
            self.logger.dump(self.step)
        if at_end or evaluate_every and self.step % evaluate_every == 0:
            # where a stop is asked for, it comes after the evaluation and the snapshot
            with contextlib.nullcontext() if self.stop.asked else self.stop.at_once():
                scores = evaluate()
            self.logger.log_metrics({**scores, **self.evaluator.baselines}, self.step, 'eval')
            self.logger.dump(self.step, 'eval')
            if scores['trans'] <= self.best:  # equal after the code, which changes no picture
                self.best, self.scores = scores['trans'], scores
                self.save(self.best_path)
        if snapshot_now:
            self.save(self.path, best=self.best, elapsed=self.timer.total(),
                      optimizers={key: adam.state_dict() for key, adam in self.optimizers.items()},
                      samplers={key: each.rng.bit_generator.state
                                for key, each in self.samplers.items()},
                      rng=utils.get_rng_states())
            self.stop.raise_if_asked()

    def save(self, path: Path, **to_resume):
        snapshots.save_snapshot(path, 'translator', self.cfg.task_name, {
            **self.made, 'model': self.model.state_dict(), 'step': self.step,
            'scores': self.scores, **to_resume})


def train(cfg, work_dir: Path):
    """Train the translator, then the code.

    Ctrl-C and SIGTERM end the run after the current step, and its evaluation where one is due, with
    a snapshot. While it encodes videos or evaluates they end it at once, and the next start goes on
    from the last snapshot.

    Raises: utils.Interrupted then; UserError, see `Run`.
    """
    run = Run(cfg, work_dir)
    with run.stop:
        run.train_translator()
        if run.step < run.num_steps:
            run.fit_code()
    run.logger.close()


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


@settings.main('train_ct', dmc.task_names(), check_settings)
def main(cfg):
    work_dir = utils.work_dir()
    with snapshots.only_one_at_work(work_dir):
        train(cfg, work_dir)
    print(f'snapshot: {work_dir / "best.pt"}\n'
          f'next: python train_ac.py task={cfg.task_name} '
          f"{utils.typed_path('snapshot', work_dir / 'best.pt')} "
          f"{utils.typed_path('data_dir', cfg.data_dir)}"
          f"{' recipe=liu2017' if cfg.model.code_dim is None else ''}")


if __name__ == '__main__':
    main()
