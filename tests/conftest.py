"""One intra-op thread, float64 where a test asks for it, and a fixed seed before every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
