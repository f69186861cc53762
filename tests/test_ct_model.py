import plain
import pytest
import torch
import torch.nn.functional as F

import ct_model
from ct_model import ContextTranslator, SkipDeconv, moving, to_float, to_uint8
from utils import UserError

SMALL = dict(im_size=16, channels=[4, 6, 8, 10], z_dim=5, hidden=12)


def make(**changes) -> ContextTranslator:
    torch.manual_seed(0)
    return ContextTranslator(**{**SMALL, **changes})


def clips(num_clips=3, num_frames=4, size=16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_clips, num_frames, size, size, 3), dtype=torch.uint8,
                         generator=generator)


@pytest.mark.parametrize('changes', [{}, {'kernel': 5, 'im_size': 48}, {'im_size': 80}])
def test_vectorised_is_a_plain_loop_over_time(changes):
    model = make(**changes)
    source, target = clips(size=model.im_size), clips(size=model.im_size).flip(0)
    first = target[:, 2]
    z3, z, translations, reconstructions = plain.translate(model, source, target, first)
    context = model.context(first)
    torch.testing.assert_close(model.translate(model.encode(source), context), z3)
    torch.testing.assert_close(model.encode(target), z)
    torch.testing.assert_close(model.decode(z3, context), translations)

    expected = {'trans': F.mse_loss(translations, ct_float(target)),
                'rec': F.mse_loss(reconstructions, ct_float(target)), 'align': F.mse_loss(z3, z)}
    expected_total = 2 * expected['trans'] + 3 * expected['rec'] + 5 * expected['align']
    total, losses = model.losses(source, target, first, 2, 3, 5)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss.detach())
    torch.testing.assert_close(total, expected_total)
    parameters = list(model.parameters())
    for grad, other in zip(torch.autograd.grad(total, parameters),
                           torch.autograd.grad(expected_total, parameters), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-6)


def ct_float(frames):
    return torch.stack([to_float(clip) for clip in frames])


@pytest.mark.parametrize('kernel', [4, 5])
def test_the_split_convolution_is_the_one_over_the_concatenation(kernel):
    deconv = SkipDeconv(4, 3, kernel)
    x, skip = torch.randn(6, 4, 5, 5), torch.randn(2, 4, 5, 5)
    expected = plain.deconv(deconv, x, skip.repeat_interleave(3, dim=0))
    assert expected.shape == (6, 3, 10, 10)
    torch.testing.assert_close(deconv(x, skip), expected)


def test_images_and_floats():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    floats = to_float(frames)
    assert floats.shape == (1, 3, 1, 1)
    torch.testing.assert_close(floats.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    every = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(every)), every)
    beyond = to_uint8(torch.tensor([-7.0, 0.0, 7.0]).view(3, 1, 1))
    assert beyond.flatten().tolist() == [0, 128, 255]


def test_what_moves():
    first = torch.full((1, 1, 3, 3), 100, dtype=torch.uint8)
    frame = first.clone()
    frame[0, 0, 0, 2] -= ct_model.MOVED + 1
    frame[0, 0, 1, 0] += ct_model.MOVED
    assert moving(frame[:, None], first).tolist() == [[[[True, False, False]]]]


class Predicts(ContextTranslator):
    """Features are the frames' mean brightness in [-1, 1]; the decoder paints them everywhere."""

    def encode(self, frames):
        return (frames.float() / 127.5 - 1).mean((-3, -2, -1))[..., None]

    def context(self, first):
        return None

    def translate(self, z1, context):
        return z1

    def decode(self, z, context):
        return z[..., None, None].expand(*z.shape[:2], 3, 16, 16)


def test_losses_by_hand():
    model = Predicts(**SMALL)
    source = torch.full((1, 2, 16, 16, 3), 255, dtype=torch.uint8)  # 1: predicts 1 everywhere
    target = torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)        # -1
    target[0, 1, :, :8] = 255  # half of the second frame moves, to 1
    first = target[:, 0]
    total, losses = model.losses(source, target, first, 1, 1, 0.5)
    # trans: 4 wherever the target is -1, on 3/4 of the pixels
    # rec: frame 0 exact; frame 1 has mean 0, so 1 everywhere: mean 1/2
    # align: z3 = 1, z = -1 and 0: (4 + 1) / 2
    assert losses['trans'] == pytest.approx(3)
    assert losses['rec'] == pytest.approx(0.5)
    assert losses['align'] == pytest.approx(2.5)
    assert total == pytest.approx(3 + 0.5 + 0.5 * 2.5)
    # all of the weight on the quarter that moves, where the translation is right
    _, losses = model.losses(source, target, first, foreground=1)
    assert losses['trans'] == pytest.approx(0)
    assert losses['rec'] == pytest.approx(1)
    # half of it
    _, losses = model.losses(source, target, first, foreground=0.5)
    assert losses['trans'] == pytest.approx(1.5)
    assert losses['rec'] == pytest.approx(0.75)


def test_a_clip_that_stands_still_has_finite_losses():
    frames = clips(num_frames=1).expand(-1, 3, -1, -1, -1)
    total, _ = make().losses(frames, frames, frames[:, 0], foreground=0.5)
    assert total.isfinite() and total > 0


@pytest.mark.parametrize('name', ['trans', 'rec', 'align'])
def test_a_loss_of_weight_0_is_not_computed(name, monkeypatch):
    model, frames = make(), clips()
    decoded = []
    decode = model.decode
    monkeypatch.setattr(model, 'decode', lambda z, context: decoded.append(z.shape[1])
                        or decode(z, context))
    total, losses = model.losses(frames, frames.flip(0), frames[:, 2], **{name: 0.0})
    assert losses.keys() == {'trans', 'rec', 'align'} - {name}
    assert decoded == [8 if name == 'align' else 4]  # frames of each clip
    _, everything = model.losses(frames, frames.flip(0), frames[:, 2])
    for key, loss in losses.items():
        torch.testing.assert_close(loss, everything[key])


def test_it_overfits_one_small_batch():
    """A bright square wanders over clips of different colours."""
    model = make(channels=[16, 16, 32, 32], z_dim=16, hidden=64)
    source = torch.zeros(2, 6, 16, 16, 3, dtype=torch.uint8)
    source[0] += torch.tensor([60, 0, 0], dtype=torch.uint8)
    source[1] += torch.tensor([0, 60, 120], dtype=torch.uint8)
    target = source.flip(0)
    for t in range(6):
        for n in range(2):
            source[n, t, 2 * t:2 * t + 4, 5 * n:5 * n + 5] = 230
            target[n, t, 2 * t:2 * t + 4, 5 * n:5 * n + 5] = 200
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    history = []
    for _ in range(150):
        total, losses = model.losses(source, target, target[:, 0], foreground=0.5)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(losses)
    assert history[-1]['trans'] < 0.05 * history[0]['trans']
    assert history[-1]['rec'] < 0.05 * history[0]['rec']


def test_an_untrained_encoder_tells_frames_apart():
    """With PyTorch's own initialisation the variance is 1e-4, and training stands still."""
    z = make(im_size=64, channels=[32, 64, 128, 256], z_dim=128, hidden=512).encode(clips(size=64))
    assert z.flatten(0, 1).var(0).mean() > 0.01


def test_bf16_stays_close():
    model, frames = make(), clips()
    _, exact = model.losses(frames, frames.flip(0), frames[:, 2], foreground=0.5)
    with torch.autocast('cpu', torch.bfloat16):
        _, close = model.losses(frames, frames.flip(0), frames[:, 2], foreground=0.5)
    for name, loss in exact.items():
        assert close[name].dtype == torch.float32
        torch.testing.assert_close(close[name], loss, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize('shape', [(), (7,), (2, 3)])
def test_any_number_of_frames_can_be_encoded(shape):
    frames = clips(1, 1)[0, 0].expand(*shape, 16, 16, 3)
    assert make().encode(frames).shape == (*shape, 5)


@pytest.mark.parametrize('changes, word', [
    ({'im_size': 84}, 'im_size=84'), ({'im_size': 0}, 'im_size=0'),
    ({'channels': [4]}, r'channels=\[4\]')])
def test_sizes_that_do_not_fit_are_refused(changes, word):
    with pytest.raises(UserError, match=word):
        make(**changes)
