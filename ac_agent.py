"""The imitator's agent, a sum of terms that each stand in one class. It learns from demonstrations
without actions, from its own play and its own steps, never from a task's reward."""
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import dmc
import snapshots
import utils
import video
from ct_model import normed_mlp
from drqv2 import DrQV2Agent
from imitation import (
    HISTORY,
    NUM_ACTIONS,
    Demonstrations,
    Guide,
    Imitation,
    Layout,
    Play,
    draw_moments,
    from_now,
    histories,
    load_translator,
    make_env,
    moments,
)
from utils import UserError

NUM_LATER = 3  # codes after an action that the inverse model sees: a contact shows late


class Moments(NamedTuple):
    """A batch of the agent's own moments, float32."""

    history: torch.Tensor   # (B, HISTORY, D), the codes up to the moment, newest first
    later: torch.Tensor     # (B, NUM_LATER, D), the codes after it, oldest first
    action: torch.Tensor    # (B, A), the action taken
    obs: torch.Tensor       # (B, n), what it saw, following some demonstration
    next_obs: torch.Tensor  # (B, n), what it saw next


def draw_play(play: Play, guide: Guide, layout: Layout, num: int) -> Moments:
    """Draw moments of play, uniformly, each with a demonstration drawn for it."""
    (i, steps), followed = draw_moments(play.codes, num), draw_moments(guide.demos, num)[0]
    at = steps[:, None] - torch.arange(NUM_ACTIONS + 1, device=steps.device)
    actions = play.actions[i[:, None], at.clamp(min=0)] * (at >= 0)[..., None]
    history = histories(play.codes, i, steps)
    later = moments(play.codes, i, steps, range(1, NUM_LATER + 1))
    obs, next_obs = (layout.join(codes, guide.shown(followed, codes), before) for codes, before in (
        (history, actions[:, 1:]),
        (torch.cat([later[:, :1], history[:, :-1]], dim=1), actions[:, :-1])))
    return Moments(history, later, actions[:, 0], obs, next_obs)


def draw_replay(replay_buffer, layout: Layout, num: int) -> Moments:
    """Draw moments of what was replayed, uniformly, each with the demonstration it followed."""
    ahead = tuple(range(2, NUM_LATER + 1))
    obs, action, _, _, next_obs, *later = replay_buffer.sample(num, ahead=ahead)
    later = [layout.split(each)[0][:, 0] for each in (next_obs, *later)]
    return Moments(layout.split(obs)[0], torch.stack(later, dim=1), action, obs, next_obs)


def action_loss(predicted: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Return the Huber losses (B, 1) of actions (B, A): absolute errors, squared below 0.1. Experts
    often act at the bounds, and a squared error would blur where they switch."""
    return F.smooth_l1_loss(predicted, action, beta=0.1, reduction='none').mean(1, keepdim=True)


class Learner:
    """A network, its optimiser, and a running mean of its weights (Polyak and Juditsky 1992).

    At first the mean is the plain mean over all updates, so that the initial weights have no part
    in it; later it is over some 1/`rate` updates. So learning rates can stay constant.
    """

    def __init__(self, net: nn.Module, lr: float, device: torch.device, rate: float = 0.002):
        self.net = net.to(device)
        self.mean = copy.deepcopy(self.net).requires_grad_(False)
        self._adam = torch.optim.Adam(self.net.parameters(), lr=lr, fused=True)
        self._rate, self._num_updates = rate, 0

    def descend(self, loss: torch.Tensor):
        """Take one step down the loss, 0-d, with this network's parameters alone."""
        parameters = list(self.net.parameters())
        # Not loss.backward(): that would also work out gradients of other networks.
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        self._adam.step()
        self._num_updates += 1
        torch._foreach_lerp_(list(self.mean.parameters()), parameters,
                             max(self._rate, 1 / self._num_updates))

    def state_dict(self) -> dict:
        return {'net': self.net.state_dict(), 'mean': self.mean.state_dict(),
                'adam': self._adam.state_dict(), 'num_updates': self._num_updates}

    def load_state_dict(self, state: dict):
        """Load a full state, or a slim one's `mean`, which suffices to act but not to train."""
        self.mean.load_state_dict(state['mean'])
        if 'net' in state:
            self.net.load_state_dict(state['net'])
            self._adam.load_state_dict(state['adam'])
            self._num_updates = state['num_updates']


class Policy(nn.Module):
    """Maps observations (B, n) to actions (B, A) in (-1, 1)."""

    def __init__(self, size: int, hidden_dim: int, action_dim: int):
        super().__init__()
        self.net = normed_mlp(size, hidden_dim, action_dim)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs).tanh()

    def noisy(self, obs: torch.Tensor, stddev: float) -> torch.Tensor:
        """Return actions with noise, as DrQ-v2's losses take them: clipped at `stddev`, and
        gradients pass straight through the bounds."""
        action = self(obs)
        noisy = action + (torch.randn_like(action) * stddev).clamp(-stddev, stddev)
        return noisy + (noisy.clamp(-1, 1) - noisy).detach()


class InverseModel:
    """Tells which action was taken between codes (Torabi et al. 2018, BCO).

    It is fitted to the agent's own moments, and labels demonstrations with the actions with which
    the agent would do what they show.
    """

    def __init__(self, layout: Layout, hidden_dim: int, lr: float, device: torch.device):
        in_dim = (HISTORY + NUM_LATER) * layout.code_dim
        self.learner = Learner(Policy(in_dim, hidden_dim, layout.action_dim), lr, device)

    @staticmethod
    def _input(history: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        return torch.cat([from_now(history), later - history[:, :1]], dim=1).flatten(1)

    def fit(self, own: Moments) -> dict[str, torch.Tensor]:
        loss = action_loss(self.learner.net(self._input(own.history, own.later)),
                           own.action).mean()
        self.learner.descend(loss)
        return {'inverse_loss': loss.detach()}

    @torch.no_grad()
    def label(self, demos: torch.Tensor, i: torch.Tensor, steps: torch.Tensor, num: int
              ) -> torch.Tensor:
        """Return `num` actions of demonstrations number i (B,) of (N, T+1, D), from steps (B,)
        backwards: (B, num, A), newest first; zeros before the start."""
        at = (steps[:, None] - torch.arange(num, device=steps.device)).flatten()
        i = i.repeat_interleave(num)
        x = self._input(histories(demos, i, at), moments(demos, i, at, range(1, NUM_LATER + 1)))
        return (self.learner.mean(x) * (at >= 0)[:, None]).unflatten(0, (-1, num))


class Cloning:
    """Makes the actor do what the inverse model reads out of demonstrations.

    Targets are shifted by up to MAX_SHIFT steps: the moment that the agent finds nearest may be off
    by as much. With a discriminator, as many moments more see another demonstration's targets, for
    an agent is never quite where its own was. They weigh what a later moment of theirs earns with
    these targets: hardly anything, if each demonstration has a goal of its own.
    """

    MAX_SHIFT = 2

    def __init__(self, layout: Layout, guide: Guide):
        self._layout, self._guide = layout, guide

    def loss(self, actor: nn.Module, inverse: InverseModel, batch_size: int,
             discriminator: 'Discriminator | None' = None) -> torch.Tensor:
        """Return how far the actor is from the inverse model's labels at random moments, 0-d."""
        guide, demos, join = self._guide, self._guide.demos, self._layout.join
        num = batch_size if discriminator else 0  # of moments more
        i, steps = draw_moments(demos, batch_size + num)
        labels = inverse.label(demos, i, steps, NUM_ACTIONS + 1)
        shift = torch.randint_like(steps, -self.MAX_SHIFT, self.MAX_SHIFT + 1)
        history, targets = histories(demos, i, steps), guide.targets(i, steps + shift)
        weight = torch.ones_like(labels[:, 0, :1])
        if num:
            others, left = draw_moments(demos, num)[0], demos.shape[1] - 1 - steps[:num]
            ahead = 1 + (torch.rand_like(weight[:num, 0]) * left).long()
            later = histories(demos, i[:num], steps[:num] + ahead)
            targets[:num] = guide.shown(others, history[:num])
            weight[:num] = discriminator.reward(join(later, guide.shown(others, later)))
        obs = join(history, targets, labels[:, 1:])
        return (action_loss(actor(obs), labels[:, 0]) * weight).sum() / weight.sum()


class Discriminator:
    """Tells demonstrated moments from the agent's own (Torabi et al. 2018b, GAIfO).

    It sees codes and targets: a demonstration's moment with its own targets, the agent's with those
    of the one that it follows. So it learns what in the targets matters: only the end, if only the
    end pose does; the gait, if any phase of it will do.
    """

    SLOPE_WEIGHT = 0.1  # keeps it smooth, so that being nearer pays (Gulrajani et al. 2017)

    def __init__(self, layout: Layout, guide: Guide, hidden_dim: int, lr: float,
                 device: torch.device):
        self._layout, self._guide = layout, guide
        self.learner = Learner(normed_mlp(layout.num_seen, hidden_dim, 1), lr, device)

    def _demonstrated(self, batch_size: int) -> torch.Tensor:
        """Draw moments of demonstrations, with their own targets (B, num_seen)."""
        demos = self._guide.demos
        i, steps = draw_moments(demos, batch_size)
        # The later of two: early moments show more of the start than of the task.
        steps = steps.maximum(torch.randint_like(steps, demos.shape[1]))
        return self._layout.join(histories(demos, i, steps), self._guide.targets(i, steps))

    def fit(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Fit it to the agent's own observations (B, n) beside as many demonstrated moments."""
        own, shown = obs[:, :self._layout.num_seen], self._demonstrated(len(obs))
        some = len(obs) // 4  # for the penalty on its slope between the two, which is dear
        between = torch.lerp(own[:some], shown[:some], torch.rand_like(own[:some, :1]))
        logits = self.learner.net(torch.cat([own, shown, between.requires_grad_()]))
        own_logit, shown_logit, logit = logits.split([len(own), len(shown), some])
        slope, = torch.autograd.grad(logit.sum(), between, create_graph=True)
        loss = (F.softplus(own_logit).mean() + F.softplus(-shown_logit).mean()
                + self.SLOPE_WEIGHT * slope.square().sum(1).mean())
        self.learner.descend(loss)
        return {'discriminator_loss': loss.detach()}

    @torch.no_grad()
    def reward(self, obs: torch.Tensor) -> torch.Tensor:
        """Return the probability that observations (B, n or num_seen) are demonstrated: (B, 1)."""
        return self.learner.net(obs[:, :self._layout.num_seen]).sigmoid()


class Critic:
    """Two estimates of the discounted sum of rewards, without end; the actor climbs the lower."""

    def __init__(self, layout: Layout, hidden_dim: int, lr: float, device: torch.device,
                 discount: float, stddev: float):
        self._discount, self._stddev = discount, stddev
        # Layer normalisation keeps values of actions that nobody took low (Ball et al. 2023).
        nets = nn.ModuleList(normed_mlp(layout.size + layout.action_dim, hidden_dim, 1)
                             for _ in range(2))
        self.learner = Learner(nets, lr, device, rate=0.01)  # its mean is the target network

    @staticmethod
    def _values(nets: nn.ModuleList, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Return both estimates, (2, B, 1)."""
        both = torch.cat([obs, action], dim=1)
        return torch.stack([net(both) for net in nets])

    def fit(self, own: Moments, reward: torch.Tensor, actor: Policy) -> dict[str, torch.Tensor]:
        """Fit it towards reward (B, 1) + discount Q'(next)."""
        with torch.no_grad():
            after = own.next_obs, actor.noisy(own.next_obs, self._stddev)
            target = reward + self._discount * self._values(self.learner.mean, *after).amin(0)
        values = self._values(self.learner.net, own.obs, own.action)
        loss = 2 * F.mse_loss(values, target.expand_as(values))
        self.learner.descend(loss)
        return {'batch_reward': reward.mean(), 'critic_target_q': target.mean(),
                'critic_loss': loss.detach()}

    def loss(self, actor: Policy, obs: torch.Tensor) -> torch.Tensor:
        """Return minus the value of the actor's actions, 0-d, in units of the values' size, so that
        neither term of its loss drowns the other (Fujimoto and Gu 2021, TD3+BC)."""
        value = self._values(self.learner.net, obs, actor.noisy(obs, self._stddev)).amin(0)
        return -value.mean() / value.abs().mean().detach().clamp(min=1e-3)


class ACAgent:
    """The imitator: it clones what an inverse model reads out of demonstrations, and climbs a
    critic of how much its moments look like demonstrated ones.

    Each update draws own moments: play with demonstrations drawn anew, replay with those that it
    followed. The actor's loss is w_clone * cloning + w_value * value. Its running mean acts.
    """

    def __init__(self, obs_shape, action_dim: int, w_clone: float = 1.0, w_value: float = 1.0,
                 lr: float = 1e-3, hidden_dim: int = 256, precision: str = 'fp32', device=None,
                 demos: torch.Tensor | None = None, play: Play | None = None, *,
                 discount: float, stddev: float):
        """Make the agent; it learns only if it is given demonstrations and play.

        Args:
          w_clone, w_value: weights in the actor's loss; what weighs 0 is left out.
          lr: learning rate; the discriminator's is lower, since the critic has to follow it.
          stddev: of the noise on actions, while exploring and in the critic's losses.
          precision: see `utils.set_precision`.
          demos: float32 (N, T+1, D), codes of demonstrations.
        """
        self.device = torch.device(device or torch.get_default_device())
        utils.set_precision(precision)
        self._layout = layout = Layout.of(obs_shape[0], action_dim)
        self._w_clone, self._w_value, self._stddev = w_clone, w_value, stddev
        self.actor = Learner(Policy(layout.size, hidden_dim, action_dim), lr, self.device)
        self._learners = {'actor': self.actor}
        if demos is None:
            return
        self._play = Play(*(each.to(self.device) for each in play))
        self._guide = Guide(demos.to(self.device))
        self.inverse = InverseModel(layout, hidden_dim, lr, self.device)
        self._cloning = Cloning(layout, self._guide)
        self.discriminator = Discriminator(layout, self._guide, hidden_dim, lr * 0.3, self.device)
        self.critic = Critic(layout, hidden_dim, lr, self.device, discount, stddev)
        self._learners |= {name: getattr(self, name).learner
                           for name in ('inverse', 'discriminator', 'critic')}

    def pretrain(self, num_updates: int, batch_size: int) -> Iterator[int]:
        """Learn from demonstrations and play alone, at first cloning; yield after each update."""
        for number in range(num_updates):
            clones_only = self._w_clone > 0 and number < 0.8 * num_updates  # values are dear
            self.update(None, batch_size, number, clones_only)
            yield number + 1

    def update(self, replay_buffer, batch_size: int, step: int, clones_only: bool = False
               ) -> dict[str, torch.Tensor]:
        """Update all parts once, and return metrics; `step` does not matter."""
        own, metrics, loss = self._draw(replay_buffer, batch_size), {}, 0.0
        w_value = 0.0 if clones_only else self._w_value
        if self._w_clone:
            metrics |= self.inverse.fit(own)
        if w_value:
            metrics |= self.discriminator.fit(own.next_obs)
            reward = self.discriminator.reward(own.next_obs)
            metrics |= self.critic.fit(own, reward, self.actor.net)
            loss = w_value * self.critic.loss(self.actor.net, own.obs)
        if self._w_clone:
            loss = loss + self._w_clone * self._cloning.loss(
                self.actor.net, self.inverse, batch_size, self.discriminator if w_value else None)
        self.actor.descend(loss)
        return metrics | {'actor_loss': loss.detach()}

    def _draw(self, replay_buffer, batch_size: int) -> Moments:
        """Draw own moments: half of play, half of replay, which is nearer to demonstrations."""
        num_replayed = 0 if replay_buffer is None else batch_size // 2
        play = draw_play(self._play, self._guide, self._layout, batch_size - num_replayed)
        if not num_replayed:
            return play
        replayed = draw_replay(replay_buffer, self._layout, num_replayed)
        return Moments(*(torch.cat(part) for part in zip(play, replayed, strict=True)))

    @torch.no_grad()
    def act(self, obs: np.ndarray, step: int, eval_mode: bool) -> np.ndarray:
        """Return the action, float32 (action_dim,) in [-1, 1], for one observation (n,)."""
        action = self.actor.mean(torch.as_tensor(obs, device=self.device)[None])[0]
        if not eval_mode:
            action = (action + self._stddev * torch.randn_like(action)).clamp(-1, 1)
        return action.cpu().numpy()

    def state_dict(self) -> dict:
        return {name: learner.state_dict() for name, learner in self._learners.items()}

    def load_state_dict(self, state: dict):
        """Load a snapshot's state. An agent without demonstrations takes the actor alone."""
        for name, learner in self._learners.items():
            learner.load_state_dict(state[name])


def refuse_earlier(source: str | Path, agent_args: dict, remedy: str):
    """Refuse an imitator from before the one recipe (UserError)."""
    if 'lookahead' in agent_args:
        raise UserError(f'{source} is of an earlier version, whose imitators saw their '
                        f'demonstrations otherwise: {remedy}.')


def load_imitator(path: str | Path, translator: str | Path, videos: str | Path, task_name: str,
                  evaluate: bool = False) -> tuple[Imitation, ACAgent | DrQV2Agent]:
    """Return an imitator's environment, see `Imitation`, and the imitator, to act on the CPU: from
    its snapshot, the translator that it was trained with, and the split of videos to imitate.

    Raises: UserError if one of them is missing, or they do not go together.
    """
    retrain = f'python train_ac.py task={task_name}'
    made = snapshots.load_snapshot(path, 'imitator', task_name, remedy=retrain)
    with snapshots.must_fit(path, retrain):
        made_by, args = made['made_by'], made['agent_args']
        refuse_earlier(path, args, retrain)
        if 'oracle' in made_by:  # see benchmarks/oracles.py
            raise UserError(f'{path} was trained by an oracle, which sees what an imitator never '
                            'has: choose a run of train_ac.py.')
        agent = snapshots.rebuild(DrQV2Agent if made_by['recipe'] == 'liu2017' else ACAgent, args,
                                  made['agent'])
        scale, repeat, sha256 = (made_by[key] for key in (
            'scale', 'action_repeat', 'translator_sha256'))
    model, _ = load_translator(translator, task_name, made_by['recipe'], torch.device('cpu'),
                               args['precision'])
    if snapshots.sha256(translator) != sha256:
        raise UserError(f'{path} was trained with another translator than {translator}: set '
                        'translator to that one.')
    clips = video.Clips(videos, task_name, model.im_size, dmc.CONTEXT_QUALITY)
    meta = clips.meta
    if meta['action_repeat'] != repeat or meta['num_contexts'] < clips.min_contexts:
        raise UserError(f"{videos} was filmed with action_repeat={meta['action_repeat']} in "
                        f"{meta['num_contexts']} contexts, and {path} takes action_repeat={repeat} "
                        'and two or more: choose another imitator, or film anew.')
    return make_env(Demonstrations(model, clips, scale), made_by.get('w_img'), evaluate), agent
