from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_cfgs import CFGS
from test_train import Killed, rows, weights

import contexts
import dmc
import train_ac
import utils
import video
from ac_agent import ACAgent
from ct_model import ContextTranslator, to_uint8
from train import Workspace
from train_ac import DemoTranslator
from utils import UserError

LENGTH, SIZE = 4, 16
MADE_BY = {'videos': utils.versions(), 'quality': dmc.CONTEXT_QUALITY}
MODEL_ARGS = {'im_size': SIZE, 'channels': [4, 4, 4, 4], 'z_dim': 4, 'hidden': 8}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ContextTranslator(**MODEL_ARGS).eval()


@pytest.fixture
def data_dir(tmp_path, scenery):
    rng = np.random.default_rng(0)
    for split, kind in (('train', 'seen'), ('valid', 'held_out')):
        root = tmp_path / 'videos' / split
        for i in range(2):
            video.write_episode(root, i, rng.integers(
                0, 256, (3, LENGTH + 1, SIZE, SIZE, 3), dtype=np.uint8), {
                'episode_seed': i, 'expert_return': 5.0, 'rewards': [1.0] * LENGTH,
                'contexts': [contexts.sample(rng, kind, scenery).tolist() for _ in range(3)]})
        video.write_json(root / 'meta.json', {
            'format': utils.FORMAT, 'task': 'reacher_hard', 'split': split, 'im_size': SIZE,
            'episode_len': LENGTH, 'num_contexts': 3, 'action_repeat': 2, 'scenery': scenery,
            'num_episodes': 2, 'expert_sha256': 'none', 'quality': dmc.CONTEXT_QUALITY,
            'versions': utils.versions()})
    return tmp_path / 'videos'


def test_translation_is_the_mean_over_sources_in_the_agents_context(model, data_dir):
    clips = video.Clips(data_dir / 'train')
    translator, first = DemoTranslator(model, clips, z_dim=3), np.array(clips.frames(1)[0, 0])
    features, images = translator.translate(1, [1, 2], first), translator.decode()
    expected, pictures = [], []
    with torch.no_grad():
        for source in (1, 2):
            context = model.context(torch.from_numpy(first)[None])
            z1 = model.encode(torch.from_numpy(np.array(clips.frames(1)[source]))[None])
            z3 = model.translate(z1, context)
            expected.append(z3[0])
            pictures.append(model.decode(z3, context)[0])
    mean, components = map(torch.tensor, translator.basis[:2])
    np.testing.assert_allclose(features, (sum(expected) / 2 - mean) @ components, atol=1e-3)
    assert abs(images.astype(int) - to_uint8(sum(pictures) / 2).numpy()).max() <= 1


def test_features_are_those_that_vary_most_for_the_error_of_their_translation(model, data_dir):
    clips = video.Clips(data_dir / 'train')
    translator = DemoTranslator(model, clips, z_dim=4)
    frames = [np.array(clips.frames(i)) for i in range(2)]
    z = np.stack([translator.encode(frame) for i in range(2) for clip in frames[i]
                  for frame in clip])
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(z.std(0), 1, atol=0.05)
    error = np.concatenate([
        translator.translate(i, [c for c in range(3) if c != i], frames[i][i, 0])
        - np.stack([translator.encode(frame) for frame in frames[i][i]]) for i in range(2)])
    ratios = (error ** 2).mean(0)  # the variances are 1
    assert (np.diff(ratios) < 1e-3).all()  # the best come last
    covariance = error.T @ error / len(error)
    # what one gets wrong says nothing about the others: none of them could be made better by them
    np.testing.assert_allclose(covariance - np.diag(ratios), 0, atol=0.05 * ratios.max())


def test_demonstrations_are_encoded_once(model, data_dir, monkeypatch):
    translator = DemoTranslator(model, video.Clips(data_dir / 'train'), z_dim=3)
    translator._encoded.clear()
    encoded = []
    encode = model.encode
    monkeypatch.setattr(model, 'encode', lambda frames: encoded.append(1) or encode(frames))
    for _ in range(3):
        translator.translate(0, [1], np.zeros((SIZE, SIZE, 3), np.uint8))
    assert len(encoded) == 1


@pytest.fixture
def cfg(data_dir):
    with initialize_config_dir(str(CFGS), version_base='1.3'):
        return compose('train_ac', [
            f'data_dir={data_dir}', 'device=cpu', 'use_tb=false', 'save_video=false',
            'action_repeat=2', 'num_train_frames=160', 'num_seed_frames=20', 'batch_size=8',
            'eval_every_frames=64', 'num_eval_episodes=2', 'log_every_frames=8',
            'snapshot_every_frames=48', 'lookahead=[1,2]', 'z_dim=4', 'agent.num_expl_steps=10',
            'w_img=0.5', 'relabel=0', 'stddev_schedule=1.0'])


def make_env(cfg, model, split):
    clips = video.Clips(f'{cfg.data_dir}/{split}')
    return train_ac.make_env(cfg, clips, DemoTranslator(model, clips, cfg.z_dim), split == 'valid')


def make(cfg, model, work_dir, overlap=False):
    work_dir.mkdir(exist_ok=True)
    envs = [make_env(cfg, model, split) for split in ('train', 'valid')]
    agent_args = dict(obs_shape=[4 * 5 + 1], action_dim=2, z_dim=4, num_frames=3, lookahead=[1, 2],
                      hidden_dim=16, feature_dim=None, num_expl_steps=10, relabel=0.25,
                      hindsight=0.5, w_inverse=1.0)
    return Workspace(cfg, work_dir, 'imitator', *envs, ACAgent, agent_args, {}, overlap)


@pytest.mark.parametrize('overlap', [False, True])  # updates in a second thread change nothing
def test_a_killed_and_resumed_imitator_ends_as_one_that_ran_through(cfg, model, tmp_path, overlap):
    torch.set_num_threads(1)  # as they have it in a second thread
    make(cfg, model, tmp_path / 'whole').train()
    killed = make(cfg, model, tmp_path / 'killed', overlap)
    step, taken = killed.train_env.step, []
    def dying_step(action):
        taken.append(action)
        if len(taken) == 58:
            raise Killed
        return step(action)
    killed.train_env.step = dying_step
    with pytest.raises(Killed):
        killed.train()
    resumed = make(cfg, model, tmp_path / 'killed', overlap)
    assert 0 < resumed.global_step < 58
    resumed.train()
    whole, again = (weights(tmp_path / name, 'imitator') for name in ('whole', 'killed'))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    for name in ('train.csv', 'eval.csv'):
        assert rows(tmp_path / 'whole' / name) == rows(tmp_path / 'killed' / name)


def test_a_resumed_run_keeps_its_features(cfg, shipped, tmp_path, monkeypatch):
    """Worked out again, they could point the other way."""
    first = train_ac.make_workspace(cfg, tmp_path)
    first.save_snapshot()
    monkeypatch.setattr(DemoTranslator, '_find_basis', None)
    again = train_ac.make_workspace(cfg, tmp_path)
    frame = np.full((SIZE, SIZE, 3), 77, np.uint8)
    for env in ('train_env', 'eval_env'):
        np.testing.assert_array_equal(*(getattr(run, env)._translator.encode(frame)
                                        for run in (first, again)))


def test_the_report_says_how_it_compares(cfg, model, tmp_path):
    workspace = make(cfg, model, tmp_path / 'run')
    workspace.train()
    text = train_ac.report(workspace, num_videos=1)
    assert (tmp_path / 'run/report.md').exists() and (tmp_path / 'run/demo.mp4').exists()
    result = workspace.last_eval
    assert result['expert_return'] == 5.0
    assert f"| return, imitator | {result['task_return']:.1f} |" in text
    low, high = result['random_return'], result['expert_return']
    score = (result['task_return'] - low) / (high - low)
    assert f'| (imitator - random) / (expert - random) | {score:.2f} |' in text


def test_only_evaluation_logs_the_task_return(cfg, model, tmp_path):
    make(cfg, model, tmp_path / 'run').train()
    assert 'task_return' in rows(tmp_path / 'run/eval.csv')[0]
    assert not any('return' in column for column in rows(tmp_path / 'run/train.csv')[0])


def test_the_agent_starts_where_the_filmed_episode_started(cfg, model):
    env = make_env(cfg, model, 'train')
    env.reset(episode_seed=3)
    plain = dmc.make('reacher_hard', obs='states')
    starts = []
    for seed in (0, 1):
        plain.reset(episode_seed=seed)
        starts.append((plain.physics.get_state(), plain.physics.model.geom_pos.copy()))
    assert [np.array_equal(env.physics.get_state(), state)  # the same pose, and the same target
            and np.array_equal(env.physics.model.geom_pos, places)
            for state, places in starts].count(True) == 1


def test_a_missing_translator_is_told_with_the_command(cfg, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='python train_ct.py task=reacher_hard'):
        train_ac.make_workspace(cfg, tmp_path)


def test_shares_of_a_batch_are_no_more_than_the_batch(cfg, tmp_path):
    for override in ({'relabel': 0.6, 'hindsight': 0.5}, {'hindsight': -0.1}):
        cfg.merge_with(override)
        with pytest.raises(UserError, match='shares'):
            train_ac.make_workspace(cfg, tmp_path)


@pytest.mark.parametrize('overrides, mend', [
    ({'relabel': 0.5, 'w_img': 0.5}, 'set relabel=0'),
    ({'relabel': 0.5, 'w_img': 0, 'lookahead': [2]}, 'set relabel=0'),
    ({'hindsight': 0.5, 'nstep': 3}, 'set nstep=1'),
    ({'relabel': 0, 'hindsight': 0}, 'w_inverse=0'), ({'w_inverse': -1}, 'w_inverse=0'),
    ({'lookahead': []}, r'lookahead=\[1,3'), ({'lookahead': [0, 1]}, r'lookahead=\[1,3'),
    ({'w_feature': 0, 'w_img': 0}, 'set w_feature=1'),
    ({'precision': 'fp8'}, 'set precision=fp32')])
def test_settings_that_do_not_go_together_are_told_before_any_work(cfg, tmp_path, overrides, mend):
    cfg.merge_with(overrides)
    with pytest.raises(UserError, match=mend):
        train_ac.make_workspace(cfg, tmp_path)


@pytest.fixture
def shipped(cfg, model, tmp_path):
    """A translator where `cfg` looks for it; -> writes it, made by what it is given."""
    cfg.snapshot = str(tmp_path / 'ct.pt')

    def write(made_by):
        utils.save_snapshot(cfg.snapshot, 'translator', cfg.task_name, {
            'model_args': MODEL_ARGS, 'model': model.state_dict(), 'made_by': made_by})
    write(MADE_BY)
    return write


@pytest.mark.parametrize('split', ['train', 'valid'])
@pytest.mark.parametrize('other, words', [
    ({'quality': [2048, 28, 16]}, 'quality .*2048.*generate_expert_video.py'),
    ({'versions': utils.versions() | {'mujoco': '3.0'}}, 'MuJoCo 3.0.*generate_expert_video.py')])
def test_demonstrations_of_other_pictures_are_refused(data_dir, cfg, shipped, tmp_path, split,
                                                      other, words):
    path = data_dir / split / 'meta.json'
    video.write_json(path, video.read_json(path) | other)
    with pytest.raises(UserError, match=words):
        train_ac.make_workspace(cfg, tmp_path)


def test_a_translator_of_other_pictures_or_too_few_features_is_refused(cfg, shipped, tmp_path):
    with pytest.raises(UserError, match='set z_dim=4'):
        train_ac.make_workspace(OmegaConf.merge(cfg, {'z_dim': 5}), tmp_path)
    shipped(MADE_BY | {'quality': [2048, 28, 16]})
    with pytest.raises(UserError, match='quality .*2048.*train_ct.py'):
        train_ac.make_workspace(cfg, tmp_path)


def test_an_agent_acts_as_often_as_the_expert_did(data_dir, cfg, shipped, tmp_path):
    cfg.action_repeat = 4
    with pytest.raises(UserError, match='2 times, not 4: leave action_repeat out'):
        train_ac.make_workspace(cfg, tmp_path)
    for split in ('train', 'valid'):
        path = data_dir / split / 'meta.json'
        video.write_json(path, video.read_json(path) | {'action_repeat': 3})
    cfg.action_repeat = None
    workspace = train_ac.make_workspace(cfg, tmp_path)
    assert workspace.num_train_steps == cfg.num_train_frames // 3
    assert workspace.made_by['action_repeat'] == 3


def test_before_there_are_videos_it_asks_the_expert_how_often(cfg, shipped, tmp_path, monkeypatch):
    cfg.data_dir, cfg.expert, commands = str(tmp_path / 'none'), str(tmp_path / 'expert.pt'), []
    def save_expert(action_repeat):
        utils.save_snapshot(cfg.expert, 'expert', cfg.task_name,
                            {'made_by': {'env_args': {'action_repeat': action_repeat}}})
    def run(command, check):
        commands.append(command)
        return SimpleNamespace(returncode=3)
    monkeypatch.setattr(train_ac.subprocess, 'run', run)
    save_expert(1)
    with pytest.raises(UserError, match='1 times, not 2: leave action_repeat out'):
        train_ac.make_workspace(cfg, tmp_path)
    cfg.action_repeat = None
    save_expert(161)
    with pytest.raises(UserError, match='num_train_frames=160 is not even one step of 161'):
        train_ac.make_workspace(cfg, tmp_path)
    assert not commands
    cfg.action_repeat = None
    save_expert(1)
    with pytest.raises(SystemExit, match='3'):  # filming that fails has said why
        train_ac.make_workspace(cfg, tmp_path)
    assert cfg.action_repeat == 1 and f'snapshot={cfg.expert}' in commands[0]
