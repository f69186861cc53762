import shutil
import sys

import numpy as np
import plot_imitators
import pytest

import utils

COLUMNS = 'task_return,expert_return,random_return'


@pytest.fixture
def run(tmp_path):
    """A run that ended at 0.75 of the way: after 10 frames at 0.25, after 20 at 0.7."""
    tmp_path = tmp_path / 'a'
    tmp_path.mkdir()
    (tmp_path / '.hydra').mkdir()
    (tmp_path / '.hydra/config.yaml').write_text('task_name: reacher_hard\n')
    (tmp_path / '.hydra/overrides.yaml').write_text(
        '- task=reacher_hard\n- seed=2\n- num_demos=500\n- num_demos=30\n- hydra.run.dir=x\n')
    (tmp_path / 'eval.csv').write_text(
        f'frame,{COLUMNS},total_time\n0,0,40,0,0\n10,10,40,0,60\n20,28,40,0,120\n30,30,40,0,180\n')
    (tmp_path / 'episodes.csv').write_text(
        f'{COLUMNS}\n' + '\n'.join(f'{value},40,0' for value in (-360, 40, 40, 40, 40, 380)))
    return tmp_path


def test_a_row_sums_up_a_task(run):
    task, overrides, *results = plot_imitators.read(run)
    assert (task, overrides) == ('reacher_hard', 'num_demos=30')
    cells = [cell.strip() for cell in plot_imitators.row(task, [results]).split('|')]
    assert cells[1:4] == ['reacher_hard', '0.75', '0.75']
    assert cells[4].startswith('1.00 [')       # outliers on both sides are no part of the middle
    assert cells[5:7] == ['20', '2']           # 0.7 is more than nine tenths of 0.75


def test_runs_that_differ_in_the_seed_share_a_row(run, capsys, monkeypatch):
    runs = [run]
    for name, old, new in (('b', 'seed=2', 'seed=3'), ('c', 'num_demos=30', 'num_demos=100')):
        shutil.copytree(run, runs[0].parent / name)
        runs.append(runs[0].parent / name)
        path = runs[-1] / '.hydra/overrides.yaml'
        path.write_text(path.read_text().replace(old, new))
    monkeypatch.setattr(sys, 'argv', ['', *map(str, runs)])
    plot_imitators.main()
    rows = [line.split('|')[1:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ['reacher_hard num_demos=30', '0.75 0.75'], ['reacher_hard num_demos=100', '0.75']]


def test_a_score_weighs_episodes_by_what_there_is_to_do():
    episodes = np.array([(5, 10, 0), (10, 10, 10), (3, 10, 4)], dtype=[
        (name, float) for name in COLUMNS.split(',')])
    assert plot_imitators.scores(episodes).mean() == pytest.approx((18 - 14) / (30 - 14))


def test_the_middle_half_decides():
    assert plot_imitators.interquartile_mean(np.array([-99, 1, 2, 3, 4, 5, 6, 99.0])) == 3.5


def test_the_picture_has_a_panel_for_each_task(run, tmp_path):
    _, _, *results = plot_imitators.read(run)
    plot_imitators.plot({'reacher_hard': [results, results], 'finger_spin': [results]},
                        tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').stat().st_size > 1000


def test_a_run_that_has_not_ended_is_told(run):
    (run / 'episodes.csv').unlink()
    with pytest.raises(utils.UserError, match='episodes.csv is missing'):
        plot_imitators.read(run)
