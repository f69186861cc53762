"""The imitator: DrQ-v2's actor-critic on the features of a context translator."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from drqv2 import DrQV2Agent


class TrackingEncoder(nn.Module):
    """`dmc.Imitation`'s observation, seen from the agent's present: (B, n) -> (B, n).

    The newest features stay; the older ones become how they have moved since, and the targets what
    is still missing. Which way to go is then an input, not a small difference of large inputs.
    """

    def __init__(self, obs_dim: int, z_dim: int):
        super().__init__()
        self.repr_dim, self._z_dim = obs_dim, z_dim

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        now, others, left = obs.split(
            [self._z_dim, self.repr_dim - self._z_dim - 1, 1], dim=1)
        moved = others.unflatten(1, (-1, self._z_dim)) - now[:, None]  # (B, others, Z)
        return torch.cat([now, moved.flatten(1), left], dim=1)


class ACAgent(DrQV2Agent):
    """Learns as DrQ-v2 does, from `dmc.Imitation`'s observations; task rewards never reach it.

    What a step is worth follows from the observation alone, and where the targets go does not
    depend on what the agent does. So a step that was taken tells about every target, not only
    those that stood there at the time. In the place of DrQ-v2's random shifts, transitions are
    relabelled (Andrychowicz et al. 2017): a share of each batch gets its targets and clock, and so
    its reward, from other transitions of it; another share gets as its targets what the agent
    itself did next, as if the demonstration had shown just that, which is perfect imitation and
    otherwise rare. There, what it did is also the action to take: the policy learns it as an
    inverse model (Torabi et al. 2018), which shows it the way to targets whose distance is much the
    same all around them.
    """

    def __init__(self, obs_shape, action_dim: int, z_dim: int, num_frames: int,
                 lookahead: list[int], relabel: float = 0.0, hindsight: float = 0.0,
                 w_inverse: float = 0.0, w_feature: float = 1.0, time_power: float = 2.0,
                 **drqv2_args):
        """
        Args:
          obs_shape: (n,), of the flat observation.
          z_dim, num_frames, lookahead, w_feature, time_power: as `dmc.Imitation` has them.
          relabel: the share of transitions that get targets of others. Above 0 it takes the target
            of the next step first in `lookahead`.
          hindsight: the share that get as targets what came of them. Both take transitions of one
            step (nstep 1).
          w_inverse: of the inverse model's squared error of actions, beside the critic's value.
            Above 0 it takes hindsight.
          drqv2_args: see `DrQV2Agent`.
        """
        self._z_dim, self._seen, self._lookahead = z_dim, z_dim * num_frames, list(lookahead)
        self._relabel, self._hindsight, self._w_inverse = relabel, hindsight, w_inverse
        self._w_feature, self._time_power = w_feature, time_power
        super().__init__(obs_shape, action_dim, **drqv2_args)

    def make_encoder(self, obs_shape: tuple[int, ...]) -> nn.Module:
        return TrackingEncoder(obs_shape[0], self._z_dim)

    def _ends(self, batch_size: int) -> tuple[int, int]:
        """The first n of a batch are relabelled, those up to m seen in hindsight."""
        n = round(self._relabel * batch_size)
        return n, n + round(self._hindsight * batch_size)

    def draw(self, replay_buffer, batch_size: int) -> tuple[torch.Tensor, ...]:
        """-> obs (B, n), action (B, A), reward (B, 1), discount (B, 1), next_obs (B, n), float32:
        the first relabelled, those after them in hindsight, see `_ends`."""
        steps = sorted({step + more for step in self._lookahead for more in (0, 1)})
        obs, action, reward, discount, next_obs, *later = replay_buffer.sample(
            batch_size, ahead=steps if self._hindsight else ())
        seen, z_dim = self._seen, self._z_dim
        n, m = self._ends(batch_size)
        other = torch.randperm(n, device=obs.device)
        for x in (obs, next_obs):
            x[:n, seen:] = x[other, seen:]
        missing = obs[:n, seen:seen + z_dim] - next_obs[:n, :z_dim]
        time = 1 - next_obs[:n, -1:]
        reward[:n] = (-self._w_feature * time ** self._time_power
                      * missing.square().mean(1, keepdim=True))
        discount[:n] = discount[other]

        if later:
            done = {step: x[n:m, :z_dim] for step, x in zip(steps, later, strict=True)}
            obs[n:m, seen:-1] = torch.cat([done[step] for step in self._lookahead], dim=1)
            next_obs[n:m, seen:-1] = torch.cat([done[step + 1] for step in self._lookahead], dim=1)
            reward[n:m] = 0.0
        return obs, action, reward, discount, next_obs

    def actor_loss(self, features, dist, action):
        loss = super().actor_loss(features, dist, action)
        if self._w_inverse:
            n, m = self._ends(len(action))
            loss = loss + self._w_inverse * F.mse_loss(dist.mean[n:m], action[n:m])
        return loss
