"""The context translator of Liu, Gupta, Abbeel and Levine (2017, arXiv 1707.03374).

It learns what a video would look like in another context, given the first image in that context:

    z1 = Enc1(o_t^source)    what happens, apart from where
    z2 = Enc2(o_0^target)    the context, with a skip of every level into the decoder
    z3 = T(z1, z2)           what happens, as it would be encoded in the target context
    o  = Dec(z3, skips)      its image there

All of it works on whole clips: the context is computed once a clip and broadcast over time.
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils import UserError

NUM_LEVELS = 4  # each halves the image
MOVED = 12  # of 255: a pixel that differs by more from its clip's first frame is foreground


def to_float(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, 3) in 0..255 -> float32 (N, 3, H, W) in [-1, 1], in channels_last memory."""
    return frames.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float (..., 3, H, W) in about [-1, 1], which is clamped -> uint8 (..., H, W, 3)."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().byte().movedim(-3, -1)


def moving(frames: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The foreground: uint8 (N, T, H, W, 3) and (N, H, W, 3) -> bool (N, T, H, W)."""
    return (frames.short() - first[:, None].short()).abs_().amax(-1) > MOVED


def leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.2)


def initialise(module: nn.Module):
    """He et al. 2015: activations keep their scale through all layers.

    With PyTorch's own initialisation features start at a variance of 1e-4, and in 900
    steps nothing came to pass through them: all images come out alike.
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


class Context(NamedTuple):
    """Of N clips' first frames: Enc2's z2 (N, z_dim), its maps of each level, the frames."""

    z2: torch.Tensor
    skips: list[torch.Tensor]
    first: torch.Tensor


class ContextTranslator(nn.Module):
    """Enc1, Enc2, T and Dec. Features have no scale of their own: the losses do not ask for one."""

    def __init__(self, im_size: int = 64, channels: tuple[int, ...] = (32, 64, 128, 256),
                 z_dim: int = 128, hidden: int = 512, kernel: int = 4):
        """
        Args:
          im_size: pixels along an edge, a multiple of 16.
          channels: of the four levels; the paper has 64, 128, 256, 512.
          z_dim, hidden: of the features, and of the layer before them and in T; the paper has 1024.
          kernel: of the convolutions; the paper has 5. 4 covers all pixels evenly at stride 2.

        Raises: UserError for sizes that do not fit.
        """
        super().__init__()
        if im_size < 16 or im_size % 2 ** NUM_LEVELS:
            raise UserError(f'im_size={im_size} cannot be halved {NUM_LEVELS} times: film with a '
                            f'multiple of {2 ** NUM_LEVELS}, such as im_size=64.')
        if len(channels) != NUM_LEVELS:
            raise UserError(f'channels={list(channels)} are not {NUM_LEVELS}, one for each level: '
                            'set channels=[32,64,128,256].')
        self.im_size, self.z_dim = im_size, z_dim
        sizes = (im_size, list(channels), kernel, hidden, z_dim)
        self.enc1, self.enc2, self.dec = Encoder(*sizes), Encoder(*sizes), Decoder(*sizes)
        self.translator = nn.Sequential(nn.Linear(2 * z_dim, hidden), nn.LeakyReLU(0.2),
                                        nn.Linear(hidden, z_dim))
        self.apply(initialise)
        # Training begins with the first frames, dimmed, instead of noise laid over them.
        nn.init.normal_(self.dec.deconvs[-1].weight, std=0.01)
        self.to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        return self.translator[0].weight.dtype

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Enc1: uint8 (..., H, W, 3) -> z (..., z_dim), in the precision of the parameters."""
        z, _ = self.enc1(to_float(frames.reshape(-1, *frames.shape[-3:])).to(self.dtype))
        return z.view(*frames.shape[:-3], self.z_dim)

    def context(self, first: torch.Tensor) -> Context:
        """Enc2: the first frames of N clips, uint8 (N, H, W, 3) -> their context."""
        first = to_float(first)
        return Context(*self.enc2(first.to(self.dtype)), first)

    def translate(self, z1: torch.Tensor, context: Context) -> torch.Tensor:
        """T: z1 (N, T, z_dim) of any context -> z3 (N, T, z_dim) in `context`."""
        z2 = context.z2[:, None].expand(-1, z1.shape[1], -1)
        return self.translator(torch.cat([z1, z2], dim=2))

    def decode(self, z: torch.Tensor, context: Context) -> torch.Tensor:
        """Dec: z (N, T, z_dim) -> images (N, T, 3, H, W) in about [-1, 1]; see `to_uint8`."""
        return self.dec(z.flatten(0, 1), *context[1:]).unflatten(0, z.shape[:2])

    def losses(self, source: torch.Tensor, target: torch.Tensor, first: torch.Tensor,
               trans: float = 1.0, rec: float = 1.0, align: float = 1 / 346,
               foreground: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of the paper's losses, each a mean over elements.

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
