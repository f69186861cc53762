"""What LeRobot is handed; what it makes of that is seen only in its own environment:
python -m pytest --noconftest tests/test_to_lerobot.py, after pip install pytest."""
import runpy
import sys

import numpy as np
import pytest
import to_lerobot

import snapshots
import utils
import video

SIZE = 64
ACTIONS = [[0.1, -1], [0.2, -2], [0.3, -3], [0.4, -4]]


def make_split(root, fps=25, size=SIZE, **info):
    """Two episodes of 4 steps in 2 contexts: grey, 100 i + 20 t + c in frame t of context c."""
    video.write_json(root / 'meta.json', {
        'format': snapshots.FORMAT, 'task': 'reacher_hard', 'im_size': size, 'episode_len': 4,
        'num_contexts': 2, 'num_episodes': 2})
    level = (20 * np.arange(5) + np.arange(2)[:, None])[..., None, None, None]
    for i in range(2):
        frames = np.zeros((2, 5, size, size, 3), np.uint8) + (100 * i + level).astype(np.uint8)
        video.write_episode(root, i, frames,
                            {'qpos': [[9.0]] * 5, 'contexts': [[8.0]] * 2, **info})
    video.save(root / 'preview_00000.mp4', np.zeros((5, size, size, 3), np.uint8), fps)
    return root


class FakeDataset:
    """Keeps what a LeRobotDataset is handed."""

    @classmethod
    def create(cls, root, **settings):
        self = cls.last = cls()
        self.settings, self.root, self.episodes, self.frames = settings, root, [], []
        self.finalized = False
        root.mkdir()
        return self

    def add_frame(self, frame):
        self.frames.append(frame)

    def save_episode(self, parallel_encoding):
        self.episodes.append(self.frames)
        self.frames = []

    def finalize(self):
        self.finalized = True
        (self.root / 'whole').touch()  # LeRobot's writes its tables, else once it is collected


def exported(root, out, **options):
    to_lerobot.export(video.Clips(root), out, FakeDataset, fps=25, **options)
    assert (out / 'whole').exists() and [path.name for path in out.parent.glob('.tmp-*')] == []
    return FakeDataset.last


def levels(episode, camera):
    return [int(frame[camera].mean()) for frame in episode]


def test_each_context_is_a_camera_and_demonstrations_have_every_frame_and_nothing_else(tmp_path):
    dataset = exported(make_split(tmp_path / 'train', rewards=[7.0] * 4), tmp_path / 'out')
    cameras = ['observation.images.context_0', 'observation.images.context_1']
    assert list(dataset.settings['features']) == cameras and dataset.settings['fps'] == 25
    for feature in dataset.settings['features'].values():
        assert feature['dtype'] == 'video' and feature['shape'] == (SIZE, SIZE, 3)
    for i, episode in enumerate(dataset.episodes):
        assert levels(episode, cameras[0]) == [100 * i + 20 * t for t in range(5)]
        assert levels(episode, cameras[1]) == [100 * i + 20 * t + 1 for t in range(5)]
        for frame in episode:
            assert frame.keys() == {*cameras, 'task'} and frame['task'] == 'reacher_hard'
            assert frame[cameras[0]].shape == (SIZE, SIZE, 3)
            assert frame[cameras[0]].dtype == np.uint8
    assert len(dataset.episodes) == 2 and not dataset.frames


def test_play_has_the_action_of_each_frame_but_the_last_which_is_left_out(tmp_path):
    dataset = exported(make_split(tmp_path / 'play', actions=ACTIONS), tmp_path / 'out')
    action = dataset.settings['features']['action']
    assert action['dtype'] == 'float32' and action['shape'] == (2,)
    for i, episode in enumerate(dataset.episodes):
        assert levels(episode, 'observation.images.context_1') == [100 * i + 20 * t + 1
                                                                   for t in range(4)]
        assert np.array_equal([frame['action'] for frame in episode], np.float32(ACTIONS))
        assert all(frame['action'].dtype == np.float32 for frame in episode)
        assert {frame['task'] for frame in episode} == {'reacher_hard: play'}


def test_frames_can_be_kept_as_images(tmp_path):
    dataset = exported(make_split(tmp_path / 'train'), tmp_path / 'out', images=True)
    assert {feature['dtype'] for feature in dataset.settings['features'].values()} == {'image'}


def test_a_split_that_turns_out_damaged_leaves_nothing(tmp_path):
    root = make_split(tmp_path / 'train')
    path = video.frames_path(root, 1)
    path.write_bytes(path.read_bytes()[:-1] + b'x')
    (tmp_path / '.tmp-out').mkdir()  # of an export that was killed
    with pytest.raises(utils.UserError, match='episode_00001.npy is damaged'):
        to_lerobot.export(video.Clips(root), tmp_path / 'out', FakeDataset, fps=25)
    assert len(FakeDataset.last.episodes) == 1 and FakeDataset.last.finalized
    assert [path.name for path in tmp_path.iterdir()] == ['train']


def test_an_image_too_small_for_a_video_is_refused(tmp_path, monkeypatch):
    root = make_split(tmp_path / 'train', size=16)
    monkeypatch.setattr(sys, 'argv', ['to_lerobot.py', str(root), str(tmp_path / 'out')])
    with pytest.raises(utils.UserError, match='16 pixels, .*: add --images'):
        to_lerobot.main()


@pytest.mark.parametrize('fps, given, sentence', [
    (25, ['play', 'there'], 'there exists: remove it'),
    (25, ['none', 'out'], 'there are no videos in none: python generate_expert_video.py'),
    (16.67, ['play', 'out'], 'whole ones only: give the nearest, --fps 17'),
    (None, ['play', 'out'], 'preview_00000.mp4, .* is missing or damaged: give the rate, as in'),
    (None, ['play', 'out', '--fps', '25'], 'pip install lerobot'),
    (25, ['play', 'out'], 'LeRobot cannot be imported .*: pip install lerobot')])
def test_one_sentence_says_what_is_wrong(tmp_path, monkeypatch, fps, given, sentence):
    make_split(tmp_path / 'play', fps or 25, actions=ACTIONS)
    if fps is None:
        (tmp_path / 'play/preview_00000.mp4').unlink()
    (tmp_path / 'there').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'lerobot', None)  # as where it is not installed
    monkeypatch.setattr(sys, 'argv', ['to_lerobot.py', *given])
    with pytest.raises(utils.UserError, match=sentence):
        to_lerobot.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['play', 'there']


def test_without_hydra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'utils', None)  # importing it raises what a lack of Hydra does
    with pytest.raises(SystemExit) as end:
        runpy.run_path(to_lerobot.__file__, run_name='__main__')
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and 'hydra-core==' in line and line.startswith('error: ')


@pytest.mark.parametrize('images', [False, True])
def test_lerobot_reads_what_was_written(tmp_path, images):
    lerobot = pytest.importorskip('lerobot.datasets.lerobot_dataset', reason='needs an environment '
                                  'of its own, see tools/to_lerobot.py')
    root, out = make_split(tmp_path / 'play', actions=ACTIONS), tmp_path / 'out'
    to_lerobot.export(video.Clips(root), out, lerobot.LeRobotDataset, 25, images)
    dataset = lerobot.LeRobotDataset('local/out', root=out, video_backend='pyav')
    assert dataset.fps == 25 and dataset.num_episodes == 2 and len(dataset) == 8
    assert list(dataset.meta.episodes['length']) == [4, 4]
    for n, item in enumerate(dataset):
        i, t = divmod(n, 4)
        assert item['episode_index'] == i and item['task'] == 'reacher_hard: play'
        assert item['timestamp'].item() == pytest.approx(t / 25)
        assert item['action'].tolist() == np.float32(ACTIONS[t]).tolist()
        for c in range(2):
            image = 255 * item[f'observation.images.context_{c}'].numpy()
            assert image.shape == (3, SIZE, SIZE)
            assert np.abs(image - (100 * i + 20 * t + c)).max() < (1e-3 if images else 5)
    assert len(list(tmp_path.iterdir())) == 2
