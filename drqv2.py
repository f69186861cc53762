"""DrQ-v2 (Yarats et al. 2021, arXiv 2107.09645): encoder, actor, critic and the agent.

On flat states the same learner runs with an identity encoder and without augmentation.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal
from torch.distributions.utils import _standard_normal

import utils


def random_shift(obs: torch.Tensor, pad: int = 4) -> torch.Tensor:
    """Shift each image by whole pixels in [-pad, pad], the border repeated.

    Args:
      obs: uint8 (B, C, H, W). -> the same shape and dtype.

    The reference interpolates bilinearly at whole pixels, up to rounding; here pixels are copied.
    """
    batch, _, height, width = obs.shape
    shift = torch.randint(0, 2 * pad + 1, (2, batch, 1), device=obs.device) - pad
    rows = (torch.arange(height, device=obs.device) + shift[0]).clamp(0, height - 1)  # (B, H)
    cols = (torch.arange(width, device=obs.device) + shift[1]).clamp(0, width - 1)    # (B, W)
    flat = (rows[:, :, None] * width + cols[:, None, :]).view(batch, 1, -1)           # (B, 1, H*W)
    return obs.flatten(2).gather(2, flat.expand(-1, obs.shape[1], -1)).view_as(obs)


def weight_init(module: nn.Module):
    """Initialise a layer with orthogonal weights and zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
    elif isinstance(module, nn.Conv2d):
        nn.init.orthogonal_(module.weight, nn.init.calculate_gain('relu'))
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.zeros_(module.bias)


class TruncatedNormal(Normal):
    """A normal clamped into (-1, 1), its noise clipped; gradients pass straight through."""

    def sample(self, clip: float | None = None) -> torch.Tensor:
        noise = _standard_normal(self.loc.shape, self.loc.dtype, self.loc.device) * self.scale
        if clip is not None:
            noise = noise.clamp(-clip, clip)
        action = self.loc + noise
        clamped = action.clamp(-1.0 + 1e-6, 1.0 - 1e-6)
        return action - action.detach() + clamped.detach()


class Encoder(nn.Module):
    """Encodes uint8 pixels (B, C, H, W) as (B, repr_dim), 39,200 at 84 px; states pass unchanged.

    Features are flattened with channels innermost. The published order differs, which the layers
    after it do not mind.
    """

    def __init__(self, obs_shape: tuple[int, ...], precision: str = 'fp32'):
        super().__init__()
        if len(obs_shape) == 1:
            self.repr_dim, self.convs = obs_shape[0], None
            return
        channels, size, _ = obs_shape
        convs = []
        for stride in (2, 1, 1, 1):
            convs.append(nn.Conv2d(channels, 32, 3, stride))
            channels, size = 32, (size - 3) // stride + 1
        self.convs, self._dtype = nn.ModuleList(convs), utils.PRECISIONS[precision]
        self.repr_dim = 32 * size * size
        self.apply(weight_init)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        if self.convs is None:
            return obs
        return convolve(obs, self.convs, self._dtype)


class Projection(nn.Linear):
    """A linear layer that multiplies in the precision of its input and answers in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).float()


def trunk(repr_dim: int, feature_dim: int | None) -> nn.Module:
    """Return DrQ-v2's bottleneck for image features, or the identity where `feature_dim` is None.

    States get no bottleneck: its LayerNorm removes the input's scale, which is contrast in pixels
    but distance and speed in states.
    """
    if feature_dim is None:
        return nn.Identity()
    return nn.Sequential(Projection(repr_dim, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(),
                         nn.Linear(hidden_dim, hidden_dim), nn.ReLU(),
                         nn.Linear(hidden_dim, out_dim))


class Actor(nn.Module):
    """Maps features (B, repr_dim) to a truncated normal of actions (B, action_dim)."""

    def __init__(self, repr_dim: int, action_dim: int, feature_dim: int | None,
                 hidden_dim: int):
        super().__init__()
        self.trunk = trunk(repr_dim, feature_dim)
        self.policy = mlp(feature_dim or repr_dim, hidden_dim, action_dim)
        self.apply(weight_init)

    def forward(self, features: torch.Tensor, stddev: float) -> TruncatedNormal:
        mean = torch.tanh(self.policy(self.trunk(features)))
        return TruncatedNormal(mean, torch.full_like(mean, stddev), validate_args=False)


class Critic(nn.Module):
    """Maps features (B, repr_dim), actions (B, action_dim) to two estimated returns (B, 1)."""

    def __init__(self, repr_dim: int, action_dim: int, feature_dim: int | None,
                 hidden_dim: int):
        super().__init__()
        self.trunk = trunk(repr_dim, feature_dim)
        in_dim = (feature_dim or repr_dim) + action_dim
        self.q1 = mlp(in_dim, hidden_dim, 1)
        self.q2 = mlp(in_dim, hidden_dim, 1)
        self.apply(weight_init)

    def forward(self, features: torch.Tensor, action: torch.Tensor):
        both = torch.cat([self.trunk(features), action], dim=-1)
        return self.q1(both), self.q2(both)


class DrQV2Agent:
    """Acts, and updates from replayed batches; `update` returns metrics as 0-d tensors."""

    def __init__(self, obs_shape, action_dim: int, device=None, lr: float = 1e-4,
                 feature_dim: int | None = 50, hidden_dim: int = 1024,
                 critic_target_tau: float = 0.01, num_expl_steps: int = 2000,
                 update_every_steps: int = 2,
                 stddev_schedule: str = 'linear(1.0,0.1,500000)', stddev_clip: float = 0.3,
                 precision: str = 'fp32'):
        """Make networks and optimisers.

        Args:
          obs_shape: (C, H, W) of uint8 pixels, or (n,) of float32 states.
          device: None is PyTorch's default, the CPU unless set otherwise.
          num_expl_steps: agent steps of uniform actions at the start.
          update_every_steps: agent steps to an update.
          stddev_schedule: exploration noise over agent steps, see `utils.schedule`.
          stddev_clip: bound of the noise on actions inside the losses.
          precision: 'fp32', or 'bf16' for what is multiplied; sums and parameters stay in fp32.
        """
        self.device = torch.device(device or torch.get_default_device())
        utils.schedule(stddev_schedule, 0)  # a wrong one is told here, not at the first step
        self.critic_target_tau, self.update_every_steps = critic_target_tau, update_every_steps
        self.num_expl_steps = num_expl_steps
        self.stddev_schedule, self.stddev_clip = stddev_schedule, stddev_clip
        utils.set_precision(precision)

        self.encoder = Encoder(tuple(obs_shape), precision).to(self.device)
        sizes = (self.encoder.repr_dim, action_dim, feature_dim, hidden_dim)
        self.actor = Actor(*sizes).to(self.device)
        self.critic = Critic(*sizes).to(self.device)
        self.critic_target = Critic(*sizes).to(self.device).requires_grad_(False)
        self.critic_target.load_state_dict(self.critic.state_dict())

        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=lr, fused=True)
        # One optimiser for both: the encoder learns from the critic's loss only.
        self.critic_opt = torch.optim.Adam(
            [*self.encoder.parameters(), *self.critic.parameters()], lr=lr, fused=True)

    _parts = ('encoder', 'actor', 'critic', 'critic_target', 'actor_opt', 'critic_opt')

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self._parts}

    def load_state_dict(self, state: dict):
        """Load a full snapshot's state, or a slim one's, which suffices to act but not to train."""
        if missing := {'encoder', 'actor'} - state.keys():
            raise KeyError(min(missing))
        for name in self._parts:
            if name in state:
                getattr(self, name).load_state_dict(state[name])

    @torch.no_grad()
    def act(self, obs: np.ndarray, step: int, eval_mode: bool) -> np.ndarray:
        """Return the action, float32 (action_dim,) in [-1, 1], for one observation, unbatched."""
        features = self.encoder(torch.as_tensor(obs, device=self.device)[None])
        dist = self.actor(features, utils.schedule(self.stddev_schedule, step))
        if eval_mode:
            action = dist.mean
        elif step < self.num_expl_steps:
            action = torch.empty_like(dist.mean).uniform_(-1.0, 1.0)
        else:
            action = dist.sample()
        return action.float().cpu().numpy()[0]

    def update(self, replay_buffer, batch_size: int, step: int) -> dict[str, torch.Tensor]:
        """Update once in every `update_every_steps` steps; return metrics, empty in between."""
        if step % self.update_every_steps:
            return {}
        obs, action, reward, discount, next_obs = replay_buffer.sample(batch_size)
        if obs.dim() == 4:  # images
            obs, next_obs = random_shift(obs), random_shift(next_obs)
        stddev = utils.schedule(self.stddev_schedule, step)
        features = self.encoder(obs)
        with torch.no_grad():
            next_features = self.encoder(next_obs)
        metrics = self.update_critic(features, action, reward, discount, next_features, stddev)
        metrics |= self.update_actor(features.detach(), stddev)
        with torch.no_grad():  # else the target would carry the graph of all updates along
            torch._foreach_lerp_(list(self.critic_target.parameters()),
                                 list(self.critic.parameters()), self.critic_target_tau)
        return {'batch_reward': reward.mean(), **metrics}

    def update_critic(self, features, action, reward, discount, next_features, stddev):
        """Update encoder and critic, towards reward + discount Q'(next).

        Args: features, next_features (B, repr_dim), action (B, A), reward and discount (B, 1).
        """
        with torch.no_grad():
            next_action = self.actor(next_features, stddev).sample(self.stddev_clip)
            target_q = torch.min(*self.critic_target(next_features, next_action))
            target_q = reward + discount * target_q
        q1, q2 = self.critic(features, action)
        loss = F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)
        self.critic_opt.zero_grad(set_to_none=True)
        loss.backward()
        self.critic_opt.step()
        return {'critic_target_q': target_q.mean(), 'critic_q1': q1.detach().mean(),
                'critic_q2': q2.detach().mean(), 'critic_loss': loss.detach()}

    def update_actor(self, features, stddev):
        """Update the actor; the encoder gets no gradient. Args: features (B, repr_dim)."""
        action = self.actor(features, stddev).sample(self.stddev_clip)
        loss = -torch.min(*self.critic(features, action)).mean()
        parameters = list(self.actor.parameters())
        # Not loss.backward(): that would also work out gradients of the critic, to throw them away.
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        self.actor_opt.step()
        return {'actor_loss': loss.detach()}


# ------------------------------------------------------------- fast convolutions on a CPU

def convolve(obs: torch.Tensor, convs: nn.ModuleList, dtype: torch.dtype) -> torch.Tensor:
    """Pass obs / 255 - 0.5 through convolutions, each with its ReLU.

    Args: obs uint8 (B, C, H, W).

    Returns: (B, repr_dim) of `dtype`, flattened with channels innermost, as it lies in memory.
    """
    weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
    strides = [conv.stride[0] for conv in convs]
    # obs / 255 - 0.5 is (obs - 128) / 255 + 0.5 / 255. Pixels less 128 are exact in bf16; the first
    # layer's weights and biases take over the rest.
    weights[0] = weights[0] / 255
    biases[0] = biases[0] + 0.5 * weights[0].sum((1, 2, 3))
    if (dtype == torch.bfloat16 and obs.device.type == 'cpu'
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        # Asked here: within a Function gradients are never enabled, wanted or not.
        return ConvStack.apply(obs, strides, torch.is_grad_enabled(), *weights, *biases)
    layout = dict(dtype=dtype, memory_format=torch.channels_last)
    x = obs.to(**layout).sub_(128)
    for weight, bias, stride in zip(weights, biases, strides, strict=True):
        x = F.relu(F.conv2d(x, weight.to(**layout), bias.to(x.dtype), stride))
    return x.permute(0, 2, 3, 1).flatten(1)


class ConvStack(torch.autograd.Function):
    """`convolve` for a CPU in bf16: each chunk passes all layers while it is in the cache, and ReLU
    is fused into the convolution."""

    chunk = 64  # images

    @staticmethod
    def forward(ctx, obs, strides, for_backward, *weights_and_biases):
        """Return features, bf16 (B, repr_dim), of uint8 (B, C, H, W), channels innermost.

        Args: for_backward: whether to keep each layer's input for the backward pass.
        """
        layout = dict(dtype=torch.bfloat16, memory_format=torch.channels_last)
        weights = [weight.to(**layout) for weight in weights_and_biases[:len(strides)]]
        biases = [bias.bfloat16() for bias in weights_and_biases[len(strides):]]
        features, saved = [], []
        for x in obs.split(ConvStack.chunk):
            # In two steps, which together are faster than one that changes type and order at once.
            x = (x ^ 128).view(torch.int8).bfloat16().contiguous(memory_format=torch.channels_last)
            for weight, bias, stride in zip(weights, biases, strides, strict=True):
                if for_backward:
                    saved.append(x)
                x = torch.ops.mkldnn._convolution_pointwise(
                    x, weight, bias, [0, 0], [stride] * 2, [1, 1], 1, 'relu', [], None)
            x = x.permute(0, 2, 3, 1)
            features.append(x.flatten(1))
        features = torch.cat(features)
        ctx.save_for_backward(features, *weights, *saved)
        ctx.strides, ctx.shape = strides, x.shape[1:]
        return features

    @staticmethod
    def backward(ctx, grad):
        depth = len(ctx.strides)
        features, *saved = ctx.saved_tensors
        weights, saved = saved[:depth], saved[depth:]
        sums = [0.0] * (2 * depth)  # of weights and biases, in fp32
        inputs = [saved[i:i + depth] for i in range(0, len(saved), depth)]
        outputs, grads = (x.split(ConvStack.chunk) for x in (features, grad))
        for xs, *ends in zip(inputs, outputs, grads, strict=True):
            x, x_grad = (end.unflatten(1, ctx.shape).permute(0, 3, 1, 2) for end in ends)
            for i in reversed(range(depth)):
                x_grad = torch.ops.aten.threshold_backward(x_grad, x, 0)
                x = xs[i]
                x_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
                    x_grad, x, weights[i], [len(weights[i])], [ctx.strides[i]] * 2, [0, 0],
                    [1, 1], False, [0, 0], 1, [i > 0, True, True])
                sums[i] = sums[i] + weight_grad.float()
                sums[depth + i] = sums[depth + i] + bias_grad.float()
        return None, None, None, *sums
