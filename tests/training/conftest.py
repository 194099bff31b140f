"""A small model with weights that were not trained, and graphs to try it on."""

import numpy as np
import pytest

from coconut_serve.training.task import Graphs, sample


@pytest.fixture
def graphs() -> Graphs:
    return sample(np.random.default_rng(11), 3, 6, "train")
