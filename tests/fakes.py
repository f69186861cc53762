"""Environments and demonstrations whose every number a test can work out by hand."""
import csv
from pathlib import Path
from types import SimpleNamespace

import dm_env
import numpy as np
import torch
from dm_env import specs

from ac_agent import Translation

CFGS = Path(__file__).parent.parent / 'cfgs'


class Killed(Exception):
    """Raised in the middle of a run, as if it had been killed there."""


def rows(path):
    """Return the rows of a run's CSV, without the columns that differ from run to run."""
    with open(path) as file:
        return [{key: value for key, value in row.items() if key not in ('total_time', 'fps')}
                for row in csv.DictReader(file)]


class FakeEnv(dm_env.Environment):
    """Walks on a line: the state moves by the action, the reward is minus its distance from 0.5."""

    def __init__(self, length: int = 10, pixels: bool = False):
        self.length, self.pixels, self.episode_info = length, pixels, {}
        self._time = None

    def observation_spec(self):
        if self.pixels:
            return specs.BoundedArray((9, 20, 20), np.uint8, 0, 255, 'observation')
        return specs.Array((5,), np.float32, 'observation')

    def action_spec(self):
        return specs.BoundedArray((2,), np.float32, -1, 1, 'action')

    def reset(self, episode_seed=0, context=None):
        self._state = np.random.default_rng(episode_seed).uniform(-1, 1, 2)
        self._time, self._frames = 0, None
        return dm_env.restart(self._observe())

    def step(self, action):
        if self._time is None or self._time == self.length:
            return self.reset()
        self._state = np.clip(self._state + 0.1 * np.asarray(action, float), -1, 1)
        self._time += 1
        reward = -float(abs(self._state - 0.5).sum())
        if self._time == self.length:
            return dm_env.truncation(reward, self._observe())
        return dm_env.transition(reward, self._observe())

    def _observe(self):
        if not self.pixels:
            return np.array([*self._state, self._time, 1, 2], np.float32)
        frame = np.full((3, 20, 20), 127 + 100 * self._state[0], np.uint8)
        frame[:, self._time % 20] = 255
        self._frames = [frame] * 3 if self._frames is None else [*self._frames[1:], frame]
        return np.concatenate(self._frames)

    def render(self, im_size):
        return np.full((im_size, im_size, 3), self._time, np.uint8)

    def panels(self, im_size):
        return {'agent': self.render(im_size)}


class FakeDemos:
    """A fake of `ac_agent.Demonstrations`: three episodes in three contexts, frame t is t all over.

    Features are a frame's red and its green; the translation is perfect. `asked` keeps the last
    request for one: episode, source contexts, whether for images.
    """

    feature_dim = 2

    def __init__(self, length: int = 4):
        frames = np.arange(length + 1, dtype=np.uint8)[None, :, None, None, None]
        self._frames = np.broadcast_to(frames, (3, length + 1, 8, 8, 3))
        self.clips = SimpleNamespace(frames=self._frames_of, episode=self._episode)
        self.asked = None

    def __len__(self):
        return 3

    def _frames_of(self, i):
        return self._frames

    def _episode(self, i):
        return {'episode_seed': 10 + i, 'expert_return': 9.0, 'contexts': [[0.1], [0.2], [0.3]]}

    def encode(self, frame):
        return torch.tensor(frame.mean((0, 1))[:2], dtype=torch.float32)

    def translate(self, i, sources, first, images=False):
        self.asked = i, tuple(sources), images
        frames = np.array(self._frames[0])
        return Translation(torch.stack([self.encode(frame) for frame in frames]),
                           frames if images else None)

    def image_variance(self):
        return 0.01
