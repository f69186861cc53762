"""Train an imitator that differs from train_ac.py's in one thing: python benchmarks/oracles.py
{pose,end,none,unconditioned} task=..., with train_ac.py's options.

pose: the true pose stands in for the code. It needs no pictures, so no video is filmed and no
  translator is read: demonstrations and play are played anew, from the episodes' usual seeds.
end: of a demonstration the agent sees the end alone.
none: it sees nothing of the demonstration.
unconditioned: the discriminator does not see targets.

The run's snapshot says which of these made it, and nothing takes it for an imitator's.
"""
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dmc

# isort: split
import ac_agent
import imitation
import snapshots
import train_ac
import utils
from ac_agent import ACAgent, Discriminator
from contexts import Scenery
from generate_expert_video import RandomPlay, draw_episode, film, load_expert
from imitation import HISTORY, LOOKAHEAD, Demonstrations, Guide, Imitation, Play, Translation
from logger import Progress
from probe import pose_vectors
from train import Loop, Workspace, agent_args, check_length

EPISODE_LEN = 50  # agent steps


class EndGuide(Guide):
    """Shows the end of a demonstration in place of every target."""

    def targets(self, i, steps):
        return self.demos[i, -1:].expand(-1, len(LOOKAHEAD) + 1, -1)


class NoGuide(Guide):
    """Shows the nearest moment itself in place of every target."""

    def targets(self, i, steps):
        return self.demos[i, steps.clamp(0, self.demos.shape[1] - 1)][:, None].expand(
            -1, len(LOOKAHEAD) + 1, -1)

    def shown(self, i, history):
        return history[:, :1].expand(-1, len(LOOKAHEAD) + 1, -1)


class UnconditionedDiscriminator(Discriminator):
    """Sees codes without targets."""

    def _blank(self, obs):
        codes = obs[:, :HISTORY * self._layout.code_dim]
        return torch.nn.functional.pad(codes, (0, self._layout.num_seen - codes.shape[1]))

    def _demonstrated(self, batch_size):
        return self._blank(super()._demonstrated(batch_size))

    def fit(self, obs):
        return super().fit(self._blank(obs))

    def reward(self, obs):
        return super().reward(self._blank(obs))


class Poses:
    """Stands in for `video.Clips`: episodes of poses, without pictures."""

    imported = False

    def __init__(self, agent, env, split: str, seed: int, num: int):
        """Play `num` episodes of a split with the expert, or at random if `agent` is None."""
        scenery = OmegaConf.load(ROOT / 'cfgs/generate_expert_video.yaml').scenery
        self._episodes, progress = [], Progress(num, 'episode')
        for i in range(num):
            episode_seed, _ = draw_episode(seed, split, i, 1, Scenery(scenery))
            actor = agent or RandomPlay(episode_seed, env.action_spec().shape)
            _, happened = film(env, actor, [], EPISODE_LEN, episode_seed, [])
            self._episodes.append({
                'episode_seed': episode_seed, 'contexts': [[], []], **happened,
                'expert_return': sum(happened['rewards'])})
            progress.show(i + 1)
        progress.close()

    def __len__(self) -> int:
        return len(self._episodes)

    def episode(self, i: int) -> dict:
        return self._episodes[i]

    def frames(self, i: int) -> np.ndarray:
        return np.zeros((2, EPISODE_LEN + 1, 8, 8, 3), np.uint8)

    def array(self, key: str) -> np.ndarray:
        """Return what is known of all episodes, such as 'qpos', float64 (N, ...)."""
        return np.array([episode[key] for episode in self._episodes])


class PoseDemonstrations(Demonstrations):
    """Demonstrations whose features are the pose: sine and cosine of angles, and lengths, of zero
    mean and unit variance over demonstrations and play.

    `pose` is the physical pose, float64 (nq,), of the frame that `encode` is asked for next.
    """

    def __init__(self, clips: Poses, joints: list[str], scale: tuple[np.ndarray, np.ndarray]):
        self.clips, self._joints, self.scale = clips, joints, scale
        self._features = self.normalised(clips.array('qpos'))
        self.feature_dim = self._features.shape[-1]

    def normalised(self, qpos: np.ndarray) -> torch.Tensor:
        """Return features, float32 (..., D), of poses (..., nq)."""
        mean, deviation = self.scale
        return torch.from_numpy((pose_vectors(qpos, self._joints) - mean) / deviation).float()

    def encode(self, frame):
        return self.normalised(self.pose)

    def features(self):
        return self._features

    def translate(self, i, sources, first, images=False):
        return Translation(self._features[i], self.clips.frames(i)[0])


class PoseBesideFrame(dmc.Wrapper):
    """Draw nothing, and tell the demonstrations the pose."""

    def __init__(self, env, demos: PoseDemonstrations):
        super().__init__(env)
        self._demos = demos

    def render(self, im_size: int) -> np.ndarray:
        self._demos.pose = self._env.qpos()
        return np.zeros((8, 8, 3), np.uint8)


def make_pose_workspace(cfg, work_dir: Path) -> Workspace:
    """Return the run on true poses."""
    train_ac.check_settings(cfg)
    expert, env_args = load_expert(ROOT / f'experts/{cfg.task_name}.pt', cfg.task_name)
    env, repeat = dmc.make(cfg.task_name, **env_args), env_args['action_repeat']
    check_length(cfg.num_train_frames, repeat)
    numbers = {'train': cfg.num_demos, 'valid': cfg.num_eval_demos, 'play': cfg.num_play}
    clips = {split: Poses(None if split == 'play' else expert, env, split, 1, num)
             for split, num in numbers.items()}
    joints = env.joints()
    poses = np.concatenate([pose_vectors(clips[split].array('qpos'), joints)
                            for split in ('train', 'play')])
    scale = poses.mean((0, 1)), poses.std((0, 1)) + 1e-6
    demos, eval_demos = (PoseDemonstrations(clips[split], joints, scale)
                         for split in ('train', 'valid'))
    play = Play(demos.normalised(clips['play'].array('qpos')),
                torch.from_numpy(clips['play'].array('actions')).float())

    def make_env(demos: PoseDemonstrations, evaluate: bool) -> Imitation:
        env = dmc.ActionRepeat(dmc.load_suite(cfg.task_name), repeat)
        return Imitation(PoseBesideFrame(env, demos), demos, 8, evaluate)
    train_env, eval_env = make_env(demos, False), make_env(eval_demos, True)
    return train_ac.Workspace(
        cfg, work_dir, 'imitator', train_env, eval_env,
        functools.partial(ACAgent, demos=demos.features(), play=play),
        agent_args(cfg, ACAgent, train_env) | train_ac.FIXED,
        Loop(repeat, discount=train_ac.FIXED['discount']), {'recipe': cfg.recipe},
        snapshots.load_last(work_dir, 'imitator', cfg.task_name))


# What each oracle puts in the place of what: module, name, stand-in.
ORACLES = {
    'pose': [(train_ac, 'make_workspace', make_pose_workspace)],
    'end': [(module, 'Guide', EndGuide) for module in (imitation, ac_agent)],
    'none': [*((module, 'Guide', NoGuide) for module in (imitation, ac_agent)),
             (ac_agent.Cloning, 'MAX_SHIFT', 0)],  # a shifted target would show which way to go
    'unconditioned': [(ac_agent, 'Discriminator', UnconditionedDiscriminator)]}


def marked_workspace(oracle: str, *args, **options) -> Workspace:
    """Return a `Workspace` whose snapshots say which oracle made them."""
    *args, made_by, last = args
    return Workspace(*args, made_by | {'oracle': oracle}, last, **options)


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in ORACLES:
        raise utils.UserError(f"usage: python benchmarks/oracles.py {{{','.join(ORACLES)}}} "
                              'task=TASK ...')
    if 'recipe=liu2017' in sys.argv:
        raise utils.UserError('oracles go with recipe=pose_code: leave recipe out.')
    oracle, command = sys.argv.pop(1), utils.command
    for module, name, stand_in in ORACLES[oracle]:
        setattr(module, name, stand_in)
    train_ac.Workspace = functools.partial(marked_workspace, oracle)
    utils.command = lambda: command().replace('train_ac.py', f'benchmarks/oracles.py {oracle}', 1)
    train_ac.main()


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
