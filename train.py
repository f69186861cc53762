"""Train an expert with DrQ-v2: python train.py task=reacher_hard [obs=states]

`Workspace` is the project's only RL loop: act, step, store, update, log, evaluate, snapshot and
resume. The imitator (train_ac.py) runs in it as well.
"""
import gc
import signal

if __name__ == '__main__':  # imports take seconds; command_line.main turns both on again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()

import inspect
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf

import command_line
import dmc
import settings
import snapshots
import utils
from drqv2 import DrQV2Agent
from logger import Logger
from replay_buffer import ReplayBuffer
from utils import UserError
from video import VideoRecorder

TRAIN, EVAL = 0, 1  # streams of episode seeds
# Published arguments of `DrQV2Agent`: no settings, but every snapshot keeps them.
FIXED = {'critic_target_tau': 0.01, 'stddev_clip': 0.3, 'update_every_steps': 2}
LONGEST_EPISODE = dmc.MAX_EPISODE_STEPS + 1  # rows in the ring


def check_settings(cfg):
    """Refuse settings with which there is no run (UserError)."""
    settings.check_settings(cfg, 'train')
    check_length(cfg.num_train_frames, cfg.action_repeat)


def check_length(num_train_frames: int, action_repeat: int):
    """Refuse a run without a single step (UserError)."""
    if num_train_frames < action_repeat:
        raise UserError(f'num_train_frames={num_train_frames} is not even one step of '
                        f'{action_repeat} frames: set num_train_frames={action_repeat} or more.')


class Loop(NamedTuple):
    """What the loop takes beside the settings that all scripts with a loop have."""

    action_repeat: int            # frames, that is simulator steps, to an agent's step
    num_seed_frames: int = 0      # before the first update
    nstep: int = 1                # steps of the critic's return
    discount: float = 0.99
    replay_buffer_size: int = 1_000_000


class Inline(Executor):
    """Runs what is submitted at once, in the same thread."""

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


class Workspace:
    """One run in one folder, which goes on from its last snapshot when started again there."""

    def __init__(self, cfg, work_dir: Path, kind: str, train_env, eval_env, make_agent,
                 agent_args: dict, loop: Loop, made_by: dict, last: dict | None,
                 overlap: bool = False):
        """Make the parts of the run and load `last`.

        Args:
          kind: what its snapshots hold, 'expert' or 'imitator'.
          agent_args: what `make_agent` takes beside the device; kept in the snapshot, so that the
            agent can be made again from that alone.
          made_by: plain values to keep in the snapshot: where inputs came from.
          last: the snapshot to go on from, see `snapshots.load_last`.
          overlap: run the update in a thread beside the environment's step, one core each. It pays
            where both take about as long and spend little time in Python (its global lock).

        Raises: UserError where `last` was made with other options or inputs, or the disk is too
          small for what the run will write.
        """
        self.cfg, self.work_dir, self.kind = cfg, work_dir, kind
        self.train_env, self.eval_env = train_env, eval_env
        self.agent_args, self.loop = agent_args, loop
        self.made_by = made_by | loop._asdict() | {key: cfg[key] for key in (
            'seed', 'batch_size', 'num_train_frames', 'snapshot_every_frames')}
        self.snapshot_path = work_dir / 'snapshot.pt'
        self.global_step, self.global_episode, resume = 0, 0, False
        self.num_train_steps = cfg.num_train_frames // loop.action_repeat
        if last:  # checked before the replay buffer's files are touched
            with snapshots.must_fit(self.snapshot_path, 'start a new run'):
                snapshots.require_same_run(work_dir, last, {**agent_args, **self.made_by})
                resume = last['global_step'] < self.num_train_steps

        device = utils.pick_device(cfg.device)
        utils.prepare_cpu()
        utils.set_seed_everywhere(cfg.seed)
        self.agent = make_agent(**agent_args, device=device)
        self.overlap = overlap
        if overlap:
            torch.set_num_threads(1)
        # The run can go back to the last snapshot but one: two intervals, each up to an episode's
        # end, of two rows a step at worst (an episode has one row more than steps); and an episode.
        between = min(cfg.snapshot_every_frames, cfg.num_train_frames) // loop.action_repeat
        slack = 4 * between + 5 * LONGEST_EPISODE
        capacity = min(loop.replay_buffer_size, self.num_train_steps * 21 // 20 + LONGEST_EPISODE)
        spare = snapshots.snapshot_space(  # weights, and Adam's two moments of them
            self.snapshot_path, 3 * snapshots.num_bytes(self.agent.state_dict()))
        if last and not resume:
            capacity, slack, spare = 1, 1, 0  # a finished run has no use for it
        obs_spec = train_env.observation_spec()
        self.replay_buffer = ReplayBuffer(
            work_dir / 'buffer', obs_spec, train_env.action_spec(), capacity, loop.nstep,
            loop.discount, cfg.frame_stack if len(obs_spec.shape) == 3 else 1, slack, cfg.seed,
            device, resume, spare)
        self.elapsed, self.last_eval_step = 0.0, None
        self.stop = utils.Stop()
        self.evaluations = []  # [frame, mean return, standard deviation]
        if last:
            with snapshots.must_fit(self.snapshot_path, 'start a new run'):
                self.load_state(last)
        self.first_step = self.global_step
        self.timer = utils.Timer(self.elapsed)
        self.logger = Logger(work_dir, total=cfg.num_train_frames, resume_step=self.global_frame,
                             use_tb=cfg.use_tb,
                             settings=OmegaConf.to_container(cfg, resolve=True))
        self.video = VideoRecorder(work_dir if cfg.save_video else None)

    @property
    def global_frame(self) -> int:
        return self.global_step * self.loop.action_repeat

    def train(self):
        """Run to the end, or on Ctrl-C and SIGTERM to the end of the current step, with a snapshot.

        Raises: utils.Interrupted where it did not come to the end.
        """
        snapshots.keep_config(self.cfg)
        with self.stop:
            try:
                if self.global_step == 0:
                    self.eval()
                self.run(self.cfg.num_train_frames)
                self.finish()
            except utils.Interrupted:
                if self.stop.asked and self.global_step > self.first_step:  # all is whole
                    self.save_snapshot()
                raise

    def run(self, num_frames: int):
        """Go on until the run has had so many frames in all, from the start of an episode."""
        cfg, repeat = self.cfg, self.loop.action_repeat
        train_until_step = utils.Until(num_frames, repeat)
        seed_until_step = utils.Until(self.loop.num_seed_frames, repeat)
        # a run that was interrupted in an evaluation evaluates after its next episode
        evaluated = self.evaluations[-1][0] // repeat if self.evaluations else 0
        every = [utils.Every(frames, repeat, since) for frames, since in
                 ((cfg.log_every_frames, self.global_step), (cfg.eval_every_frames, evaluated),
                  (cfg.snapshot_every_frames, self.global_step))]
        if not train_until_step(self.global_step):
            return
        time_step = self.start_episode()
        # Whatever ends the loop, no update outlives it.
        with ThreadPoolExecutor(1) if self.overlap else Inline() as executor:
            while train_until_step(self.global_step):
                self.stop.raise_if_asked()  # the broken-off episode is dropped

                # sample an action
                action = self.act(time_step.observation, eval_mode=False)

                # update the agent
                update = None
                if not seed_until_step(self.global_step) and len(self.replay_buffer):
                    update = executor.submit(self.agent.update, self.replay_buffer, cfg.batch_size,
                                             self.global_step)

                # take a step, perhaps beside the update
                time_step = self.train_env.step(action)
                if update:
                    self.logger.log_metrics(update.result(), self.global_frame)
                self.episode_reward += time_step.reward
                self.episode_step += 1
                self.global_step += 1
                self.replay_buffer.add(time_step, action)

                if time_step.last():
                    # Logging, evaluation and snapshots all fall between two episodes: a resumed
                    # run need not restore one that is half played.
                    self.global_episode += 1
                    log_now, eval_now, snapshot_now = [check(self.global_step) for check in every]
                    if log_now or snapshot_now:  # means from before a kill would be lost with it
                        self.log_episode()
                    if eval_now:
                        self.eval()
                    if snapshot_now:
                        self.save_snapshot()
                    time_step = self.start_episode()

    def act(self, obs: np.ndarray, eval_mode: bool) -> np.ndarray:
        """Return the agent's action, (action_dim,); refuse one that is not finite (UserError)."""
        action = self.agent.act(obs, self.global_step, eval_mode)
        if not np.isfinite(action).all():
            raise snapshots.diverged(self.snapshot_path)
        return action

    def start_episode(self):
        self.episode_reward, self.episode_step = 0.0, 0
        self.timer.reset()
        time_step = self.train_env.reset(
            episode_seed=utils.derive_seed(self.cfg.seed, TRAIN, self.global_episode))
        self.replay_buffer.add(time_step)
        return time_step

    def log_episode(self):
        self.logger.log_metrics({
            'fps': self.episode_step * self.loop.action_repeat / self.timer.reset(),
            'episode_reward': self.episode_reward, 'episode_length': self.episode_step,
            'episode': self.global_episode, 'step': self.global_step,
            'buffer_size': len(self.replay_buffer), 'total_time': self.timer.total(),
            **self.train_env.episode_info}, self.global_frame, 'train')
        self.logger.dump(self.global_frame, 'train')

    def play(self, episode: int):
        """Yield the time steps of an evaluation episode: the same start at every evaluation."""
        time_step = self.eval_env.reset(
            episode_seed=utils.derive_seed(self.cfg.seed, EVAL, episode))
        yield time_step
        while not time_step.last():
            self.stop.raise_if_asked()
            action = self.act(time_step.observation, eval_mode=True)
            time_step = self.eval_env.step(action)
            yield time_step

    def eval(self):
        """Evaluate: set `last_eval` (means) and `last_eval_episodes` (one dict an episode), and
        log."""
        self.last_eval_episodes = []
        for episode in range(self.cfg.num_eval_episodes):
            episode_reward = 0.0
            for time_step in self.play(episode):
                if time_step.first():
                    self.video.init(self.eval_env, enabled=episode == 0)
                else:
                    self.video.record(self.eval_env)
                    episode_reward += time_step.reward
            film = self.video.save(f'{self.global_frame}.mp4')
            if film is not None:
                self.logger.log_film(film, self.global_frame)
            self.last_eval_episodes.append({'episode_reward': episode_reward,
                                            **self.eval_env.episode_info})
            self.logger.log_metrics(self.last_eval_episodes[-1], self.global_frame, 'eval')
        self.logger.log_metrics({'total_time': self.timer.total()}, self.global_frame, 'eval')
        self.last_eval_step = self.global_step
        self.last_eval = self.logger.dump(self.global_frame, 'eval')
        returns = [episode['episode_reward'] for episode in self.last_eval_episodes]
        self.evaluations.append(
            [self.global_frame, float(np.mean(returns)), float(np.std(returns))])

    def finish(self):
        """Evaluate and save a last time, then delete the replay buffer."""
        evaluated = bool(self.evaluations) and self.evaluations[-1][0] == self.global_frame
        if self.last_eval_step != self.global_step:
            self.eval()
        if self.global_step > self.first_step or not evaluated:
            self.save_snapshot()
        self.replay_buffer.remove()
        self.logger.close()

    def save_snapshot(self):
        snapshots.save_snapshot(self.snapshot_path, self.kind, self.cfg.task_name, {
            'agent_args': self.agent_args, 'agent': self.agent.state_dict(),
            'made_by': self.made_by, 'replay_buffer': self.replay_buffer.state_dict(),
            'global_step': self.global_step, 'global_episode': self.global_episode,
            'evaluations': self.evaluations, 'elapsed': self.timer.total(),
            'rng': utils.get_rng_states()})

    def load_state(self, state: dict):
        if missing := self.agent.state_dict().keys() - dict(state['agent']).keys():
            raise KeyError(min(missing))
        self.agent.load_state_dict(state['agent'])
        self.global_step, self.global_episode = state['global_step'], state['global_episode']
        if self.global_step < self.num_train_steps:
            self.replay_buffer.load_state_dict(state['replay_buffer'])
        self.elapsed = float(state['elapsed'])
        self.evaluations = [[frame, mean, spread] for frame, mean, spread in state['evaluations']]
        utils.set_rng_states(state['rng'])


def env_args(cfg) -> dict:
    """Return the `dmc.make` arguments; the snapshot keeps them, to make the environment again."""
    return dict(obs=cfg.obs, action_repeat=cfg.action_repeat, frame_stack=cfg.frame_stack,
                im_size=cfg.im_size)


def agent_args(cfg, agent_class: type, env) -> dict:
    """Return what the agent is made with: those settings that its class takes, by their names, and
    the sizes of the environment's observations and actions."""
    names = inspect.signature(agent_class).parameters.keys()
    settings = OmegaConf.to_container(cfg, resolve=True)
    return {**{name: settings[name] for name in sorted(names - {'device'}) if name in settings},
            'obs_shape': list(env.observation_spec().shape),
            'action_dim': env.action_spec().shape[0]}


def make_workspace(cfg, work_dir: Path) -> Workspace:
    check_settings(cfg)
    train_env = dmc.make(cfg.task_name, seed=cfg.seed, **env_args(cfg))
    eval_env = dmc.make(cfg.task_name, seed=cfg.seed, **env_args(cfg))
    if cfg.obs == 'pixels' or cfg.save_video:
        train_env.camera(16)  # where no OpenGL works, say so now
    return Workspace(cfg, work_dir, 'expert', train_env, eval_env, DrQV2Agent,
                     agent_args(cfg, DrQV2Agent, train_env) | FIXED,
                     Loop(**{name: cfg[name] for name in Loop._fields}),
                     {'env_args': env_args(cfg), 'quality': dmc.QUALITY},
                     snapshots.load_last(work_dir, 'expert', cfg.task_name))


@command_line.main('train', dmc.task_names(), check_settings)
def main(cfg):
    with snapshots.only_one_at_work(utils.work_dir()):
        workspace = make_workspace(cfg, utils.work_dir())
        workspace.train()
    print(f'snapshot: {workspace.snapshot_path}\n'
          f'next: python generate_expert_video.py task={cfg.task_name} '
          f"{utils.typed_path('expert', workspace.snapshot_path)}")


if __name__ == '__main__':
    main()
