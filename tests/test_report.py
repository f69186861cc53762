import shutil
import sys

import cv2
import numpy as np
import pytest
import report

import snapshots
import utils

COLUMNS = 'task_return,expert_return,random_return'
CURVE = f'frame,{COLUMNS},psnr_translation,psnr_copy_first,total_time'
CONFIG = """task_name: reacher_hard
seed: 2
num_demos: 30
num_play: 200
w_value: 0.0
lookahead: [1, 2]
recipe: pose_code
translator: ct/none.pt
"""
SCORES = {'agreement': 0.006, 'agreement_play': 0.008, 'rank': 0.48, 'rank_play': 0.43,
          'probe': 0.03, 'probe_play': 0.04, 'probe_gross': 0.001, 'probe_gross_play': 0.01,
          'open_loop': 0.08, 'open_loop_still': 0.63}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
    """A run that ended at 0.75 of the way: after 10 frames at 0.25, after 20 at 0.7."""
    return write_run(tmp_path / 'a')


def write_run(folder, seed=2, task='reacher_hard', sha256='1234567890abcdef', made_by=(),
              **settings):
    (folder / '.hydra').mkdir(parents=True)
    config = dict(line.split(': ', 1) for line in CONFIG.splitlines())
    config |= {'seed': seed, 'task_name': task, **settings}
    (folder / '.hydra/config.yaml').write_text(
        ''.join(f'{key}: {value}\n' for key, value in config.items()))
    (folder / '.hydra/overrides.yaml').write_text(
        f'- task={task}\n- seed={seed}\n- num_demos=500\n- num_demos={config["num_demos"]}\n'
        + ''.join(f'- {key}={value}\n' for key, value in settings.items())
        + '- hydra.run.dir=x\n- use_tb=false\n')
    (folder / 'eval.csv').write_text(
        f'{CURVE}\n0,0,40,0,30,20,0\n10,10,40,0,30,20,60\n20,28,40,0,30,20,120\n'
        '30,30,40,0,30,20,180\n')
    (folder / 'episodes.csv').write_text(
        f'{COLUMNS}\n' + '\n'.join(f'{value},40,0' for value in (-360, 40, 40, 40, 40, 380)))
    snapshots.save_snapshot(folder / 'snapshot.pt', 'imitator', task, {'made_by': {
        'seed': seed, 'action_repeat': 2, 'translator_sha256': sha256, **dict(made_by)}})
    return folder


def test_evaluations_of_a_resumed_run_count_as_when_they_were_due(tmp_path):
    folder = write_run(tmp_path / 'a', eval_every_frames=5000)
    (folder / 'eval.csv').write_text(
        f'{CURVE}\n0,0,40,0,30,20,0\n5008,10,40,0,30,20,60\n8000,28,40,0,30,20,120\n')
    assert report.read(folder).steps.tolist() == [0, 2500, 4000]


def rows(tasks):
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in report.main_table(tasks).splitlines()[2:]]


def read(*folders):
    return report.sort([report.read(folder) for folder in folders])


def test_a_row_sums_up_a_task(run):
    [cells] = rows(read(run))
    assert cells[:4] == ['reacher_hard', '2', '0.75', '0.75']
    assert cells[4].startswith('1.00 [') and cells[4].endswith(']*')  # outliers do not count
    assert cells[5] == '5 of 6'
    assert cells[6:] == ['10 (20)', '2.0', '3.0']  # 0.7 is more than nine tenths of 0.75


def test_rows_are_named_by_what_differs_in_truth(run, tmp_path):
    """Whether an option was given or not, and however its number is written."""
    others = [write_run(tmp_path / 'b', seed=3), write_run(tmp_path / 'c', num_demos=100),
              write_run(tmp_path / 'd', seed=4, w_value=0), write_run(tmp_path / 'e', w_value=1),
              write_run(tmp_path / 'f', seed=5, num_demos='3_0'),
              write_run(tmp_path / 'g', lookahead='[]', seed=3, sha256='f' * 64),
              write_run(tmp_path / 'h', task='finger_spin', seed=9)]
    tasks = read(run, *others)
    assert [row[:2] for row in rows(tasks)] == [
        ['reacher_hard `base`', '2, 3, 4, 5'], ['reacher_hard `num_demos=100`', '2'],
        ['reacher_hard `w_value=1`', '2'],
        ['reacher_hard `lookahead=[] translator=ffffffff`', '3'], ['finger_spin', '9']]
    assert tasks[0].base == 'lookahead=[1,2] num_demos=30 w_value=0 translator=12345678'


def test_a_run_of_an_oracle_has_a_row_of_its_own(run, tmp_path):
    oracle = write_run(tmp_path / 'b', made_by={'oracle': 'pose'})
    assert read(run)[0].rows.keys() == {'base'}
    [task] = read(run, write_run(tmp_path / 'c', seed=3), oracle)
    assert {name: len(runs) for name, runs in task.rows.items()} == {'base': 2, 'oracle=pose': 1}
    assert task.base.endswith(' oracle=none')


def test_a_run_on_own_videos_has_no_score(tmp_path):
    folder = write_run(tmp_path / 'own', made_by={'mp4_sha256': 'none'})
    for name in ('eval.csv', 'episodes.csv'):
        text = (folder / name).read_text().replace('expert_return', 'distance')
        (folder / name).write_text(text)
    with pytest.raises(utils.UserError, match='own imitated your own videos.* have no score'):
        report.read(folder)


def test_a_seed_counts_once(run, tmp_path):
    shutil.copytree(run, tmp_path / 'copy')
    with pytest.raises(utils.UserError, match='a and .*copy have the same task, options and seed'):
        read(run, tmp_path / 'copy')


def test_a_score_weighs_episodes_by_what_there_is_to_do(run):
    (run / 'episodes.csv').write_text(f'{COLUMNS}\n5,10,0\n10,10,10\n3,10,4\n')
    assert report.read(run).scores.mean() == pytest.approx((18 - 14) / (30 - 14))


def test_the_middle_half_decides():
    assert report.interquartile_mean(np.array([-99, 1, 2, 3, 4, 5, 6, 99.0])) == 3.5


def test_an_interval_is_of_episodes_and_of_seeds():
    rng = np.random.default_rng(0)
    seeds = [rng.normal(0, 0.1, 20) + offset for offset in (0, 0.5, 1)]
    low, high = report.interval(seeds)
    assert low < 0.1 and high > 0.9  # all three draws may be of one seed
    low, high = report.interval([np.concatenate(seeds)])  # as if they were one seed's episodes
    assert 0.2 < low < 0.5 < high < 0.8
    # Seeds alike leave only what is between episodes.
    low, high = report.interval([rng.normal(0, 1, 200) for _ in range(4)])
    assert 0.1 < high - low < 0.3
    # Unequal numbers, and nothing that was not there.
    assert report.interval([np.zeros(3), np.zeros(7)]) == (0, 0)
    assert np.isnan(report.interval([np.ones(1)])).all()


def test_a_band_is_over_seeds_at_the_evaluations_that_all_have(run, tmp_path):
    other = write_run(tmp_path / 'b', seed=3)
    (other / 'eval.csv').write_text(f'{CURVE}\n0,20,40,0,30,20,0\n20,40,40,0,30,20,9\n')
    steps, scores, (low, high) = report.over_seeds([report.read(run), report.read(other)])
    assert steps.tolist() == [0, 10]
    np.testing.assert_allclose(scores, [[0, 0.7], [0.5, 1]])
    np.testing.assert_allclose((low, high), [[0, 0.7], [0.5, 1]])
    assert report.over_seeds([report.read(run)])[2] is None


def test_the_translators_scores_are_shown_where_it_is_still_the_same(run, tmp_path):
    snapshots.save_snapshot(tmp_path / 'ct/mine.pt', 'translator', 'reacher_hard',
                            {'made_by': {}, 'scores': SCORES})
    same = write_run(tmp_path / 'b', sha256=snapshots.sha256(tmp_path / 'ct/mine.pt'),
                     translator='ct/mine.pt')
    other = write_run(tmp_path / 'c', translator='ct/mine.pt')
    lines = report.translators(read(same, run)).splitlines()[2:]
    assert '30.0 dB (20.0) | 0.006 / 0.008 | 0.48 / 0.43 | 0.03 / 0.04 | 0.1% / 1.0% | ' \
           '0.08 (0.63) |' in lines[0]
    assert '`ct/none.pt`: not there any more' in lines[1] and '0.48' not in lines[1]
    [line] = report.translators(read(other)).splitlines()[2:]
    assert '`ct/mine.pt`: not there any more' in line and '0.48' not in line


def test_the_page_has_all_its_parts(run, tmp_path, capsys, monkeypatch):
    others = [write_run(tmp_path / 'b', seed=3), write_run(tmp_path / 'c', num_demos=100),
              write_run(tmp_path / 'd', task='finger_spin')]
    snapshot = others[0] / 'snapshot.pt'
    made = snapshots.load_snapshot(snapshot, 'imitator')
    monkeypatch.setattr(utils, 'command', lambda: 'train_ac.py task=reacher_hard seed=3')
    snapshots.save_snapshot(snapshot, 'imitator', 'reacher_hard', {'made_by': made['made_by']})
    monkeypatch.setattr(sys, 'argv', ['', *map(str, (run, *others)), '--out', 'page',
                                      '--picture', 'demo/curves.png'])
    report.main()
    printed = capsys.readouterr().out
    page = (tmp_path / 'page/report.md').read_text()
    assert printed.endswith('page: page/report.md\n') and printed.split('\n\n')[0] in page
    pictures = {path.name for path in (tmp_path / 'page').glob('*.png')}
    assert pictures == {'curves.png', 'reacher_hard.png'}  # finger_spin's has one row only
    assert all(f']({name})' in page for name in pictures)
    one, wide = (cv2.imread(str(tmp_path / name)) for name in ('page/curves.png',
                                                               'demo/curves.png'))
    assert (one == wide).all() and (one != 255).any()
    assert '| agent steps | 0 | 5 | 10 | 15 |' in page
    assert '| `base` | 0.00, 0.00 | 0.25, 0.25 | 0.70, 0.70 | 0.75, 0.75 |' in page
    [made] = [line for line in page.splitlines() if line.startswith(f'| {others[0]} ')]
    assert f"`python train_ac.py task=reacher_hard seed=3` | {utils.machine()} | torch " in made


@pytest.mark.parametrize('name', ['episodes.csv', 'eval.csv', 'snapshot.pt', '.hydra/config.yaml',
                                  '.hydra/overrides.yaml'])
def test_a_run_that_has_not_ended_is_told(run, name):
    (run / name).unlink()
    with pytest.raises(utils.UserError, match=f'{name} is missing.*hydra.run.dir='):
        report.read(run)


def test_a_run_of_another_kind_is_told(run):
    (run / 'eval.csv').write_text('frame,episode_reward\n0,1\n')
    with pytest.raises(utils.UserError, match='does not hold what it should.*train_ac.py'):
        report.read(run)
