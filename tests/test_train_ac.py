import functools
import shutil
import tempfile
from pathlib import Path

import evaluate
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from fakes import (
    CFGS,
    GOOD,
    MADE_BY,
    SCENERY,
    Killed,
    agent_of,
    die,
    edit,
    judge_args,
    kind_of,
    learned_alike,
    rows,
    save_translator,
    settings,
    terminate_at_once,
    watch,
    write_split,
)
from omegaconf import OmegaConf

import contexts
import dmc
import imitation
import snapshots
import train_ac
import utils
import video
from ac_agent import InverseModel, load_imitator
from ct_model import ContextTranslator
from imitation import Demonstrations
from train_ac import WORKED, judge_translator
from utils import UserError

LENGTH, SIZE = 4, 16
RECIPES = ['liu2017', 'pose_code']


@pytest.fixture
def recipe():
    """May be parametrized."""
    return 'pose_code'


@pytest.fixture
def changes():
    """Changes of settings; may be parametrized."""
    return {}


@pytest.fixture
def data_dir(videos, tmp_path):
    """A copy of the videos, which may be changed."""
    return shutil.copytree(videos, tmp_path / 'videos')


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp('videos'))


def write_videos(folder, num_contexts=3):
    """Noise, in contexts that are true."""
    rng = np.random.default_rng(0)

    def episode(i, split, kind):
        frames = rng.integers(0, 256, (num_contexts, LENGTH + 1, SIZE, SIZE, 3), np.uint8)
        kept = {'train': {'expert_return': 6.0, 'rewards': [1.5] * LENGTH},
                'valid': {'expert_return': 5.0, 'rewards': [1.25] * LENGTH},
                'play': {'actions': rng.uniform(-1, 1, (LENGTH, 2)).tolist()}}[split]
        return frames, {'episode_seed': i, **kept, 'qpos': [[0.0] * 2] * (LENGTH + 1),
                        'contexts': [contexts.Scenery(SCENERY).sample(rng, kind).tolist()
                                     for _ in range(num_contexts)]}
    for split, kind in (('train', 'seen'), ('valid', 'held_out'), ('play', 'seen')):
        write_split(folder / split, [episode(i, split, kind) for i in range(2)],
                    action_repeat=2, scenery=SCENERY)
    return folder


@functools.cache
def translator(recipe) -> bytes:
    """What `save_translator` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save_translator(Path(folder) / 'ct.pt', code=recipe == 'pose_code')
        return (Path(folder) / 'ct.pt').read_bytes()


def make_cfg(folder, data_dir, recipe, changes):
    """Settings of a short run, whose translator is saved in the folder."""
    (folder / 'ct.pt').write_bytes(translator(recipe))
    cfg = settings(
        'train_ac', f'recipe={recipe}', 'device=cpu', 'use_tb=false', 'save_video=false',
        'num_train_frames=128', 'batch_size=8', 'eval_every_frames=64', 'num_eval_episodes=2',
        'log_every_frames=8', 'snapshot_every_frames=48', 'hidden_dim=16',
        *({'liu2017': ['liu2017.num_seed_frames=20', 'liu2017.stddev_schedule=1.0'],
           'pose_code': ['num_pretrain_updates=5']}[recipe]),
        translator=f'{folder}/ct.pt', data_dir=str(data_dir))
    cfg.merge_with(changes)
    return cfg


@pytest.fixture
def cfg(data_dir, tmp_path, recipe, changes):
    """Settings of a short run whose translator and videos are there."""
    return make_cfg(tmp_path, data_dir, recipe, changes)


@pytest.fixture(scope='module')
def trained(videos, tmp_path_factory):
    """-> a function of recipe and changes: the folder of such a run that nothing ended."""
    folders = {}

    def train(recipe, changes):
        key = recipe, str(changes)
        if key not in folders:
            folder = tmp_path_factory.mktemp('whole')
            run(make(make_cfg(folder, videos, recipe, changes), folder / 'run'))
            folders[key] = folder / 'run'
        return folders[key]
    return train


@pytest.fixture
def whole(trained, recipe, changes):
    """The folder of a run with these settings that nothing ended, trained once for all tests."""
    return trained(recipe, changes)


def load_translator(cfg):
    return imitation.load_translator(cfg.translator, cfg.task_name, cfg.recipe, torch.device('cpu'),
                                     cfg.precision)


def make(cfg, work_dir, overlap=False):
    work_dir.mkdir(exist_ok=True)
    workspace = train_ac.make_workspace(cfg.copy(), work_dir)
    workspace.overlap = overlap
    return workspace


def run(workspace):
    """Train as the script does."""
    if workspace.cfg.recipe == 'pose_code' and not workspace.global_step:
        train_ac.pretrain(workspace)
    workspace.train()


# ------------------------------------------------------------------------------ runs

VARIANTS = [('liu2017', {}), ('pose_code', {}), ('pose_code', {'w_value': 0.0}),
            ('pose_code', {'w_clone': 0.0})]


@pytest.mark.parametrize('overlap', [False, True])  # updates in a second thread change nothing
@pytest.mark.parametrize('recipe, changes', VARIANTS)
def test_a_killed_and_resumed_imitator_ends_as_one_that_ran_through(cfg, whole, tmp_path,
                                                                    monkeypatch, overlap, recipe,
                                                                    changes):
    killed = make(cfg, tmp_path / 'killed', overlap)
    watch(monkeypatch, killed.train_env, 'step', 50, die)
    with pytest.raises(Killed):
        run(killed)
    resumed = make(cfg, tmp_path / 'killed', overlap)
    assert 0 < resumed.global_step < 50
    run(resumed)
    assert learned_alike(whole, tmp_path / 'killed', 'imitator')
    if recipe == 'pose_code':
        agent = agent_of(whole, 'imitator')
        counts = {name: part['num_updates'] for name, part in agent.items()}
        num = counts.pop('actor')
        assert num > 5 + 50
        judged = cfg.w_value * (num - 4 * cfg.w_clone)  # of five in pretraining the last one
        assert counts == {'inverse': num * cfg.w_clone, 'discriminator': judged, 'critic': judged}
    for name in ('train.csv', 'eval.csv'):
        assert rows(whole / name) == rows(tmp_path / 'killed' / name)


@pytest.mark.parametrize('owner, name', [(ContextTranslator, 'encode'), (InverseModel, 'fit')])
def test_long_work_is_broken_off_at_once_and_done_again(cfg, whole, tmp_path, monkeypatch, owner,
                                                        name):
    """While demonstrations are encoded, and in pretraining."""
    with (monkeypatch.context() as patch, pytest.raises(utils.Interrupted),
          utils.raise_interrupts()):
        watch(patch, owner, name, 3, terminate_at_once)
        run(make(cfg, tmp_path / 'broken', overlap=True))
    assert not list((tmp_path / 'broken').glob('*.pt'))
    run(make(cfg, tmp_path / 'broken', overlap=True))
    assert learned_alike(whole, tmp_path / 'broken', 'imitator')


@pytest.mark.parametrize('recipe', ['liu2017'])  # codes have a scale of their own
def test_a_resumed_run_keeps_its_features(cfg, tmp_path, monkeypatch):
    """Worked out again, their scale could differ in the last digits."""
    first = make(cfg, tmp_path / 'run')
    first.save_snapshot()
    encode = ContextTranslator.encode
    monkeypatch.setattr(ContextTranslator, 'encode', lambda self, x: 1.1 * encode(self, x))
    again = make(cfg, tmp_path / 'run')
    assert again.made_by['scale'] == first.made_by['scale']


class Deceptive(dmc.Wrapper):
    """A task whose rewards are nonsense, and whose pose cannot be read."""

    def step(self, action):
        return self._env.step(action)._replace(reward=-123.0)

    def qpos(self):
        raise AssertionError('the pose is for evaluation only')


@pytest.mark.parametrize('recipe, changes', VARIANTS)
def test_training_reads_neither_pose_nor_task_reward(cfg, whole, data_dir, tmp_path, monkeypatch):
    rng = np.random.default_rng(5)
    for split in ('train', 'valid', 'play'):
        for i in range(2):
            path = video.frames_path(data_dir / split, i).with_suffix('.json')
            edit(path, qpos=rng.normal(size=(LENGTH + 1, 2)).tolist(),
                 rewards=rng.normal(size=LENGTH).tolist())
            if split != 'play':
                edit(path, expert_return=-77.0)
    load_suite = dmc.load_suite
    monkeypatch.setattr(dmc, 'load_suite', lambda *args: Deceptive(load_suite(*args)))
    other = make(cfg, tmp_path / 'run')
    run(other)
    assert other.last_eval['task_return'] == 2 * LENGTH * -123.0  # that the agent was deceived
    assert other.last_eval['expert_return'] == -77.0
    assert learned_alike(whole, tmp_path / 'run', 'imitator')
    assert rows(whole / 'train.csv') == rows(tmp_path / 'run/train.csv')


def test_training_reads_pictures_and_the_actions_of_play(cfg, whole, data_dir, tmp_path):
    """What the test above changes is not just without any effect."""
    path = video.frames_path(data_dir / 'play', 0).with_suffix('.json')
    edit(path, actions=np.zeros((LENGTH, 2)).tolist())
    run(make(cfg, tmp_path / 'run'))
    assert not learned_alike(whole, tmp_path / 'run', 'imitator')


@pytest.mark.parametrize('recipe', RECIPES)
def test_evaluation_has_held_out_videos_and_the_features_of_training(cfg, tmp_path):
    workspace = make(cfg, tmp_path / 'run')
    env = workspace.eval_env
    obs = env.reset(episode_seed=0).observation
    model, _ = load_translator(cfg)
    train, valid = (video.Clips(f'{cfg.data_dir}/{split}') for split in ('train', 'valid'))
    demos = Demonstrations(model, valid, Demonstrations(model, train).scale)
    features = demos.encode(env.render(SIZE)).numpy()
    np.testing.assert_array_equal(obs[:len(features)], features)
    other = imitation.make_env(demos, workspace.made_by.get('w_img'))
    np.testing.assert_array_equal(other.reset(episode_seed=0).observation, obs)
    assert env.episode_info['expert_return'] == 5.0


@pytest.mark.parametrize('recipe', RECIPES)
def test_the_report_says_how_it_compares(cfg, tmp_path):
    workspace = make(cfg, tmp_path / 'run')
    run(workspace)
    text = train_ac.report(workspace, num_videos=1)
    assert (tmp_path / 'run/demo.mp4').exists()
    assert (tmp_path / 'run/report.md').read_text() in text
    result = workspace.last_eval
    episodes = np.genfromtxt(tmp_path / 'run/episodes.csv', delimiter=',', names=True)
    assert len(episodes) == workspace.cfg.num_eval_episodes
    for name in ('task_return', 'expert_return', 'random_return'):
        assert episodes[name].mean() == pytest.approx(result[name])
    assert result['expert_return'] == 5.0
    for name, who in (('task', 'imitator'), ('expert', 'expert'), ('random', 'random')):
        returns = episodes[f'{name}_return']
        assert f'| return, {who} | {returns.mean():.1f} ± {returns.std():.1f} |' in text
    assert f'| agent steps (frames) | 64 (128) |\n| minutes | 0 |\n| seed | {cfg.seed} |' in text
    low, high = result['random_return'], result['expert_return']
    score = (result['task_return'] - low) / (high - low)
    assert f'| (imitator - random) / (expert - random) | {score:.2f} |' in text
    for name, words in (('psnr_translation', 'the translation'),
                        ('psnr_copy_first', 'copying the first frame')):
        assert f'| PSNR of {words} | {result[name]:.1f} dB |' in text


def test_a_report_without_a_span_has_no_score(cfg, tmp_path):
    """Where the expert is no better than random actions."""
    workspace = make(cfg, tmp_path / 'run')
    workspace.eval()
    for episode in workspace.last_eval_episodes:
        episode |= {'expert_return': 0.0, 'random_return': 0.0}
    assert '(expert - random) | nan |' in train_ac.report(workspace, num_videos=1)


def test_the_report_counts_episodes_and_names_the_command(cfg, tmp_path, monkeypatch):
    workspace = make(cfg, tmp_path / 'run')
    workspace.eval()
    workspace.last_eval_episodes = [
        dict(workspace.last_eval_episodes[0], task_return=value, expert_return=10.0,
             random_return=0.0) for value in (7.9, 8.0, 12.0)]
    monkeypatch.setattr(utils, 'command', lambda: 'train_ac.py task=reacher_hard')
    text = train_ac.report(workspace, num_videos=1)
    assert '| episodes that score 0.8 or more | 2 of 3 |' in text
    assert '| command | `python train_ac.py task=reacher_hard` |' in text


def test_the_demo_says_how_each_episode_went(cfg, tmp_path, monkeypatch):
    workspace, notes = make(cfg, tmp_path / 'run'), []
    side_by_side = video.panels_side_by_side
    def noted(frames, note):
        notes.append(note)
        return side_by_side(frames, note)
    workspace.eval()
    monkeypatch.setattr(video, 'panels_side_by_side', noted)
    train_ac.report(workspace, num_videos=2)
    assert notes == [f": {episode['task_return']:.0f} of {episode['expert_return']:.0f}"
                     for episode in workspace.last_eval_episodes]


def test_evaluate_repeats_a_runs_own_evaluation_and_films_it(cfg, tmp_path):
    workspace = make(cfg, tmp_path / 'run')
    run(workspace)
    args = judge_args(seed=cfg.seed, translator=cfg.translator, videos=f'{cfg.data_dir}/valid',
                      show=1, out=tmp_path / 'x.gif')
    line, film = evaluate.judge(tmp_path / 'run', args).splitlines()
    result = workspace.last_eval
    assert f": {result['task_return']:.1f} ± " in line and 'over 2 episodes' in line
    assert f"expert 5.0 ± 0.0, random {result['random_return']:.1f}; score " in line
    assert film == f"video: {tmp_path / 'x.gif'}"
    assert iio.imread(tmp_path / 'x.gif').shape[1:] == (video.CAPTION + 256, 3 * 256, 3)
    args.videos = f'{cfg.data_dir}/none'
    with pytest.raises(UserError, match='there are no videos in'):
        evaluate.judge(tmp_path / 'run', args)


@pytest.mark.parametrize('recipe', RECIPES)
def test_only_evaluation_logs_the_task_return(whole):
    assert 'task_return' in rows(whole / 'eval.csv')[0]
    assert not any('return' in column for column in rows(whole / 'train.csv')[0])


def test_the_agent_starts_where_the_filmed_episode_started(cfg, tmp_path):
    env = make(cfg, tmp_path / 'run').train_env
    env.reset(episode_seed=3)
    plain = dmc.make('reacher_hard', obs='states')
    starts = []
    for seed in (0, 1):
        plain.reset(episode_seed=seed)
        starts.append((plain.physics.get_state(), plain.physics.model.geom_pos.copy()))
    assert [np.array_equal(env.physics.get_state(), state)  # the same pose, and the same target
            and np.array_equal(env.physics.model.geom_pos, places)
            for state, places in starts].count(True) == 1


def test_made_by_says_what_it_was_made_of(cfg, tmp_path):
    made_by = make(cfg, tmp_path / 'run').made_by
    assert made_by['translator_sha256'] == snapshots.sha256(cfg.translator)
    assert (made_by['recipe'], made_by['num_demos'], made_by['num_play']) == ('pose_code', 2, 2)
    cfg.merge_with({'num_demos': 1, 'num_play': 1})
    made_by = make(cfg, tmp_path / 'other').made_by
    assert (made_by['num_demos'], made_by['num_play']) == (1, 1)


@pytest.mark.parametrize('recipe', RECIPES)
def test_an_imitator_of_an_earlier_version_is_refused_in_a_sentence(cfg, tmp_path):
    make(cfg, tmp_path).save_snapshot()
    path = tmp_path / 'snapshot.pt'
    older = snapshots.load_snapshot(path, 'imitator')
    older['agent_args'] |= {'lookahead': [1, 2], 'num_frames': 3}
    older['made_by'] |= {'timing': 'clock'}
    torch.save(older, path)
    for use, words in (
            (lambda: load_imitator(path, cfg.translator, f'{cfg.data_dir}/valid', 'reacher_hard'),
             f'{path} is of an earlier version, .*: python train_ac.py task=reacher_hard'),
            (lambda: make(cfg, tmp_path),
             f'the run in {tmp_path} is of an earlier version, .*: start a new run')):
        with pytest.raises(UserError, match=f'^{words}\\.$'):
            use()


# ------------------------------------------------------------------------------ own videos

@pytest.fixture
def imported(cfg, tmp_path):
    """Demonstrations of which nothing is known, each in one context; play as it is filmed."""
    folder = write_videos(tmp_path / 'own', num_contexts=1)
    for split, kind in (('train', 'seen'), ('valid', 'held_out')):
        for i in range(2):
            path = video.frames_path(folder / split, i)
            video.write_episode(folder / split, i, np.load(path),
                                {'files': [f'{i}.mp4'], 'fps': [30.0]})
        edit(folder / split / 'meta.json', mp4_sha256='none', expert_sha256=None, contexts=kind,
             actor=None)
    cfg.data_dir = str(folder)
    return cfg


@pytest.mark.parametrize('recipe', RECIPES)
def test_an_imitator_of_own_videos_trains_and_resumes(imported, tmp_path, monkeypatch):
    run(make(imported, tmp_path / 'whole'))
    killed = make(imported, tmp_path / 'again')
    watch(monkeypatch, killed.train_env, 'step', 50, die)
    with pytest.raises(Killed):
        run(killed)
    run(make(imported, tmp_path / 'again'))
    assert learned_alike(tmp_path / 'whole', tmp_path / 'again', 'imitator')


def test_what_own_videos_do_not_tell_is_not_reported(imported, tmp_path):
    workspace = make(imported, tmp_path / 'run')
    workspace.eval()
    text = train_ac.report(workspace, num_videos=1)
    result = workspace.last_eval
    assert (f"| squared distance from its video | {result['distance']:.3f} |\n"
            f"| the same from another video | {result['distance_other']:.3f} |\n") in text
    assert 'there is no score' in text and 'PSNR' not in text and '(expert' not in text
    assert 'expert_return' not in result and 'psnr_translation' not in result
    episodes = np.genfromtxt(tmp_path / 'run/episodes.csv', delimiter=',', names=True)
    assert episodes.dtype.names == ('task_return', 'random_return')
    returns = episodes['task_return']
    assert f'| return, imitator | {returns.mean():.1f} ± {returns.std():.1f} |' in text


def test_evaluate_tells_how_near_own_videos_it_stays(imported, tmp_path):
    workspace = make(imported, tmp_path / 'run')
    workspace.eval()
    workspace.save_snapshot()
    args = judge_args(seed=imported.seed, translator=imported.translator, show=1,
                      videos=f'{imported.data_dir}/valid', out=tmp_path / 'x.gif')
    line, _ = evaluate.judge(tmp_path / 'run', args).splitlines()
    distance, other = (workspace.last_eval[name] for name in ('distance', 'distance_other'))
    assert (f'squared distance from its video {distance:.3f}, from another video {other:.3f}; '
            'no score, since') in line
    assert 'expert ' not in line.partition('no score')[0] and (tmp_path / 'x.gif').exists()


def test_an_agent_of_own_videos_starts_from_resets_and_in_contexts_of_its_own(imported, tmp_path,
                                                                              monkeypatch):
    workspace = make(imported, tmp_path / 'run')
    translated = watch(monkeypatch, Demonstrations, 'translate')
    resets = watch(monkeypatch, dmc.SuiteEpisodes, 'reset')
    for env, kind in ((workspace.train_env, 'seen'), (workspace.eval_env, 'held_out')):
        demos, starts, drawn = [], [], []
        for seed in (0, 0, 1, 2, 3, 4, 5):
            translated.clear()
            env.reset(episode_seed=seed)
            _, demo, sources, *_ = translated[0][0]
            assert sources == [0]
            assert env.start_seed == resets[-1][1]['episode_seed']
            demos.append(demo)
            starts.append(env.start_seed)
            drawn.append(resets[-1][1]['context'])
        assert set(demos) == {0, 1}
        assert starts[0] == starts[1] and len(set(starts)) == 6
        assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
        assert {kind_of(contexts.Scenery(SCENERY), context) for context in drawn} == {kind}


# ------------------------------------------------------------------------------ what is refused

def refused(cfg, tmp_path, words):
    """Asserts that there is one sentence, and no work."""
    with pytest.raises(UserError, match=words) as raised:
        train_ac.make_workspace(cfg, tmp_path / 'run')
    text = str(raised.value)
    assert text.endswith('.') and '\n' not in text
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('overrides, words', [
    ({'w_clone': 0, 'w_value': 0}, 'nothing is learned: set w_clone=1'),
    ({'num_play': 0}, 'nothing to learn actions from: set num_play=1'),
    ({'w_value': -1}, 'set w_value=1'), ({'num_demos': 0}, 'set num_demos=1')])
def test_settings_that_do_not_go_together_are_told_before_any_work(cfg, tmp_path, overrides, words):
    (tmp_path / 'ct.pt').unlink()  # not even the translator was looked for
    cfg.merge_with(overrides)
    refused(cfg, tmp_path, words)


def test_a_missing_translator_is_told_with_the_command(cfg, tmp_path):
    (tmp_path / 'ct.pt').unlink()
    refused(cfg, tmp_path, 'python train_ct.py task=reacher_hard')


@pytest.mark.parametrize('recipe, other', [RECIPES, RECIPES[::-1]])
def test_a_translator_of_the_other_recipe_is_refused(cfg, tmp_path, recipe, other):
    save_translator(cfg.translator, code=other == 'pose_code')
    refused(cfg, tmp_path, f'pose code: set recipe={other}, choose another translator, or python '
                           f'train_ct.py task=reacher_hard recipe={recipe}')


def test_a_translator_of_other_pictures_is_refused(cfg, tmp_path):
    for other, words in (({'quality': [2048, 28, 16]}, 'quality=.*2048.*train_ct.py'),
                         ({'videos': snapshots.versions() | {'mujoco': '3.0'}},
                          'mujoco=3.0.*train_ct.py')):
        save_translator(cfg.translator, made_by=MADE_BY | other)
        refused(cfg, tmp_path, words)


@pytest.mark.parametrize('split', ['train', 'valid', 'play'])
@pytest.mark.parametrize('other, words', [
    ({'quality': [2048, 28, 16]}, 'quality=.*2048.*generate_expert_video.py'),
    ({'versions': snapshots.versions() | {'mujoco': '3.0'}},
     'mujoco=3.0.*generate_expert_video.py'),
    ({'im_size': 32}, 'im_size=32, not 16'), ({'task': 'finger_spin'}, 'finger_spin, not reacher')])
def test_videos_of_other_pictures_are_refused(data_dir, cfg, tmp_path, split, other, words):
    edit(data_dir / split / 'meta.json', **other)
    refused(cfg, tmp_path, words)


def test_one_context_is_not_enough(cfg, tmp_path):
    cfg.data_dir = str(write_videos(tmp_path / 'narrow', num_contexts=1))
    refused(cfg, tmp_path, 'one context only.*generate_expert_video.py .*num_contexts=')


def test_an_agent_acts_as_often_as_the_expert_did(data_dir, cfg, tmp_path):
    for split in ('train', 'valid'):
        edit(data_dir / split / 'meta.json', action_repeat=3)
    refused(cfg, tmp_path, 'play was made with action_repeat=2, not 3: film the splits with one')
    edit(data_dir / 'play/meta.json', action_repeat=3)
    workspace = make(cfg, tmp_path / 'repeats')
    assert workspace.num_train_steps == cfg.num_train_frames // 3
    assert workspace.made_by['action_repeat'] == 3
    cfg.num_train_frames = 2
    refused(cfg, tmp_path, 'num_train_frames=2 is not even one step of 3 frames')


@pytest.mark.parametrize('split', ['train', 'valid', 'play'])
def test_videos_that_are_missing_are_told_with_the_command(data_dir, cfg, tmp_path, split):
    video.frames_path(data_dir / split, 1).with_suffix('.json').unlink()
    refused(cfg, tmp_path, f'{split} lacks some of its 2 episodes.*: python '
                           'generate_expert_video.py task=reacher_hard goes on with it')
    shutil.rmtree(data_dir / split)
    refused(cfg, tmp_path, f'no videos in {data_dir}/{split}: python generate_expert_video.py '
                           f'task=reacher_hard out_dir={data_dir}')


@pytest.mark.parametrize('recipe', ['liu2017'])
def test_the_papers_recipe_takes_no_play(data_dir, cfg, tmp_path):
    shutil.rmtree(data_dir / 'play')
    assert make(cfg, tmp_path / 'run').made_by['num_play'] == 0


# ------------------------------------------------------------------------------ judgement

@pytest.mark.parametrize('recipe', ['pose_code'])
def test_a_code_that_was_not_fitted_to_the_end_is_refused(cfg):
    save_translator(cfg.translator, scores={'trans': 0.1})
    with pytest.raises(UserError, match='not fitted to the end: .*python train_ct.py'):
        load_translator(cfg)


@pytest.mark.parametrize('path', sorted((CFGS.parent / 'ct').glob('*.pt')), ids=lambda p: p.stem)
def test_a_shipped_translator_can_be_imitated_with(path):
    cfg = OmegaConf.create({'task_name': path.stem, 'translator': str(path), 'recipe': 'pose_code',
                            'device': 'cpu', 'precision': 'bf16'})
    model, scores = load_translator(cfg)
    frames = torch.randint(256, (2, model.im_size, model.im_size, 3), dtype=torch.uint8)
    assert model.code(model.encode(frames)).isfinite().all()
    # the only one whose earlier imitators' mean was below 0.8
    assert ('warning' in judge_translator(scores)) == (path.stem == 'walker_walk')


def test_a_translator_as_good_as_those_that_worked_is_not_warned_of():
    line = judge_translator(GOOD | {'open_loop': 0.123, 'open_loop_still': 0.456, 'trans': 9.0})
    assert 'warning' not in line and '\n' not in line
    assert all(f'{name} {value:.3g}' in line for name, value in GOOD.items())
    assert 'open_loop 0.123' in line and 'open_loop_still 0.456' in line and '9' not in line


@pytest.mark.parametrize('name', WORKED)
def test_a_score_that_is_worse_is_warned_of_and_no_other(name):
    worked, sign = WORKED[name]
    better, worse = (worked + way * sign * 0.1 * worked for way in (1, -1))
    assert 'warning' not in judge_translator(GOOD | {name: better})
    _, warning = judge_translator(GOOD | {name: worse}).splitlines()
    assert warning.startswith('warning:')
    assert f'{name} {worse:.3g} (has worked with {worked:g})' in warning
    assert warning.count('has worked with') == 1
    assert 'warning' not in judge_translator({key: GOOD[key] for key in GOOD if key != name})


def test_scores_are_printed_with_the_translator(cfg, tmp_path, capsys):
    save_translator(cfg.translator, scores=GOOD | {'rank': 0.05})
    make(cfg, tmp_path / 'run')
    printed = capsys.readouterr().out
    assert printed == judge_translator(GOOD | {'rank': 0.05}) + '\n' and 'warning' in printed


@pytest.mark.parametrize('recipe', ['liu2017'])
def test_the_papers_translator_has_no_such_scores(cfg, tmp_path, capsys):
    make(cfg, tmp_path / 'run')
    assert capsys.readouterr().out == ''
