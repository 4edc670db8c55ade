"""A model that the tests of the command share."""

import pytest
from swirl_agents.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model folder of a few thousand random weights, which now and then writes a legal action: some are single tokens."""
    folder = tmp_path_factory.mktemp("model")
    legal = [f"<calculator>{i}+{j}</calculator>" for i in range(2, 40) for j in range(2, 12)]
    tokenizer = tiny_tokenizer(" ".join([*legal, *(f"<answer>{i}</answer>" for i in range(100))]))
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
