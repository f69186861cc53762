import errno
import io
import threading
import tracemalloc

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from fakes import rows
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import utils
from logger import SCORE, Logger, Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock():
    return Clock()


def make_logger(work_dir, clock=None, stream=None, **kwargs):
    kwargs = {'total': 1000, 'use_tb': False, **kwargs}
    return Logger(work_dir, clock=clock or Clock(), stream=stream or io.StringIO(), **kwargs)


def test_csv_holds_the_means_since_the_last_dump(tmp_path):
    logger = make_logger(tmp_path)
    logger.log_metrics({'loss': 1.0}, 2)
    logger.log_metrics({'loss': torch.tensor(4.0, requires_grad=True), 'q': 0.5}, 4)
    assert logger.dump(4) == {'loss': 2.5, 'q': 0.5}
    logger.log_metrics({'loss': 7.0, 'q': 0.1}, 6)
    logger.log_metrics({'reward': 3.0}, 6, 'eval')
    logger.dump(6)
    logger.dump(6, 'eval')
    assert rows(tmp_path / 'train.csv') == [{'frame': '4', 'loss': '2.5', 'q': '0.5'},
                                            {'frame': '6', 'loss': '7.0', 'q': '0.1'}]
    assert rows(tmp_path / 'eval.csv') == [{'frame': '6', 'reward': '3.0'}]


def test_a_dump_of_nothing_writes_nothing(tmp_path):
    assert make_logger(tmp_path).dump(4) == {}
    assert not list(tmp_path.iterdir())


def test_tensors_are_read_when_they_are_logged_and_summed_in_float32(tmp_path):
    logger = make_logger(tmp_path)
    static = torch.ones((), dtype=torch.bfloat16)  # like the output of a replayed CUDA graph
    for _ in range(1000):
        logger.log_metrics({'ones': static}, 0)
    static.fill_(3)
    logger.log_metrics({'ones': static}, 0)
    assert logger.dump(0)['ones'] == pytest.approx(1003 / 1001, rel=1e-6)


def test_columns_join_as_they_turn_up(tmp_path):
    logger = make_logger(tmp_path)
    for step, metrics in enumerate([{'a': 1.0}, {'b': 2.0, 'a': 3.0}, {'b': 4.0}]):
        logger.log_metrics(metrics, step)
        logger.dump(step)
    assert (tmp_path / 'train.csv').read_text().splitlines() == [
        'frame,a,b', '0,1.0,', '1,3.0,2.0', '2,,4.0']


def write_run(work_dir, steps, resume_step=0, **kwargs):
    logger = make_logger(work_dir, resume_step=resume_step, **kwargs)
    for step in steps:
        logger.log_metrics({'reward': step / 10}, step)
        logger.log_metrics({'reward': step / 10}, step, 'eval')
        logger.dump(step)
        logger.dump(step, 'eval')
    logger.close()


def test_resuming_drops_the_rows_that_were_lost(tmp_path):
    write_run(tmp_path, [0, 100, 200, 300])
    make_logger(tmp_path, resume_step=200)
    for name in ('train.csv', 'eval.csv'):
        assert [row['frame'] for row in rows(tmp_path / name)] == ['0', '100', '200']
    # A column of the earlier run is still known to the one that goes on.
    write_run(tmp_path, [200, 250, 350], resume_step=200)
    assert rows(tmp_path / 'train.csv') == [
        {'frame': str(step), 'reward': str(step / 10)} for step in (0, 100, 200, 250, 350)]


def test_a_new_run_in_an_old_folder_starts_over(tmp_path):
    write_run(tmp_path, [0, 100])
    write_run(tmp_path, [0, 50])
    assert [row['frame'] for row in rows(tmp_path / 'train.csv')] == ['0', '50']


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    write_run(tmp_path, [0, 100])
    with (tmp_path / 'train.csv').open('a') as file:
        file.write('15')  # of '150,15.0\n'
    write_run(tmp_path, [200], resume_step=150)
    assert [row['frame'] for row in rows(tmp_path / 'train.csv')] == ['0', '100', '200']


def test_a_step_dumped_twice_is_one_row(tmp_path):
    logger = make_logger(tmp_path)
    for metrics in ({'a': 1.0}, {'b': 2.0}, {'a': 3.0}):
        logger.log_metrics(metrics, 10)
        logger.dump(10)
    assert rows(tmp_path / 'train.csv') == [{'frame': '10', 'a': '3.0', 'b': '2.0'}]


def test_tensorboard_points_survive_a_resume_without_doubles(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    write_run(tmp_path, [0, 100, 200, 300], use_tb=True)
    write_run(tmp_path, [300, 400], resume_step=200, use_tb=True)
    events = EventAccumulator(str(tmp_path / 'tb')).Reload()
    for tag in ('train/reward', 'eval/reward'):
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        assert points == [(step, step / 10) for step in (0, 100, 200, 300, 400)]


def test_tensorboard_on_a_full_disk_ends_the_run_in_a_sentence(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter
    monkeypatch.setattr(threading, 'excepthook', threading.__excepthook__)  # not pytest's
    logger = make_logger(tmp_path, use_tb=True)

    def write(self, data):
        raise OSError(errno.ENOSPC, 'No space left on device', 'tb/events')
    monkeypatch.setattr(RecordWriter, 'write', write)
    logger.log_metrics({'reward': 1.0}, 5)
    with pytest.raises(SystemExit) as end, utils.exit_on_user_error():
        logger.dump(5)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith('error: the disk of tb/events is full')
    assert said.count('\n') == 1
    broken = threading.Thread(target=lambda: 1 / 0)
    broken.start()
    broken.join()
    assert 'ZeroDivisionError' in capsys.readouterr().err


def test_speed_and_time_left(clock):
    progress = Progress(1000, 'frame', done=200, clock=clock, stream=io.StringIO())
    assert (progress.speed, progress.eta) == (0.0, float('inf'))
    clock.now += 1000
    progress.update(200)  # neither does what an earlier run made count, nor the time before
    assert (progress.speed, progress.eta) == (0.0, float('inf'))
    clock.now += 10
    progress.update(300)
    assert progress.speed == pytest.approx(100 / 10)
    assert progress.eta == pytest.approx(700 / 10)
    assert str(progress) == '300/1000 frames | 10 frames/s | 0:01:10 left'
    progress.update(1000)
    assert progress.eta == 0


def test_speed_forgets_what_lies_before_the_window(clock):
    progress = Progress(10**6, 'step', clock=clock, stream=io.StringIO())
    for step in range(1, 1001):  # 1 step/s, then 1000 steps/s, each for much longer than a window
        clock.now += 1
        progress.update(step)
    tracemalloc.start()
    for tick in range(1, 100_001):
        clock.now += 0.001
        progress.update(1000 + tick)
    kept = tracemalloc.get_traced_memory()[0]  # before approx, which fills caches of Python's own
    tracemalloc.stop()
    assert progress.speed == pytest.approx(1000, rel=1e-3)
    assert kept < 10_000  # few of them


def test_plain_lines_are_few_whole_and_carry_the_latest_metrics(tmp_path, clock):
    stream = io.StringIO()
    logger = make_logger(tmp_path, clock, stream)
    for step in range(1, 41):
        clock.now += 1
        logger.log_metrics({'reward': step * 1.0}, step)
        if step % 8 == 0:
            logger.dump(step)
    logger.log_metrics({'reward': 123456.7}, 40, 'eval')
    logger.dump(40, 'eval')
    logger.close()
    logger.close()  # the final state is there already
    assert stream.getvalue().splitlines() == [
        '10/1000 frames | 1 frames/s | 0:16:30 left | reward 4.5',
        '20/1000 frames | 1 frames/s | 0:16:20 left | reward 12.5',
        '30/1000 frames | 1 frames/s | 0:16:10 left | reward 20.5',
        '40/1000 frames | 1 frames/s | 0:16:00 left | reward 28.5',
        'eval at frame 40 | reward 123457',
        '40/1000 frames | 1 frames/s | 0:16:00 left | reward 36.5']


def test_a_terminal_gets_one_line_that_is_rewritten(clock, monkeypatch):
    monkeypatch.setenv('COLUMNS', '30')
    stream = Terminal()
    progress = Progress(100, 'clip', clock=clock, stream=stream)
    for done in range(1, 51):
        clock.now += 0.125  # two clips a line
        progress.show(done, ['x' * 50])
    assert '\n' not in stream.getvalue()
    lines = stream.getvalue().split('\r\x1b[K')
    assert [line.split('/')[0] for line in lines] == [str(done) for done in range(2, 51, 2)]
    assert all(len(line) == 29 for line in lines)
    progress.say('kept')
    progress.close()
    screen = stream.getvalue().split('\r\x1b[K')[-1]
    assert screen.splitlines()[0] == 'kept'
    assert screen.splitlines()[1].startswith('50/100 clips | 8 clips/s | 0:00:06 left')


def test_a_line_holds_what_matters_first_and_fits(tmp_path):
    stream = io.StringIO()
    logger = make_logger(tmp_path, stream=stream)
    logger.log_metrics({**{f'loss_{i}': i / 10 for i in range(20)}, 'expert_return': 60.0,
                        'task_return': 30.0}, 5, 'eval')
    logger.dump(5, 'eval')
    line = stream.getvalue().rstrip()
    assert line.startswith('eval at frame 5 | task_return 30 | expert_return 60 | loss_0 0 | ')
    assert 80 < len(line) <= 100 and not line.endswith('|')
    assert rows(tmp_path / 'eval.csv')[0]['loss_19'] == '1.9'


def test_tensorboard_shows_what_matters_first(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    settings = {'seed': 3, 'agent': {'lr': 0.5, 'lookahead': [1, 2], 'scale': None}, 'name': 'x'}
    logger = make_logger(tmp_path, use_tb=True, settings=settings)
    for step, task_return in ((0, 5.0), (100, 25.0)):
        logger.log_metrics({'task_return': task_return, 'expert_return': 45.0, 'total_time': step,
                            'random_return': 5.0, 'psnr_copy_first': 20.0}, step, 'eval')
        logger.dump(step, 'eval')
    logger.log_film(np.full((130, 48, 96, 3), 100, np.uint8), 100)
    logger.close()
    events = EventAccumulator(str(tmp_path / 'tb')).Reload()
    tags = events.Tags()
    assert sorted(tags['scalars']) == [SCORE, 'eval/task_return', 'eval/total_time']
    assert [(event.step, event.value) for event in events.Scalars(SCORE)] == [(0, 0), (100, 0.5)]
    [tag] = [tag for tag in tags['tensors'] if 'constant' in tag]
    [told] = events.Tensors(tag)  # once
    text = told.tensor_proto.string_val[0].decode()
    assert '| expert_return | 45 |' in text and '| random_return | 5 |' in text
    assert '| psnr_copy_first | 20 |' in text
    [film] = events.Images('0_film')
    assert (film.step, film.height, film.width) == (100, 24, 48)
    assert iio.imread(film.encoded_image_string, extension='.gif').shape[1:] == (24, 48, 3)
    start = events.summary_metadata['_hparams_/session_start_info'].plugin_data.content
    values = HParamsPluginData.FromString(start).session_start_info.hparams
    assert {key: value.WhichOneof('kind') for key, value in values.items()} == {
        'seed': 'number_value', 'agent.lr': 'number_value', 'agent.lookahead': 'string_value',
        'agent.scale': 'string_value', 'name': 'string_value'}
    assert values['agent.lookahead'].string_value == '[1, 2]' and values['seed'].number_value == 3


def test_without_tensorboard_a_film_goes_nowhere(tmp_path):
    make_logger(tmp_path).log_film(np.zeros((2, 8, 8, 3), np.uint8), 1)
    assert not list(tmp_path.iterdir())
