"""Train the context translator on demonstration videos: python train_ct.py task=reacher_hard

Supervised: clips of one episode in two contexts; see ct_model.py for what is learnt. The folder of
the run gets snapshot.pt, to resume from, and best.pt, the one with the lowest translation loss on
held-out episodes in held-out contexts: that is the one to use.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from omegaconf import OmegaConf

import dmc
import utils
import video
from ct_model import ContextTranslator, moving, to_uint8
from logger import Logger
from utils import UserError


class PairSampler:
    """Draws source and target clips from a dataset; all its randomness is in `rng`."""

    def __init__(self, clips: video.Clips, pairs: str, frames_per_clip: int,
                 augment_mirror: bool, augment_colours: bool, seed: int):
        """Raises: UserError where the dataset cannot give such pairs."""
        num_contexts, num_frames = clips.meta['num_contexts'], clips.meta['episode_len'] + 1
        command = f"python generate_expert_video.py task={clips.meta['task']}"
        if pairs not in ('same_episode', 'random'):
            raise UserError(f'pairs={pairs} is neither same_episode nor random: '
                            'set pairs=same_episode.')
        if pairs == 'same_episode' and num_contexts < 2:
            raise UserError(f'{clips.root} shows each episode in one context, and '
                            f'pairs=same_episode takes two: remove it and {command} '
                            'num_contexts=4, or set pairs=random.')
        if pairs == 'random' and len(clips) < 2:
            raise UserError(f'{clips.root} holds one episode, and pairs=random takes two: '
                            f"{command} num_{clips.meta['split']}=100.")
        if frames_per_clip > num_frames:
            raise UserError(f'{clips.root} holds clips of {num_frames} frames: set '
                            f'frames_per_clip={num_frames} or less.')
        self._clips, self._pairs = clips, pairs
        self._augment_mirror, self._augment_colours = augment_mirror, augment_colours
        self._num_contexts, self._num_frames, self._moves = num_contexts, num_frames, {}
        self._frames_per_clip, self.rng = frames_per_clip, np.random.default_rng(seed)

    def draw(self) -> tuple[int, int, int, int, np.ndarray]:
        """-> source episode and context, target episode and context, frame numbers, sorted."""
        rng = self.rng
        if self._pairs == 'same_episode':
            episode = int(rng.integers(len(self._clips)))
            episodes = episode, episode
            contexts = rng.choice(self._num_contexts, 2, replace=False)
        else:
            episodes = rng.choice(len(self._clips), 2, replace=False)
            contexts = rng.integers(self._num_contexts, size=2)
        frames = np.sort(rng.choice(self._num_frames, self._frames_per_clip, replace=False,
                                    p=self._how_much_moves(int(episodes[0]))))
        return episodes[0], contexts[0], episodes[1], contexts[1], frames

    def _how_much_moves(self, i: int) -> np.ndarray:
        """Of which frames episode i is to be learnt from: float64 (T+1,), which sum to 1.

        Half goes to all frames alike, half to those that differ from the one before. Experts soon
        stand where they want to be, and from then on every frame says the same.
        """
        if i not in self._moves:
            frames = self._clips.frames(i)[0].astype(np.int16)
            change = np.abs(np.diff(frames, axis=0, prepend=frames[:1])).mean((1, 2, 3)) + 1e-6
            self._moves[i] = 0.5 / len(change) + 0.5 * change / change.sum()
        return self._moves[i]

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        """-> source and target, uint8 (N, T, H, W, 3), the targets' first frames (N, H, W, 3)."""
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


class Examination:
    """Held-out clips, the same at every examination, and what can be said without a model."""

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
        return {f'psnr{suffix}': psnr(error),
                f'psnr_moving{suffix}': psnr(error[moved.flatten(0, 1)]),
                f'ssim{suffix}': float(maps.mean()),
                f'ssim_moving{suffix}': float(maps[moved[..., 3:-3, 3:-3].flatten(0, 1)].mean())}

    @torch.no_grad()
    def __call__(self, model: ContextTranslator, foreground: float, autocast
                 ) -> tuple[dict[str, float], torch.Tensor]:
        """-> metrics, and the predicted clips, uint8 (N, T, H, W, 3).

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
        """The first clips one after another: source, prediction and truth side by side."""
        clips = [part[:num_clips].flatten(0, 1).cpu().numpy()
                 for part in (self._source, images, self._target)]
        return video.side_by_side(clips, ['source', 'prediction', 'truth'])


def psnr(error: torch.Tensor) -> float:
    """Squared errors of pixels in [0, 1], pooled -> dB; nan where there are none."""
    return float(-10 * error.mean().clamp(min=1e-10).log10())


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


def update(model: ContextTranslator, optimizer, batch: list[torch.Tensor], autocast, cfg
           ) -> dict[str, torch.Tensor]:
    """One step on a batch of `PairSampler` -> its losses."""
    with autocast:
        loss, metrics = model.losses(*batch, **cfg.weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    # Batches differ: without this, one that is far off can undo all before it.
    nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    optimizer.step()
    return metrics


def train(cfg, work_dir: Path):
    """The whole run, from its last snapshot on where there is one.

    Raises: UserError for bad settings or data, before anything is written.
    """
    utils.require_at_least(cfg, 0, 'seed')
    utils.require_at_least(cfg, 1, 'num_train_steps', 'batch_size', 'frames_per_clip', 'log_every',
                           'eval_every', 'snapshot_every', 'num_eval_clips')
    utils.set_precision(cfg.precision)
    weights = OmegaConf.to_container(cfg.weights)
    if not 0 <= weights['foreground'] <= 1:
        raise UserError(f"weights.foreground={weights['foreground']} is no share: set it in [0,1].")
    losses = [weights[name] for name in ('trans', 'rec', 'align')]
    if min(losses) < 0 or not any(losses):
        raise UserError('weights of trans, rec and align must be positive, or 0 to leave one out, '
                        'but not all 0: set weights.trans=1.')
    device = utils.pick_device(cfg.device)
    root = Path(cfg.data_dir)
    clips = video.Clips(root / 'train', cfg.task_name)
    sampler = PairSampler(clips, cfg.pairs, cfg.frames_per_clip, cfg.augment_mirror,
                          cfg.augment_colours, cfg.seed)
    utils.prepare_cpu()
    utils.set_seed_everywhere(cfg.seed)
    model_args = {**OmegaConf.to_container(cfg.model), 'im_size': clips.meta['im_size']}
    model = ContextTranslator(**model_args).to(device)
    valid_clips = video.Clips(root / 'valid', cfg.task_name, model.im_size)
    for each in (clips, valid_clips):
        dmc.require_same_videos(each.root, each.meta)
    examination = Examination(valid_clips, clips, cfg.pairs, cfg.num_eval_clips, device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == 'bf16')

    made_by = {'weights': weights, 'expert_sha256': clips.meta['expert_sha256'],
               'num_clips': len(clips), 'videos': clips.meta['versions'],
               'quality': clips.meta['quality'],
               **{key: cfg[key] for key in ('seed', 'pairs', 'batch_size', 'frames_per_clip',
                                            'augment_mirror', 'augment_colours', 'precision')}}
    path, best_path = work_dir / 'snapshot.pt', work_dir / 'best.pt'
    step, best, elapsed = 0, float('inf'), 0.0
    if utils.newest_snapshot(path):
        state = utils.load_snapshot(path, 'translator', cfg.task_name, remedy='start a new run')
        utils.check_same_run(work_dir, {**state['model_args'], **state['made_by']},
                             {**model_args, **made_by})
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        sampler.rng.bit_generator.state = state['sampler']
        step, best, elapsed = state['step'], state['best'], state['elapsed']
        utils.set_rng_states(state['rng'])
    timer = utils.Timer(elapsed)
    logger = Logger(work_dir, cfg.num_train_steps, 'step', step, cfg.use_tb)
    made = {'model_args': model_args, 'made_by': made_by}

    while step < cfg.num_train_steps:
        # draw pairs of clips
        batch = [part.to(device, non_blocking=True) for part in sampler.sample(cfg.batch_size)]
        # one step of Adam
        for group in optimizer.param_groups:
            group['lr'] = utils.schedule(cfg.lr, step)
        metrics = update(model, optimizer, batch, autocast, cfg)
        step += 1
        logger.log_metrics(metrics, step)

        last = step == cfg.num_train_steps
        snapshot_now = last or step % cfg.snapshot_every == 0
        # with each snapshot too: means over steps before and after it would not survive a kill
        if snapshot_now or step % cfg.log_every == 0:
            logger.log_metrics({'total_time': timer.total()}, step)
            logger.dump(step)
        if last or step % cfg.eval_every == 0:
            scores, images = examination(model, weights['foreground'], autocast)
            logger.log_metrics({**scores, **examination.baselines}, step, 'eval')
            logger.dump(step, 'eval')
            video.save(work_dir / f'eval_video/{step}.mp4',
                       examination.film(images, cfg.num_eval_videos))
            if scores['trans'] < best:
                best = scores['trans']
                utils.save_snapshot(best_path, 'translator', cfg.task_name, {
                    **made, 'model': model.state_dict(), 'step': step, 'scores': scores})
        if snapshot_now:
            utils.save_snapshot(path, 'translator', cfg.task_name, {
                **made, 'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                'sampler': sampler.rng.bit_generator.state, 'step': step, 'best': best,
                'elapsed': timer.total(), 'rng': utils.get_rng_states()})
    logger.close()


@utils.main('train_ct')
def main(cfg):
    work_dir = utils.work_dir()
    train(cfg, work_dir)
    print(f'snapshot: {work_dir / "best.pt"}\n'
          f'next: python utils.py slim {work_dir / "best.pt"} ct/{cfg.task_name}.pt && '
          f'python train_ac.py task={cfg.task_name} data_dir={cfg.data_dir}')


if __name__ == '__main__':
    main()
