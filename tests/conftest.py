import gc
import signal

import pytest

import dmc  # noqa: F401  before anything that imports mujoco: it chooses the OpenGL backend
import utils

gc.freeze()  # garbage collections, of which tests make many, need not look through the modules

# A shell ignores SIGINT for what it starts in the background, and so would the scripts under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def precision():
    """Reset the process-wide precision after each test."""
    yield
    utils.set_precision('fp32')
