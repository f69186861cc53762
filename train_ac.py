"""Train the imitator on translated videos: python train_ac.py task=reacher_hard

The loop is train.py's `Workspace`; here stands what it is given: demonstrations, the translator,
the imitation environment and the `ACAgent`.
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

import dmc
import utils
import video
from ac_agent import ACAgent
from ct_model import ContextTranslator, to_uint8
from train import Workspace, check_action_repeat, check_settings
from utils import UserError


class DemoTranslator:
    """A context translator at work on demonstrations: each is encoded once, when first needed.

    Features leave as linear discriminants: the directions in which demonstrations vary most for
    what translation gets wrong in them, each scaled to unit variance. What is left behind is noise
    to a distance; and neither reward nor agent depends on the scale at which a translator happened
    to settle.
    """

    def __init__(self, model: ContextTranslator, clips: video.Clips, z_dim: int,
                 basis: list | None = None):
        """
        Args:
          z_dim: how many discriminants.
          basis: another DemoTranslator's, in plain values, so that both give the same features and
            rewards: worked out anew, on another machine, they may point the other way.
        """
        self.model, self._clips, self._encoded = model, clips, {}
        self._device = next(model.parameters()).device
        self.z_dim = z_dim
        self.basis = mean, components, self.image_var = basis or self._find_basis()
        self._mean, self._components = (
            torch.tensor(part, dtype=torch.float64, device=self._device)
            for part in (mean, components))

    def _find_basis(self, num_episodes: int = 100) -> list:
        """-> mean (Z,), components (Z, z_dim), and how much pixels in [0, 1] vary in an episode."""
        truth, error, motion = [], [], []
        for i in range(min(len(self._clips), num_episodes)):
            z, own = self._features(i), i % self._clips.meta['num_contexts']
            frames = np.array(self._clips.frames(i)[own])
            z3 = self._translate(i, [c for c in range(len(z)) if c != own], frames[0])
            truth.append(z.flatten(0, 1))
            error.append(z3[0].mean(0) - z[own])
            motion.append(np.var(frames / 255.0, axis=0).mean())
        # In float64, which `precision` does not touch.
        truth, error = torch.cat(truth).double(), torch.cat(error).double()
        noise = error.T @ error / len(error)
        noise += 1e-3 * noise.trace() / len(noise) * torch.eye(len(noise)).to(noise)
        whiten = torch.linalg.inv(torch.linalg.cholesky(noise))
        _, directions = torch.linalg.eigh(whiten @ torch.cov(truth.T) @ whiten.T)
        components = whiten.T @ directions[:, -self.z_dim:]
        mean = truth.mean(0)
        components /= ((truth - mean) @ components).std(0)
        return [mean.tolist(), components.tolist(), float(np.mean(motion))]

    def _normalised(self, z: torch.Tensor) -> np.ndarray:
        return ((z.double() - self._mean) @ self._components).float().cpu().numpy()

    @torch.no_grad()
    def _features(self, i: int) -> torch.Tensor:
        """-> (C, T+1, Z), as the translator takes them."""
        if i not in self._encoded:
            frames = torch.from_numpy(np.array(self._clips.frames(i))).to(self._device)
            self._encoded[i] = self.model.encode(frames)
        return self._encoded[i]

    @torch.no_grad()
    def encode(self, frame: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> float32 (Z,)."""
        frames = torch.from_numpy(frame).to(self._device)[None]
        return self._normalised(self.model.encode(frames)[0])

    @torch.no_grad()
    def _translate(self, i: int, sources: list[int], first: np.ndarray) -> torch.Tensor:
        """-> (1, n, T+1, Z), what `decode` decodes."""
        z1 = self._features(i)[sources]                                        # (n, T+1, Z)
        self._context = self.model.context(torch.from_numpy(first).to(self._device)[None])
        # The n videos share the context: to the translator they are one clip of n (T+1) frames.
        self._z3 = self.model.translate(z1.flatten(0, 1)[None], self._context).unflatten(
            1, z1.shape[:2])
        return self._z3

    def translate(self, i: int, sources: list[int], first: np.ndarray) -> np.ndarray:
        """Demonstration i as it would go from `first` on: the mean over its source contexts.

        Args:
          first: uint8 (H, W, 3), the agent's first image.

        Returns: features float32 (T+1, z_dim).
        """
        return self._normalised(self._translate(i, sources, first)[0].mean(0))

    @torch.no_grad()
    def decode(self) -> np.ndarray:
        """The images of what was translated last, averaged: uint8 (T+1, H, W, 3)."""
        images = self.model.decode(self._z3.flatten(1, 2), self._context)[0]   # (n(T+1), 3, H, W)
        return to_uint8(images.unflatten(0, self._z3.shape[1:3]).mean(0)).cpu().numpy()


def act_as_often(cfg, source: str | Path, action_repeat: int):
    """Set action_repeat to that of the expert behind `source`.

    Raises: UserError where the settings say otherwise, or are for less than one action.
    """
    if cfg.action_repeat not in (None, action_repeat):
        raise UserError(f'the expert behind {source} repeats its actions {action_repeat} times, '
                        f'not {cfg.action_repeat}: leave action_repeat out.')
    cfg.action_repeat = action_repeat
    check_action_repeat(cfg)


def film_demonstrations(cfg, im_size: int):
    """Let the expert film what is to be imitated; it goes on where it was interrupted."""
    expert = utils.load_snapshot(cfg.expert, 'expert', cfg.task_name,
                                 remedy=f'python train.py task={cfg.task_name}')
    act_as_often(cfg, cfg.expert, expert['made_by']['env_args']['action_repeat'])
    command = [sys.executable, str(Path(__file__).parent / 'generate_expert_video.py'),
               f'task={cfg.task_name}', f'snapshot={cfg.expert}', f'out_dir={cfg.data_dir}',
               f'num_train={cfg.num_demos}', f'num_valid={cfg.num_eval_demos}',
               f'im_size={im_size}', f'seed={cfg.seed}']
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def report(workspace: Workspace, num_videos: int = 5) -> str:
    """Write report.md and demo.mp4 into the run's folder: what came of it, to read and to see."""
    result = workspace.last_eval
    clips = [[workspace.eval_env.panels(64) for _ in workspace.play(episode)]
             for episode in range(num_videos)]
    frames = [panels for clip in clips for panels in [*clip, *[clip[-1]] * 10]]
    path = workspace.work_dir / 'demo.mp4'
    video.save(path, video.panels_side_by_side(frames))
    span = result['expert_return'] - result['random_return']
    score = (result['task_return'] - result['random_return']) / span if span else float('nan')
    text = (f"| {workspace.cfg.task_name}, held-out episodes and contexts | |\n|---|---|\n"
            f"| return, random | {result['random_return']:.1f} |\n"
            f"| return, imitator | {result['task_return']:.1f} |\n"
            f"| return, expert | {result['expert_return']:.1f} |\n"
            f"| (imitator - random) / (expert - random) | {score:.2f} |\n"
            f"| PSNR of the translation | {result['psnr_translation']:.1f} dB |\n"
            f"| PSNR of copying the first frame | {result['psnr_copy_first']:.1f} dB |\n")
    with utils.atomic_write(workspace.work_dir / 'report.md') as tmp:
        tmp.write_text(text)
    return f'\n{text}\nvideo: {path}\ntable: {workspace.work_dir / "report.md"}'


def make_env(cfg, clips: video.Clips, translator: DemoTranslator, evaluate: bool) -> dmc.Imitation:
    meta = clips.meta
    env = dmc.ActionRepeat(dmc.load_suite(cfg.task_name, meta['scenery']), meta['action_repeat'])
    return dmc.Imitation(env, clips, translator, meta['im_size'], cfg.num_frames,
                         list(cfg.lookahead), cfg.time_power, cfg.w_feature, cfg.w_img, evaluate)


def make_workspace(cfg, work_dir: Path) -> Workspace:
    """The run, ready to be trained; its expert films demonstrations if there are none.

    Raises: UserError for bad settings, translator or demonstrations, before anything is trained.
    """
    check_settings(cfg)
    utils.require_at_least(cfg, 1, 'num_demos', 'num_eval_demos', 'num_frames', 'z_dim')
    if min(cfg.w_feature, cfg.w_img) < 0 or not cfg.w_feature + cfg.w_img:
        raise UserError('w_feature and w_img must not be negative, nor both 0: set w_feature=1.')
    if min(cfg.relabel, cfg.hindsight) < 0 or cfg.relabel + cfg.hindsight > 1:
        raise UserError(f'relabel={cfg.relabel} and hindsight={cfg.hindsight} are shares of one '
                        'batch: set them to 0 or more, and no more than 1 together.')
    if (cfg.relabel or cfg.hindsight) and cfg.nstep != 1:
        raise UserError(f'nstep={cfg.nstep} goes with the targets that were there: set nstep=1, or '
                        'relabel=0 hindsight=0 w_inverse=0.')
    if cfg.w_inverse < 0 or (cfg.w_inverse and round(cfg.hindsight * cfg.batch_size) < 1):
        raise UserError(f'w_inverse={cfg.w_inverse} must not be negative, and learns from the '
                        f'share hindsight={cfg.hindsight} of batch_size={cfg.batch_size}, which is '
                        'less than one: set w_inverse=0, or those higher.')
    if not cfg.lookahead or min(cfg.lookahead) < 1:
        raise UserError(f'lookahead={list(cfg.lookahead)} is no list of steps ahead: set '
                        'lookahead=[1,3,6,12].')
    if cfg.relabel and (cfg.w_img or cfg.lookahead[0] != 1):
        raise UserError(f'relabel={cfg.relabel} works out rewards from observations, which takes '
                        'w_img=0 and 1 as the first lookahead: set relabel=0.')
    utils.set_precision(cfg.precision)
    device = utils.pick_device(cfg.device)
    retrain = f'python train_ct.py task={cfg.task_name}'
    made = utils.load_snapshot(cfg.snapshot, 'translator', cfg.task_name, remedy=retrain)
    dmc.require_same_pictures(cfg.snapshot, made['made_by']['videos'],
                              made['made_by'].get('quality'), dmc.CONTEXT_QUALITY, retrain)
    model = ContextTranslator(**made['model_args'])
    model.load_state_dict(made['model'])
    model.to(device, utils.PRECISIONS[cfg.precision]).eval()
    if cfg.z_dim > model.z_dim:
        raise UserError(f'z_dim={cfg.z_dim} is more than the {model.z_dim} features of the '
                        f'translator: set z_dim={model.z_dim} or less.')
    root = Path(cfg.data_dir)
    if not video.is_whole(root / 'train') or not video.is_whole(root / 'valid'):
        film_demonstrations(cfg, model.im_size)
    train_clips, valid_clips = (
        video.Clips(root / split, cfg.task_name, model.im_size, max_clips=max_clips)
        for split, max_clips in (('train', cfg.num_demos), ('valid', cfg.num_eval_demos)))
    meta = train_clips.meta
    if meta['num_contexts'] < 2:
        raise UserError(f'{root} shows each episode in one context only; one more is needed for '
                        f'the agent: python generate_expert_video.py task={cfg.task_name} '
                        'num_contexts=4 out_dir=<another folder>.')
    act_as_often(cfg, root, meta['action_repeat'])
    for clips in (train_clips, valid_clips):
        dmc.require_same_videos(clips.root, clips.meta)
    basis = None
    if utils.newest_snapshot(work_dir / 'snapshot.pt'):
        basis = utils.load_snapshot(work_dir / 'snapshot.pt', 'imitator', cfg.task_name,
                                    remedy='start a new run')['made_by'].get('basis')
    translator = DemoTranslator(model, train_clips, cfg.z_dim, basis)
    train_env = make_env(cfg, train_clips, translator, evaluate=False)
    eval_env = make_env(cfg, valid_clips, DemoTranslator(model, valid_clips, cfg.z_dim,
                                                         translator.basis), evaluate=True)
    agent_args = dict(OmegaConf.to_container(cfg.agent, resolve=True),
                      obs_shape=list(train_env.observation_spec().shape),
                      action_dim=train_env.action_spec().shape[0])
    made_by = {'translator_sha256': utils.sha256(cfg.snapshot),
               'expert_sha256': meta['expert_sha256'], 'num_demos': len(train_clips),
               'w_img': cfg.w_img, 'basis': translator.basis}
    return Workspace(cfg, work_dir, 'imitator', train_env, eval_env, ACAgent, agent_args, made_by,
                     overlap=device.type == 'cpu')


@utils.main('train_ac')
def main(cfg):
    workspace = make_workspace(cfg, utils.work_dir())
    workspace.train()
    print(f'snapshot: {workspace.snapshot_path}\n{report(workspace)}')


if __name__ == '__main__':
    main()
