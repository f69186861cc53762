"""Every script composes with every task, and task files stay what they are: a few lines."""
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import dmc
import utils

CFGS = Path(__file__).parent.parent / 'cfgs'
TIERS = {'easy': (1_100_000, 100_000), 'medium': (3_100_000, 500_000),
         'hard': (30_100_000, 2_000_000)}
FILES = sorted(path.stem for path in (CFGS / 'task').glob('*.yaml') if path.stem not in TIERS)


@pytest.fixture(scope='module', autouse=True)
def hydra():
    utils.register_tasks([])
    with initialize_config_dir(str(CFGS), version_base='1.3'):
        yield


def cfg_of(script, *overrides):
    cfg = compose(script, list(overrides))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cfg


@pytest.mark.parametrize('script', ['train', 'generate_expert_video', 'train_ct', 'train_ac'])
@pytest.mark.parametrize('task', FILES)
def test_every_script_composes_with_every_task_file(script, task):
    assert cfg_of(script, f'task={task}').task_name == task
    dmc.split_name(task)


@pytest.mark.parametrize('script', ['train', 'generate_expert_video', 'train_ct', 'train_ac'])
def test_folders_of_runs_and_sweeps_resolve(script):
    cfg = compose(script, ['task=reacher_hard'], return_hydra_config=True)
    cfg.hydra.job.num, cfg.hydra.job.override_dirname = 0, 'seed2'
    for folder in (cfg.hydra.run.dir, cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir):
        assert '=' not in folder  # it can be typed again as an override


@pytest.mark.parametrize('script', ['train', 'generate_expert_video', 'train_ct', 'train_ac'])
def test_help_lists_tasks_and_options(script):
    run = subprocess.run([sys.executable, CFGS.parent / f'{script}.py', '--help'],
                         capture_output=True, text=True, check=True)
    assert 'reacher_hard' in run.stdout and 'fish_swim' in run.stdout and 'seed: 1' in run.stdout


@pytest.mark.parametrize('task', ['fish_swim', 'point_mass_easy', 'ball_in_cup_catch'])
def test_suite_tasks_without_a_file_compose_as_well(task):
    assert cfg_of('train', f'task={task}').task_name == task


def test_the_papers_hyperparameters():
    for task, tier in (('finger_spin', 'easy'), ('reacher_hard', 'medium'),
                       ('humanoid_run', 'hard')):
        cfg = cfg_of('train', f'task={task}')
        frames, decay = TIERS[tier]
        assert cfg.num_train_frames == frames
        assert cfg.agent.stddev_schedule == f'linear(1.0,0.1,{decay})'
    cfg = cfg_of('train', 'task=reacher_hard')
    assert (cfg.nstep, cfg.batch_size, cfg.discount, cfg.lr) == (3, 256, 0.99, 1e-4)
    assert (cfg.agent.feature_dim, cfg.agent.hidden_dim) == (50, 1024)
    cfg = cfg_of('train', 'task=walker_run')
    assert (cfg.nstep, cfg.batch_size) == (1, 512)
    assert cfg_of('train', 'task=humanoid_run').agent.lr == 8e-5


def test_what_the_task_file_says_of_the_expert_is_not_said_of_the_imitator():
    cfg = cfg_of('train_ac', 'task=humanoid_run')
    assert cfg.num_train_frames < 1_000_000 and cfg.lr != 8e-5
    assert cfg.action_repeat is None  # until it is known which expert is imitated
    assert cfg_of('train', 'task=reacher_hard', 'obs=states').agent.feature_dim is None


def test_task_files_are_short():
    for name in FILES:
        assert len((CFGS / f'task/{name}.yaml').read_text().splitlines()) <= 6
