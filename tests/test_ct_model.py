import plain
import pytest
import torch
import torch.nn.functional as F

import ct_model
from ct_model import (
    ContextTranslator,
    Dynamics,
    PoseCode,
    SkipDeconv,
    moving,
    to_float,
    to_uint8,
)

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


# ------------------------------------------------------------------------- dynamics, pose code

def make_dynamics(code_dim=2, action_dim=1, still=False, **options) -> Dynamics:
    """`still`: every member predicts that the velocity stays."""
    torch.manual_seed(0)
    dynamics = Dynamics(code_dim, action_dim, hidden=16, **options)
    for member in dynamics.members if still else ():
        torch.nn.init.zeros_(member[-1].weight)
        torch.nn.init.zeros_(member[-1].bias)
    return dynamics


def test_dynamics_predict_the_change_of_velocity():
    dynamics = make_dynamics(still=True)
    history = torch.tensor([[0.0, 5.0], [1.0, 5.0], [3.0, 4.0]]).expand(3, 4, 3, 2)
    assert torch.equal(dynamics(history, torch.ones(3, 4, 1)),
                       torch.tensor([5.0, 3.0]).expand(3, 4, 2))
    for k, member in enumerate(dynamics.members):
        torch.nn.init.constant_(member[-1].bias, 0.5 * k)
    assert torch.equal(dynamics(history, torch.ones(3, 4, 1))[:, 0],
                       torch.tensor([[5.0, 3.0], [5.5, 3.5], [6.0, 4.0]]))


def test_a_rollout_is_repeated_prediction_of_each_member_on_its_own():
    dynamics = make_dynamics()
    for parameter in dynamics.parameters():  # far enough apart to tell members
        torch.nn.init.normal_(parameter, std=0.3)
    codes, actions = torch.randn(5, 3, 2), torch.randn(5, 4, 1)
    predicted = dynamics.rollout(codes, actions)
    assert predicted.shape == (3, 5, 4, 2)
    history = codes.expand(3, 5, 3, 2)
    for n in range(4):
        following = dynamics(history, actions[:, n].expand(3, 5, 1))
        torch.testing.assert_close(predicted[:, :, n], following)
        history = torch.cat([history, following[:, :, None]], dim=2)[:, :, -3:]
    assert (predicted[0] - predicted[1]).abs().min() > 0
    later = dynamics.rollout(codes, torch.cat([actions[:, :2], actions[:, 2:] + 1], dim=1))
    assert torch.equal(later[:, :, :2], predicted[:, :, :2])  # what comes later moves nothing
    assert (later[:, :, 2] != predicted[:, :, 2]).all()


def test_the_loss_of_dynamics_by_hand():
    """Velocity stays, but the codes accelerate by 1: errors grow by 1, 3, 6."""
    time = torch.arange(6.0)
    codes = (time * (time - 1) / 2)[None, :, None].expand(2, 6, 2)
    loss = make_dynamics(still=True).loss(codes, torch.zeros(2, 5, 1))
    assert loss.item() == pytest.approx((1 + 9 + 36) / 3)
    steady = time[None, :, None].expand(2, 6, 2)
    assert make_dynamics(still=True).loss(steady, torch.zeros(2, 5, 1)) == 0


def test_the_loss_of_dynamics_takes_each_action_between_its_codes():
    """Members that add the action: right only for codes that moved by it at that very step."""
    class Adds(Dynamics):
        def forward(self, history, action):
            return history[:, :, -1] + action

    actions = torch.randn(4, 7, 2)
    codes = torch.cat([torch.zeros(4, 1, 2), actions.cumsum(1)], dim=1)
    dynamics = Adds(2, 2, hidden=4)
    assert dynamics.loss(codes, actions) < 1e-12
    assert dynamics.loss(codes, actions.roll(1, 1)) > 0.1


def test_dynamics_learn_a_linear_system():
    """A damped pendulum that actions push, open loop over five steps."""
    def draw(num):
        codes, actions = [torch.randn(num, 2)], torch.rand(num, 7, 1) * 2 - 1
        for action in actions.unbind(1):
            x, v = codes[-1].unbind(1)
            v = 0.95 * v - 0.3 * x + 0.5 * action[:, 0]
            codes.append(torch.stack([x + 0.3 * v, v], dim=1))
        return torch.stack(codes, dim=1), actions

    torch.manual_seed(0)
    dynamics = Dynamics(2, 1, hidden=64)
    held_out = draw(500)
    with torch.no_grad():
        before = dynamics.loss(*held_out)
    optimizer, num_steps = torch.optim.Adam(dynamics.parameters()), 300
    for step in range(num_steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * (1 - step / num_steps)
        loss = dynamics.loss(*draw(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes, actions = held_out
    with torch.no_grad():
        after = dynamics.loss(codes, actions)
        without = dynamics.loss(codes, actions.flip(0))  # other episodes' actions
    assert after < 0.02 * before and after < 0.01 * codes.var()
    assert without > 10 * after


def features(num_clips=6, num_contexts=2, num_frames=9, z_dim=5) -> torch.Tensor:
    """z1 (N, C, T, Z) of all scales, with a place of its own for each clip and context."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(num_clips, contexts, frames, z_dim, generator=generator)
             for contexts, frames in ((num_contexts, num_frames), (num_contexts, 1), (1, 1))]
    return sum(parts) * torch.tensor([0.1, 1.0, 3.0, 10.0, 30.0])[:z_dim] + 7


def make_code(z_dim=5, **changes) -> PoseCode:
    torch.manual_seed(0)
    code = PoseCode(z_dim, **{'code_dim': 3, 'action_dim': 2, 'hidden': 16, **changes})
    z = features(z_dim=z_dim)
    code.fit_scales(z, z[:, :, 0] * 2)
    return code


def test_codes_have_zero_mean_and_unit_variance_in_training():
    code = make_code()
    codes = code(features())
    assert codes.shape == (6, 2, 9, 3) and codes.dtype == torch.float32
    torch.testing.assert_close(codes.flatten(0, 2).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(codes.flatten(0, 2).var(0, correction=0), torch.ones(3), atol=1e-3,
                               rtol=0)


def test_codes_are_a_function_of_their_frame_alone_after_training():
    code = make_code()
    for _ in range(500):  # the scale of the normalisation follows slowly
        code(features())
    code.eval()
    codes = code(features())
    torch.testing.assert_close(codes[2:4, 1:], code(features()[2:4, 1:]))
    assert codes.flatten(0, 2).mean(0).abs().max() < 0.05
    assert (codes.flatten(0, 2).var(0) - 1).abs().max() < 0.05


def test_scales_are_those_of_all_features():
    code, z = make_code(), features()
    for scale, values in ((code.z_scale, z), (code.z2_scale, z[:, :, :1] * 2)):
        torch.testing.assert_close(scale[0], values.flatten(0, 2).mean(0))
        torch.testing.assert_close(scale[1], values.flatten(0, 2).std(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize('num_targets', [2, 5, 32])
def test_discriminants_have_unit_variance_within_clips(num_targets):
    code, z = make_code(num_targets=num_targets), features()
    assert code.targets.shape == (5, min(num_targets, 5))
    discriminants = z / z.flatten(0, 2).std(0) @ code.targets
    moved = (discriminants - discriminants.mean(2, keepdim=True)).flatten(0, 2)
    torch.testing.assert_close(moved.std(0), torch.ones(min(num_targets, 5)), rtol=1e-2, atol=0)


def test_discriminants_are_what_contexts_agree_on():
    """Of eight mixed features two are alike in all contexts, though they vary least."""
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(20, 1, 30, 2, generator=generator)
    noise = 2 * torch.randn(20, 3, 30, 6, generator=generator)
    mixing, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    z = torch.cat([alike.expand(-1, 3, -1, -1), noise], dim=3) @ mixing
    code = PoseCode(8, 2, 1, num_targets=2)
    code.fit_scales(z, z[:, :, 0])
    discriminants = z / z.flatten(0, 2).std(0) @ code.targets
    disagreement = (discriminants[:, 0] - discriminants[:, 1]).var() / discriminants.var()
    assert disagreement < 0.05  # of all features it is nearly 2


def handmade_code() -> PoseCode:
    """Its code is z1 itself, normalised; the predictor and the inverse model say 0, and the
    dynamics that the velocity stays."""
    class Zeros(torch.nn.Module):
        def __init__(self, out_dim):
            super().__init__()
            self.out_dim = out_dim

        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], self.out_dim)

    code = PoseCode(1, 1, 1, hidden=4)
    code.z_scale[1], code.z2_scale[1], code.targets[0] = 1, 1, 2
    code.head, code.predictor, code.inverse = torch.nn.Identity(), Zeros(1), Zeros(1)
    code.dynamics = make_dynamics(1, 1, still=True)
    return code


def test_losses_of_the_code_by_hand():
    """The second window is play. All values are 1 or -1, as many of each."""
    source = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, 1]])[..., None]
    target = torch.tensor([[1.0, 1, -1, -1], [-1, -1, -1, 1]])[..., None]
    actions = torch.tensor([[9.0, 2, 4]])[..., None]
    total, losses = handmade_code().losses(source, target, torch.zeros(2, 1), actions, trans=1,
                                           rec=10, agree=100, forward=1000, inverse=10_000)
    expected = {'agree': (4 + 4) / 8,
                'trans': 4, 'rec': 4,     # the discriminants are 2 or -2
                'forward': 4,             # from -1, -1, -1 it predicts -1
                'inverse': (4 + 16) / 2}  # of codes with two neighbours
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert float(losses[name]) == pytest.approx(loss, rel=1e-4), name
        assert not losses[name].requires_grad
    assert total.item() == pytest.approx(4 + 40 + 100 + 4000 + 100_000, rel=1e-4)


def test_agreement_is_zero_for_contexts_that_look_the_same():
    code, z = make_code(), features()[:, 0]
    z2, actions = torch.randn(6, 5), torch.rand(3, 8, 2)
    _, losses = code.losses(z, z, z2, actions, noise=0)
    assert losses['agree'] == 0 and losses['trans'] == losses['rec'] > 0
    _, losses = code.losses(z, features()[:, 1], z2, actions, noise=0)
    assert losses['agree'] > 0.01 and losses['trans'] != losses['rec']


def test_losses_about_actions_take_play_alone():
    code, z = make_code(), features()
    z2, actions = torch.randn(6, 5), torch.rand(2, 8, 2)
    torch.manual_seed(0)
    _, losses = code.losses(z[:, 0], z[:, 1], z2, actions)
    codes = code(z.transpose(0, 1))[:, -2:].flatten(0, 1)  # the last two windows, both contexts
    torch.testing.assert_close(losses['forward'],
                               code.dynamics.loss(codes, actions.repeat(2, 1, 1)).detach())
    torch.manual_seed(0)
    _, without = code.losses(z[:, 0], z[:, 1], z2, actions[:0])
    assert without.keys() == {'trans', 'rec', 'agree'}
    for name, loss in without.items():
        torch.testing.assert_close(loss, losses[name])


def test_a_weight_of_0_leaves_its_loss_out_of_the_sum():
    code, z = make_code(), features()
    names = ('trans', 'rec', 'agree', 'forward', 'inverse')
    for name in names:
        torch.manual_seed(0)
        total, losses = code.losses(z[:, 0], z[:, 1], torch.zeros(6, 5), torch.ones(6, 8, 2),
                                    **{**dict.fromkeys(names, 0.0), name: 3.0})
        torch.testing.assert_close(total.detach(), 3 * losses[name])


def test_noise_falls_on_what_the_predictor_gets_alone():
    code, z = make_code(), features()
    args = z[:, 0], z[:, 1], torch.zeros(6, 5), torch.ones(6, 8, 2)
    quiet, noisy = (code.losses(*args, noise=noise)[1] for noise in (0.0, 5.0))
    for name, loss in quiet.items():
        assert torch.equal(loss, noisy[name]) == (name not in ('trans', 'rec')), name


def test_a_code_takes_nothing_from_the_papers_networks():
    """Neither their weights at the start nor any gradient: they learn as they would without it."""
    with_code, without = make(code_dim=3, action_dim=2), make()
    assert (with_code.feature_dim, without.feature_dim) == (3, 5) and without.code is None
    assert without.image_parameters() == list(without.parameters())
    of_images = with_code.image_parameters()
    assert {id(part) for part in of_images}.isdisjoint(map(id, with_code.code.parameters()))
    assert len(of_images) + len(list(with_code.code.parameters())) == len(
        list(with_code.parameters()))
    for one, other in zip(of_images, without.parameters(), strict=True):
        assert one.shape == other.shape
    total, _ = with_code.losses(clips(), clips().flip(0), clips()[:, 0])
    total.backward()
    assert all(part.grad is not None for part in of_images)
    assert all(part.grad is None for part in with_code.code.parameters())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_code_stays_in_float32(dtype):
    model = make(code_dim=3, action_dim=2)
    exact = model.encode(clips()).detach()
    model.code.fit_scales(exact[:, None].expand(-1, 2, -1, -1) + torch.randn(3, 2, 4, 5),
                          exact[:, None, 0].expand(-1, 2, -1))
    assert model.only_answer(torch.device('cpu'), dtype) is model
    assert model.dtype == dtype and not model.training and not model.code.norm.training
    assert not any(part.requires_grad for part in model.parameters())
    assert {part.dtype for part in model.image_parameters()} == {dtype}
    assert {part.dtype for part in model.code.parameters()} == {torch.float32}
    z = model.encode(clips())
    codes = model.code(z)
    assert z.dtype == dtype and codes.dtype == torch.float32
    assert torch.equal(codes, model.code(z.float()))  # nothing in it is rounded
    # one frame alone, as the agent asks
    torch.testing.assert_close(model.code(model.encode(clips()[1, 2:3]))[0], codes[1, 2], rtol=0.02,
                               atol=0.02)
