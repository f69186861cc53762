"""Every script composes with every task, and task files stay a few lines."""
import subprocess
import sys

import pytest
from fakes import CFGS
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import dmc
import train_ac
import utils

TIERS = {'easy': (1_100_000, 100_000), 'medium': (3_100_000, 500_000),
         'hard': (30_100_000, 2_000_000)}
FILES = sorted(path.stem for path in (CFGS / 'task').glob('*.yaml') if path.stem not in TIERS)


@pytest.fixture(scope='module', autouse=True)
def hydra():
    utils.register_tasks(dmc.task_names(), [])
    with initialize_config_dir(str(CFGS), version_base='1.3'):
        yield


def cfg_of(script, *overrides):
    cfg = compose(script, list(overrides))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cfg


@pytest.mark.parametrize('task', FILES)
def test_every_task_file_composes(task):
    assert cfg_of('train', f'task={task}').task_name == task
    dmc.split_name(task)


@pytest.mark.parametrize('task', [*FILES, *TIERS])
def test_task_files_speak_of_drqv2_and_of_the_imitators_exceptions_alone(task):
    """So that what is said of one script holds with each task."""
    file = OmegaConf.load(CFGS / f'task/{task}.yaml')
    said = file.keys()
    assert said <= {'defaults', 'task_name', 'drqv2', 'imitator'}
    assert file.get('imitator', {}).keys() <= {'lookahead', 'num_actions', 'max_shift', 'w_critic'}
    assert ('task_name' in said) == (task in FILES)


# One of each kind: a tier alone, an exception in each key that a file names, and no file at all.
KINDS = ['finger_spin', 'finger_turn_easy', 'reacher_hard', 'walker_walk', 'walker_run',
         'humanoid_walk', 'quadruped_run', 'fish_swim']


def own_values(cfg):
    """All but the task's name, what train.py takes from `drqv2`, and the imitator's exceptions."""
    values = OmegaConf.to_container(cfg, resolve=True)
    del values['task_name']
    for part in (values, values.get('agent', {})):
        for key in ('drqv2', 'imitator'):
            part.pop(key, None)
        if values.get('recipe') == 'pose_code':
            for key in ('lookahead', 'num_actions', 'max_shift', 'w_critic'):
                part.pop(key, None)
    return values


@pytest.mark.parametrize('script, recipe', [
    ('generate_expert_video', None), ('train_ct', 'pose_code'), ('train_ct', 'liu2017'),
    ('train_ac', 'pose_code'), ('train_ac', 'liu2017')])
def test_a_task_files_values_of_drqv2_apply_to_train_alone(script, recipe):
    overrides = [f'recipe={recipe}'] if recipe else []
    cfgs = {task: cfg_of(script, f'task={task}', *overrides) for task in KINDS}
    common = [str(own_values(cfg)).replace(task, '<task>') for task, cfg in cfgs.items()]
    assert len(set(common)) == 1
    for task, cfg in cfgs.items():
        assert cfg.task_name == task
        if script == 'train_ct':
            assert (cfg.batch_size, cfg.frames_per_clip) == (8, 8)
            assert cfg.num_train_steps in (6000, 8000)
            assert cfg.lr == f'linear(1e-3,1e-4,{cfg.num_train_steps})'
        if script == 'train_ac':
            assert (cfg.batch_size, cfg.nstep, cfg.replay_buffer_size) == (256, 1, 1_000_000)
            assert cfg.feature_dim is None and cfg.agent.feature_dim is None
            assert cfg.agent.lr == cfg.lr == {'pose_code': 1e-3, 'liu2017': 5e-4}[recipe]
            assert cfg.num_train_frames == {'pose_code': 40_000, 'liu2017': 100_000}[recipe]


@pytest.mark.parametrize('task, changes', [
    ('finger_spin', {}), ('reacher_hard', {}), ('fish_swim', {}),
    ('walker_run', {'nstep': 1, 'batch_size': 512}),
    ('walker_stand', {'nstep': 1, 'batch_size': 512}),
    ('walker_walk', {'nstep': 1, 'batch_size': 512}),
    ('humanoid_walk', {'lr': 8e-5, 'feature_dim': 100}),
    ('quadruped_run', {'replay_buffer_size': 100_000})])
def test_a_task_files_values_of_drqv2_reach_train(task, changes):
    cfg = cfg_of('train', f'task={task}')
    published = {'nstep': 3, 'batch_size': 256, 'replay_buffer_size': 1_000_000, 'lr': 1e-4,
                 'feature_dim': 50}
    assert {key: cfg[key] for key in published} == published | changes
    assert (cfg.agent.lr, cfg.agent.feature_dim) == (cfg.lr, cfg.feature_dim)


def test_nobody_plays_unless_asked():
    assert cfg_of('generate_expert_video').player is None


def test_a_users_word_stands_above_the_task_files():
    assert cfg_of('train', 'task=walker_run', 'batch_size=64').batch_size == 64
    assert cfg_of('train', 'task=humanoid_run', 'lr=1e-3').agent.lr == 1e-3
    cfg = cfg_of('train', 'task=humanoid_run', 'obs=states')  # that of states does as well
    assert (cfg.num_train_frames, cfg.lr, cfg.agent.feature_dim) == (600_000, 3e-4, None)


def test_a_task_file_may_say_otherwise_of_its_imitator():
    def said(*overrides):
        agent = cfg_of('train_ac', *overrides).agent
        return agent.lookahead, agent.num_actions, agent.max_shift, agent.w_critic
    targets = [1, 2, 3, 5, 8, 12]
    assert said('task=cheetah_run') == (targets, 0, 6, 0)
    assert said('task=reacher_hard') == (targets, 0, 0, 0)
    assert said('task=finger_spin') == ([], 0, 6, 1)
    assert said('task=finger_turn_easy') == (targets, 0, 6, 1)
    assert said('task=walker_walk') == ([], 2, 6, 1)
    assert said('task=walker_walk', 'recipe=liu2017') == ([1, 3, 6, 12], 0, 0, 1)
    assert cfg_of('train_ac', 'task=finger_turn_easy', 'w_critic=0').agent.w_critic == 0
    assert cfg_of('train_ac', 'task=finger_spin', 'recipe=liu2017').lookahead == [1, 3, 6, 12]


@pytest.mark.parametrize('task', [task for task in FILES if 'imitator' in OmegaConf.load(
    CFGS / f'task/{task}.yaml')])
def test_what_a_task_file_says_of_its_imitator_makes_a_run(task):
    train_ac.check_all_settings(cfg_of('train_ac', f'task={task}', 'action_repeat=2'))


def test_recipes():
    """The paper's knows nothing of play and clones nothing."""
    cfg = cfg_of('train_ct', 'recipe=liu2017')
    assert (cfg.recipe, cfg.play_share, cfg.model.code_dim) == ('liu2017', 0, None)
    assert cfg.model.hidden == 512
    cfg = cfg_of('train_ct')
    assert (cfg.recipe, cfg.play_share, cfg.model.code_dim) == ('pose_code', 0.5, 16)
    assert cfg.code.lr == f'linear(1e-3,1e-5,{cfg.code.num_steps})'
    cfg = cfg_of('train_ac', 'recipe=liu2017')
    assert (cfg.recipe, cfg.agent.w_clone, cfg.agent.w_critic) == ('liu2017', 0, 1)
    assert (cfg.agent.reward_scale, cfg.agent.time_power) == (None, 2)
    cfg = cfg_of('train_ac')
    assert (cfg.recipe, cfg.agent.w_clone, cfg.agent.w_critic) == ('pose_code', 1, 0)
    assert (cfg.agent.reward_scale, cfg.agent.time_power) == (0.1, 0)
    for script in ('train_ct', 'train_ac'):
        with pytest.raises(MissingConfigException, match='other'):
            cfg_of(script, 'recipe=other')


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
