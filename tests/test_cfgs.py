"""Every script composes with every task, and only train.py knows DrQ-v2's values."""
import inspect
import sys

import pytest
import yaml
from fakes import CFGS, run_in_turn, settings
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import dmc
import generate_expert_video
import train
import train_ac
import train_ct
import utils
from ac_agent import ACAgent
from drqv2 import DrQV2Agent
from settings import check_settings, fields_of, model_of

SCRIPTS = {script.__name__: script for script in (
    train, generate_expert_video, train_ct, train_ac)}
TIERS = {'easy': (1_100_000, 100_000), 'medium': (3_100_000, 500_000),
         'hard': (30_100_000, 2_000_000)}
FILES = sorted(path.stem for path in (CFGS / 'drqv2').glob('*.yaml') if path.stem not in TIERS)


def cfg_of(script, *overrides):
    cfg = settings(script, *overrides)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cfg


@pytest.mark.parametrize('task', FILES)
def test_every_task_file_composes(task):
    assert cfg_of('train', f'task={task}').task_name == task
    dmc.split_name(task)


# One of each kind: a tier alone, an exception in each key that a file names, and no file at all.
KINDS = ['finger_spin', 'finger_turn_easy', 'reacher_hard', 'walker_walk', 'walker_run',
         'humanoid_walk', 'quadruped_run', 'fish_swim']


def own_values(cfg):
    """Return all settings but the task's name."""
    values = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in values.items() if key != 'task_name'}


@pytest.mark.parametrize('script, recipe', [
    ('generate_expert_video', None), ('train_ct', 'pose_code'), ('train_ct', 'liu2017'),
    ('train_ac', 'pose_code'), ('train_ac', 'liu2017')])
def test_no_value_of_drqv2_for_a_task_reaches_another_script(script, recipe):
    """Only the paths that contain the task's name differ."""
    overrides = [f'recipe={recipe}'] if recipe else []
    cfgs = {task: cfg_of(script, f'task={task}', *overrides)
            for task in (FILES + ['fish_swim'] if script == 'train_ac' else KINDS)}
    paths = 'expert', 'data_dir', 'out_dir', 'translator'
    first, *others = [{key: value.replace(task, '<task>') if key in paths else value
                       for key, value in own_values(cfg).items()} for task, cfg in cfgs.items()]
    for values in others:
        assert values == first
    for task, cfg in cfgs.items():
        assert cfg.task_name == task
        if script == 'train_ct':
            assert (cfg.batch_size, cfg.frames_per_clip) == (8, 8)
            assert cfg.num_train_steps in (6000, 8000)
            assert cfg.lr == f'linear(1e-3,1e-4,{cfg.num_train_steps})'


@pytest.mark.parametrize('recipe', ['pose_code', 'liu2017'])
def test_an_imitator_has_few_settings(recipe):
    assert len(utils.flat(own_values(cfg_of('train_ac', f'recipe={recipe}')))) <= 24  # and the task


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


@pytest.mark.parametrize('script, agent, others', [
    ('train', DrQV2Agent, {'device', *train.FIXED}),
    ('train_ac', ACAgent, {'device', 'demos', 'play', *train_ac.FIXED})])
def test_what_an_agent_takes_is_set_in_cfgs_or_fixed(script, agent, others):
    env = dmc.make('reacher_easy', obs='states')
    cfg = cfg_of(script)
    args = train.agent_args(cfg, agent, env)
    takes = inspect.signature(agent).parameters.keys()
    assert args.keys() == takes - others
    sizes = {'obs_shape': [6], 'action_dim': 2}
    assert args == {name: cfg[name] for name in args.keys() - sizes} | sizes


def test_nobody_plays_unless_asked():
    assert cfg_of('generate_expert_video').player is None


def test_a_users_word_stands_above_the_task_files():
    assert cfg_of('train', 'task=walker_run', 'batch_size=64').batch_size == 64
    assert cfg_of('train', 'task=humanoid_run', 'lr=1e-3').lr == 1e-3
    cfg = cfg_of('train', 'task=humanoid_run', 'obs=states')  # that of states does as well
    assert (cfg.num_train_frames, cfg.lr, cfg.feature_dim) == (600_000, 3e-4, None)


def test_recipes():
    """The paper's knows nothing of play and clones nothing."""
    cfg = cfg_of('train_ct', 'recipe=liu2017')
    assert (cfg.recipe, cfg.play_share, cfg.model.code_dim) == ('liu2017', 0, None)
    assert cfg.model.hidden == 512
    cfg = cfg_of('train_ct')
    assert (cfg.recipe, cfg.play_share, cfg.model.code_dim) == ('pose_code', 0.5, 16)
    assert cfg.code.lr == f'linear(1e-3,1e-5,{cfg.code.num_steps})'
    own = {'pose_code': {'num_play', 'num_pretrain_updates', 'w_clone', 'w_value'},
           'liu2017': {'liu2017'}}
    for recipe, other in (list(own), list(own)[::-1]):
        cfg = cfg_of('train_ac', f'recipe={recipe}')
        assert cfg.recipe == recipe and own[recipe] <= cfg.keys() and not own[other] & cfg.keys()
    assert cfg.liu2017.w_img == 1
    assert (cfg_of('train_ac').w_clone, cfg_of('train_ac').w_value) == (1, 1)
    for script in ('train_ct', 'train_ac'):
        with pytest.raises(MissingConfigException, match='other'):
            cfg_of(script, 'recipe=other')


@pytest.mark.parametrize('script', ['train', 'generate_expert_video', 'train_ct', 'train_ac'])
def test_folders_of_runs_and_sweeps_resolve(script):
    with initialize_config_dir(str(CFGS), version_base='1.3'):
        cfg = compose(script, ['task=reacher_hard'], return_hydra_config=True)
    cfg.hydra.job.num, cfg.hydra.job.override_dirname = 0, 'seed2'
    for folder in (cfg.hydra.run.dir, cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir):
        assert '=' not in folder  # it can be typed again as an override


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_tasks_and_options(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', '--help', 'seed=7'])
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main()
    assert not ended.value.code
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100 and not error
    head = lines[:lines.index('')]
    assert len(head) == 4 and all(f'  python {script}.py ' in line for line in head[1:])
    assert any(line.split()[:1] == ['seed=7'] for line in lines)
    options, tasks = (out.split(f'{part}:\n')[1].split('\n\n')[0]
                      for part in ('Options, with their values here', 'Tasks'))
    assert {'reacher_hard', 'fish_swim', 'cup_catch'} <= set(tasks.split())
    assert not TIERS.keys() & set(tasks.split())
    for line in options.splitlines():  # one a line: an option and what it is
        assert line.startswith(' ' * 41) or '=' in line.split()[0] and len(line.split()) > 1
    said = {word.partition('=')[0] for word in out.split() if '=' in word}
    assert {key for key in utils.flat(OmegaConf.to_container(cfg_of(script)))
            if key != 'task_name'} <= said


def test_help_shows_what_a_recipe_says(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train_ct.py', 'recipe=liu2017', '--help'])
    with pytest.raises(SystemExit):
        train_ct.main()
    assert 'num_train_steps=8000 ' in capsys.readouterr().out


# ------------------------------------------------------------------------------ what is refused

VARIANTS = [('train', 'obs=pixels'), ('train', 'obs=states'), ('generate_expert_video', 'seed=1'),
            *[(script, f'recipe={recipe}') for script in ('train_ct', 'train_ac')
              for recipe in ('pose_code', 'liu2017')]]


@pytest.mark.parametrize('script, variant', VARIANTS)
def test_a_script_has_the_settings_of_its_model(script, variant):
    """Each is said what it may be, in words, with an example that it may be."""
    for task in ('walker_walk', 'humanoid_walk'):
        cfg = cfg_of(script, f'task={task}', variant)
        check_settings(cfg, script)
    fields = fields_of(model_of(script, cfg.get('recipe')))
    assert fields.keys() == utils.flat(OmegaConf.to_container(cfg)).keys()
    for key, field in fields.items():
        assert field.title and len(field.examples) == 1
        assert field.description or key.startswith(('scenery.', 'code.weights.'))
        example = field.examples[0]
        if key != 'recipe' and example != '[low,high]':
            OmegaConf.update(cfg, key, yaml.safe_load(str(example).replace('1e-3', '1.0e-3')))
    check_settings(cfg, script)


@pytest.mark.parametrize('script', ['train', 'train_ct'])
def test_each_missing_setting_is_named(script):
    values = OmegaConf.to_container(cfg_of(script), resolve=True)
    for key in values:
        with pytest.raises(utils.UserError, match=f'{key} (is missing|is a section)'):
            check_settings({name: values[name] for name in values if name != key}, script)


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """-> a function that starts a script and returns the sentence with which it ends."""
    def start(script, *arguments):
        def go_on():
            raise AssertionError('it was not refused')
        monkeypatch.setattr('utils.raise_interrupts', go_on)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [f'{script}.py', *arguments])
        with pytest.raises(SystemExit) as ended:
            SCRIPTS[script].main()
        assert ended.value.code == 2 and not any(tmp_path.iterdir())
        out, error = capsys.readouterr()
        [line] = error.splitlines()
        assert not out and line.startswith('error: ') and line.endswith('.')
        return line
    return start


BAD = {
    'train': [
        ('lr=fast', 'a number above 0: set lr=1e-3'), ('lr=-1', 'set lr='), ('lr=nan', 'set lr='),
        ('lr=inf', 'set lr='), ('lr=true', 'set lr='), ('lr=null', 'set lr='), ('lr=', 'set lr='),
        ('lr=[1e-3]', 'set lr='), ('lr=0', 'set lr='),
        ('discount=7', 'from 0 to 1: set discount=0.99'), ('use_tb=maybe', 'true or false'),
        ('use_tb=1', 'true or false'), ('save_video=3', 'true or false'),
        ('hidden_dim=0', 'a whole number from 1: set hidden_dim=1'),
        ('num_eval_episodes=2.5', 'a whole number'),
        ('num_train_frames=1e6', 'set num_train_frames=1000000.'),
        ('num_train_frames=0', 'set num_train_frames=1'),
        ('num_train_frames=many', 'set num'), ('seed=1.5', 'whole'),
        ('num_train_frames=1', 'not even one step of 2 frames: set num_train_frames=2'),
        ('action_repeat=null', 'set action_repeat=1'), ('frame_stack=0', 'set frame_stack=1'),
        ('seed=-1', 'set seed=1'), ('seed=4294967296', 'set seed=1'), ('seed=true', 'set seed=1'),
        ('im_size=8', 'a whole number from 16: set im_size=84'),
        ('replay_buffer_size=1', 'from 2'), ('device=tpu', 'auto, cpu, cuda: set device=auto'),
        ('precision=fp8', 'set precision=fp32'), ('local_dir=3', 'a path'),
        ('task_name=null', 'write task=<name>'),
        ('stddev_schedule=cosine', 'a number above 0 or linear'),
        ('stddev_schedule=0', 'a number above 0'), ('stddev_schedule=true', 'a number above 0'),
        ('stddev_schedule="linear(1,0.1)"', 'linear(start,end,duration): set stddev_schedule=0.2'),
        ('stddev_schedule="linear(1,nan,9)"', 'a number above 0'),
        ('stddev_schedule="linear(1,-1,9)"', 'a number above 0'),
        ('stddev_schedule="linear(1,1,inf)"', 'a number above 0'),
        ('stddev_schedule="linear(1,1,0)"', 'a number above 0'),
        ('stddev_schedule="linear(1,0.0,9)"', 'a number above 0'),
        ('lr=${lrr}', "lr cannot be worked out (Interpolation key 'lrr'"),
        ('lr="linear(1e-3,1e-4,9)"', 'a number above 0')],
    'generate_expert_video': [
        ('im_size=63', 'a multiple of 16 above 0: set im_size=64'),
        ('im_size=0', 'a multiple of 16'),
        ('num_train=0', 'set num_train=1'), ('num_play=-1', 'set num_play=0'),
        ('episode_len=1', 'set episode_len=2'), ('num_workers=0', 'or null: set num_workers=1'),
        ('player=3', 'a path or null: set player='), ('expert=null', 'a path'),
        ('scenery.camera.enabled=perhaps', 'true or false'),
        ('scenery.sky.value=[1,0]', 'a range within [0, 1]: set scenery.sky.value=[low,high]'),
        ('scenery.sky.value=[0,1.5]', 'within [0, 1]'), ('scenery.sky.value=[0]', 'within [0, 1]'),
        ('scenery.camera.roll=[0,inf]', 'within [-180, 180]'),
        ('scenery.camera.zoom=1', 'within [0.1, 10]'),
        ('scenery.distractors.count=[2,9]', 'within [0, 4]')],
    'train_ct': [
        ('model.channels=64', 'a list of 4 whole numbers from 1'),
        ('model.channels=[4,8]', 'a list of 4'), ('model.channels=[4,8,8,0]', 'a list of 4'),
        ('lr=cosine', 'a number from 0 or linear(start,end,duration): set lr=1e-3'),
        ('code.lr=-1', 'set code.lr=1e-3'), ('code.weights.noise=-1', 'a number from 0'),
        ('weights.foreground=2', 'from 0 to 1'), ('play_share=-0.5', 'from 0 to 1'),
        ('model.code_dim=0', 'from 1 or null')],
    'train_ac': [
        ('w_clone=-1', 'a number from 0: set w_clone=1'), ('w_value=null', 'set w_value=1'),
        ('num_play=0', 'leaves nothing to learn actions from: set num_play=1 or more'),
        ('num_play=-1', 'a whole number from 0'), ('num_demos=0', 'set num_demos=1'),
        ('num_eval_demos=0', 'set num_eval_demos=1'), ('num_eval_episodes=0', 'set num_eval'),
        ('num_pretrain_updates=-1', 'set num_pretrain_updates=0'), ('lr=0', 'set lr=1e-3'),
        ('lr="linear(1e-3,1e-4,20000)"', 'set lr=1e-3'), ('batch_size=0', 'set batch_size=1'),
        ('precision=fp8', 'set precision=fp32'), ('translator=', 'a path'),
        ('data_dir=null', 'a path')]}


@pytest.mark.parametrize('script, setting, words', [
    (script, *case) for script, cases in BAD.items() for case in cases])
def test_a_bad_setting_is_refused_in_a_sentence_and_nothing_is_written(refusal, script, setting,
                                                                       words):
    line = refusal(script, setting)
    key, _, value = setting.partition('=')
    assert words in line and key in line
    if not value.startswith(('[', '$', '1e')):  # else it may be spelt in another way
        assert value.strip('"') in line


@pytest.mark.parametrize('script, argument, words', [
    ('train', 'lrr=1', ['no option lrr', 'lr']), ('train', '+lrr=1', ['no option lrr', 'lr']),
    ('train', '++lrr=1', ['no option lrr', 'lr']),
    ('train', 'hiden_dim=9', ['hiden_dim', 'hidden_dim']),
    ('train_ac', 'num_demo=9', ['num_demos']), ('train_ac', '+agent.lr=1', ['no option agent;']),
    ('train_ac', 'w_clon=1', ['w_clone']), ('train_ac', 'liu2017.w_img=1', ['no option liu2017']),
    ('train_ac', 'expert=x', ['no option expert']), ('train_ac', 'snapshot=x', ['no option']),
    ('train_ac', 'action_repeat=2', ['no option']),
    ('train_ct', 'code.wieghts.noise=1', ['code.weights.noise']),
    ('train_ct', 'num_step=7', ['code.num_steps']), ('train', 'lr.foo=1', ['no option lr.foo']),
    ('generate_expert_video', '+scenery.walls.enabled=true', ['no option scenery.walls;']),
    ('train', '~task_name', ['task=<name>']),
    ('train', '~lr', ['lr is missing', 'set lr=']), ('train', '+lr=1', ["at 'lr'", "'lr=1'"]),
    ('train_ct', 'model=3', ['model is a section', 'model.channels, model.z_dim']),
    ('train', 'lr={a:1}', ['lr={"a": 1}', 'set lr=']), ('train', '=1', ['=1']),
    ('train', 'lr=linear(1,2,3)', ['lr=linear(1,2,3)', 'quote']), ('train', 'lr=[1', ['quote']),
    ('train', 'lr', ['key=value']), ('train', 'seed=1,2', ['seed=1,2', 'add -m']),
    ('train', '--verbose', ['--verbose', '--help']), ('train_ct', 'recipe=lui2017', ['liu2017']),
    ('train_ct', 'ct=lui2017', ['no ct=lui2017', 'liu2017']), ('train', 'task=3', ['task=3: ']),
    ('train', 'xyzzy=[1]', ['no option xyzzy; --help lists them all.']),
    ('train', 'obs=sounds', ['obs=sounds', 'states']),
    ('train', 'hydra/launcher=nowhere', ['hydra/launcher=nowhere']),
    ('train', f'hydra.run.dir={__file__}', ['test_cfgs.py is a file: set local_dir or']),
    ('train', f'hydra.run.dir={__file__}/run', ['test_cfgs.py is a file: set local_dir or']),
    ('generate_expert_video', f'out_dir={__file__}', ['test_cfgs.py is a file: set out_dir to']),
    ('train_ac', 'task_name=finger_spin', ['write task=<name>']),
    ('train_ct', f'local_dir={__file__}', ['test_cfgs.py is a file: set local_dir or']),
    ('train', 'hydra.nowhere=1', ['hydra.nowhere'])])
def test_a_command_line_that_cannot_be_meant_is_refused_in_a_sentence(refusal, script, argument,
                                                                      words):
    line = refusal(script, argument)
    assert all(word in line for word in words)


def test_all_runs_of_a_sweep_are_checked_before_the_first(refusal):
    assert 'seed=-1' in refusal('train', '-m', 'seed=1,2,-1', 'task=reacher_hard,finger_spin')
    assert 'seed=-1' in refusal('train', '-m', 'seed=-1', 'task=choice(reacher_hard,finger_spin)')
    assert 'no task=reacher_hrad; the nearest are reacher_hard' in refusal(
        'train', '-m', 'task=choice(finger_spin,reacher_hrad)')
    for argument in ('seed=glob(*)', 'task=glob(walkers_*)', 'discount=interval(0,1)'):
        assert f'{argument} does not say which values' in refusal('train', '-m', argument)
    assert 'batch_size=0' in refusal('train', '-m', 'batch_size=range(2,-1,-1)')
    assert 'w_clone and w_value are both 0' in refusal('train_ac', '-m', 'w_value=1,0', 'w_clone=0')


def test_settings_of_one_recipe_are_refused_and_checked_with_it(refusal):
    for setting in ('num_play=9', 'w_value=1', 'num_pretrain_updates=9', 'w_clone=1'):
        assert f"no option {setting.partition('=')[0]};" in refusal(
            'train_ac', 'recipe=liu2017', setting)
    for setting in ('w_img=-1', 'num_seed_frames=-1', 'stddev_schedule=cosine'):
        assert f'set liu2017.{setting.partition("=")[0]}=' in refusal(
            'train_ac', 'recipe=liu2017', f'liu2017.{setting}')


def test_hydras_own_flags_and_help_end_well():
    cases = [
        (['--cfg', 'job', '++lr=3e-4', 'hydra.verbose=true', 'hydra/job_logging=none'],
         'lr: 0.0003'),
        (['--hydra-help'], '--multirun'), (['--help'], 'Options, with their values here')]
    for (_, words), (code, out, error) in zip(cases, run_in_turn(
            *(['train', *arguments] for arguments, _ in cases)), strict=True):
        assert code == 0 and words in out and not error


@pytest.mark.parametrize('task', ['fish_swim', 'point_mass_easy', 'ball_in_cup_catch'])
def test_suite_tasks_without_a_file_compose_as_well(task):
    assert cfg_of('train', f'task={task}').task_name == task


def test_the_papers_hyperparameters():
    for task, tier in (('finger_spin', 'easy'), ('reacher_hard', 'medium'),
                       ('humanoid_run', 'hard')):
        cfg = cfg_of('train', f'task={task}')
        frames, decay = TIERS[tier]
        assert cfg.num_train_frames == frames
        assert cfg.stddev_schedule == f'linear(1.0,0.1,{decay})'
    cfg = cfg_of('train', 'task=reacher_hard')
    assert (cfg.nstep, cfg.batch_size, cfg.discount, cfg.lr) == (3, 256, 0.99, 1e-4)
    assert (cfg.feature_dim, cfg.hidden_dim) == (50, 1024)
    cfg = cfg_of('train', 'task=walker_run')
    assert (cfg.nstep, cfg.batch_size) == (1, 512)
    assert cfg_of('train', 'task=humanoid_run').lr == 8e-5


def test_what_the_task_file_says_of_the_expert_is_not_said_of_the_imitator():
    cfg = cfg_of('train_ac', 'task=humanoid_run')
    assert cfg.num_train_frames < 1_000_000 and cfg.lr != 8e-5
    assert cfg_of('train', 'task=reacher_hard', 'obs=states').feature_dim is None
