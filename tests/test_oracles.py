import functools
import sys
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from fakes import CFGS, save_expert, settings
from oracles import (
    EndGuide,
    NoGuide,
    PoseBesideFrame,
    PoseDemonstrations,
    UnconditionedDiscriminator,
)

import ac_agent
import dmc
import train_ac
from imitation import HISTORY, LOOKAHEAD, NUM_ACTIONS, Guide, Layout
from utils import UserError


class ThreePoses:
    """An arm on a cart that has travelled."""

    poses = np.array([[9.0, 1.0, 0.0], [5.0, 2.0, np.pi / 2], [7.0, 6.0, np.pi]])

    def array(self, key):
        return {'qpos': self.poses[None]}[key]


@pytest.fixture
def demos():
    scale = np.array([0.5, 0.0, 3.0]), np.array([0.5, 1.0, 2.0])  # of sine, cosine, length
    return PoseDemonstrations(ThreePoses(), ['travel', 'slide', 'hinge'], scale)


def test_features_are_the_pose_without_travel(demos):
    expected = [[[-1, 1, -1], [1, 0, -0.5], [-1, -1, 1.5]]]
    torch.testing.assert_close(demos.features(), torch.tensor(expected), atol=1e-6, rtol=0)
    assert demos.feature_dim == 3


def test_nothing_is_drawn_and_the_pose_is_encoded(demos):
    class Env:
        def qpos(self):
            return ThreePoses.poses[1]
    frame = PoseBesideFrame(Env(), demos).render(64)
    assert not frame.any()
    torch.testing.assert_close(demos.encode(frame), demos.features()[0, 1])


def test_guides_that_show_less():
    shown, i, steps = torch.randn(2, 9, 3), torch.tensor([1, 0]), torch.tensor([2, 5])
    end, none = (guide(shown).targets(i, steps) for guide in (EndGuide, NoGuide))
    assert end.shape == none.shape == (2, len(LOOKAHEAD) + 1, 3)
    assert (end == shown[i, -1][:, None]).all() and (none == shown[i, steps][:, None]).all()
    history = torch.randn(2, 3, 3)
    assert (NoGuide(shown).shown(i, history) == history[:, :1]).all()
    assert not (Guide(shown).shown(i, history) == history[:, :1]).any()


def test_without_a_demonstration_cloning_shows_no_targets_either(monkeypatch):
    for module, name, stand_in in oracles.ORACLES['none']:
        monkeypatch.setattr(module, name, stand_in)
    layout, seen, demos = Layout(2, 1), [], torch.randn(3, 9, 2)
    cloning = ac_agent.Cloning(layout, ac_agent.Guide(demos))
    inverse = SimpleNamespace(label=lambda demos, i, steps, num: torch.zeros(len(i), num, 1))
    cloning.loss(lambda obs: seen.append(obs) or obs[:, :1], inverse, 50)
    targets = seen[0][:, HISTORY * 2:layout.num_seen]
    assert targets.numel() and not targets.any()


def test_a_discriminator_without_targets_rewards_all_targets_alike():
    layout, guide = Layout(2, 1), Guide(torch.randn(3, 6, 2))
    discriminator = UnconditionedDiscriminator(layout, guide, 8, 1e-3, torch.device('cpu'))
    history, actions = torch.randn(1, 3, 2), torch.zeros(1, NUM_ACTIONS, 1)
    obs = [layout.join(history, targets, actions) for targets in torch.randn(2, 1, 7, 2)]
    moved = layout.join(history + torch.tensor([[[1.0], [0.0], [0.0]]]), torch.randn(1, 7, 2),
                        actions)
    one, other, third = (discriminator.reward(x) for x in (*obs, moved))
    assert one == other != third


def test_an_oracle_of_the_pose_learns_resumes_and_is_taken_for_no_imitator(tmp_path, monkeypatch):
    save_expert(tmp_path / 'experts/reacher_hard.pt', 'reacher_hard')
    monkeypatch.setattr(oracles, 'ROOT', tmp_path)
    (tmp_path / 'cfgs').symlink_to(CFGS)
    monkeypatch.setattr(train_ac, 'Workspace', functools.partial(oracles.marked_workspace, 'pose'))
    cfg = settings('train_ac', 'device=cpu', 'use_tb=false', 'save_video=false', 'num_demos=2',
                   'num_play=2', 'num_eval_demos=2', 'num_train_frames=200', 'hidden_dim=16',
                   'batch_size=8', 'num_eval_episodes=2', 'num_pretrain_updates=2')
    monkeypatch.setattr(dmc.SuiteEpisodes, 'camera', None)  # nothing is drawn
    workspace = oracles.make_pose_workspace(cfg, tmp_path / 'run')
    workspace.run(100)
    workspace.save_snapshot()
    assert oracles.make_pose_workspace(cfg, tmp_path / 'run').global_step == 50
    with pytest.raises(UserError, match='was trained by an oracle, which sees what an imitator'):
        ac_agent.load_imitator(tmp_path / 'run/snapshot.pt', 'ct.pt', 'videos', 'reacher_hard')


def test_usage_is_told(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['oracles.py', 'pse'])
    with pytest.raises(UserError, match='usage: .*pose,end,none,unconditioned'):
        oracles.main()
