"""The plain way to compute what the project computes fast: to time it against, and to test it by.

Nothing here is clever: whole fp32 batches, one pass after another, loops over time, the suite's own
renderer. Random numbers are drawn as the fast path draws them, so that results can be compared.
"""
import copy

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from drqv2 import DrQV2Agent


def render(physics, im_size: int, camera_id: int) -> np.ndarray:
    """The suite's picture at its own settings: uint8 (im_size, im_size, 3)."""
    return physics.render(im_size, im_size, camera_id=camera_id)


def random_shift(obs: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """DrQ-v2's augmentation as published: pad, then sample bilinearly. uint8 -> float32."""
    n, _, size, _ = obs.shape
    rows, cols = torch.randint(0, 2 * pad + 1, (2, n, 1))
    x = F.pad(obs.float(), (pad,) * 4, 'replicate')
    eps = 1.0 / (size + 2 * pad)
    line = torch.linspace(-1.0 + eps, 1.0 - eps, size + 2 * pad)[:size].repeat(size, 1)[..., None]
    grid = torch.cat([line, line.transpose(0, 1)], dim=2)
    offset = torch.cat([cols, rows], dim=1).float().view(n, 1, 1, 2) * 2.0 / (size + 2 * pad)
    return F.grid_sample(x, grid + offset, padding_mode='zeros', align_corners=False)


def on_cpu(module: nn.Module) -> nn.Module:
    """A copy, wherever `module` is."""
    return copy.deepcopy(module).cpu()


class Encoder(nn.Module):
    """DrQ-v2's encoder as published, with the weights of ours."""

    def __init__(self, encoder):
        super().__init__()
        layers = [layer for conv in encoder.convs for layer in (on_cpu(conv), nn.ReLU())]
        self.convnet = nn.Sequential(*layers)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.convnet(obs / 255.0 - 0.5).permute(0, 2, 3, 1).flatten(1)


class PlainAgent:
    """DrQ-v2's update as published, from the weights of `agent`: an optimiser for each network,
    losses backpropagated through all networks."""

    def __init__(self, agent: DrQV2Agent, shift=random_shift, lr: float = 1e-4):
        self.shift, self.stddev = shift, 1.0
        pixels = getattr(agent.encoder, 'convs', None) is not None
        self.encoder = Encoder(agent.encoder) if pixels else on_cpu(agent.encoder)
        self.actor, self.critic = on_cpu(agent.actor), on_cpu(agent.critic)
        self.critic_target = on_cpu(agent.critic_target)
        self.opts = [torch.optim.Adam(part.parameters(), lr, foreach=False) for part in
                     ([self.encoder] if pixels else []) + [self.critic]]
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr, foreach=False)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        features = self.encoder(torch.as_tensor(obs)[None])
        return self.actor(features, self.stddev).sample().numpy()[0]

    def update(self, obs, action, reward, discount, next_obs) -> tuple[float, float]:
        """Return the losses of critic and actor."""
        if obs.dim() == 4:
            obs, next_obs = self.shift(obs), self.shift(next_obs)
        features = self.encoder(obs)
        with torch.no_grad():
            next_features = self.encoder(next_obs)
            next_action = self.actor(next_features, self.stddev).sample(0.3)
            q1, q2 = self.critic_target(next_features, next_action)
            target = reward + discount * torch.min(q1, q2)
        q1, q2 = self.critic(features, action)
        critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        for opt in self.opts:
            opt.zero_grad()
        critic_loss.backward()
        for opt in self.opts:
            opt.step()
        action = self.actor(features.detach(), self.stddev).sample(0.3)
        actor_loss = -torch.min(*self.critic(features.detach(), action)).mean()
        self.actor_opt.zero_grad()
        actor_loss.backward()
        self.actor_opt.step()
        with torch.no_grad():
            for p, t in zip(self.critic.parameters(), self.critic_target.parameters(), strict=True):
                t.copy_(0.01 * p + 0.99 * t)
        return critic_loss.item(), actor_loss.item()


class Replay:
    """A list of episodes of stacked observations, sampled one transition at a time."""

    def __init__(self, nstep: int = 3, discount: float = 0.99):
        self.nstep, self.discount, self.episodes = nstep, discount, []

    def add(self, time_step, action=None):
        if time_step.first():
            self.episodes.append([])
        self.episodes[-1].append((time_step.observation, action, time_step.reward or 0.0,
                                  time_step.discount))

    def _draw(self):
        episodes = [episode for episode in self.episodes if len(episode) > 1]
        episode = episodes[np.random.randint(len(episodes))]
        start = np.random.randint(len(episode) - 1)
        reward, discount = 0.0, 1.0
        for row in episode[start + 1:start + 1 + self.nstep]:
            reward, discount = reward + discount * row[2], discount * row[3] * self.discount
        last = min(start + self.nstep, len(episode) - 1)
        return (episode[start][0], episode[start + 1][1], np.float32([reward]),
                np.float32([discount]), episode[last][0])

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        columns = zip(*(self._draw() for _ in range(batch_size)), strict=True)
        return [torch.from_numpy(np.stack(column)) for column in columns]


def deconv(layer, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """The translator's transposed convolution in one piece, over [x; skip]."""
    return nn.ConvTranspose2d.forward(layer, torch.cat([x, skip], dim=1))


def translate(model, source, target, first) -> list[torch.Tensor]:
    """The translator one time step after another, every pass by itself, whole convolutions.

    Args: of `ContextTranslator.losses`.

    Returns: z3 and z (N, T, Z), translations and reconstructions (N, T, 3, H, W).
    """
    def scaled(frames):
        return frames.permute(0, 3, 1, 2).float() / 127.5 - 1

    def encode(encoder, frames):
        maps, x = [], scaled(frames)
        for conv in encoder.convs:
            x = F.leaky_relu(conv(x), 0.2)
            maps.append(x)
        x = x.permute(0, 2, 3, 1).flatten(1)
        return encoder.out(F.leaky_relu(encoder.hidden(x), 0.2)), maps

    def decode(z, skips):
        x = F.leaky_relu(model.dec.out(F.leaky_relu(model.dec.hidden(z), 0.2)), 0.2)
        x = x.unflatten(1, model.dec.shape).permute(0, 3, 1, 2)
        for level, layer in enumerate(model.dec.deconvs):
            x = deconv(layer, x, skips[3 - level])
            x = F.leaky_relu(x, 0.2) if level < 3 else x
        share = torch.sigmoid(x[:, 3:])
        return share * x[:, :3] + (1 - share) * scaled(first)

    steps = []
    for t in range(source.shape[1]):
        z1, _ = encode(model.enc1, source[:, t])
        z2, skips = encode(model.enc2, first)
        z3 = model.translator(torch.cat([z1, z2], dim=1))
        z, _ = encode(model.enc1, target[:, t])
        steps.append((z3, z, decode(z3, skips), decode(z, skips)))
    return [torch.stack(parts, dim=1) for parts in zip(*steps, strict=True)]
