"""Train the context translator on videos: python train_ct.py task=reacher_hard [recipe=liu2017]

Supervised: clips of one episode in two contexts, of demonstrations and of play; see ct_model.py for
what is learnt. The translator comes first; the pose code is then fitted to its features, which stay
as they are and are worked out once. The folder of the run gets snapshot.pt, to resume from, and
best.pt, which is the one to use: the translator with the lowest loss on held-out episodes in
held-out contexts, with its code.
"""
import gc
import signal

if __name__ == '__main__':  # imports take seconds; command_line.main turns both on again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from omegaconf import OmegaConf

import command_line
import dmc
import settings
import snapshots
import utils
import video
from ct_model import ContextTranslator
from logger import Logger
from probe import Evaluator, measure_code
from utils import UserError

LOG_EVERY = 50                           # steps
NUM_EVAL_CLIPS, NUM_EVAL_VIDEOS = 16, 4  # held-out episodes that are measured, and filmed
MAX_GRAD_NORM = 1.0
WINDOW, NUM_WINDOWS = 8, 64              # frames in a window of the pose code, windows in a batch


def check_settings(cfg):
    """Refuse settings with which there is no run (UserError)."""
    settings.check_settings(cfg, 'train_ct')
    for name, weights, others in (('weights', cfg.weights, 'foreground'),
                                  ('code.weights', cfg.code.weights, 'noise')):
        if not any(weight for loss, weight in weights.items() if loss != others):
            raise UserError(f'{name} are all 0: set {name}.trans=1.')


class PairSampler:
    """Draws source and target clips from a dataset; all its randomness is in `rng`."""

    def __init__(self, clips: video.Clips, frames_per_clip: int, augment_mirror: bool, seed: int):
        """Refuse a dataset that has no such pairs (UserError)."""
        num_contexts, num_frames = clips.meta['num_contexts'], clips.meta['episode_len'] + 1
        if num_contexts < 2:
            option = 'from_mp4=<folder of several contexts>' if clips.imported else 'num_contexts=4'
            raise UserError(f'{clips.root} shows each episode in one context, and a pair takes '
                            'two: remove it and python generate_expert_video.py '
                            f"task={clips.meta['task']} {option}.")
        if frames_per_clip > num_frames:
            raise UserError(f'{clips.root} holds clips of {num_frames} frames: set '
                            f'frames_per_clip={num_frames} or less.')
        self._clips, self._augment_mirror = clips, augment_mirror
        self._num_contexts, self._num_frames, self._probs = num_contexts, num_frames, {}
        self._frames_per_clip, self.rng = frames_per_clip, np.random.default_rng(seed)

    def draw(self) -> tuple[int, int, int, np.ndarray]:
        """Return episode, context of the source, context of the target, frame numbers, sorted."""
        episode = int(self.rng.integers(len(self._clips)))
        source, target = self.rng.choice(self._num_contexts, 2, replace=False)
        frames = np.sort(self.rng.choice(self._num_frames, self._frames_per_clip, replace=False,
                                         p=self._frame_probs(episode)))
        return episode, source, target, frames

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
            i, source_context, target_context, frames = self.draw()
            target = self._clips.frames(i)[target_context]
            clip = np.concatenate([target[:1], target[frames]])
            source = self._clips.frames(i)[source_context][frames]
            if self._augment_mirror and self.rng.integers(2):
                source, clip = source[:, :, ::-1], clip[:, :, ::-1]
            for part, values in zip(batch, (source, clip[1:], clip[0]), strict=True):
                part.append(values)
        return [torch.from_numpy(np.stack(part)) for part in batch]


class FeatureWindows:
    """Windows of successive frames, as the features of a translator that stays as it is.

    Every frame of the train and play splits is encoded once.
    """

    def __init__(self, model: ContextTranslator, splits: dict[str, video.Clips], autocast):
        self._features = {}
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
            start = torch.randint(num_frames - WINDOW + 1, (n, 1), device=z.device)
            steps = start + torch.arange(WINDOW, device=z.device)
            parts.append((z[i[:, None], source[:, None], steps],
                          z[i[:, None], target[:, None], steps], z2[i, target]))
            if name == 'play':
                actions = self._actions[i[:, None], steps[:, :-1]]
        return [torch.cat(part) for part in zip(*parts, strict=True)] + [actions]


def update(loss: torch.Tensor, module: nn.Module, optimizer, lr: float):
    """Take one step of Adam, its gradient's norm clipped."""
    for group in optimizer.param_groups:
        group['lr'] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    # Batches differ: without this, one that is far off can undo all before it.
    nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
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
    if cfg.model.code_dim and num_frames < WINDOW:
        raise UserError(f'{root} holds clips of {num_frames} frames, and a pose code takes '
                        f'{WINDOW}: python generate_expert_video.py task={cfg.task_name} '
                        f'episode_len={WINDOW - 1} out_dir=<another folder>, or more.')
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
        self.samplers = {name: PairSampler(splits[name], cfg.frames_per_clip, cfg.augment_mirror,
                                           cfg.seed)
                         for name in ('train', 'play') if self.num_pairs[name]}
        utils.prepare_cpu()
        utils.set_seed_everywhere(cfg.seed)
        model_args = {**OmegaConf.to_container(cfg.model), 'im_size': clips.meta['im_size']}
        if cfg.model.code_dim:
            model_args['action_dim'] = len(splits['play'].episode(0)['actions'][0])
        self.model = model = ContextTranslator(**model_args).to(self.device)
        self.evaluator = Evaluator(splits['valid'], clips, NUM_EVAL_CLIPS, self.device)
        self.optimizers = {'translator': torch.optim.Adam(model.image_parameters(), fused=True)}
        self.num_steps = cfg.num_train_steps
        if model.code:
            self.optimizers['code'] = torch.optim.Adam(model.code.parameters(), fused=True)
            self.num_steps += cfg.code.num_steps
        self.autocast = torch.autocast(self.device.type, torch.bfloat16,
                                       enabled=cfg.precision == 'bf16')
        made_by = {'weights': OmegaConf.to_container(cfg.weights),
                   'code': OmegaConf.to_container(cfg.code) | {
                       'window': WINDOW, 'batch_size': NUM_WINDOWS} if model.code else None,
                   'expert_sha256': clips.meta['expert_sha256'],
                   'num_clips': len(clips), 'num_play': len(splits.get('play', ())),
                   'videos': clips.meta['versions'],  # the packages that drew them
                   'quality': clips.meta['quality'],
                   'max_grad_norm': MAX_GRAD_NORM,
                   **{key: cfg[key] for key in (
                       'seed', 'recipe', 'num_train_steps', 'batch_size', 'frames_per_clip',
                       'play_share', 'augment_mirror', 'precision', 'lr')}}
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
                   utils.schedule(cfg.lr, self.step))
            self.end_step(metrics, cfg.num_train_steps, self.evaluate, cfg.eval_every)

    def evaluate(self) -> dict[str, float]:
        scores, images = self.evaluator(self.model, self.cfg.weights.foreground, self.autocast)
        film = self.evaluator.film(images, NUM_EVAL_VIDEOS)
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
            windows = FeatureWindows(model, self.splits, self.autocast)
            if begins:
                model.code.fit_scales(*windows.all())
        while self.step < self.num_steps:
            loss, metrics = model.code.losses(*windows.sample(NUM_WINDOWS), **cfg.code.weights)
            update(loss, model.code, self.optimizers['code'],
                   utils.schedule(cfg.code.lr, self.step - cfg.num_train_steps))
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
        if snapshot_now or self.step % LOG_EVERY == 0:
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


@command_line.main('train_ct', dmc.task_names(), check_settings)
def main(cfg):
    work_dir = utils.work_dir()
    with snapshots.only_one_at_work(work_dir):
        train(cfg, work_dir)
    print(f'snapshot: {work_dir / "best.pt"}\n'
          f'next: python train_ac.py task={cfg.task_name} '
          f"{utils.typed_path('translator', work_dir / 'best.pt')} "
          f"{utils.typed_path('data_dir', cfg.data_dir)}"
          f"{' recipe=liu2017' if cfg.model.code_dim is None else ''}")


if __name__ == '__main__':
    main()
