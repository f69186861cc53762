"""The imitator, whole: its observation, reward, environment, demonstrations and agent.

Imitation is an ordinary RL problem here, so that train.py's loop serves it: track what a
demonstration, translated into the agent's surroundings, would look like.
"""
import copy
import functools
import math
from collections import deque
from pathlib import Path
from typing import NamedTuple

import dm_env
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from dm_env import specs

import dmc
import utils
import video
from contexts import Scenery
from ct_model import ContextTranslator, Dynamics, normed_mlp, to_uint8
from drqv2 import DrQV2Agent
from utils import UserError


class Layout(NamedTuple):
    """Joins and splits the imitator's observation, float32 (..., size).

    In this order: features of the agent's last `num_frames` frames, newest first; the targets, the
    demonstration's features `lookahead` steps ahead, beyond the end its last; the share of the
    horizon that is left, in [0, 1]; the agent's last `num_actions` actions, newest first, zeros
    before the start.
    """

    feature_dim: int
    num_frames: int
    lookahead: tuple[int, ...]
    num_actions: int = 0
    action_dim: int = 0

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of features, targets, time left and actions, without the batch's axes."""
        return ((self.num_frames, self.feature_dim), (len(self.lookahead), self.feature_dim), (1,),
                (self.num_actions, self.action_dim))

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def join(self, features: torch.Tensor, targets: torch.Tensor, left: torch.Tensor,
             actions: torch.Tensor) -> torch.Tensor:
        """Return observations (..., size) of parts (..., num_frames, D), (..., len(lookahead), D),
        (..., 1) and (..., num_actions, A)."""
        return torch.cat([features.flatten(-2), targets.flatten(-2), left, actions.flatten(-2)],
                         dim=-1)

    def split(self, obs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the parts, as views: the inverse of `join`."""
        parts = obs.split([math.prod(shape) for shape in self.shapes], dim=-1)
        return tuple(part.unflatten(-1, shape) for part, shape in
                     zip(parts, self.shapes, strict=True))

    def history(self, episodes: torch.Tensor, i: torch.Tensor, steps: torch.Tensor
                ) -> torch.Tensor:
        """Return features of `episodes` (N, T+1, D), number i (B,), at steps (B,) and before them:
        (B, num_frames, D), newest first."""
        return moments(episodes, i, steps, range(0, -self.num_frames, -1))

    def targets(self, demos: torch.Tensor, i: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return the targets (B, L, D) that demonstrations number i (B,) of (N, T+1, D) show, seen
        from steps (B,)."""
        return moments(demos, i, steps, self.lookahead)


def past_actions(actions: torch.Tensor, i: torch.Tensor, steps: torch.Tensor, num: int
                 ) -> torch.Tensor:
    """Return the last `num` actions before steps (B,) in episodes number i (B,) of (N, T, A):
    (B, num, A), newest first; zeros before the start."""
    at = steps[:, None] - torch.arange(1, num + 1, device=steps.device)
    return actions[i[:, None], at.clamp(min=0)] * (at >= 0)[..., None]


def moments(episodes: torch.Tensor, i: torch.Tensor, steps: torch.Tensor, offsets) -> torch.Tensor:
    """Return features of `episodes` (N, T+1, D), number i (B,), at steps (B,) + offsets (n,):
    (B, n, D); beyond both ends those of the first and the last frame."""
    at = steps[:, None] + torch.tensor(list(offsets), dtype=torch.long, device=steps.device)
    return episodes[i[:, None], at.clamp(0, episodes.shape[1] - 1)]


class Reward(NamedTuple):
    """The tracking reward, in the environment and where transitions are relabelled.

    With `scale` s it is (t/T)^time_power * exp(-d / s), in [0, 1]: about 0 where d is several s
    (Peng et al. 2018, section 5). Without one it is -(t/T)^time_power * d (Liu et al. 2017, section
    V, where time_power is 2). With w_img, `Imitation` adds the distance of images to d. Without
    targets the reward is a discriminator's, see `ACAgent.update_discriminator`.
    """

    scale: float | None = 0.1
    time_power: float = 0.0
    w_feature: float = 1.0

    def distance(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return w_feature times the mean squared difference of features and targets (..., D), in
        units of their variance: (...,)."""
        return self.w_feature * (features - targets).square().mean(-1)

    def __call__(self, distance: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return the reward for distance >= 0 at time t/T in (0, 1]."""
        worth = -distance if self.scale is None else torch.exp(-distance / self.scale)
        return time ** self.time_power * worth


class Translation(NamedTuple):
    """A demonstration in another context: features (T+1, D) float32; images uint8 (T+1, H, W, 3),
    where they were asked for."""

    features: torch.Tensor
    images: np.ndarray | None


def load_translator(path: str | Path, task_name: str, recipe: str, device: torch.device,
                    precision: str) -> tuple[ContextTranslator, dict[str, float]]:
    """Return a translator, ready to answer, and its scores.

    Raises: UserError where it is missing, was made of other pictures or by another recipe.
    """
    retrain = f'python train_ct.py task={task_name}'
    made = utils.load_snapshot(path, 'translator', task_name, remedy=retrain)
    with utils.must_fit(path, retrain):
        utils.require_same_pictures(path, made['made_by']['videos'], made['made_by'].get('quality'),
                                    dmc.CONTEXT_QUALITY, retrain)
        model = utils.rebuild(ContextTranslator, made['model_args'], made['model'])
    if (model.code is None) != (recipe == 'liu2017'):
        raise UserError(f"{path} has {'no' if model.code is None else 'a'} pose code: set "
                        f"recipe={'liu2017' if model.code is None else 'pose_code'}, choose "
                        f'another translator, or {retrain} recipe={recipe}.')
    scores = made.get('scores', {})
    if model.code and 'agreement' not in scores:
        raise UserError(f'{path} has a pose code that was not fitted to the end: go on with that '
                        f'run, {retrain} hydra.run.dir={Path(path).parent}.')
    return model.only_answer(device, utils.PRECISIONS[precision]), scores


class Demonstrations:
    """Videos, and the translator at work on them; each is encoded once, when first needed.

    Features have zero mean and unit variance. With a pose code, which is the same in every context,
    the features of a translation are the source's own codes. Without one (the paper's recipe), they
    are z3 = T(z1, z2), shifted by their mean and divided by one standard deviation.
    """

    def __init__(self, model: ContextTranslator, clips: video.Clips,
                 scale: tuple[list, float] | None = None):
        """Take videos, and a translator that is ready to answer.

        Args:
          scale: another object's `scale`, so that both give the same features.
        """
        self._model, self.clips, self._encoded = model, clips, {}
        self._device = next(model.parameters()).device
        self.feature_dim = model.feature_dim
        self.scale = scale or self._find_scale()
        self._mean = torch.tensor(self.scale[0], device=self._device)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def dynamics(self) -> Dynamics | None:
        """The translator's dynamics of the features; None without a pose code."""
        return self._model.code and self._model.code.dynamics

    def _find_scale(self, num_episodes: int = 50) -> tuple[list, float]:
        """Return the mean of features, in plain numbers, and their standard deviation."""
        if self._model.code:  # has the scale of its own normalisation
            return [0.0] * self.feature_dim, 1.0
        z = torch.cat([self._encode(i).flatten(0, 1).float()
                       for i in range(min(len(self), num_episodes))])
        return z.mean(0).tolist(), float(z.var(0).mean().sqrt())

    def features_of(self, z: torch.Tensor) -> torch.Tensor:
        """Return features (..., D) of z1 or z3 (..., Z)."""
        z = self._model.code(z) if self._model.code else z.float()
        return (z - self._mean) / self.scale[1]

    @torch.no_grad()
    def _encode(self, i: int) -> torch.Tensor:
        """Return z1 (C, T+1, Z) of episode i."""
        if i not in self._encoded:
            frames = torch.from_numpy(np.array(self.clips.frames(i))).to(self._device)
            self._encoded[i] = self._model.encode(frames)
        return self._encoded[i]

    @torch.no_grad()
    def encode(self, frame: np.ndarray) -> torch.Tensor:
        """Return the features, float32 (D,), of a frame, uint8 (H, W, 3)."""
        frames = torch.from_numpy(frame).to(self._device)[None]
        return self.features_of(self._model.encode(frames))[0].cpu()

    @torch.no_grad()
    def features(self) -> torch.Tensor:
        """Return the features of all episodes, the mean over their contexts: float32
        (N, T+1, D)."""
        return torch.stack([self.features_of(self._encode(i)).mean(0).cpu()
                            for i in range(len(self))])

    @torch.no_grad()
    def translate(self, i: int, sources: list[int], first: np.ndarray, images: bool = False
                  ) -> Translation:
        """Translate demonstration i into the context of `first`: the mean over its sources.

        Args:
          first: uint8 (H, W, 3), the agent's first image.
          images: whether to decode it as well, which takes most of the time.
        """
        z, decoded = self._encode(i)[sources], None                                # (n, T+1, Z)
        shape, code = z.shape[:2], self._model.code
        if code:
            features = self.features_of(z)
        if images or not code:
            context = self._model.context(torch.from_numpy(first).to(self._device)[None])
            # The n videos share the context: to the translator they are one clip of n (T+1) frames.
            z = self._model.translate(z.flatten(0, 1)[None], context)         # (1, n (T+1), Z)
            if not code:
                features = self.features_of(z[0].unflatten(0, shape))
        if images:
            decoded = self._model.decode(z, context)[0].unflatten(0, shape)
            decoded = to_uint8(decoded.mean(0)).cpu().numpy()
        return Translation(features.mean(0).cpu(), decoded)

    def image_variance(self) -> float:
        """Return the variance over time of pixels in [0, 1], a mean over demonstrations."""
        return float(np.mean([np.var(np.array(self.clips.frames(i)[0]) / 255.0, axis=0).mean()
                              for i in range(min(len(self), 20))]))


class Start(NamedTuple):
    """The start of an imitator's episode."""

    seed: int                 # of the task's own reset
    context: np.ndarray       # (DIM,), the agent's
    sources: list[int]        # contexts of the demonstration to translate from
    truth: np.ndarray | None  # the demonstration in the agent's context, uint8 (T+1, H, W, 3)


class Imitation(dmc.Wrapper):
    """Imitation as an environment: the agent tracks a translated demonstration.

    `reset` draws a demonstrated episode and one of the contexts in which it was filmed. The agent
    starts from the expert's initial state, in that context. The episode's videos in the other
    contexts are translated into it, given the agent's first image. `start_seed` is the seed of the
    task's own reset. In one's own videos, initial state and context are unknown: the agent starts
    from the reset that looks most like the first frame, in a context drawn anew.

    Observation: see `Layout`. Targets are counted from the demonstration's phase: the agent's own
      step or, with timing='nearest', that step of the demonstration whose last frames are most like
      the agent's (of equals the first). Then the demonstration waits for an agent that is late.
    Reward: see `Reward`; the target is the step after the phase at which the agent acted. w_img
      times the mean squared difference of images, in units of their variance, is added to the
      distance of features.
    Horizon: the episode ends with the demonstration, at step T, with discount 0: there is no value
      to bootstrap from. The observation contains the time left, since the value depends on it
      (Pardo et al. 2018).

    The task's own reward is hidden. With `evaluate`, `episode_info` has its sum (`task_return`), a
    random policy's from the same start (`random_return`), and the mean distance from the
    demonstration at the same step (`distance`); where they are known also `expert_return`, the
    translation's PSNR (`psnr_translation`) and that of the true first frame (`psnr_copy_first`).
    """

    def __init__(self, env, demos: Demonstrations, layout: Layout, reward: Reward, im_size: int,
                 w_img: float = 0.0, timing: str = 'clock', evaluate: bool = False):
        """Take the task's environment, and the demonstrations to track.

        Args:
          env: `dmc.load_suite(..., scenery)`, its actions repeated as the expert's were.
        """
        super().__init__(env)
        self._demos, self._layout, self._reward_of = demos, layout, reward
        self._im_size, self._w_img, self._timing = im_size, w_img, timing
        self._evaluate, self._rng = evaluate, np.random.default_rng(0)
        self._image_var = demos.image_variance() if w_img else None
        self._horizon = demos.clips.frames(0).shape[1] - 1
        self._ended = True
        self._spec = specs.Array((layout.size,), np.float32, 'observation')

    def observation_spec(self):
        return self._spec

    def reset(self, episode_seed: int | None = None):
        """Begin an episode; its demonstration and its context depend on the seed alone."""
        rng = self._rng if episode_seed is None else np.random.default_rng(episode_seed)
        i = int(rng.integers(len(self._demos)))
        demo, clips, start = (self._demos.clips.episode(i), self._demos.clips.frames(i),
                              self._draw_start(i, rng))
        self.episode_info, self.start_seed = {}, start.seed
        if self._evaluate:
            random_return = self._random_return(start.seed)
        self._env.reset(episode_seed=start.seed, context=start.context)
        self._frame = self._env.render(self._im_size)
        self._translation = self._demos.translate(
            i, start.sources, self._frame, images=bool(self._w_img or self._evaluate))
        self._features = deque(maxlen=self._layout.num_frames)
        self._features.extend([self._demos.encode(self._frame)] * self._layout.num_frames)
        self._actions = torch.zeros(self._layout.num_actions, *self.action_spec().shape)
        self._step, self._phase = 0, 0
        self._source, self._ended = clips[start.sources[0]], False
        if self._evaluate:
            self.episode_info = {'task_return': 0.0, 'random_return': random_return,
                                 'distance': 0.0}
            if 'expert_return' in demo:
                self.episode_info['expert_return'] = demo['expert_return']
            if (truth := start.truth) is not None:
                self.episode_info |= {
                    'psnr_translation': video.psnr(video.mse(self._translation.images, truth)),
                    'psnr_copy_first': video.psnr(video.mse(truth[:1], truth))}
        return dm_env.restart(self._observation())

    def _draw_start(self, i: int, rng: np.random.Generator) -> Start:
        clips, demo = self._demos.clips, self._demos.clips.episode(i)
        contexts = range(len(clips.frames(i)))
        if 'episode_seed' in demo:
            own = int(rng.integers(len(contexts)))
            return Start(demo['episode_seed'], np.asarray(demo['contexts'][own]),
                         [c for c in contexts if c != own], clips.frames(i)[own])
        context = self._scenery.sample(rng, clips.meta['contexts'])
        return Start(demo['start_seed'], context, list(contexts), None)

    @functools.cached_property
    def _scenery(self) -> Scenery:
        return Scenery(self._demos.clips.meta['scenery'])

    def _random_return(self, episode_seed: int) -> float:
        rng, total = np.random.default_rng(episode_seed), 0.0
        self._env.reset(episode_seed=episode_seed)
        for _ in range(self._horizon):
            time_step = self._env.step(rng.uniform(-1, 1, self.action_spec().shape))
            total += time_step.reward
            if time_step.last():
                break
        return total

    def step(self, action):
        if self._ended:
            return self.reset()
        time_step = self._env.step(action)
        newest = torch.as_tensor(action, dtype=torch.float32)[None]
        self._actions = torch.cat([newest, self._actions])[:self._layout.num_actions]
        self._step += 1
        self._frame = self._env.render(self._im_size)
        self._features.appendleft(self._demos.encode(self._frame))
        if self._evaluate:
            self.episode_info['task_return'] += time_step.reward
            off = self._features[0] - self._translation.features[self._step]
            self.episode_info['distance'] += float(off.square().mean()) / self._horizon
        reward = self._reward()  # for tracking what was seen before the action
        self._phase = self._step if self._timing == 'clock' else self._nearest_phase()
        observation = self._observation()
        if self._step == self._horizon or time_step.last():
            self._ended = True
            return dm_env.termination(reward, observation)
        return dm_env.transition(reward, observation)

    def _nearest_phase(self) -> int:
        """Return the demonstration's step at which it is most like the agent's last frames."""
        steps = torch.arange(self._horizon + 1)
        shown = self._layout.history(self._translation.features[None], torch.zeros_like(steps),
                                     steps)
        return int((shown - torch.stack(list(self._features))).square().mean((1, 2)).argmin())

    def _reward(self) -> float:
        step = min(self._phase + 1, self._horizon)
        target = self._translation.features[step]
        distance = self._reward_of.distance(self._features[0], target)
        if self._w_img:
            distance += (self._w_img / self._image_var
                         * video.mse(self._frame, self._translation.images[step]))
        return float(self._reward_of(distance, torch.tensor(self._step / self._horizon)))

    def _observation(self) -> np.ndarray:
        targets = self._layout.targets(self._translation.features[None], torch.tensor([0]),
                                       torch.tensor([self._phase]))[0]
        left = torch.tensor([1 - self._step / self._horizon])
        return self._layout.join(torch.stack(list(self._features)), targets, left, self._actions
                                 ).numpy()

    def panels(self, im_size: int) -> dict[str, np.ndarray]:
        """Return what a video of the episode shows side by side: caption -> uint8 (H, W, 3).

        Images have the translator's size; `im_size` is ignored.
        """
        return {'expert, source context': self._source[self._step],
                'translation': self._translation.images[self._step],
                'imitator, target context': self._frame}


def make_env(demos: Demonstrations, num_frames: int, lookahead: list[int], num_actions: int,
             reward: Reward, w_img: float = 0.0, timing: str = 'clock', evaluate: bool = False
             ) -> Imitation:
    """Return the `Imitation` of the demonstrations' task, with their scenery and action repeat.

    Args:
      num_frames, lookahead, num_actions: see `Layout`.
      reward, w_img, timing, evaluate: see `Imitation`.

    Raises: UserError for one's own videos whose starts were not looked for.
    """
    clips, meta = demos.clips, demos.clips.meta
    if clips.imported and not all('start_seed' in clips.episode(i) for i in range(len(clips))):
        raise UserError(f'{clips.root} comes from an earlier version, which did not look for '
                        "starts: remove it, and python generate_expert_video.py "
                        f"task={meta['task']} from_mp4=<folder> out_dir={clips.root.parent}.")
    env = dmc.ActionRepeat(dmc.load_suite(meta['task'], Scenery(meta['scenery'])),
                           meta['action_repeat'])
    layout = Layout(demos.feature_dim, num_frames, tuple(lookahead), num_actions,
                    env.action_spec().shape[0])
    return Imitation(env, demos, layout, reward, meta['im_size'], w_img, timing, evaluate)


def seen_from_now(history: torch.Tensor) -> torch.Tensor:
    """Return features (..., num_frames, D), newest first, in the same shape: the older ones become
    how they have moved since."""
    now = history[..., :1, :]
    return torch.cat([now, history[..., 1:, :] - now], dim=-2)


class TrackingEncoder(nn.Module):
    """The observation, seen from the agent's present: (B, n) -> (B, n).

    The newest features stay; the older ones become how they have moved since, and the targets what
    is still missing. Which way to go is then an input, not a small difference of large inputs.
    """

    def __init__(self, layout: Layout):
        super().__init__()
        self.repr_dim, self._layout = layout.size, layout

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        features, targets, left, actions = self._layout.split(obs)
        return self._layout.join(seen_from_now(features), targets - features[..., :1, :], left,
                                 actions)


class Play(NamedTuple):
    """Episodes of play: features (M, T+1, D) and the agent's own actions (M, T, A)."""

    features: torch.Tensor
    actions: torch.Tensor


def encode_play(model: ContextTranslator, clips: video.Clips, scale: tuple[list, float]) -> Play:
    """Encode a split of play.

    Args:
      scale: that of the demonstrations, see `Demonstrations`.
    """
    actions = np.array([clips.episode(i)['actions'] for i in range(len(clips))], np.float32)
    return Play(Demonstrations(model, clips, scale).features(), torch.from_numpy(actions))


class ACAgent(DrQV2Agent):
    """Learns from demonstrations without actions and from its own steps; never from task rewards.

    An inverse model is fitted to what the agent's own actions did, in play and since. It says with
    which actions the agent would do what a demonstration shows, and the actor clones these (Torabi
    et al. 2018, BCO): as both go on while the agent acts, the inverse model comes to know what
    happens where the demonstrations are. The actor that acts and the inverse model that labels are
    running means of the trained weights (Polyak and Juditsky 1992), so that learning rates can stay
    constant.

    Beside this, the actor can practise in imagination (with `w_imagine`): it acts for a few steps
    in the translator's `Dynamics`, which are fitted further to its own steps, and its gradient
    passes through them (Heess et al. 2015, SVG). It starts from demonstrated moments, whose targets
    go by the clock, and from its own, with the targets that it had there. DrQ-v2's critic can learn
    how well targets are tracked, and the actor climb it (with `w_critic`).

    Reward depends only on the observation, and targets not on actions, so the critic's transitions
    can be relabelled (hindsight experience replay, Andrychowicz et al. 2017): a share of each batch
    gets targets, clock and reward of other transitions; another share has as its targets what the
    agent achieved itself. With timing='nearest' targets do depend on actions: those of the next
    observation are then what another agent saw next, an approximation.

    Without targets (`lookahead` is empty) there is nothing to track. The critic's reward is then
    the probability, by a discriminator, that the frames after an action are a demonstration's and
    not the agent's own (Torabi et al. 2018b, GAIfO). Its transitions come from play and replay.
    """

    NUM_AHEAD = 3  # frames after an action that the inverse model sees: a contact shows late
    MEAN_RATE = 0.002  # rate of the running means, which average over some 500 updates
    SLOPE_WEIGHT = 0.1  # keeps the discriminator smooth, so that being nearer pays
    # of lr, for discriminator and dynamics: critic and actor have to follow them
    LR_SHARE = 0.3
    NUM_ROLLOUTS = 96  # imagined at each update, a multiple of the dynamics' members
    NUM_IMAGINED = 8  # steps of each: what a push brings about shows late

    def __init__(self, obs_shape, action_dim: int, feature_dim_of_frame: int, num_frames: int,
                 lookahead: list[int], num_actions: int = 0, reward_scale: float | None = 0.1,
                 time_power: float = 0.0, w_feature: float = 1.0, w_critic: float = 1.0,
                 w_clone: float = 0.0, w_imagine: float = 0.0, max_shift: int = 0,
                 num_pretrain_updates: int = 0, relabel: float = 0.0, hindsight: float = 0.0,
                 discount: float = 0.98, lr: float = 1e-4, hidden_dim: int = 512,
                 demos: torch.Tensor | None = None, play: Play | None = None,
                 dynamics: Dynamics | None = None, **drqv2_args):
        """Make the agent; it learns only where it is given demonstrations and play.

        Args:
          obs_shape: (n,), of the flat observation.
          feature_dim_of_frame, num_frames, lookahead, num_actions: see `Layout`.
          reward_scale, time_power, w_feature: see `Reward`.
          w_critic, w_clone, w_imagine: weights of the critic's value, of cloning and of imagined
            reward in the actor's loss; 0 leaves the term out. w_imagine takes w_clone, num_frames
            of at least `Dynamics.HISTORY`, and 1 as the first of `lookahead`; its reward has no
            images.
          max_shift: steps by which the targets of a cloned moment are shifted at most, uniformly.
            The agent is seldom exactly on time. In imagination targets are 0 to so many steps
            ahead of it.
          num_pretrain_updates: updates before the first ordinary one, from play and demonstrations
            only. They train inverse model, dynamics and actor; with a discriminator also it and
            the critic.
          relabel: the share of transitions that get targets of others.
          hindsight: the share whose targets are what the agent achieved. Both take 1 as the first
            of `lookahead`, and 1-step returns.
          discount: of the critic where its reward is the discriminator's; elsewhere the replay
            buffer's.
          lr, hidden_dim: of actor, critic, inverse model and discriminator.
          demos: float32 (N, T+1, D), to be cloned.
          dynamics: those of the features, which are copied and fitted further; None: new ones.
          drqv2_args: see `DrQV2Agent`.
        """
        self._layout = Layout(feature_dim_of_frame, num_frames, tuple(lookahead), num_actions,
                              action_dim)
        self._reward = Reward(reward_scale, time_power, w_feature)
        self._w_critic, self._w_clone, self._w_imagine = w_critic, w_clone, w_imagine
        self._max_shift = max_shift
        self._num_pretrain_updates, self._num_updates = num_pretrain_updates, 0
        self._replay_buffer = None  # of the update that is going on: the actor's loss draws from it
        self._relabel, self._hindsight, self._discount = relabel, hindsight, discount
        self.discriminates = bool(w_critic and w_clone and not lookahead)
        # without targets it does not learn from the loop's reward
        self.pursues_reward = bool(lookahead)
        if self.discriminates:
            # At least half of the critic's batch is play. With layer normalisation it does not
            # overestimate actions absent from play (Ball et al. 2023).
            self.mlp = normed_mlp
        super().__init__(obs_shape, action_dim, lr=lr, hidden_dim=hidden_dim, **drqv2_args)
        if w_clone:
            in_dim = feature_dim_of_frame * (num_frames + self.NUM_AHEAD)
            self.inverse = normed_mlp(in_dim, hidden_dim, action_dim).to(self.device)
            self.inverse_opt = torch.optim.Adam(self.inverse.parameters(), lr=lr, fused=True)
            self.policy, self.labeller = (copy.deepcopy(net).requires_grad_(False)
                                          for net in (self.actor, self.inverse))
            self._parts = (*self._parts, 'policy', 'inverse', 'inverse_opt', 'labeller')
            if w_imagine:
                self.dynamics = (copy.deepcopy(dynamics)
                                 or Dynamics(feature_dim_of_frame, action_dim)
                                 ).to(self.device).requires_grad_(True)
                self.dynamics_opt = torch.optim.Adam(self.dynamics.parameters(),
                                                     lr=lr * self.LR_SHARE, fused=True)
                self._parts = (*self._parts, 'dynamics', 'dynamics_opt')
            if self.discriminates:
                in_dim = feature_dim_of_frame * num_frames
                self.discriminator = normed_mlp(in_dim, hidden_dim, 1).to(self.device)
                self.discriminator_opt = torch.optim.Adam(
                    self.discriminator.parameters(), lr=lr * self.LR_SHARE, fused=True)
                self._parts = (*self._parts, 'discriminator', 'discriminator_opt')
            if demos is not None:
                self._demos = demos.to(self.device)
                self._play = Play(*(part.to(self.device) for part in play))

    def make_encoder(self, obs_shape: tuple[int, ...]) -> nn.Module:
        return TrackingEncoder(self._layout)

    def state_dict(self) -> dict:
        return {**super().state_dict(), 'num_updates': self._num_updates}

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)
        self._num_updates = state.get('num_updates', 0)

    def update(self, replay_buffer, batch_size: int, step: int) -> dict[str, torch.Tensor]:
        """Update all parts once in every `update_every_steps` steps, and return metrics."""
        if step % self.update_every_steps:
            return {}
        if self._w_clone and not self._num_updates:
            for _ in range(self._num_pretrain_updates):
                self._update(None, batch_size, step, self.discriminates)
        self._num_updates += 1
        return self._update(replay_buffer, batch_size, step, self._w_critic)

    def _update(self, replay_buffer, batch_size: int, step: int, with_critic) -> dict:
        """Update inverse model, dynamics and discriminator, then critic and actor, or the actor
        without a critic, and return metrics."""
        self._replay_buffer = replay_buffer
        metrics = self.update_inverse(replay_buffer, batch_size) if self._w_clone else {}
        if self._w_imagine:
            metrics |= self.update_dynamics(replay_buffer, batch_size)
        if with_critic and self.discriminates:
            metrics |= self.update_discriminator(replay_buffer, batch_size)
        if with_critic:
            return metrics | super().update(replay_buffer, batch_size, step)
        return metrics | self.update_without_critic(batch_size)

    # ------------------------------------------------------------- inverse model and cloning

    @staticmethod
    def _infer_actions(inverse: nn.Module, history: torch.Tensor, later: torch.Tensor
                       ) -> torch.Tensor:
        """Return the actions (B, A) after the newest of features (B, num_frames, D), newest first,
        given what came next (B, NUM_AHEAD, D)."""
        seen = torch.cat([seen_from_now(history), later - history[:, :1]], dim=1)
        return inverse(seen.flatten(1)).tanh()

    def _own_moments(self, replay_buffer, batch_size: int):
        """Sample the agent's own steps: from play only while the replay buffer is empty, then half
        from each, since replay is nearer to the demonstrations.

        Returns: history (B, num_frames, D), later (B, NUM_AHEAD, D), the action (B, A) and those
          before it (B, num_actions, A)."""
        n = batch_size // 2 if replay_buffer is not None and len(replay_buffer) else batch_size
        ahead = range(1, self.NUM_AHEAD + 1)
        i = torch.randint(len(self._play.features), (n,), device=self.device)
        steps = torch.randint(self._play.actions.shape[1], (n,), device=self.device)
        parts = [(self._layout.history(self._play.features, i, steps),
                  moments(self._play.features, i, steps, ahead),
                  self._play.actions[i, steps],
                  past_actions(self._play.actions, i, steps, self._layout.num_actions))]
        if n < batch_size:
            obs, action, _, _, _, *later = replay_buffer.sample(batch_size - n, ahead=tuple(ahead))
            newest = [self._layout.split(each)[0][:, 0] for each in later]
            seen, _, _, before = self._layout.split(obs)
            parts.append((seen, torch.stack(newest, dim=1), action, before))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def update_inverse(self, replay_buffer, batch_size: int) -> dict[str, torch.Tensor]:
        """Fit the inverse model to the agent's own steps."""
        history, later, action, _ = self._own_moments(replay_buffer, batch_size)
        loss = action_loss(self._infer_actions(self.inverse, history, later), action)
        self.inverse_opt.zero_grad(set_to_none=True)
        loss.backward()
        self.inverse_opt.step()
        self._update_mean(self.labeller, self.inverse, self.inverse_opt)
        return {'inverse_loss': loss.detach()}

    @torch.no_grad()
    def _label(self, i: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return the actions (B, A) of demonstrations number i (B,) at steps (B,), zeros before the
        start."""
        history = self._layout.history(self._demos, i, steps)
        later = moments(self._demos, i, steps, range(1, self.NUM_AHEAD + 1))
        return self._infer_actions(self.labeller, history, later) * (steps >= 0)[:, None]

    def _labels(self, i: torch.Tensor, steps: torch.Tensor, num: int) -> torch.Tensor:
        """Return `num` actions (B, num, A), those at steps (B,) and before, newest first."""
        labels = torch.zeros(len(i), num, self._play.actions.shape[-1], device=self.device)
        for back in range(num):
            labels[:, back] = self._label(i, steps - back)
        return labels

    def clone_loss(self, batch_size: int) -> torch.Tensor:
        """Return how far the actor is from what the inverse model reads out of demonstrations,
        0-d."""
        demos, layout = self._demos, self._layout
        i = torch.randint(len(demos), (batch_size,), device=self.device)
        steps = torch.randint(demos.shape[1] - 1, (batch_size,), device=self.device)
        history = layout.history(demos, i, steps)
        labels = self._labels(i, steps, layout.num_actions + 1)
        shift = torch.randint(-self._max_shift, self._max_shift + 1, (batch_size,),
                              device=self.device)
        targets = layout.targets(demos, i, steps + shift)
        left = torch.rand(batch_size, 1, device=self.device)  # actions must not depend on the clock
        features = self.encoder(layout.join(history, targets, left, labels[:, 1:]))
        return action_loss(self.actor(features, 0.0).mean, labels[:, 0])

    @torch.no_grad()
    def _update_mean(self, mean: nn.Module, net: nn.Module, optimizer):
        """Update the running mean of a network's weights. At first it is the plain mean over all
        updates, so that the initial weights have no part in it."""
        num_updates = float(optimizer.state[next(net.parameters())]['step'])
        torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()),
                             max(self.MEAN_RATE, 1 / num_updates))

    def step_actor(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        metrics = super().step_actor(loss)
        if self._w_clone:
            self._update_mean(self.policy, self.actor, self.actor_opt)
        return metrics

    def loss_without_critic(self, batch_size: int) -> torch.Tensor:
        """Return the actor's loss without a critic, 0-d: of cloning and of imagination."""
        loss = self._w_clone * self.clone_loss(batch_size)
        if self._w_imagine:
            loss = loss - self._w_imagine * self.imagined_reward(self._replay_buffer)
        return loss

    def update_without_critic(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Update the actor once, without a critic."""
        return self.step_actor(self.loss_without_critic(batch_size))

    # ---------------------------------------------------------------------------- imagination

    def update_dynamics(self, replay_buffer, batch_size: int) -> dict[str, torch.Tensor]:
        """Fit the dynamics further, to the agent's own steps."""
        history, later, action, _ = self._own_moments(replay_buffer, batch_size)
        codes = history[:, :self.dynamics.HISTORY].flip(1)
        loss = (self.dynamics.rollout(codes, action[:, None]) - later[:, :1]).square().mean()
        self.dynamics_opt.zero_grad(set_to_none=True)
        loss.backward()
        self.dynamics_opt.step()
        return {'dynamics_loss': loss.detach()}

    def _imagined_starts(self, replay_buffer) -> tuple[torch.Tensor, list, torch.Tensor]:
        """Sample where to imagine from: demonstrations only while the replay buffer is empty, then
        half from each.

        Returns: history (B, num_frames, D), the targets (B, L, D) of each step, and the actions
          before (B, num_actions, A)."""
        n, demos, layout = self.NUM_ROLLOUTS, self._demos, self._layout
        has_replay = replay_buffer is not None and len(replay_buffer)
        if has_replay:
            n //= 2
        i = torch.randint(len(demos), (n,), device=self.device)
        steps = torch.randint(demos.shape[1] - 1, (n,), device=self.device)
        late = torch.randint(self._max_shift + 1, (n,), device=self.device)
        history = layout.history(demos, i, steps)
        targets = [layout.targets(demos, i, steps + late + step)
                   for step in range(self.NUM_IMAGINED)]
        before = self._labels(i, steps - 1, layout.num_actions)
        if has_replay:
            obs, _, _, _, _, *later = replay_buffer.sample(
                self.NUM_ROLLOUTS - n, ahead=tuple(range(1, self.NUM_IMAGINED)))
            seen, _, _, own_before = layout.split(obs)
            history, before = torch.cat([history, seen]), torch.cat([before, own_before])
            targets = [torch.cat([shown, layout.split(each)[1]])
                       for shown, each in zip(targets, (obs, *later), strict=True)]
        return history, targets, before

    def imagined_reward(self, replay_buffer) -> torch.Tensor:
        """Return the mean reward of imagined steps, 0-d, with a gradient for the actor. The time
        left is random and stays: actions must not depend on the clock."""
        layout = self._layout
        history, targets, before = self._imagined_starts(replay_buffer)
        left, total = torch.rand(len(history), 1, device=self.device), 0.0
        for target in targets:
            features = self.encoder(layout.join(history, target, left, before))
            action = self.actor(features, 0.0).mean
            newest = self.dynamics.by_turns(history[:, :self.dynamics.HISTORY].flip(1), action)
            distance = self._reward.distance(newest, target[:, 0])
            total = total + self._reward(distance, 1 - left[:, 0]).mean()
            history = torch.cat([newest[:, None], history[:, :-1]], dim=1)
            before = torch.cat([action[:, None], before], dim=1)[:, :layout.num_actions]
        return total / len(targets)

    # -------------------------------------------------------------------------- discriminator

    def _draw_own(self, replay_buffer, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Sample as `draw` does, with the discriminator's probability as the reward. The time left
        is random, so that nothing depends on it, and no episode ends."""
        history, later, action, before = self._own_moments(replay_buffer, batch_size)
        none, left = later[:, :0], torch.rand(len(later), 1, device=later.device)
        obs = self._layout.join(history, none, left, before)
        history = torch.cat([later[:, :1], history[:, :-1]], dim=1)
        before = torch.cat([action[:, None], before], dim=1)[:, :self._layout.num_actions]
        next_obs = self._layout.join(history, none, left, before)
        with torch.no_grad():
            reward = self._logit(history).sigmoid()
        return obs, action, reward, torch.full_like(reward, self._discount), next_obs

    def _logit(self, history: torch.Tensor) -> torch.Tensor:
        """Return the discriminator's logit (B, 1) of features (B, num_frames, D), newest first:
        positive means 'a demonstration'."""
        return self.discriminator(seen_from_now(history).flatten(1))

    def update_discriminator(self, replay_buffer, batch_size: int) -> dict[str, torch.Tensor]:
        """Train the discriminator to tell demonstrations from the agent's own steps, with a penalty
        on its slope between the two (Gulrajani et al. 2017)."""
        own, *_ = self._own_moments(replay_buffer, batch_size)
        i = torch.randint(len(self._demos), (batch_size,), device=self.device)
        # The later of two: early moments show more of the start than of the task.
        steps = torch.randint(self._demos.shape[1], (2, batch_size), device=self.device).amax(0)
        shown = self._layout.history(self._demos, i, steps)
        between = torch.lerp(own, shown, torch.rand_like(own[:, :1, :1])).requires_grad_()
        slope, = torch.autograd.grad(self._logit(between).sum(), between, create_graph=True)
        loss = (F.softplus(-self._logit(shown)).mean() + F.softplus(self._logit(own)).mean()
                + self.SLOPE_WEIGHT * slope.square().sum((1, 2)).mean())
        self.discriminator_opt.zero_grad(set_to_none=True)
        loss.backward()
        self.discriminator_opt.step()
        return {'discriminator_loss': loss.detach()}

    # --------------------------------------------------------------------------------- critic

    def _ends(self, batch_size: int) -> tuple[int, int]:
        """Return n, m: rows [0, n) of a batch are relabelled, rows [n, m) get hindsight targets."""
        n = round(self._relabel * batch_size)
        return n, n + round(self._hindsight * batch_size)

    def draw(self, replay_buffer, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Sample obs (B, n), action (B, A), reward (B, 1), discount (B, 1) and next_obs (B, n), all
        float32: the first relabelled, those after them in hindsight, see `_ends`."""
        if self.discriminates:
            return self._draw_own(replay_buffer, batch_size)
        layout = self._layout
        steps = sorted({step + more for step in layout.lookahead for more in (0, 1)})
        obs, action, reward, discount, next_obs, *later = replay_buffer.sample(
            batch_size, ahead=steps if self._hindsight else ())
        n, m = self._ends(batch_size)
        other = torch.randperm(n, device=obs.device)
        for x in (obs, next_obs):
            _, targets, left, _ = layout.split(x)
            targets[:n], left[:n] = targets[other], left[other]
        discount[:n] = discount[other]

        if later:
            achieved = {step: layout.split(x[n:m])[0][:, 0]
                        for step, x in zip(steps, later, strict=True)}
            for x, more in ((obs, 0), (next_obs, 1)):
                layout.split(x)[1][n:m] = torch.stack(
                    [achieved[step + more] for step in layout.lookahead], dim=1)
        if m:
            target = layout.split(obs[:m])[1][:, 0]
            features, _, left, _ = layout.split(next_obs[:m])
            distance = self._reward.distance(features[:, 0], target)[:, None]
            reward[:m] = self._reward(distance, 1 - left)
        return obs, action, reward, discount, next_obs

    def actor_loss(self, features, dist) -> torch.Tensor:
        q = torch.min(*self.critic(features, dist.sample(self.stddev_clip)))
        if not self._w_clone:
            return -self._w_critic * q.mean()
        # Values in units of their size, so that neither term drowns the other (Fujimoto and Gu
        # 2021, TD3+BC).
        value = q.mean() / q.abs().mean().detach().clamp(min=1e-3)
        return self.loss_without_critic(len(features)) - self._w_critic * value


def action_loss(predicted: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Return the Huber loss, 0-d: absolute error, squared below 0.1. Experts often act at the
    bounds, and a squared error would blur where they switch."""
    return F.smooth_l1_loss(predicted, action, beta=0.1)


def complete(made: dict):
    """Add to an imitator's snapshot what an older one does not say."""
    made['made_by'].setdefault('timing', 'clock')
    made['agent_args'].setdefault('w_imagine', 0.0)


def load_imitator(path: str | Path, translator: str | Path, videos: str | Path, task_name: str,
                  evaluate: bool = False) -> tuple[Imitation, ACAgent]:
    """Return an imitator's environment with these demonstrations, and the imitator, to act on the
    CPU.

    Args:
      path: its snapshot; translator: the one that it was trained with.
      videos: the split to imitate.
      evaluate: see `Imitation`.

    Raises: UserError where one of them is missing, or they do not go together.
    """
    retrain = f'python train_ac.py task={task_name}'
    made = utils.load_snapshot(path, 'imitator', task_name, remedy=retrain)
    with utils.must_fit(path, retrain):
        complete(made)
        args, made_by = made['agent_args'], made['made_by']
        agent = utils.rebuild(ACAgent, args, made['agent'])
        recipe, repeat, translator_sha256, scale, w_img, timing = (made_by[key] for key in (
            'recipe', 'action_repeat', 'translator_sha256', 'scale', 'w_img', 'timing'))
        layout = [args[key] for key in ('num_frames', 'lookahead', 'num_actions')]
        reward = Reward(args['reward_scale'], args['time_power'], args['w_feature'])
    if 'oracle' in made_by:  # see benchmarks/oracles.py
        raise UserError(f'{path} was trained by an oracle, which sees what an imitator never has: '
                        'choose a run of train_ac.py.')
    model, _ = load_translator(translator, task_name, recipe, torch.device('cpu'),
                               args['precision'])
    if utils.sha256(translator) != translator_sha256:
        raise UserError(f'{path} was trained with another translator than {translator}: set '
                        'translator to that one.')
    clips = video.Clips(videos, task_name, model.im_size, dmc.CONTEXT_QUALITY)
    meta = clips.meta
    if meta['action_repeat'] != repeat or meta['num_contexts'] < clips.min_contexts:
        raise UserError(f"{videos} was filmed with action_repeat={meta['action_repeat']} in "
                        f"{meta['num_contexts']} contexts, and {path} takes action_repeat={repeat} "
                        'and two or more: choose another imitator, or film anew.')
    env = make_env(Demonstrations(model, clips, scale), *layout, reward, w_img, timing, evaluate)
    return env, agent
