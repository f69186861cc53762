"""What tests share: environments, demonstrations and datasets whose every number can be worked out
by hand, artifacts that never trained, and what ends a run in the middle."""
import argparse
import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dm_env
import hydra
import numpy as np
import torch
from dm_env import specs
from omegaconf import OmegaConf

import contexts
import dmc
import snapshots
import video
from ct_model import ContextTranslator
from drqv2 import DrQV2Agent
from imitation import Translation
from train_ac import WORKED

ROOT = Path(__file__).parent.parent
CFGS = ROOT / 'cfgs'
SCENERY = OmegaConf.to_container(OmegaConf.load(CFGS / 'generate_expert_video.yaml').scenery)

# ------------------------------------------------------------------------------ scripts and runs


@functools.cache
def _composed(script: str, *overrides: str):
    with hydra.initialize_config_dir(str(CFGS), version_base='1.3'):
        return hydra.compose(script, list(overrides))


def settings(script: str, *overrides: str, **values):
    """Return what a script is given with these overrides; `values` are set afterwards."""
    cfg = _composed(script, *overrides).copy()
    cfg.merge_with(values)
    return cfg


def start(script: str, *arguments, **options) -> subprocess.Popen:
    """Start a script in a process of its own."""
    return subprocess.Popen([sys.executable, ROOT / f'{script}.py', *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(script: str, *arguments, **options) -> tuple[int, str, str]:
    """Run a script in a process of its own; return its exit code, output and errors."""
    done = subprocess.run([sys.executable, ROOT / f'{script}.py', *arguments], text=True,
                          capture_output=True, timeout=120, check=False, **options)
    return done.returncode, done.stdout, done.stderr


IN_TURN = """
import contextlib, io, json, runpy, sys
root, commands = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, root)
results = []
for script, *arguments in commands:
    sys.argv = [f'{script}.py', *arguments]
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_path(f'{root}/{script}.py', run_name='__main__')
        except SystemExit as end:
            code = end.code or 0
    results.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(results))
"""


def run_in_turn(*commands: tuple[str, ...], **options) -> list[tuple[int, str, str]]:
    """Run scripts, (script, *arguments) each, one after another in one process of their own, as
    their imports take seconds; return what `run` returns of each."""
    done = subprocess.run([sys.executable, '-c', IN_TURN, ROOT, json.dumps(commands)], text=True,
                          stdout=subprocess.PIPE, timeout=120, check=True, **options)
    return [tuple(result) for result in json.loads(done.stdout)]


def wait_until(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)


def judge_args(**options) -> argparse.Namespace:
    """Return what tools/evaluate.py takes from its command line."""
    return argparse.Namespace(**{'episodes': 2, 'seed': 1, 'contexts': 'own', 'translator': None,
                                 'videos': None, 'show': 0, 'out': None, **options})


class Killed(Exception):
    """Raised in the middle of a run, as if it had been killed there."""


def die():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_at_once():
    """Where the signal is to end the work that is going on."""
    terminate()
    raise AssertionError('the signal was held back')


def watch(patch, owner, name: str, at: int = 0, event=None) -> list[tuple[tuple, dict]]:
    """Return a list to which each call of `owner.name` adds its arguments, (args, kwargs).

    Call number `at` starts with `event`, which may raise. `patch` is pytest's monkeypatch.
    """
    calls, function = [], getattr(owner, name)

    def watched(*args, **kwargs):
        calls.append((args, kwargs))
        if len(calls) == at:
            event()
        return function(*args, **kwargs)
    patch.setattr(owner, name, watched)
    return calls


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a run's CSV, without the columns that differ from run to run."""
    with open(path, newline='') as file:
        return [{key: value for key, value in row.items() if key not in ('total_time', 'fps')}
                for row in csv.DictReader(file)]


def agent_of(work_dir: Path, kind: str) -> dict:
    """Return the state of the agent in a run's snapshot, an 'expert' or an 'imitator'."""
    return snapshots.load_snapshot(work_dir / 'snapshot.pt', kind)['agent']


def learned_alike(one: Path, other: Path, kind: str) -> bool:
    """Whether the agents of two runs are in the same state, to the bit."""
    return not differences(agent_of(one, kind), agent_of(other, kind))


def leaves(tree, path: tuple = ()) -> dict:
    """Return the tensors and plain values of nested dicts and lists by their paths."""
    if not isinstance(tree, (dict, list, tuple)) or not tree:
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: leaf for name, part in items
            for key, leaf in leaves(part, (*path, name)).items()}


def differences(one, other) -> list[tuple]:
    """Return the paths at which two trees are not equal to the bit."""
    def equal(a, b) -> bool:
        if torch.is_tensor(a) or torch.is_tensor(b):
            return torch.is_tensor(a) and torch.is_tensor(b) and torch.equal(a, b)
        return a == b or a != a and b != b
    one, other, missing = leaves(one), leaves(other), object()
    return [path for path in one.keys() | other.keys()
            if not equal(one.get(path, missing), other.get(path, missing))]


# ------------------------------------------------------------------------------ artifacts

MADE_BY = {'videos': snapshots.versions(), 'quality': dmc.CONTEXT_QUALITY}
GOOD = {name: worked for name, (worked, _) in WORKED.items()}  # scores of a translator


def save_expert(path: Path, task: str = 'reacher_easy', num_states: int = 6, **env_args):
    """Save an expert from states as it is before training."""
    torch.manual_seed(0)
    agent_args = {'obs_shape': [num_states], 'action_dim': 2, 'hidden_dim': 16}
    snapshots.save_snapshot(path, 'expert', task, {
        'agent_args': agent_args, 'agent': DrQV2Agent(**agent_args).state_dict(),
        'made_by': {'env_args': {'obs': 'states', 'action_repeat': 2, **env_args}}})


def make_translator(im_size: int = 16, code: bool = True) -> tuple[ContextTranslator, dict]:
    """Return a small translator that has not been trained, and its arguments."""
    torch.manual_seed(0)
    args = {'im_size': im_size, 'channels': [4, 4, 4, 4], 'z_dim': 4, 'hidden': 8,
            **({'code_dim': 3, 'action_dim': 2} if code else {})}
    model = ContextTranslator(**args)
    if code:
        model.code.fit_scales(torch.randn(9, 2, 4, 4), torch.randn(9, 2, 4))
    return model, args


def save_translator(path: Path, task: str = 'reacher_hard', im_size: int = 16, code: bool = True,
                    made_by=MADE_BY, scores=GOOD):
    model, args = make_translator(im_size, code)
    snapshots.save_snapshot(path, 'translator', task, {
        'model_args': args, 'model': model.state_dict(), 'made_by': made_by,
        **({'scores': scores} if code else {})})


def write_split(root: Path, episodes, **meta) -> Path:
    """Write a split of a dataset: for each episode its frames (C, T+1, H, W, 3) and what is known
    of it; `meta` is known of all."""
    for i, (frames, known) in enumerate(episodes):
        video.write_episode(root, i, frames, known)
    num_contexts, num_frames, im_size = frames.shape[:3]
    video.write_json(root / 'meta.json', {
        'format': snapshots.FORMAT, 'task': 'reacher_hard', 'split': root.name, 'seed': 1,
        'im_size': im_size, 'episode_len': num_frames - 1, 'num_contexts': num_contexts,
        'num_episodes': i + 1, 'expert_sha256': 'none', 'quality': dmc.CONTEXT_QUALITY,
        'versions': snapshots.versions(), **meta})
    return root


SIZE, LENGTH = 16, 9  # of what `film` films


def film(root, split='train', num_episodes=5, num_contexts=3, seed=0, pose_seed=0):
    """A square wanders: a way for each episode, colours for each context.

    The upper left pixel tells (episode, context, frame), and an action of play (episode, step).
    Poses have nothing to do with any of it.
    """
    rng, episodes = np.random.default_rng(seed), []
    for i in range(num_episodes):
        place = rng.integers(1, SIZE - 5, (2, 2))
        frames = np.empty((num_contexts, LENGTH + 1, SIZE, SIZE, 3), np.uint8)
        for c in range(num_contexts):
            frames[c], square = rng.integers(0, 100, 3), rng.integers(150, 256, 3)
            for t in range(LENGTH + 1):
                y, x = (place[0] + (place[1] - place[0]) * t / LENGTH).round().astype(int)
                frames[c, t, y:y + 4, x:x + 4] = square
                frames[c, t, 0, 0] = i, c, t
        qpos = np.random.default_rng([pose_seed, seed, i]).normal(size=(LENGTH + 1, 2))
        episodes.append((frames, {
            'qpos': qpos.tolist(), **({'actions': [[i / 10, t / 10] for t in range(LENGTH)]}
                                      if split.startswith('play') else {'expert_return': 0.0})}))
    write_split(root / split, episodes, task='fake_walk', joints=['hinge', 'slide'])


def film_all(root, **options):
    for seed, (split, num) in enumerate((('train', 5), ('valid', 3), ('play', 4),
                                         ('play_valid', 3))):
        film(root, split, num, seed=seed, **options)
    return root


def labels(frames):
    """-> episodes, contexts, frame numbers, of the pixel that `film` put there."""
    return frames[..., 0, 0, :].long().unbind(-1)


def edit(path: Path, **values):
    """Change a json of a dataset."""
    video.write_json(path, video.read_json(path) | values)


# ------------------------------------------------------------------------------ in memory


class FakeEnv(dm_env.Environment):
    """Walks on a line: the state moves by the action, the reward is minus its distance from 0.5.

    Args:
      events: functions to call in steps of these numbers, which are counted over all episodes.
    """

    def __init__(self, length: int = 10, pixels: bool = False, events=()):
        self.length, self.pixels, self.episode_info = length, pixels, {}
        self._time, self._events, self._num_steps = None, dict(events), 0

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
        self._num_steps += 1
        if self._num_steps in self._events:
            self._events[self._num_steps]()
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

    def qpos(self):
        return self._state.copy()

    def render(self, im_size):
        return np.full((im_size, im_size, 3), self._time, np.uint8)

    def panels(self, im_size):
        return {'agent': self.render(im_size)}


class FakeClips:
    """A fake of `video.Clips`: frames (N, C, T+1, H, W, 3), what is known of each episode, and of
    all."""

    imported = False

    def __init__(self, frames, episodes=(), **meta):
        self._frames, self._episodes, self.meta = frames, episodes, meta

    def __len__(self):
        return len(self._frames)

    def frames(self, i):
        return self._frames[i]

    def episode(self, i):
        return self._episodes[i]


class Stored:
    """A replay buffer that always gives the same batch; `ahead` are its observations by steps."""

    def __init__(self, batch, ahead=None):
        self.batch, self.ahead = batch, ahead

    def sample(self, batch_size, ahead=()):
        return [part.clone() for part in [*self.batch, *(self.ahead[step] for step in ahead)]]


class FakeDemos:
    """A fake of `imitation.Demonstrations`: three episodes in three contexts; frame t is t all
    over.

    Features are a frame's red and its green; the translation is perfect. `asked` keeps the last
    request for one: episode, source contexts, whether for images.
    """

    feature_dim = 2

    def __init__(self, length: int = 4):
        frames = np.arange(length + 1, dtype=np.uint8)[:, None, None, None]
        self.clips = FakeClips(
            np.broadcast_to(frames, (3, 3, length + 1, 8, 8, 3)),
            [{'episode_seed': 10 + i, 'expert_return': 9.0, 'contexts': [[0.1], [0.2], [0.3]]}
             for i in range(3)])
        self.asked = None

    def __len__(self):
        return 3

    def encode(self, frame):
        return torch.tensor(frame.mean((0, 1))[:2], dtype=torch.float32)

    def translate(self, i, sources, first, images=False):
        self.asked = i, tuple(sources), images
        frames = np.array(self.clips.frames(i)[0])
        return Translation(torch.stack([self.encode(frame) for frame in frames]),
                           frames if images else None)


def kind_of(scenery: contexts.Scenery, context: np.ndarray) -> contexts.Kind:
    """Return 'seen' or 'held_out', from a context's values and the switches alone."""
    cells = sum(int(contexts.CELLS * context[contexts.SLOTS[name].start]) for name in scenery.names)
    return 'seen' if cells % contexts.MODULUS else 'held_out'
