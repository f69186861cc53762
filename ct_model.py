"""The context translator of Liu, Gupta, Abbeel, Levine (2017, arXiv 1707.03374), and a pose code.

It learns what a video would look like in another context, given the first image in that context:

    z1 = Enc1(o_t^source)    what happens, apart from where
    z2 = Enc2(o_0^target)    the context, with a skip of every level into the decoder
    z3 = T(z1, z2)           what happens, as it would be encoded in the target context
    o  = Dec(z3, skips)      its image there

All of it works on whole clips: the context is computed once a clip and broadcast over time.

Distances between features say little about poses. `PoseCode` makes a narrow code of z1 in which
they do: all that translation needs passes through it, a moment has one code in all contexts, and
how the agent's actions move it can be predicted.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

NUM_LEVELS = 4  # each halves the image
MOVED = 12  # of 255: a pixel that differs by more from its clip's first frame is foreground


def to_float(frames: torch.Tensor) -> torch.Tensor:
    """Convert uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1], in channels_last memory."""
    return frames.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert float (..., 3, H, W), clamped to [-1, 1], to uint8 (..., H, W, 3)."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().byte().movedim(-3, -1)


def moving(frames: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The foreground: uint8 (N, T, H, W, 3) and (N, H, W, 3) -> bool (N, T, H, W)."""
    return (frames.short() - first[:, None].short()).abs_().amax(-1) > MOVED


def leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.2)


def initialise(module: nn.Module):
    """Initialise a layer by He et al. 2015: activations keep their scale through all layers.

    With PyTorch's default, features start at a variance of 1e-4 and had learnt nothing after 900
    steps: all outputs were alike.
    """
    if isinstance(module, nn.ConvTranspose2d):  # 1 in stride^2 of the kernel meets an output pixel
        fan_in = module.weight[:, 0].numel() / module.stride[0] ** 2
    elif isinstance(module, (nn.Conv2d, nn.Linear)):
        fan_in = module.weight[0].numel()
    else:
        return
    nn.init.normal_(module.weight, std=(2 / (1 + 0.2 ** 2) / fan_in) ** 0.5)
    nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """Images float (N, 3, H, W) -> features (N, z_dim), and the maps of all levels for skips."""

    def __init__(self, im_size: int, channels: list[int], kernel: int, hidden: int, z_dim: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, kernel, 2, (kernel - 1) // 2)
            for in_channels, out_channels in zip([3, *channels[:-1]], channels, strict=True))
        size = channels[-1] * (im_size // 2 ** NUM_LEVELS) ** 2
        self.hidden, self.out = nn.Linear(size, hidden), nn.Linear(hidden, z_dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        maps = []
        for conv in self.convs:
            x = leaky(conv(x))
            maps.append(x)
        # flattened in the order in which channels_last lies in memory: no copy
        return self.out(leaky(self.hidden(x.permute(0, 2, 3, 1).flatten(1)))), maps


class SkipDeconv(nn.ConvTranspose2d):
    """A transposed convolution over [x; skip] that doubles the size.

    It is linear, so it is the sum of one over x and one over the skip, and the skip's half is the
    same for all T images of a clip.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__(2 * in_channels, out_channels, kernel, 2, (kernel - 1) // 2, kernel % 2)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """x (N*T, C, h, w), skip (N, C, h, w) -> (N*T, out_channels, 2h, 2w)."""
        of_x, of_skip = self.weight.chunk(2)
        options = dict(stride=self.stride, padding=self.padding,
                       output_padding=self.output_padding)
        x = F.conv_transpose2d(x, of_x, **options).unflatten(0, (len(skip), -1))
        return (x + F.conv_transpose2d(skip, of_skip, self.bias, **options)[:, None]).flatten(0, 1)


class Decoder(nn.Module):
    """Features (N*T, z_dim), skips of N clips and their first frames -> images (N*T, 3, H, W).

    The last level is a skip as well: the first frame itself, over which the decoder lays what it
    draws through a mask. What stands still need not be drawn anew.
    """

    def __init__(self, im_size: int, channels: list[int], kernel: int, hidden: int, z_dim: int):
        super().__init__()
        self.shape = 2 * (im_size // 2 ** NUM_LEVELS,) + (channels[-1],)
        size = self.shape[0] * self.shape[1] * self.shape[2]
        self.hidden, self.out = nn.Linear(z_dim, hidden), nn.Linear(hidden, size)
        self.deconvs = nn.ModuleList(
            SkipDeconv(in_channels, out_channels, kernel)
            for in_channels, out_channels in zip(channels[::-1], [*channels[-2::-1], 4],
                                                 strict=True))

    def forward(self, z: torch.Tensor, skips: list[torch.Tensor], first: torch.Tensor
                ) -> torch.Tensor:
        x = leaky(self.out(leaky(self.hidden(z)))).unflatten(1, self.shape).permute(0, 3, 1, 2)
        for deconv, skip in zip(self.deconvs[:-1], skips[:0:-1], strict=True):
            x = leaky(deconv(x, skip))
        drawn, mask = self.deconvs[-1](x, skips[0]).float().unflatten(0, (len(first), -1)).split(
            [3, 1], dim=2)
        return torch.lerp(first[:, None], drawn, mask.sigmoid()).flatten(0, 1)


def normed_mlp(in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers, each with layer normalisation and SiLU."""
    return nn.Sequential(nn.Linear(in_dim, hidden), nn.LayerNorm(hidden), nn.SiLU(),
                         nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU(),
                         nn.Linear(hidden, out_dim))


class Dynamics(nn.Module):
    """An ensemble that predicts the next code from the last HISTORY codes and the action.

    Each member is an MLP that predicts how the next change differs from the last one. Members start
    differently and see the same data (Chua et al. 2018).
    """

    HISTORY = 3  # codes: a pose, its velocity and acceleration

    def __init__(self, code_dim: int, action_dim: int, hidden: int = 256, num_members: int = 3):
        super().__init__()
        in_dim = code_dim * self.HISTORY + action_dim
        self.members = nn.ModuleList(normed_mlp(in_dim, hidden, code_dim)
                                     for _ in range(num_members))
        for member in self.members:
            nn.init.normal_(member[-1].weight, std=1e-2 / hidden ** 0.5)

    def forward(self, history: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Return the next codes (K, B, D) after the history (K, B, HISTORY, D), oldest first, of
        each member, and the action (K, B, A)."""
        moved = history.diff(dim=2)
        x = torch.cat([history[:, :, -1], moved.flatten(2), action], dim=2)
        change = torch.stack([member(part) for member, part in zip(self.members, x, strict=True)])
        return history[:, :, -1] + moved[:, :, -1] + change

    def rollout(self, codes: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Predict open loop, each member on its own.

        Args:
          codes: (B, HISTORY, D), oldest first.
          actions: (B, n, A), from the newest code on.

        Returns: (K, B, n, D), the codes after each action.
        """
        num_members, predicted = len(self.members), []
        history = codes.expand(num_members, *codes.shape)
        for action in actions.unbind(1):
            code = self(history, action.expand(num_members, *action.shape))
            predicted.append(code)
            history = torch.cat([history[:, :, 1:], code[:, :, None]], dim=2)
        return torch.stack(predicted, dim=2)

    def loss(self, codes: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Return the squared error of open-loop prediction over windows, a mean over all elements.

        Args: codes (B, T, D) with T > HISTORY; actions (B, T-1, A), those between the codes.
        """
        h = self.HISTORY
        predicted = self.rollout(codes[:, :h], actions[:, h - 1:])
        return (predicted - codes[:, h:]).square().mean()


class PoseCode(nn.Module):
    """A narrow code of z1, with zero mean and unit variance, and all that shapes it.

    - translation: from the code of a moment in one context and z2 of another, `predictor` predicts
      z1 of the same moment there, so that the code keeps the pose;
    - agreement: a moment has the same code in all contexts, so that it keeps no more than that;
    - `dynamics` predicts the code over several steps from the agent's actions, and `inverse` reads
      the action out of it, so that distances follow what the agent can do.

    What is predicted of z1 are linear discriminants: the directions with the largest ratio of
    variance within episodes to disagreement between contexts.
    """

    def __init__(self, z_dim: int, code_dim: int, action_dim: int, num_targets: int = 32,
                 hidden: int = 256):
        """Make the code's head, and the networks that are trained with it.

        Args:
          num_targets: how many discriminants are predicted.
          hidden: of each MLP.
        """
        super().__init__()
        num_targets = min(num_targets, z_dim)
        self.head = normed_mlp(z_dim, hidden, code_dim)
        # Unit variance, without parameters: codes cannot agree by being all the same.
        self.norm = nn.BatchNorm1d(code_dim, affine=False, momentum=0.02)
        self.predictor = normed_mlp(code_dim + z_dim, hidden, num_targets)
        self.dynamics = Dynamics(code_dim, action_dim, hidden)
        self.inverse = normed_mlp(3 * code_dim, hidden, action_dim)
        self.register_buffer('z_scale', torch.zeros(2, z_dim))            # mean, deviation
        self.register_buffer('z2_scale', torch.zeros(2, z_dim))
        self.register_buffer('targets', torch.zeros(z_dim, num_targets))

    def fit_scales(self, z: torch.Tensor, z2: torch.Tensor):
        """Set the scales of z1 and z2, and the discriminants, from a dataset's features.

        Args: z (N, C, T, Z), z2 (N, C, Z), of N episodes in C >= 2 contexts.
        """
        for scale, values in ((self.z_scale, z), (self.z2_scale, z2)):
            values = values.flatten(0, -2)
            scale.copy_(torch.stack([values.mean(0), values.std(0) + 1e-4]))
        moved = self._scaled(z, self.z_scale)
        moved = (moved - moved.mean(2, keepdim=True)).double()      # within an episode
        noise = (moved[:, 0] - moved[:, 1]).flatten(0, 1)
        noise = noise.T @ noise / len(noise)
        noise += 1e-3 * noise.trace() / len(noise) * torch.eye(len(noise)).to(noise)
        moved = moved.flatten(0, 2)
        whiten = torch.linalg.inv(torch.linalg.cholesky(noise))
        _, directions = torch.linalg.eigh(whiten @ torch.cov(moved.T) @ whiten.T)
        targets = whiten.T @ directions[:, -self.targets.shape[1]:]
        self.targets.copy_(targets / (moved @ targets).std(0))

    @staticmethod
    def _scaled(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (values - scale[0]) / scale[1]

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z1 (..., Z) -> code float32 (..., code_dim)."""
        code = self.head(self._scaled(z.float(), self.z_scale).flatten(0, -2))
        return self.norm(code).unflatten(0, z.shape[:-1])

    def losses(self, z_source: torch.Tensor, z_target: torch.Tensor, z2: torch.Tensor,
               actions: torch.Tensor, trans: float = 1.0, rec: float = 1.0, agree: float = 1.0,
               forward: float = 1.0, inverse: float = 0.1, noise: float = 0.1
               ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted sum of the losses, each a mean over elements.

        Args:
          z_source, z_target: z1 (N, T, Z) of windows of successive frames in two contexts.
          z2: (N, Z), of the target contexts.
          actions: (P, T-1, A): the last P windows are play, and these the actions in them.
          trans, rec: of prediction from the source's and from the target's own code.
          agree, forward, inverse: of the terms above.
          noise: standard deviation of noise on the codes that `predictor` gets: poses that look
            different stay further apart than that.

        Returns: a scalar, and each loss before weighting, detached.
        """
        source, target = self(torch.stack([z_source, z_target])).unbind(0)
        context = self._scaled(z2, self.z2_scale)[:, None].expand(-1, source.shape[1], -1)
        truth = self._scaled(z_target, self.z_scale) @ self.targets
        losses = {'agree': F.mse_loss(source, target)}
        for name, code in (('trans', source), ('rec', target)):
            noisy = code + noise * torch.randn_like(code)
            losses[name] = F.mse_loss(self.predictor(torch.cat([noisy, context], dim=2)), truth)
        if len(actions):
            codes = torch.cat([source[-len(actions):], target[-len(actions):]])      # (2P, T, D)
            actions = actions.repeat(2, 1, 1)
            losses['forward'] = self.dynamics.loss(codes, actions)
            around = torch.cat([codes[:, :-2], codes[:, 1:-1], codes[:, 2:]], dim=2)
            losses['inverse'] = F.mse_loss(self.inverse(around), actions[:, 1:])
        weights = {'trans': trans, 'rec': rec, 'agree': agree, 'forward': forward,
                   'inverse': inverse}
        total = sum(weights[name] * loss for name, loss in losses.items() if weights[name])
        return total, {name: loss.detach() for name, loss in losses.items()}


class EncodedContext(NamedTuple):
    """The context of N clips: Enc2's z2 (N, z_dim), its maps of each level, the first frames."""

    z2: torch.Tensor
    skips: list[torch.Tensor]
    first: torch.Tensor


class ContextTranslator(nn.Module):
    """Enc1, Enc2, T and Dec, and a pose code where there is one.

    z1 to z3 have no scale of their own: the losses do not ask for one.
    """

    def __init__(self, im_size: int = 64, channels: tuple[int, ...] = (32, 64, 128, 256),
                 z_dim: int = 128, hidden: int = 512, kernel: int = 4,
                 code_dim: int | None = None, action_dim: int | None = None):
        """Make the networks.

        Args:
          im_size: pixels along an edge, a multiple of 16.
          channels: of the four levels; the paper has 64, 128, 256, 512.
          z_dim, hidden: of the features, and of the layer before them and in T; the paper has 1024.
          kernel: of the convolutions; the paper has 5. 4 covers all pixels evenly at stride 2.
          code_dim: numbers in the pose code, which takes `action_dim`; None is the paper's model.
        """
        super().__init__()
        self.im_size, self.z_dim = im_size, z_dim
        sizes = (im_size, list(channels), kernel, hidden, z_dim)
        self.enc1, self.enc2, self.dec = Encoder(*sizes), Encoder(*sizes), Decoder(*sizes)
        self.translator = nn.Sequential(nn.Linear(2 * z_dim, hidden), nn.LeakyReLU(0.2),
                                        nn.Linear(hidden, z_dim))
        self.apply(initialise)
        self.code = PoseCode(z_dim, code_dim, action_dim) if code_dim else None
        self.feature_dim = code_dim or z_dim
        # Training begins with the first frames, dimmed, instead of noise laid over them.
        nn.init.normal_(self.dec.deconvs[-1].weight, std=0.01)
        self.to(memory_format=torch.channels_last)

    def only_answer(self, device: torch.device, dtype: torch.dtype) -> 'ContextTranslator':
        """Prepare for use after training: multiply in `dtype`, but for the code, which stays in
        float32."""
        for part in (self.enc1, self.enc2, self.dec, self.translator):
            part.to(dtype)
        return self.to(device).eval().requires_grad_(False)

    def image_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the paper's four networks, without the code's."""
        return [parameter for part in (self.enc1, self.enc2, self.dec, self.translator)
                for parameter in part.parameters()]

    @property
    def dtype(self) -> torch.dtype:
        return self.translator[0].weight.dtype

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Enc1: uint8 (..., H, W, 3) -> z (..., z_dim), in the precision of the parameters."""
        z, _ = self.enc1(to_float(frames.reshape(-1, *frames.shape[-3:])).to(self.dtype))
        return z.view(*frames.shape[:-3], self.z_dim)

    def context(self, first: torch.Tensor) -> EncodedContext:
        """Enc2: the first frames of N clips, uint8 (N, H, W, 3) -> their context."""
        first = to_float(first)
        return EncodedContext(*self.enc2(first.to(self.dtype)), first)

    def translate(self, z1: torch.Tensor, context: EncodedContext) -> torch.Tensor:
        """T: z1 (N, T, z_dim) of any context -> z3 (N, T, z_dim) in `context`."""
        z2 = context.z2[:, None].expand(-1, z1.shape[1], -1)
        return self.translator(torch.cat([z1, z2], dim=2))

    def decode(self, z: torch.Tensor, context: EncodedContext) -> torch.Tensor:
        """Dec: z (N, T, z_dim) -> images (N, T, 3, H, W) in about [-1, 1]; see `to_uint8`."""
        return self.dec(z.flatten(0, 1), *context[1:]).unflatten(0, z.shape[:2])

    def losses(self, source: torch.Tensor, target: torch.Tensor, first: torch.Tensor,
               trans: float = 1.0, rec: float = 1.0, align: float = 1 / 346,
               foreground: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted sum of the paper's losses, each a mean over elements.

        Args:
          source, target: uint8 (N, T, H, W, 3), time-aligned clips; any frames of them.
          first: uint8 (N, H, W, 3), the target clips' first frames.
          trans, rec, align: the weights; what weighs 0 is not computed.
          foreground: the share of the image losses' weight that goes to the moving pixels of the
            target, in [0, 1]; the rest falls on all pixels alike.

        Returns: a scalar, and each loss before weighting, detached.
        """
        context, num_frames = self.context(first), source.shape[1]
        z1, z_target = self.encode(torch.cat([source, target], dim=1)).chunk(2, dim=1)
        z3 = self.translate(z1, context)
        losses = {}
        decoded = [name for name, weight in (('trans', trans), ('rec', rec)) if weight]
        if decoded:
            z = torch.cat([{'trans': z3, 'rec': z_target}[name] for name in decoded], dim=1)
            truth = to_float(target.flatten(0, 1)).unflatten(0, target.shape[:2])
            moved = moving(target, first).unsqueeze(2).float()                   # (N, T, 1, H, W)
            emphasis = 1 - foreground + foreground * moved / moved.mean().clamp(min=1e-6)
            images = self.decode(z, context).float().split(num_frames, dim=1)
            for name, image in zip(decoded, images, strict=True):
                losses[name] = ((image - truth).square() * emphasis).mean()
        if align:
            losses['align'] = F.mse_loss(z3.float(), z_target.float())
        weights = {'trans': trans, 'rec': rec, 'align': align}
        total = sum(weights[name] * loss for name, loss in losses.items())
        return total, {name: loss.detach() for name, loss in losses.items()}
