"""The imitator: DrQ-v2's actor-critic on the features of a context translator."""
import torch
import torch.nn as nn

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
    depend on what the agent does. So every step that was ever taken tells about every target at
    every time: in the place of DrQ-v2's random shifts, a share of each batch gets its targets,
    clock and reward from other transitions of it (the relabelling of Andrychowicz et al. 2017,
    with an exact reward in the place of a sparse one).
    """

    def __init__(self, obs_shape, action_dim: int, z_dim: int, num_frames: int,
                 relabel: float = 0.0, w_feature: float = 1.0, time_power: float = 2.0,
                 **drqv2_args):
        """
        Args:
          obs_shape: (n,), of the flat observation.
          z_dim, num_frames: the size of the features, and of how many frames they are seen.
          relabel: the share of transitions that get other targets. Above 0 it takes transitions of
            one step (nstep 1), whose observation has the target of the next (lookahead 1) first.
          w_feature, time_power: of the reward, see `dmc.Imitation`.
          drqv2_args: see `DrQV2Agent`.
        """
        self._z_dim, self._seen = z_dim, z_dim * num_frames
        self._relabel, self._w_feature, self._time_power = relabel, w_feature, time_power
        super().__init__(obs_shape, action_dim, **drqv2_args)

    def make_encoder(self, obs_shape: tuple[int, ...]) -> nn.Module:
        return TrackingEncoder(obs_shape[0], self._z_dim)

    def augment(self, obs, action, reward, discount, next_obs):
        n, seen = round(self._relabel * len(obs)), self._seen
        other = torch.randperm(n, device=obs.device)
        obs, reward, discount, next_obs = (x.clone() for x in (obs, reward, discount, next_obs))
        for x in (obs, next_obs):
            x[:n, seen:] = x[other, seen:]
        missing = obs[:n, seen:seen + self._z_dim] - next_obs[:n, :self._z_dim]
        time = 1 - next_obs[:n, -1:]
        reward[:n] = (-self._w_feature * time ** self._time_power
                      * missing.square().mean(1, keepdim=True))
        discount[:n] = discount[other]
        return obs, action, reward, discount, next_obs
