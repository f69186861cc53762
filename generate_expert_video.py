"""Film an expert in many visual contexts: python generate_expert_video.py task=reacher_hard

Also film play: episodes in which the agent acts at random, or as an imitator with noise
(`player=ac_local/.../snapshot.pt`), whose poses are nearer to the demonstrated ones. From play the
translator learns how actions change the picture. Only play keeps its actions.

Own videos can replace the expert: from_mp4=FOLDER. Each FOLDER/<name>.mp4 is an episode; an episode
that was filmed in several contexts at once is FOLDER/<context>/<name>.mp4.

The physics runs once for each episode, and one camera films it in each context. An episode depends
only on (seed, split, i) and the agent that acts. So the number of workers does not change the
dataset, and the same command resumes or extends it.
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
from pathlib import Path

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

# Split -> kind of its contexts, and who acts.
SPLITS: dict[str, tuple[Kind, str]] = {
    'train': ('seen', 'expert'), 'valid': ('held_out', 'expert'),
    'play': ('seen', 'play'), 'play_valid': ('held_out', 'play')}
NUM_PREVIEWS = 3  # episodes of each split


def check_settings(cfg):
    """Raise UserError if nothing can be filmed with these settings."""
    settings.check_settings(cfg, 'generate_expert_video')
    Scenery(cfg.scenery)
    if cfg.action_repeat and not cfg.from_mp4:
        raise UserError(f'action_repeat={cfg.action_repeat} goes with from_mp4; an expert has its '
                        'own: leave it out.')


def load_expert(path: str | Path, task_name: str) -> tuple[DrQV2Agent, dict]:
    """Return an agent that acts on the CPU, and the `dmc.make` arguments of its environment.

    Raises: UserError if the file is missing, damaged, of another task or of other pictures.
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


def share_mp4s(cfg) -> dict[str, list[list[Path]]]:
    """Return 'train' and 'valid' -> the episodes of `video.find_mp4s`. 'valid' gets a fifth of
    them, at most `num_valid`."""
    episodes = video.find_mp4s(cfg.from_mp4)
    order = np.random.default_rng(cfg.seed).permutation(len(episodes))
    num_valid = min(cfg.num_valid, max(len(episodes) // 5, 1))
    return {'train': [episodes[i] for i in sorted(order[num_valid:])[:cfg.num_train]],
            'valid': [episodes[i] for i in sorted(order[:num_valid])]}


def draw_episode(seed: int, split: str, i: int, num_contexts: int,
                 scenery: Scenery) -> tuple[int, np.ndarray]:
    """Return episode i's seed, which is even in a split with seen contexts and odd in the others,
    and its contexts (num_contexts, DIM)."""
    number, (kind, _) = list(SPLITS).index(split), SPLITS[split]
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, i)))
    episode_seed = 2 * int(rng.integers(2**31)) + (kind == 'held_out')
    return episode_seed, np.stack([scenery.sample(rng, kind) for _ in range(num_contexts)])


class RandomPlay:
    """Random actions of one episode: a first-order autoregressive process, clipped to [-1, 1].

    Its correlation time is log-uniform in 1 to 50 steps, and its amplitude is uniform in 0.2 to 2:
    slow and fast, weak and saturated play reach different poses.
    """

    def __init__(self, episode_seed: int, shape: tuple[int, ...]):
        self._rng = np.random.default_rng(episode_seed)
        self._decay = np.exp(-1 / np.exp(self._rng.uniform(0, np.log(50))))
        self._amplitude = self._rng.uniform(0.2, 2.0)
        self._state = self._rng.normal(size=shape)

    def act(self, obs, step: int, eval_mode: bool) -> np.ndarray:
        """Return float32 (action_dim,); the arguments of an agent's `act` are not used."""
        noise = self._rng.normal(size=self._state.shape)
        self._state = self._decay * self._state + np.sqrt(1 - self._decay ** 2) * noise
        return np.clip(self._amplitude * self._state, -1, 1).astype(np.float32)


class NoisyPlay:
    """An imitator's actions in one episode plus white noise, clipped to [-1, 1].

    The standard deviation of the noise is uniform in 0 to 0.6.
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
    """Film one episode from its start, with one camera for each context.

    Args:
      agent: an expert, which acts without noise, `RandomPlay` or `NoisyPlay`.
      cameras: `camera.render(context)` returns uint8 (H, W, 3); a camera that keeps its context
        uploads its textures only once.
      contexts: float64 (DIM,) each.

    Returns: frames uint8 (C, episode_len + 1, H, W, 3), and plain numbers: 'rewards' and 'actions'
      of each step, 'qpos' of each frame.

    Raises: UserError if the task ends the episode before `episode_len` steps.
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


def frame_rate(env, env_args: dict) -> float:
    """Return the agent's steps per second."""
    return 1 / (env.control_timestep() * env_args['action_repeat'])


class Studio:
    """Makes episodes, with an environment, its cameras and an agent, or from own videos.

    Raises: UserError if a file cannot be used.
    """

    def __init__(self, cfg):
        self.cfg, self.scenery = cfg, Scenery(cfg.scenery)
        if cfg.from_mp4:
            self.mp4s, self.expert = share_mp4s(cfg), None
            self.env_args = {'obs': 'states', 'action_repeat': cfg.action_repeat or 2}
        else:
            self.mp4s, (self.expert, self.env_args) = {}, load_expert(cfg.expert, cfg.task_name)
        self.env = dmc.make(cfg.task_name, scenery=self.scenery, **self.env_args)
        self.fps = frame_rate(self.env, self.env_args)
        self.num_episodes = {split: len(self.mp4s.get(split, ())) or cfg[f'num_{split}']
                             for split in SPLITS}

    @functools.cache  # noqa: B019  a process has one studio
    def cameras(self, env) -> list:
        """Return a camera for each context."""
        return [env.camera(self.cfg.im_size) for _ in range(self.cfg.num_contexts)]

    @functools.cache  # noqa: B019
    def player(self, kind: Kind) -> tuple:
        """Return the environment of `cfg.player`, with demonstrations in contexts of this kind, the
        imitator and its snapshot's SHA-256."""
        cfg, demos = self.cfg, Path(self.cfg.out_dir) / ('train' if kind == 'seen' else 'valid')
        return (*load_imitator(cfg.player, cfg.translator, demos, cfg.task_name),
                snapshots.sha256(cfg.player))

    def describe(self, split: str) -> dict:
        """Return all that the episodes of a split depend on, but for their number and `player`.

        Raises: UserError if an own video cannot be read, or is too short.
        """
        cfg, (kind, actor) = self.cfg, SPLITS[split]
        meta = {'format': snapshots.FORMAT, 'task': cfg.task_name, 'split': split,
                'contexts': kind, 'actor': actor, 'joints': self.env.joints(),
                'im_size': cfg.im_size, 'episode_len': cfg.episode_len,
                'num_contexts': cfg.num_contexts, 'action_repeat': self.env_args['action_repeat'],
                'seed': cfg.seed, 'scenery': OmegaConf.to_container(cfg.scenery, resolve=True),
                'quality': dmc.CONTEXT_QUALITY,
                'expert_sha256': snapshots.sha256(cfg.expert) if self.expert else None,
                'versions': snapshots.versions()}
        if split in self.mp4s:
            digest, episodes = hashlib.sha256(), self.mp4s[split]
            for path in (path for files in episodes for path in files):
                video.nearest_frames(path, self.fps, cfg.episode_len + 1)
                digest.update(snapshots.sha256(path).encode())
            meta |= {'actor': None, 'num_contexts': len(episodes[0]),
                     'mp4_sha256': digest.hexdigest()}
        return meta

    def make(self, split: str, i: int):
        """Film episode i of a split, or read it from own videos, and write it."""
        cfg, root = self.cfg, Path(self.cfg.out_dir) / split
        if split in self.mp4s:
            files = self.mp4s[split][i]
            clips, rates = zip(*(video.load(path, self.fps, cfg.episode_len + 1, cfg.im_size)
                                 for path in files), strict=True)
            frames, labels = np.stack(clips), [path.parent.name for path in files]
            known = {'files': [str(path.relative_to(cfg.from_mp4)) for path in files],
                     'fps': list(rates)}
        else:
            frames, known = self.film(split, i)
            labels = [f'{SPLITS[split][0]} context {c}' for c in range(len(frames))]
        if i < NUM_PREVIEWS:
            video.save(root / f'preview_{i:05d}.mp4', video.side_by_side(frames, labels), self.fps)
        video.write_episode(root, i, frames, known)

    def film(self, split: str, i: int) -> tuple[np.ndarray, dict]:
        """Return an episode's frames (C, T+1, H, W, 3), and what its json keeps."""
        cfg, (kind, actor) = self.cfg, SPLITS[split]
        episode_seed, contexts = draw_episode(cfg.seed, split, i, cfg.num_contexts, self.scenery)
        env, agent = self.env, self.expert
        if actor == 'play' and cfg.player:
            env, imitator, player_sha256 = self.player(kind)
            agent = NoisyPlay(imitator, episode_seed)
        elif actor == 'play':
            agent = RandomPlay(episode_seed, env.action_spec().shape)
        frames, happened = film(env, agent, self.cameras(env), cfg.episode_len, episode_seed,
                                list(contexts))
        if actor == 'expert':  # its actions are never kept
            kept = {'expert_return': sum(happened['rewards']), 'rewards': happened['rewards']}
        else:  # the task's rewards are never kept
            kept = {'actions': happened['actions']}
            if cfg.player:  # its environment chose the start, from a demonstration
                episode_seed = env.start_seed
                kept['player_sha256'] = player_sha256
        return frames, {'episode_seed': episode_seed, **kept, 'qpos': happened['qpos'],
                        'contexts': contexts.tolist()}


def generate(cfg):
    """Film the episodes that each split lacks.

    Raises: UserError for bad settings, before anything is written.
    """
    check_settings(cfg)
    studio, folder = Studio(cfg), Path(cfg.out_dir)
    # What would fail in a worker fails here: OpenGL that does not work, episodes that end early.
    studio.env.camera(16)
    play = RandomPlay(0, studio.env.action_spec().shape)
    film(studio.env, play, [], cfg.episode_len, episode_seed=0, contexts=[])
    with snapshots.only_one_at_work(folder, 'out_dir'):
        numbers = {split: num for split, num in studio.num_episodes.items() if num}
        metas = {split: studio.describe(split) for split in numbers}
        there = {split: set(video.episode_numbers(folder / split)) for split in numbers}
        missing = {split: num - sum(i < num for i in there[split])
                   for split, num in numbers.items()}
        for split, meta in metas.items():
            check_same_settings(folder / split, meta)
        if cfg.player:
            check_player(studio, missing)
        clip_bytes = (cfg.episode_len + 1) * cfg.im_size ** 2 * 3
        utils.check_disk(folder, clip_bytes * sum(
            num * metas[split]['num_contexts'] for split, num in missing.items()),
            'the dataset', 'set num_train or num_contexts lower')
        for split, num in numbers.items():
            video.write_json(folder / split / 'meta.json', metas[split] | {
                'num_episodes': max(num, len(there[split]))})
            for leftover in (folder / split).glob('.tmp-*'):  # a killed process left it
                leftover.unlink()
        jobs = [(split, i) for split, num in numbers.items() for i in range(num)
                if i not in there[split]]
        if jobs:
            share_out(cfg, jobs, sum(numbers.values()))


def check_same_settings(root: Path, meta: dict):
    """Raise UserError if a folder's episodes were made otherwise than `meta` says, or its meta.json
    is missing."""
    if utils.exists(root / 'meta.json') or video.episode_numbers(root):
        before = video.read_json(root / 'meta.json')
        before.pop('num_episodes', None)
        snapshots.require_same(root, before, meta,
                               f'rm -r {root}, or set out_dir to another folder')


def check_player(studio: Studio, missing: dict[str, int]):
    """Raise UserError if the player cannot act, or a split of demonstrations lacks episodes."""
    for split in filter(missing.get, missing):
        kind, actor = SPLITS[split]
        if actor == 'expert':
            raise UserError(f'{studio.cfg.out_dir}/{split} lacks episodes, and a player needs all '
                            'demonstrations: run this command without player first, with num_play '
                            'set to the number of random episodes.')
        studio.player(kind)


def start_worker(cfg):
    """Prepare a process for `make_episode`."""
    global studio
    studio = Studio(cfg)
    torch.set_num_threads(1)

    def end_with_parent():  # a worker whose parent was killed would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def make_episode(split: str, i: int):
    studio.make(split, i)


def open_pool(cfg, num_workers: int) -> ProcessPoolExecutor:
    """Return processes that run `make_episode`."""
    # They keep the cores busy, so threads of software OpenGL would only be in their way.
    os.environ.setdefault('LP_NUM_THREADS', '0')
    # They are forked from a process that imports the slow modules once. dm_control is not among
    # these: it opens OpenGL's display, which forked processes must not share.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch', 'hydra', 'cv2', 'imageio.v3', 'scipy.ndimage'])
    return ProcessPoolExecutor(num_workers, context, start_worker, (cfg,))


def share_out(cfg, jobs: list[tuple[str, int]], total: int):
    """Make episodes, (split, i) each, in several processes. On Ctrl-C each process finishes its
    episode; `total` counts the episodes that were there as well."""
    num_workers = cfg.num_workers or min(len(os.sched_getaffinity(0)), 8)
    pool = open_pool(cfg, min(num_workers, len(jobs)))
    progress = Progress(total, 'episode', total - len(jobs))
    try:
        # A terminal sends Ctrl-C to all processes. Workers inherit the mask and ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        episodes = pool.map(make_episode, *zip(*jobs, strict=True))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for done, _ in enumerate(episodes, start=progress.done + 1):
            progress.show(done)
    except BrokenProcessPool as error:
        raise UserError('a worker died, perhaps because memory ran out: set num_workers lower; the '
                        'same command resumes.') from error
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()


def next_command(cfg) -> str:
    """Return the command to run next."""
    if cfg.from_mp4 and not cfg.num_play:
        return 'the same command with num_play=1000: imitating your own videos takes play'
    options = f"task={cfg.task_name} {utils.typed_path('data_dir', cfg.out_dir)}"
    # A code is judged by poses of demonstrations and held-out play. Without these, there is a
    # translator already.
    if cfg.from_mp4 or cfg.num_play and not cfg.num_play_valid:
        return f"python train_ac.py {options} {utils.typed_path('translator', cfg.translator)}"
    return f"python train_ct.py {options}{'' if cfg.num_play else ' recipe=liu2017'}"


@command_line.main('generate_expert_video', dmc.task_names(), check_settings)
def main(cfg):
    generate(cfg)
    for split in SPLITS:
        if cfg[f'num_{split}']:
            clips = video.Clips(Path(cfg.out_dir) / split)
            returns = [clips.episode(i).get('expert_return', np.nan) for i in range(len(clips))]
            print(f"{clips.root}: {len(clips)} episodes in {clips.meta['num_contexts']} contexts "
                  'each' + ('' if np.isnan(returns[0]) else
                            f'; return {np.mean(returns):.4g} +- {np.std(returns):.2g}'))
    print(f'to look at: {cfg.out_dir}/*/preview_*.mp4\nnext: {next_command(cfg)}')


if __name__ == '__main__':
    main()
