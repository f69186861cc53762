import copy
import functools
import gc
import os
import signal

import pytest

# A shell ignores SIGINT for what it starts in the background, and so would the scripts under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes seconds to import is imported by the processes that run tests, and not by the one that
# hands tests out to them.


def pytest_collectstart():
    import dmc  # noqa: F401  before anything that imports mujoco: it chooses the OpenGL backend


def pytest_collection():
    gc.disable()


def pytest_collection_finish():
    gc.freeze()  # garbage collections, of which tests make many, need not look through the modules
    gc.enable()


@pytest.fixture(autouse=True, scope='session')
def each_model_is_compiled_once():
    """Compile once in each process, and hand out copies: hundreds of environments are made of some
    fifty models. No test here is about compiling, which is MuJoCo's."""
    from dmc import mujoco
    compiled = functools.cache(lambda xml, assets: compile_model(xml, dict(assets)))
    compile_model = mujoco.MjModel.from_xml_string
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mujoco.MjModel, 'from_xml_string', lambda xml, assets=None: copy.copy(
            compiled(xml, tuple((assets or {}).items()))))
        yield


@pytest.fixture(autouse=True, scope='session')
def no_power_cut():
    """Let files reach the disk when the system likes: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', lambda file: None)
        yield


@pytest.fixture(autouse=True)
def precision():
    """Reset the process-wide precision after each test."""
    import utils
    yield
    utils.set_precision('fp32')


@pytest.fixture
def linear_probe(monkeypatch):
    """Poses are read by a linear map, which is fitted within a second."""
    import torch

    import probe
    monkeypatch.setattr(probe, 'normed_mlp',
                        lambda size, _, out_dim: torch.nn.Linear(size, out_dim))
