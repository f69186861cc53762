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
    """Learns as DrQ-v2 does, from `dmc.Imitation`'s observations; task rewards never reach it."""

    def __init__(self, obs_shape, action_dim: int, z_dim: int, **drqv2_args):
        """
        Args:
          obs_shape: (n,), of the flat observation.
          z_dim: the size of the translator's features.
          drqv2_args: see `DrQV2Agent`.
        """
        self._z_dim = z_dim
        super().__init__(obs_shape, action_dim, **drqv2_args)

    def make_encoder(self, obs_shape: tuple[int, ...]) -> nn.Module:
        return TrackingEncoder(obs_shape[0], self._z_dim)
