import cv2
import pytest
from omegaconf import OmegaConf
from plot_curves import plot

from utils import UserError


def test_tasks_get_a_panel_each_and_what_is_no_run_is_refused(tmp_path):
    runs = [tmp_path / name for name in ('a', 'b', 'c')]
    for run, task in zip(runs, ('walker_walk', 'fish_swim', 'walker_walk'), strict=True):
        (run / '.hydra').mkdir(parents=True)
        (run / 'eval.csv').write_text('frame,episode_reward\n0,10\n1000,20\n')
        OmegaConf.save({'task_name': task, 'obs': 'states', 'seed': 1}, run / '.hydra/config.yaml')
    plot(runs[:1], tmp_path / 'one.png')
    plot(runs, tmp_path / 'two.png')
    one, two = (cv2.imread(str(tmp_path / name)) for name in ('one.png', 'two.png'))
    assert two.shape[1] == 2 * one.shape[1]
    (runs[0] / 'eval.csv').write_text('frame,episode_reward\n0,10\n1000,900\n')
    plot(runs[:1], tmp_path / 'higher.png')
    higher = cv2.imread(str(tmp_path / 'higher.png'))
    assert higher.shape == one.shape and (higher != one).any()  # the curve is in the picture
    with pytest.raises(UserError, match='nowhere'):
        plot([*runs, tmp_path / 'nowhere'], tmp_path / 'three.png')
    assert not (tmp_path / 'three.png').exists()
