from pathlib import Path

import pytest
from omegaconf import OmegaConf

import dmc  # noqa: F401  before anything that imports mujoco: it chooses the OpenGL backend


@pytest.fixture(scope='session')
def scenery():
    """The ranges that ship."""
    cfg = OmegaConf.load(Path(__file__).parent.parent / 'cfgs/base.yaml')
    return OmegaConf.to_container(cfg.scenery)
