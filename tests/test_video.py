import json
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from fakes import FakeEnv, watch, write_split

import snapshots
import utils
import video


def make_dataset(root, num=3, **changes):
    """Episodes of 4 steps in 2 contexts; the frames of episode i are all i."""
    return write_split(root, [(np.full((2, 5, 8, 8, 3), i, np.uint8), {'expert_return': i})
                              for i in range(num)], **changes)


def test_mp4_has_every_frame_in_its_place(tmp_path):
    clip = np.repeat(np.linspace(0, 250, 7).astype(np.uint8), 31 * 45 * 3).reshape(7, 31, 45, 3)
    path = tmp_path / 'new' / 'clip.mp4'
    video.save(path, clip, fps=10)
    read = iio.imread(path)
    assert read.shape == (7, 32, 46, 3)  # odd edges repeated, nothing rescaled
    assert np.abs(read.mean(axis=(1, 2, 3)) - clip.mean(axis=(1, 2, 3))).max() < 3
    properties = iio.immeta(path)
    assert properties['fps'] == 10 and properties['pix_fmt'].startswith('yuv420p')
    assert [file.name for file in path.parent.iterdir()] == ['clip.mp4']


def test_gif_has_every_frame(tmp_path):
    clip = np.zeros((3, 9, 9, 3), np.uint8)
    clip[1:, :, :, 0], clip[2, :, :, 1] = 255, 255
    video.save(tmp_path / 'clip.gif', clip, fps=20)
    assert np.array_equal(iio.imread(tmp_path / 'clip.gif')[..., :3], clip)


@pytest.mark.parametrize('name, shape, dtype', [
    ('clip.avi', (2, 4, 4, 3), np.uint8), ('clip.mp4', (2, 3, 4, 4), np.uint8),
    ('clip.mp4', (2, 4, 4, 3), np.float32), ('clip.gif', (0, 4, 4, 3), np.uint8)])
def test_save_refuses_what_is_no_clip(tmp_path, name, shape, dtype):
    with pytest.raises(ValueError):
        video.save(tmp_path / name, np.zeros(shape, dtype))
    assert not list(tmp_path.iterdir())


def test_side_by_side():
    short = np.arange(2, dtype=np.uint8).repeat(64 * 64 * 3).reshape(2, 64, 64, 3) + 10
    low = np.full((5, 4, 6, 3), 200, np.uint8)
    low[:, 0, 0] = 7
    film = video.side_by_side([short, low], ['expert', 'translation'])
    # 64 -> x4; min(4, 6) -> x64; both are 256 high.
    assert film.shape == (5, video.CAPTION + 256, 256 + 6 * 64, 3) and film.dtype == np.uint8
    assert [film[t, -1, 0, 0] for t in range(5)] == [10, 11, 11, 11, 11]  # stands still
    panel = film[:, video.CAPTION:, 256:]
    assert (panel[:, :64, :64] == 7).all() and (panel[:, 64:] == 200).all()
    caption = film[:, :video.CAPTION]
    assert caption[:, :, :256].any() and caption[:, :, 256:].any()
    assert (caption == caption[0]).all()


def test_side_by_side_fills_lower_panels_and_shrinks_captions():
    tall, flat = np.full((1, 8, 4, 3), 50, np.uint8), np.full((1, 4, 40, 3), 60, np.uint8)
    film = video.side_by_side([tall, flat], [20 * 'a very long caption', ''])[0]
    assert film.shape == (video.CAPTION + 512, 256 + 2560, 3)
    assert (film[video.CAPTION:video.CAPTION + 256, 256:] == 60).all()
    assert not film[video.CAPTION + 256:, 256:].any()
    assert film[:video.CAPTION, :256].any() and not film[:video.CAPTION, 256:].any()


def test_a_note_ends_the_last_caption():
    frames = [{'one': np.zeros((64, 64, 3), np.uint8), 'two': np.zeros((64, 64, 3), np.uint8)}] * 2
    film = video.panels_side_by_side(frames, ': 62 of 66')
    assert (film == video.side_by_side([np.zeros((2, 64, 64, 3), np.uint8)] * 2,
                                       ['one', 'two: 62 of 66'])).all()


def test_mse_and_psnr_by_hand():
    dark, bright = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 110, np.uint8)
    assert video.mse(dark, bright) == video.mse(bright, dark) == pytest.approx((10 / 255) ** 2)
    assert video.psnr(video.mse(dark, bright)) == pytest.approx(20 * np.log10(255 / 10))
    black, white = np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8)
    assert video.mse(black, white) == 1 and video.psnr(1.0) == 0  # no uint8 wraps round
    assert video.psnr(video.mse(dark, dark)) == 100
    assert np.isnan(video.psnr(float('nan')))


def test_mse_compares_a_clip_with_one_image():
    clip = np.stack([np.full((2, 2, 3), value, np.uint8) for value in (0, 51, 102)])
    assert video.mse(clip[:1], clip) == pytest.approx((0 + 0.04 + 0.16) / 3)


def test_recorder(tmp_path, monkeypatch):
    env, recorder = FakeEnv(), video.VideoRecorder(tmp_path)
    env.reset()
    filmed = watch(monkeypatch, env, 'panels')
    for _ in range(2):  # the second episode begins anew
        recorder.init(env)
        recorder.record(env)
        recorder.record(env)
    assert len(recorder.save('12.mp4')) == 3
    assert len(iio.imread(tmp_path / 'eval_video' / '12.mp4')) == 3
    recorder.init(env, enabled=False)
    recorder.record(env)
    assert recorder.save('13.mp4') is None
    assert len(filmed) == 6 and not (tmp_path / 'eval_video' / '13.mp4').exists()


def test_recorder_without_a_folder_films_nothing(monkeypatch):
    env, recorder = FakeEnv(), video.VideoRecorder(None)
    filmed = watch(monkeypatch, env, 'panels')
    recorder.init(env)
    recorder.save('12.mp4')
    assert not filmed


def test_clips_read_back(tmp_path):
    clips = video.Clips(make_dataset(tmp_path), task='reacher_hard', im_size=8)
    assert len(clips) == 3 and clips.meta['num_contexts'] == 2
    for i in range(3):
        frames = clips.frames(i)
        assert isinstance(frames, np.memmap) and not frames.flags.writeable
        assert frames.shape == (2, 5, 8, 8, 3) and frames.dtype == np.uint8 and (frames == i).all()
        checksum = zlib.crc32((tmp_path / f'episode_0000{i}.npy').read_bytes())
        assert clips.episode(i) == {'index': i, 'expert_return': i, 'frames_crc32': checksum}


def test_half_written_episodes_are_not_there(tmp_path):
    make_dataset(tmp_path, num_episodes=2)
    (tmp_path / 'episode_00001.json').unlink()  # killed between the frames and the json
    (tmp_path / '.tmp-episode_00003.npy').write_bytes(b'cut')
    clips = video.Clips(tmp_path)
    assert [clips.episode(i)['index'] for i in range(len(clips))] == [0, 2]
    assert (clips.frames(1) == 2).all()
    make_dataset(tmp_path / 'cut', num_episodes=4)
    with pytest.raises(utils.UserError, match='lacks some of its 4 episodes'):
        video.Clips(tmp_path / 'cut')


@pytest.mark.parametrize('wanted, sentence', [
    ({'task': 'finger_spin'},
     'task=reacher_hard, not finger_spin: .* task=finger_spin out_dir=<another folder>'),
    ({'im_size': 64}, 'im_size=8, not 64: .* im_size=64 out_dir=<another folder>')])
def test_clips_of_the_wrong_kind(tmp_path, wanted, sentence):
    with pytest.raises(utils.UserError, match=sentence):
        video.Clips(make_dataset(tmp_path), **wanted)


@pytest.mark.parametrize('changes, words', [
    ({'versions': {'mujoco': '1.0'}}, 'mujoco=1.0'),
    ({'quality': [1, 2, 3]}, r'quality=\[1, 2, 3\]'), ({'quality': None}, 'quality=None')])
def test_videos_that_are_drawn_otherwise_are_refused(tmp_path, changes, words):
    made = {'versions': snapshots.versions(), 'quality': [512, 14, 7]}
    video.Clips(make_dataset(tmp_path / 'same', **made), quality=[512, 14, 7])
    root = make_dataset(tmp_path / 'other', **{**made, **changes})
    video.Clips(root)
    with pytest.raises(utils.UserError,
                       match=f'{root} was made with {words}, not .*task=reacher_hard'):
        video.Clips(root, quality=[512, 14, 7])


def test_clips_missing_or_of_another_format(tmp_path):
    with pytest.raises(utils.UserError, match='generate_expert_video.py task=reacher_easy'):
        video.Clips(tmp_path / 'train', task='reacher_easy')
    make_dataset(tmp_path, format=snapshots.FORMAT + 1)
    with pytest.raises(utils.UserError, match=f'format={snapshots.FORMAT + 1}, not'):
        video.Clips(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def as_float(path):
    np.save(path, np.zeros((2, 5, 8, 8, 3), np.float32))


def as_shorter(path):
    np.save(path, np.zeros((2, 4, 8, 8, 3), np.uint8))


def as_pickle(path):
    np.save(path, np.array([{}], dtype=object))


@pytest.mark.parametrize('name, damage', [
    ('episode_00001.npy', truncate), ('episode_00001.npy', as_float),
    ('episode_00001.npy', as_shorter), ('episode_00001.npy', as_pickle),
    ('episode_00001.npy', lambda path: path.write_bytes(b'')),
    ('episode_00001.npy', lambda path: path.unlink()),
    ('episode_00001.json', lambda path: path.write_text('{"index": ')),
    ('meta.json', lambda path: path.write_bytes(b'\xff'))])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    make_dataset(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(utils.UserError, match=f'{name} is damaged.*: delete .*run python generate'):
        video.Clips(tmp_path)


@pytest.mark.parametrize('owner, name', [(Path, 'read_text'), (np.lib.format, 'open_memmap'),
                                         (Path, 'exists')])
def test_what_may_not_be_read_is_told(tmp_path, monkeypatch, owner, name):
    def refuse(*_, **__):
        raise PermissionError
    make_dataset(tmp_path)
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(utils.UserError, match='may not be read by this user'):
        video.Clips(tmp_path)


@pytest.mark.parametrize('name', ['episode_00001.npy', 'episode_00001.json', 'meta.json'])
def test_a_changed_byte_is_found_wherever_it_is(tmp_path, name):
    root = make_dataset(tmp_path / 'whole')
    whole = (root / name).read_bytes()
    end = whole.rfind(b', "crc32"')  # what the checksum's own name says is of no account
    for at in range(0, end if name.endswith('json') else len(whole), 23):
        (root / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(utils.UserError):
            video.Clips(root).frames(1)
    (root / name).write_bytes(whole)
    video.Clips(root).frames(1)


@pytest.mark.parametrize('name, key', [('meta.json', 'crc32'), ('episode_00001.json', 'crc32'),
                                       ('episode_00001.json', 'frames_crc32')])
def test_what_has_no_checksum_is_refused(tmp_path, name, key):
    """A flipped bit can turn the checksum's own name into another."""
    root = make_dataset(tmp_path)
    values = json.loads((root / name).read_text())
    del values[key]
    if key == 'frames_crc32':
        del values['crc32']
        video.write_json(root / name, values)
    else:
        (root / name).write_text(json.dumps(values))
    with pytest.raises(utils.UserError, match='is damaged or missing'):
        video.Clips(root).frames(1)


# ------------------------------------------------------------------------------ own videos

def save_counting(path, num_frames, fps, size=(48, 64)):
    """A video whose frame t is 5 t all over, but for two dark bars left and right."""
    clip = np.zeros((num_frames, *size, 3), np.uint8)
    clip[:, :, 8:-8] = 5 * np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    video.save(path, clip, fps=fps)
    return path


@pytest.mark.parametrize('rate, numbers', [
    (25, [0, 1, 2, 3, 4, 5]), (50, [0, 2, 4, 6, 8, 10]), (30, [0, 1, 2, 4, 5, 6]),
    (12.5, [0, 0, 1, 1, 2, 2])])
def test_a_video_is_read_at_the_agents_rate_and_squared(tmp_path, rate, numbers):
    clip, found = video.load(save_counting(tmp_path / 'a.mp4', 30, rate), 25, 6, 16)
    assert clip.shape == (6, 16, 16, 3) and clip.dtype == np.uint8
    assert found == rate
    np.testing.assert_allclose(clip.mean((1, 2, 3)), 5 * np.array(numbers), atol=2.5)
    assert (clip.std((1, 2)) < 3).all()  # the bars are cut off, nothing is squeezed


def test_a_video_that_ends_before_is_refused_with_what_it_has(tmp_path):
    path = save_counting(tmp_path / 'a.mp4', 30, 30)
    assert len(video.load(path, 25, 25, 16)[0]) == 25
    with pytest.raises(utils.UserError, match='ends after 0.97 s.*set episode_len=24 or less'):
        video.load(path, 25, 26, 16)


@pytest.mark.parametrize('content', [b'', b'no video', None])
def test_what_is_no_video_is_named(tmp_path, content):
    path = tmp_path / 'a.mp4'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(utils.UserError, match='a.mp4 is no video that ffmpeg can read'):
        video.load(path, 25, 6, 16)
