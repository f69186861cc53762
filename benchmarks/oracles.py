"""Train an imitator with what it never has: python benchmarks/oracles.py {reward,pose} task=...

What it reaches beside train_ac.py with the same options tells what tracking, or the code, costs:

reward: the task's own reward is what the critic learns from, and no transition is relabelled;
pose: the physical pose of each frame stands in for its code.

The run's snapshot says which oracle made it, and nothing takes it for an imitator's.
"""
import functools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import ac_agent
import dmc
import train_ac
import utils
from ac_agent import ACAgent, Demonstrations, Imitation, Translation
from train import Workspace
from train_ct import pose_vectors


class TaskReward(dmc.Wrapper):
    """Keep the task's reward of the last step, which `Imitation` hides."""

    def step(self, action):
        time_step = self._env.step(action)
        self.task_reward = time_step.reward
        return time_step


class RewardedImitation(Imitation):
    """Imitation, but its reward is the task's."""

    def __init__(self, env, *args, **options):
        super().__init__(TaskReward(env), *args, **options)

    def step(self, action):
        time_step = super().step(action)
        return time_step if time_step.first() else time_step._replace(reward=self.task_reward)


class RewardedAgent(ACAgent):
    """An imitator whose critic learns from the replayed reward, also without targets. None are
    relabelled: the task's reward does not follow from targets."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {'relabel': 0.0, 'hindsight': 0.0})
        self.discriminates = False


def check_rewarded(cfg, check=train_ac.check_all_settings):
    """Raise UserError for settings with which there is no run, or no critic in it."""
    check(cfg)
    if not cfg.w_critic:
        raise utils.UserError("w_critic=0 leaves no critic to learn from the task's reward: set "
                              'w_critic=1.')


class PoseDemonstrations(Demonstrations):
    """Videos whose features are the pose: sine and cosine of angles, and lengths, of unit variance.

    `pose` is that of the frame which `encode` is asked for next, float64 (nq,).
    """

    dynamics = None  # the code's do not fit

    def __init__(self, model, clips, scale=None):
        super().__init__(model, clips, ([0.0], 1.0))
        poses = self._vectors(np.array([clips.episode(i)['qpos'] for i in range(len(clips))]))
        flat = poses.reshape(-1, poses.shape[-1])
        self.scale = scale or (flat.mean(0).tolist(), (flat.std(0) + 1e-6).tolist())
        self.feature_dim, self._poses = flat.shape[1], self._normalised(poses)

    def _vectors(self, qpos: np.ndarray) -> np.ndarray:
        return pose_vectors(qpos, self.clips.meta['joints'])

    def _normalised(self, vectors: np.ndarray) -> torch.Tensor:
        mean, std = map(np.array, self.scale)
        return torch.from_numpy((vectors - mean) / std).float()

    def encode(self, frame: np.ndarray) -> torch.Tensor:
        return self._normalised(self._vectors(self.pose))

    def features(self) -> torch.Tensor:
        return self._poses

    def translate(self, i: int, *args, **options) -> Translation:
        return super().translate(i, *args, **options)._replace(features=self._poses[i])

    def features_of(self, z: torch.Tensor) -> torch.Tensor:
        return z  # nobody asks for the code's


class PoseBesideFrame(dmc.Wrapper):
    """Tell the demonstrations the pose of each frame as it is rendered."""

    def __init__(self, env, demos: PoseDemonstrations):
        super().__init__(env)
        self._demos = demos

    def render(self, im_size: int) -> np.ndarray:
        self._demos.pose = self._env.qpos()
        return self._env.render(im_size)


class PoseImitation(Imitation):
    """Imitation on the true pose."""

    def __init__(self, env, demos: PoseDemonstrations, *args, **options):
        super().__init__(PoseBesideFrame(env, demos), demos, *args, **options)


ORACLES = {'reward': {'Imitation': RewardedImitation, 'ACAgent': RewardedAgent,
                      'check_all_settings': check_rewarded},
           'pose': {'Imitation': PoseImitation, 'Demonstrations': PoseDemonstrations}}


def make_workspace(oracle: str, *args, **options) -> Workspace:
    """Return a `Workspace` whose snapshots say which oracle made them."""
    *args, made_by, last = args
    return Workspace(*args, made_by | {'oracle': oracle}, last, **options)


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in ORACLES:
        raise utils.UserError('usage: python benchmarks/oracles.py {reward,pose} task=TASK ...')
    oracle, command = sys.argv.pop(1), utils.command
    for name, stand_in in ORACLES[oracle].items():
        for module in (ac_agent, train_ac):
            setattr(module, name, stand_in)
    train_ac.Workspace = functools.partial(make_workspace, oracle)
    utils.command = lambda: command().replace('train_ac.py', f'benchmarks/oracles.py {oracle}', 1)
    train_ac.main()


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
