"""Film an expert in many visual contexts: python generate_expert_video.py task=reacher_hard

Also films play: episodes of the agent's own actions, random or an imitator's with noise
(`player=ac_local/.../snapshot.pt`), whose poses are nearer to the demonstrated ones. From play the
translator learns how actions change what it sees. Only play stores its actions.

Own videos can take the demonstrations' place: from_mp4=FOLDER. Each FOLDER/<name>.mp4 is
an episode; if it was filmed in several contexts at once, its files are
FOLDER/<context>/<name>.mp4. Play is filmed as ever.

The physics runs once for each episode, and one camera for each context films it. Demonstrations and
random play depend on (seed, split, i) alone, an imitator's play on the imitator as well. So the
number of workers does not change the dataset, and an interrupted generation can go on or be
extended.
"""
import gc
import signal

if __name__ == '__main__':  # imports take seconds; command_line.main turns both on again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()

import functools
import hashlib
import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf

import dmc  # first: it chooses the OpenGL backend before anything imports mujoco

# isort: split
import command_line
import settings
import snapshots
import utils
import video
from ac_agent import load_imitator
from contexts import Kind, Scenery
from drqv2 import DrQV2Agent
from logger import Progress
from utils import UserError


class Split(NamedTuple):
    kind: Kind  # of the contexts that it is filmed in
    actor: str  # 'expert' or 'play'


SPLITS = {'train': Split('seen', 'expert'), 'valid': Split('held_out', 'expert'),
          'play': Split('seen', 'play'), 'play_valid': Split('held_out', 'play')}
NUM_PREVIEWS = 3  # episodes of each split


def check_settings(cfg):
    """Refuse settings with which nothing can be filmed (UserError)."""
    settings.check_settings(cfg, 'generate_expert_video')
    Scenery(cfg.scenery)
    if cfg.action_repeat and not cfg.from_mp4:
        raise UserError(f'action_repeat={cfg.action_repeat} goes with from_mp4; an expert has its '
                        'own: leave it out.')


@dataclass(frozen=True)
class Order:
    """A split to film: its folder, number of episodes, and those that exist."""

    name: str
    root: Path
    num_episodes: int
    meta: dict       # what its episodes depend on
    there: set[int]  # episodes that were filmed before

    @property
    def num_missing(self) -> int:
        return self.num_episodes - sum(i < self.num_episodes for i in self.there)

    def missing(self) -> list[int]:
        return [i for i in range(self.num_episodes) if i not in self.there]


def load_expert(path: str | Path, task_name: str) -> tuple[DrQV2Agent, dict]:
    """Return an agent that acts on the CPU, and the `dmc.make` arguments of its environment.

    Raises: UserError for a file that is missing or damaged, of another task or other pictures.
    """
    retrain = f'python train.py task={task_name}'
    expert = snapshots.load_snapshot(path, 'expert', task_name, remedy=retrain)
    with snapshots.must_fit(path, retrain):
        made_by, env_args = expert['made_by'], expert['made_by']['env_args']
        if env_args['obs'] == 'pixels':
            snapshots.require_same_pictures(path, expert['versions'], made_by.get('quality'),
                                            dmc.QUALITY, retrain)
        agent = snapshots.rebuild(DrQV2Agent, expert['agent_args'], expert['agent'])
    return agent, env_args


def recording(cfg) -> tuple[DrQV2Agent | None, dict]:
    """Return the expert, or None if demonstrations are own videos, and the `dmc.make`
    arguments of the environment that films."""
    if cfg.from_mp4:
        return None, {'obs': 'states', 'action_repeat': cfg.action_repeat or 2}
    return load_expert(cfg.expert, cfg.task_name)


def find_mp4s(cfg) -> dict[str, list[list[Path]]]:
    """Share the videos of `cfg.from_mp4` out to 'train' and 'valid', which gets a fifth of them,
    at most `num_valid`: each episode's files, one for each context.

    Raises: UserError where there are none, or a context lacks one.
    """
    root = Path(cfg.from_mp4)
    found = {path.relative_to(root) for path in [*root.glob('*.mp4'), *root.glob('*/*.mp4')]}
    folders, names = sorted({path.parent for path in found}), sorted({path.name for path in found})
    if len(names) < 2:
        raise UserError(f'{root} holds {len(names) or "no"} videos, *.mp4 or */*.mp4, and two are '
                        'the least, to imitate and to evaluate with: set from_mp4 to a folder with '
                        'more.')
    for path in (folder / name for name in names for folder in folders):
        if path not in found:
            raise UserError(f'{root / path} is missing: each video stands in {root} or, filmed in '
                            f'several contexts, under one name in each of its folders.')
    episodes = [[root / folder / name for folder in folders] for name in names]
    order = np.random.default_rng(cfg.seed).permutation(len(names))
    num_valid = min(cfg.num_valid, max(len(names) // 5, 1))
    return {'train': [episodes[i] for i in sorted(order[num_valid:])[:cfg.num_train]],
            'valid': [episodes[i] for i in sorted(order[:num_valid])]}


def draw_episode(seed: int, split: str, i: int, num_contexts: int,
                 scenery: Scenery) -> tuple[int, np.ndarray]:
    """Return episode i's seed, even where contexts are seen and odd where they are held out, and
    its contexts (num_contexts, DIM)."""
    number, kind = list(SPLITS).index(split), SPLITS[split].kind
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, i)))
    episode_seed = 2 * int(rng.integers(2**31)) + (kind == 'held_out')
    return episode_seed, np.stack([scenery.sample(rng, kind) for _ in range(num_contexts)])


class RandomPlay:
    """Random actions that are correlated over time, for one episode.

    A first-order autoregressive process, clipped to [-1, 1]. Its correlation time, log-uniform in 1
    to 50 steps, and its amplitude, uniform in 0.2 to 2, are drawn for the episode: slow and fast,
    weak and saturated play reach different poses.
    """

    def __init__(self, episode_seed: int, shape: tuple[int, ...]):
        self._rng = np.random.default_rng(episode_seed)
        self._decay = np.exp(-1 / np.exp(self._rng.uniform(0, np.log(50))))
        self._amplitude = self._rng.uniform(0.2, 2.0)
        self._state = self._rng.normal(size=shape)

    def act(self, obs, step: int, eval_mode: bool) -> np.ndarray:
        """Return float32 (action_dim,); takes the arguments of an agent's `act`, needs none."""
        noise = self._rng.normal(size=self._state.shape)
        self._state = self._decay * self._state + np.sqrt(1 - self._decay ** 2) * noise
        return np.clip(self._amplitude * self._state, -1, 1).astype(np.float32)


class NoisyPlay:
    """An imitator's actions plus white noise, clipped to [-1, 1]: play near the demonstrations.

    The noise's standard deviation is drawn once for each episode, uniformly in [0, 0.6].
    """

    def __init__(self, agent, episode_seed: int):
        self._agent, self._rng = agent, np.random.default_rng(episode_seed)
        self._stddev = self._rng.uniform(0.0, 0.6)

    def act(self, obs, step: int, eval_mode: bool) -> np.ndarray:
        """Return float32 (action_dim,)."""
        action = self._agent.act(obs, step, eval_mode)
        return np.clip(action + self._stddev * self._rng.normal(size=action.shape), -1, 1).astype(
            np.float32)


def film(env, agent, cameras: list, episode_len: int, episode_seed: int, contexts: Sequence
         ) -> tuple[np.ndarray, dict[str, list]]:
    """Film one episode from its start, with a camera for each context.

    Args:
      agent: an expert, which acts without noise, `RandomPlay` or `NoisyPlay`.
      cameras: one for each context, so that its textures are uploaded once an episode;
        `render(context)` -> uint8 (H, W, 3).
      contexts: the cameras', float64 (DIM,) each.

    Returns: frames uint8 (C, episode_len + 1, H, W, 3), and what happened, in plain numbers:
      'rewards' and 'actions' of each step, 'qpos' of each frame.

    Raises: UserError where the task ends the episode before `episode_len` steps.
    """
    frames, rewards, actions, qpos = [], [], [], []
    time_step = env.reset(episode_seed=episode_seed)
    while True:
        frames.append([camera.render(context)
                       for camera, context in zip(cameras, contexts, strict=True)])
        qpos.append(env.qpos().tolist())
        if len(rewards) == episode_len:
            return np.stack(frames, axis=1), dict(rewards=rewards, actions=actions, qpos=qpos)
        if time_step.last():
            raise UserError(f'the episode of seed {episode_seed} ends after {len(rewards)} steps: '
                            f'set episode_len={len(rewards)} or less.')
        action = agent.act(time_step.observation, step=0, eval_mode=True)
        time_step = env.step(action)
        actions.append(np.asarray(action).tolist())
        rewards.append(float(time_step.reward))


def load_player(cfg, kind: Kind) -> tuple:
    """Return the environment of `cfg.player`, with the demonstrations filmed in contexts of a kind,
    and this imitator; refuse one that cannot act (UserError)."""
    demos = next(name for name, split in SPLITS.items()
                 if split == Split(kind, 'expert'))
    return load_imitator(cfg.player, cfg.translator, Path(cfg.out_dir) / demos, cfg.task_name)


def frame_rate(env, env_args: dict) -> float:
    """Return the agent's steps per second."""
    return 1 / (env.control_timestep() * env_args['action_repeat'])


class Studio:
    """What a worker needs to film: environment, expert, cameras."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.agent, env_args = recording(cfg)
        self.scenery = Scenery(cfg.scenery)
        self.env = dmc.make(cfg.task_name, scenery=self.scenery, **env_args)
        self.fps = frame_rate(self.env, env_args)
        self.mp4s = find_mp4s(cfg) if cfg.from_mp4 else {}

    @functools.cache  # noqa: B019  a worker has one studio
    def cameras(self, env) -> list:
        """One for each context: its textures are uploaded once an episode, not once a frame."""
        return [env.camera(self.cfg.im_size) for _ in range(self.cfg.num_contexts)]

    @functools.cache  # noqa: B019
    def player(self, kind: Kind):
        """Return the imitator's environment, with demonstrations in such contexts; the imitator;
        and its snapshot's sha256."""
        return *load_player(self.cfg, kind), snapshots.sha256(self.cfg.player)

    def make(self, split: str, i: int):
        """Write episode i."""
        cfg, root, (kind, actor) = self.cfg, Path(self.cfg.out_dir) / split, SPLITS[split]
        if split in self.mp4s:
            self.take_over(root, i, self.mp4s[split][i])
            return
        episode_seed, contexts = draw_episode(cfg.seed, split, i, cfg.num_contexts, self.scenery)
        env, agent = self.env, self.agent
        if actor == 'play' and cfg.player:
            env, imitator, player_sha256 = self.player(kind)
            agent = NoisyPlay(imitator, episode_seed)
        elif actor == 'play':
            agent = RandomPlay(episode_seed, env.action_spec().shape)
        frames, happened = film(env, agent, self.cameras(env), cfg.episode_len, episode_seed,
                                list(contexts))
        self.preview(root, i, frames,
                     [f'{kind} context {c}' for c in range(len(frames))])
        if actor == 'expert':  # its actions are never stored
            kept = {'expert_return': sum(happened['rewards']), 'rewards': happened['rewards']}
        else:  # no task reward
            kept = {'actions': happened['actions']}
            if cfg.player:  # it started from a reset of its own environment's
                episode_seed = env.start_seed
                kept['player_sha256'] = player_sha256
        video.write_episode(root, i, frames, {
            'episode_seed': episode_seed, **kept, 'qpos': happened['qpos'],
            'contexts': contexts.tolist()})

    def take_over(self, root: Path, i: int, files: list[Path]):
        """Write these video files as episode i."""
        clips, rates = zip(*(video.load(path, self.fps, self.cfg.episode_len + 1, self.cfg.im_size)
                             for path in files), strict=True)
        frames = np.stack(clips)
        self.preview(root, i, frames, [path.parent.name for path in files])
        video.write_episode(root, i, frames, {
            'files': [str(path.relative_to(self.cfg.from_mp4)) for path in files],
            'fps': list(rates)})

    def preview(self, root: Path, i: int, frames: np.ndarray, labels: list[str]):
        if i < NUM_PREVIEWS:
            video.save(root / f'preview_{i:05d}.mp4', video.side_by_side(frames, labels), self.fps)


def start_worker(cfg):
    global studio
    # Built lazily: an exception in a pool's initializer surfaces only as BrokenProcessPool.
    studio = functools.cache(functools.partial(Studio, cfg))
    torch.set_num_threads(1)

    def end_with_parent():  # else the workers of a main process that is killed wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def make_episode(split: str, i: int):
    studio().make(split, i)


def describe(cfg, split: str, env_args: dict, joints: list[str]) -> dict:
    """Return all that the episodes of a split depend on, but for their number and `player`."""
    return {'format': snapshots.FORMAT, 'task': cfg.task_name, 'split': split,
            'contexts': SPLITS[split].kind, 'actor': SPLITS[split].actor, 'joints': joints,
            'im_size': cfg.im_size, 'episode_len': cfg.episode_len,
            'num_contexts': cfg.num_contexts, 'action_repeat': env_args['action_repeat'],
            'seed': cfg.seed, 'scenery': OmegaConf.to_container(cfg.scenery, resolve=True),
            'quality': dmc.CONTEXT_QUALITY,
            'expert_sha256': None if cfg.from_mp4 else snapshots.sha256(cfg.expert),
            'versions': snapshots.versions()}


def describe_mp4s(episodes: list[list[Path]], fps: float, episode_len: int) -> dict:
    """Return the meta.json entries that differ for own videos.

    Raises: UserError where one of them cannot be read, or is too short.
    """
    digest = hashlib.sha256()
    for path in (path for files in episodes for path in files):
        video.nearest_frames(path, fps, episode_len + 1)
        digest.update(snapshots.sha256(path).encode())
    return {'actor': None, 'num_contexts': len(episodes[0]), 'mp4_sha256': digest.hexdigest()}


def check_same_settings(root: Path, meta: dict):
    """Refuse a folder whose episodes were made otherwise than `meta` says (UserError)."""
    remedy = f'rm -r {root}, or set out_dir to another folder'
    if not utils.exists(root / 'meta.json'):
        if video.episode_numbers(root):
            raise UserError(f'{root} holds episodes, but meta.json, which describes them, is '
                            f'missing: {remedy}.')
        return
    there = video.read_json(root / 'meta.json')
    there.pop('num_episodes', None)
    snapshots.require_same(root, there, meta, remedy)


def generate(cfg):
    """Bring each split to its number of episodes; what is there already stays.

    Raises: UserError for bad settings, before anything is written.
    """
    check_settings(cfg)
    _, env_args = recording(cfg)
    mp4s = find_mp4s(cfg) if cfg.from_mp4 else {}
    # What would fail in every worker fails here: a wrong scenery, or episodes that are too short.
    env = dmc.make(cfg.task_name, scenery=Scenery(cfg.scenery),
                   **{**env_args, 'obs': 'states'})
    still = SimpleNamespace(act=lambda *_, **__: np.zeros(env.action_spec().shape))
    film(env, still, [], cfg.episode_len, episode_seed=0, contexts=[])
    env.camera(16)  # and so does an OpenGL that does not work
    with snapshots.only_one_at_work(Path(cfg.out_dir), 'out_dir'):
        orders = []
        for name in SPLITS:
            num_episodes = len(mp4s[name]) if name in mp4s else cfg[f'num_{name}']
            if num_episodes:
                root, meta = Path(cfg.out_dir) / name, describe(cfg, name, env_args, env.joints())
                if name in mp4s:
                    meta |= describe_mp4s(mp4s[name], frame_rate(env, env_args), cfg.episode_len)
                check_same_settings(root, meta)
                orders.append(Order(name, root, num_episodes, meta,
                                    set(video.episode_numbers(root))))
        if cfg.player:
            check_player(cfg, orders)
        clip_bytes = (cfg.episode_len + 1) * cfg.im_size ** 2 * 3
        utils.check_disk(cfg.out_dir, clip_bytes * sum(
            order.num_missing * order.meta['num_contexts'] for order in orders),
            'the dataset', 'set num_train or num_contexts lower')
        fill(cfg, orders)


def check_player(cfg, orders: list[Order]):
    """Refuse a player (UserError) that cannot act, or that has no demonstrations to follow."""
    for order in orders:
        if SPLITS[order.name].actor == 'expert' and order.num_missing:
            raise UserError(f'{order.root} lacks episodes, and player={cfg.player} needs '
                            'demonstrations that are complete: run this command without player '
                            'first, with num_play set to the number of random episodes.')
    for order in orders:
        if SPLITS[order.name].actor == 'play' and order.num_missing:
            load_player(cfg, SPLITS[order.name].kind)


def fill(cfg, orders: list[Order]):
    """Film the episodes that are missing, or take them over from own videos."""
    for order in orders:
        num_episodes = max(order.num_episodes, len(order.there))
        video.write_json(order.root / 'meta.json', order.meta | {'num_episodes': num_episodes})
        for leftover in order.root.glob('.tmp-*'):  # of a generation that was killed
            leftover.unlink()
    jobs = [(order.name, i) for order in orders for i in order.missing()]
    if jobs:
        total = sum(order.num_episodes for order in orders)
        share_out(cfg, jobs, Progress(total, 'episode', total - len(jobs)))


def open_pool(cfg, num_workers: int) -> ProcessPoolExecutor:
    """Processes that take `make_episode`."""
    # They keep the cores busy: threads of software OpenGL would only be in their way.
    os.environ.setdefault('LP_NUM_THREADS', '0')
    # They are forked from a server process that imports the slow modules once. dm_control is not
    # among them: it opens OpenGL's display, which forked processes must not share. A kill -9 leaves
    # the server's socket behind, in $TMPDIR/pymp-*.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch', 'hydra', 'cv2', 'imageio.v3', 'scipy.ndimage'])
    return ProcessPoolExecutor(num_workers, context, start_worker, (cfg,))


def share_out(cfg, jobs: list[tuple[str, int]], progress: Progress):
    """Share the jobs, arguments of `make_episode`, out to processes. On Ctrl-C the episodes that
    were begun are finished."""
    num_workers = cfg.num_workers or min(len(os.sched_getaffinity(0)), 8)
    pool = open_pool(cfg, min(num_workers, len(jobs)))
    try:
        # The main process answers Ctrl-C, and lets its workers finish what they began. They inherit
        # the blocked signal, so that they never get it, not even while they start.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        episodes = pool.map(make_episode, *zip(*jobs, strict=True))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for done, _ in enumerate(episodes, start=progress.done + 1):
            progress.show(done)
    except BrokenProcessPool as error:
        raise UserError('a worker died, perhaps for want of memory: set num_workers lower; the '
                        'same command goes on with what is missing.') from error
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()


def next_command(cfg) -> str:
    """Return the command to run next."""
    if cfg.from_mp4 and not cfg.num_play:
        return 'the same command with num_play=1000: imitating your own videos takes play'
    options = utils.typed_path('data_dir', cfg.out_dir)
    # A code is judged by the poses of demonstrations and held-out play: where these are missing,
    # there is a translator already.
    if cfg.from_mp4 or cfg.num_play and not cfg.num_play_valid:
        options += f" {utils.typed_path('translator', cfg.translator)}"
        return f'python train_ac.py task={cfg.task_name} {options}'
    recipe = '' if cfg.num_play else ' recipe=liu2017'
    return f'python train_ct.py task={cfg.task_name} {options}{recipe}'


@command_line.main('generate_expert_video', dmc.task_names(), check_settings)
def main(cfg):
    generate(cfg)
    for split, (kind, actor) in SPLITS.items():
        if not cfg[f'num_{split}']:
            continue
        clips = video.Clips(Path(cfg.out_dir) / split)
        if clips.imported:
            rates = [rate for i in range(len(clips)) for rate in clips.episode(i)['fps']]
            print(f'{clips.root}: {len(clips)} episodes of {cfg.from_mp4}, contexts: '
                  f'{clips.meta["num_contexts"]}, frames a second: {min(rates):.4g} to '
                  f'{max(rates):.4g}')
            continue
        line = (f'{clips.root}: {len(clips)} episodes of {actor}, each in {cfg.num_contexts} '
                f'{kind} contexts')
        if actor == 'expert':
            returns = [clips.episode(i)['expert_return'] for i in range(len(clips))]
            line += f'; return {np.mean(returns):.4g} +- {np.std(returns):.2g}'
        print(line)
    print(f'to look at: {cfg.out_dir}/*/preview_*.mp4\nnext: {next_command(cfg)}')


if __name__ == '__main__':
    main()
