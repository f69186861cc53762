"""Imitation as an ordinary RL environment, so that train.py's loop serves it: demonstrations, the
translator at work on them, what the agent sees of them, the paper's reward."""
from pathlib import Path
from typing import NamedTuple

import dm_env
import numpy as np
import torch
from dm_env import specs

import dmc
import snapshots
import utils
import video
from contexts import Scenery
from ct_model import ContextTranslator, to_uint8
from utils import UserError

HISTORY = 3      # codes that the agent sees of itself: a pose, its velocity and acceleration
NUM_ACTIONS = 2  # of its own last actions, which tell what codes show badly
LOOKAHEAD = (1, 2, 3, 5, 8, 12)  # steps from the present to each target


def moments(episodes: torch.Tensor, i: torch.Tensor, steps: torch.Tensor, offsets) -> torch.Tensor:
    """Return codes of `episodes` (N, T+1, D), number i (B,), at steps (B,) + offsets (n,):
    (B, n, D); beyond both ends the first and the last one."""
    at = steps[:, None] + torch.tensor(list(offsets), dtype=torch.long, device=steps.device)
    return episodes[i[:, None], at.clamp(0, episodes.shape[1] - 1)]


def draw_moments(episodes: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw numbers and steps (num,) of moments of `episodes` (N, T+1, D), none of them the last."""
    return tuple(torch.randint(high, (num,), device=episodes.device)
                 for high in (len(episodes), episodes.shape[1] - 1))


def histories(episodes: torch.Tensor, i: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return the last codes up to steps (B,), (B, HISTORY, D), newest first, see `moments`."""
    return moments(episodes, i, steps, range(0, -HISTORY, -1))


def from_now(history: torch.Tensor) -> torch.Tensor:
    """Return codes (..., HISTORY, D) as networks see them: the newest one, and how the older ones
    differ from it."""
    now = history[..., :1, :]
    return torch.cat([now, history[..., 1:, :] - now], dim=-2)


class Layout(NamedTuple):
    """Joins and splits the imitator's observation, float32 (..., size).

    In this order: the agent's last codes, see `from_now`; how targets differ from its newest code;
    its last actions, newest first, zeros before the start.
    """

    code_dim: int
    action_dim: int

    @classmethod
    def of(cls, size: int, action_dim: int) -> 'Layout':
        """Return the layout of observations of this size."""
        return cls((size - NUM_ACTIONS * action_dim) // (HISTORY + len(LOOKAHEAD) + 1), action_dim)

    @property
    def size(self) -> int:
        return self.num_seen + NUM_ACTIONS * self.action_dim

    @property
    def num_seen(self) -> int:
        """Numbers before the actions: what can be seen of a demonstration, too."""
        return (HISTORY + len(LOOKAHEAD) + 1) * self.code_dim

    def join(self, history: torch.Tensor, targets: torch.Tensor, *actions: torch.Tensor
             ) -> torch.Tensor:
        """Join codes (..., HISTORY, D), targets (..., n, D), and actions (..., NUM_ACTIONS, A)."""
        parts = from_now(history), targets - history[..., :1, :], *actions
        return torch.cat([part.flatten(-2) for part in parts], dim=-1)

    def split(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (..., HISTORY, D) and actions (..., NUM_ACTIONS, A)."""
        codes = obs[..., :HISTORY * self.code_dim].unflatten(-1, (HISTORY, self.code_dim))
        actions = obs[..., self.num_seen:].unflatten(-1, (NUM_ACTIONS, self.action_dim))
        return torch.cat([codes[..., :1, :], codes[..., 1:, :] + codes[..., :1, :]], -2), actions


class Guide:
    """Shows an agent demonstrations, float32 (N, T+1, D).

    The agent sees what comes after the moment that is nearest to its own last codes. There is no
    clock: any moment of any episode can be paired with any demonstration.
    """

    def __init__(self, demos: torch.Tensor):
        self.demos = demos
        before = [demos[:, :1].expand(-1, back, -1) for back in range(HISTORY)]  # the start
        self._histories = torch.cat([torch.cat([start, demos], 1)[:, :demos.shape[1]]
                                     for start in before], dim=2)

    def nearest(self, i: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Return the steps (B,) at which demonstrations number i (B,) are nearest to histories
        (B, HISTORY, D), by the mean square; of equals the first."""
        off = self._histories[i] - history.flatten(1)[:, None]
        return off.square_().mean(2).argmin(1)

    def targets(self, i: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return the codes of demonstrations number i (B,) at steps (B,) + LOOKAHEAD, and their
        last: (B, len(LOOKAHEAD) + 1, D)."""
        return torch.cat([moments(self.demos, i, steps, LOOKAHEAD), self.demos[i, -1:]], dim=1)

    def shown(self, i: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Return the `targets` of agents with histories (B, HISTORY, D)."""
        return self.targets(i, self.nearest(i, history))


class Translation(NamedTuple):
    """A demonstration in another context."""

    features: torch.Tensor      # float32 (T+1, D)
    images: np.ndarray | None   # uint8 (T+1, H, W, 3), if they were asked for


def load_translator(path: str | Path, task_name: str, recipe: str, device: torch.device,
                    precision: str) -> tuple[ContextTranslator, dict[str, float]]:
    """Return a translator, ready to answer, and its scores.

    Raises: UserError if it is missing, or was made of other pictures or by another recipe.
    """
    retrain = f'python train_ct.py task={task_name}'
    made = snapshots.load_snapshot(path, 'translator', task_name, remedy=retrain)
    with snapshots.must_fit(path, retrain):
        made_by, quality = made['made_by'], dmc.CONTEXT_QUALITY
        snapshots.require_same_pictures(path, made_by['videos'], made_by.get('quality'), quality,
                                        retrain)
        model = snapshots.rebuild(ContextTranslator, made['model_args'], made['model'])
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

    Features have zero mean and unit variance. A pose code is the same in every context, so it is
    taken from the source. Without one (the paper's recipe) features are z3 = T(z1, z2), less their
    mean and divided by one standard deviation: `scale`, which may be another object's.
    """

    def __init__(self, model: ContextTranslator, clips: video.Clips,
                 scale: tuple[list, float] | None = None):
        self._model, self.clips, self._encoded = model, clips, {}
        self._device = next(model.parameters()).device
        self.feature_dim = model.feature_dim
        self.scale = scale or self._find_scale()
        self._mean = torch.tensor(self.scale[0], device=self._device)

    def __len__(self) -> int:
        return len(self.clips)

    def _find_scale(self, num_episodes: int = 50) -> tuple[list, float]:
        """Return the mean of features, in plain numbers, and their standard deviation."""
        if self._model.code:  # has the scale of its own normalisation
            return [0.0] * self.feature_dim, 1.0
        z = torch.cat([self._encode(i).flatten(0, 1) for i in range(len(self))[:num_episodes]])
        return z.float().mean(0).tolist(), float(z.float().var(0).mean().sqrt())

    def features_of(self, z: torch.Tensor) -> torch.Tensor:
        """Return features (..., D) of z1 or z3 (..., Z)."""
        z = self._model.code(z) if self._model.code else z.float()
        return (z - self._mean) / self.scale[1]

    @torch.no_grad()
    def _encode(self, i: int) -> torch.Tensor:
        """Return z1 (C, T+1, Z) of episode i."""
        if i not in self._encoded:
            frames = torch.from_numpy(np.array(self.clips.frames(i)))
            self._encoded[i] = self._model.encode(frames.to(self._device))
        return self._encoded[i]

    @torch.no_grad()
    def encode(self, frame: np.ndarray) -> torch.Tensor:
        """Return the features, float32 (D,), of a frame, uint8 (H, W, 3)."""
        frames = torch.from_numpy(frame).to(self._device)[None]
        return self.features_of(self._model.encode(frames))[0].cpu()

    @torch.no_grad()
    def features(self) -> torch.Tensor:
        """Return all episodes' features, float32 (N, T+1, D), each the mean over its contexts: an
        inverse model of noisy codes labels with actions that are too small."""
        codes = (self.features_of(self._encode(i)) for i in range(len(self)))
        return torch.stack([each.mean(0).cpu() for each in codes])

    @torch.no_grad()
    def translate(self, i: int, sources: list[int], first: np.ndarray, images: bool = False
                  ) -> Translation:
        """Translate demonstration i, the mean over its sources, into the context of the agent's
        first image, uint8 (H, W, 3); decode it only if `images`, since that is slow."""
        z, decoded = self._encode(i)[sources], None                                # (n, T+1, Z)
        shape, code = z.shape[:2], self._model.code
        features = self.features_of(z) if code else None
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


class Imitation(dmc.Wrapper):
    """An environment in which the agent follows a translated demonstration.

    `reset` draws a demonstrated episode and one of the contexts in which it was filmed. The agent
    starts there from the expert's initial state, and the videos from the other contexts are
    translated. Neither is known of an own video: the agent starts from a reset and in a context of
    its own. `start_seed` is the seed of the task's reset.

    Observation: see `Layout` and `Guide`.
    Reward: minus the mean squared difference of the agent's code from that of the demonstration's
      nearest moment. It is for the log: `ACAgent` has a reward of its own.
    Horizon: the episode is as long as the demonstration, T steps.

    The task's own reward is hidden. With `evaluate`, `episode_info` has its sum (`task_return`) and
    a random policy's from the same start (`random_return`); how far the episode stayed from its
    demonstration (`distance`) and from another one, if there is one (`distance_other`); if known
    also `expert_return` and the PSNR of the translation and of the first frame.
    """

    needs_images = False  # of the translation, to learn from

    def __init__(self, env, demos: Demonstrations, im_size: int, evaluate: bool = False):
        """Take the task, with the expert's action repeat, and what to follow."""
        super().__init__(env)
        self._demos, self._im_size, self._evaluate = demos, im_size, evaluate
        self._ended, self._rng = True, np.random.default_rng(0)
        self._horizon = demos.clips.frames(0).shape[1] - 1
        self._layout = Layout(demos.feature_dim, env.action_spec().shape[0])

    def observation_spec(self):
        return specs.Array((self._layout.size,), np.float32, 'observation')

    def reset(self, episode_seed: int | None = None):
        """Begin an episode, whose demonstration and context depend on the seed alone."""
        rng = self._rng if episode_seed is None else np.random.default_rng(episode_seed)
        i, clips = int(rng.integers(len(self._demos))), self._demos.clips
        self.start_seed, context, sources, truth = self._draw_start(i, rng)
        random_return = self._random_return(self.start_seed) if self._evaluate else None
        self._env.reset(episode_seed=self.start_seed, context=context)
        self._frame = self._env.render(self._im_size)
        images = self.needs_images or self._evaluate
        self._translation = shown = self._demos.translate(i, sources, self._frame, images=images)
        self._guide, self._codes = Guide(shown.features[None]), [self._demos.encode(self._frame)]
        self._actions = torch.zeros(NUM_ACTIONS, *self.action_spec().shape)
        self._step, self._ended, self.episode_info = 0, False, {}
        self._source = clips.frames(i)[sources[0]]
        if self._evaluate:
            self._compared = {'distance': shown.features}
            if (num := len(self._demos)) > 1:
                other = (i + 1 + int(rng.integers(num - 1))) % num
                self._compared['distance_other'] = self._demos.translate(
                    other, sources, self._frame).features
            self.episode_info = {'task_return': 0.0, 'random_return': random_return}
            if not clips.imported:
                psnr = {name: video.psnr(video.mse(images, truth)) for name, images in (
                    ('psnr_translation', shown.images), ('psnr_copy_first', truth[:1]))}
                self.episode_info |= {'expert_return': clips.episode(i)['expert_return']} | psnr
        return dm_env.restart(self._observe())

    def _draw_start(self, i: int, rng: np.random.Generator) -> tuple:
        """Return the seed of the task's reset, the agent's context (DIM,), demonstration i's
        contexts to translate from, and its frames in the agent's own, if they were filmed."""
        clips, demo = self._demos.clips, self._demos.clips.episode(i)
        contexts = list(range(len(clips.frames(i))))
        if clips.imported:
            scenery = Scenery(clips.meta['scenery'])
            return (int(rng.integers(2 ** 31)), scenery.sample(rng, clips.meta['contexts']),
                    contexts, None)
        own = contexts.pop(int(rng.integers(len(contexts))))
        context = np.asarray(demo['contexts'][own])
        return demo['episode_seed'], context, contexts, clips.frames(i)[own]

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
        time_step, taken = self._env.step(action), torch.as_tensor(action, dtype=torch.float32)
        self._actions = torch.cat([taken[None], self._actions])[:NUM_ACTIONS]
        self._step += 1
        self._frame = self._env.render(self._im_size)
        self._codes.append(self._demos.encode(self._frame))
        self._ended = self._step == self._horizon or time_step.last()
        if self._evaluate:
            self.episode_info['task_return'] += time_step.reward
            if self._ended:
                self.episode_info |= {name: self._distance_from(shown)
                                      for name, shown in self._compared.items()}
        kind = dm_env.termination if self._ended else dm_env.transition
        return kind(self._reward(), self._observe())

    def _distance_from(self, shown: torch.Tensor) -> float:
        """Return the mean, over a demonstration's moments (T+1, D), of the mean squared difference
        from the agent's nearest code."""
        off = torch.cdist(shown, torch.stack(self._codes)).square() / shown.shape[1]
        return float(off.amin(1).mean())

    def _history(self) -> torch.Tensor:
        """Return the agent's last codes (HISTORY, D), newest first."""
        last = self._codes[:-HISTORY - 1:-1]
        return torch.stack(last + last[-1:] * (HISTORY - len(last)))

    def _reward(self) -> float:
        return -float((self._translation.features - self._codes[-1]).square().mean(1).min())

    def _observe(self) -> np.ndarray:
        history = self._history()[None]
        targets = self._guide.shown(torch.tensor([0]), history)
        return self._layout.join(history, targets, self._actions[None])[0].numpy()

    def panels(self, im_size: int) -> dict[str, np.ndarray]:
        """Return what a video of the episode shows side by side: caption -> uint8 (H, W, 3), of the
        translator's size."""
        return {'expert, source context': self._source[self._step],
                'translation': self._translation.images[self._step],
                'imitator, target context': self._frame}


class PaperImitation(Imitation):
    """Imitation as Liu et al. 2017 reward it (section V), by the clock.

    Observation: the agent's last features, see `from_now`; how those of the demonstration differ,
      AHEAD steps after the agent's own step; the share of time left (Pardo et al. 2018).
    Reward: -(t/T)^2 (d + w_img d_img), with the mean squared differences of features and of images
      from the demonstration's at the same step, in units of their variance.
    """

    AHEAD = (1, 3, 6, 12)

    def __init__(self, env, demos: Demonstrations, im_size: int, evaluate: bool, w_img: float):
        super().__init__(env, demos, im_size, evaluate)
        self._w_img, self.needs_images = w_img, w_img > 0
        self._image_var = w_img and np.mean([  # of pixels in [0, 1] over time
            np.var(demos.clips.frames(i)[0] / 255.0, axis=0) for i in range(len(demos))[:20]])

    def observation_spec(self):
        return specs.Array(((HISTORY + len(self.AHEAD)) * self._demos.feature_dim + 1,),
                           np.float32, 'observation')

    def _observe(self) -> np.ndarray:
        targets = moments(self._translation.features[None], torch.tensor([0]),
                          torch.tensor([self._step]), self.AHEAD)[0]
        return torch.cat([
            from_now(self._history()).flatten(), (targets - self._codes[-1]).flatten(),
            torch.tensor([1 - self._step / self._horizon])]).numpy()

    def _reward(self) -> float:
        target = self._translation.features[self._step]
        distance = float((self._codes[-1] - target).square().mean())
        if self._w_img:
            distance += self._w_img / self._image_var * video.mse(
                self._frame, self._translation.images[self._step])
        return -(self._step / self._horizon) ** 2 * distance


def make_env(demos: Demonstrations, w_img: float | None = None, evaluate=False) -> Imitation:
    """Return the environment of the demonstrations' task, with their scenery and action repeat;
    with `w_img` the paper's."""
    meta = demos.clips.meta
    env = dmc.load_suite(meta['task'], Scenery(meta['scenery']))
    args = dmc.ActionRepeat(env, meta['action_repeat']), demos, meta['im_size'], evaluate
    return Imitation(*args) if w_img is None else PaperImitation(*args, w_img)


class Play(NamedTuple):
    """Episodes of play, float32."""

    codes: torch.Tensor    # (M, T+1, D)
    actions: torch.Tensor  # (M, T, A), the agent's own


def encode_play(model: ContextTranslator, clips: video.Clips) -> Play:
    """Encode a split of play."""
    actions = np.array([clips.episode(i)['actions'] for i in range(len(clips))], np.float32)
    return Play(Demonstrations(model, clips).features(), torch.from_numpy(actions))
