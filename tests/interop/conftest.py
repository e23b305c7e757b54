"""What the tests of config.json share."""

import json

import fiddle as fdl
import pytest

from moejax.interop import hf


@pytest.fixture
def config_of(tmp_path):
    """Writes a config.json of the values, `...` for one that is absent, and reads it."""

    def read(values: dict, **changes) -> fdl.Config:
        values = {k: v for k, v in (values | changes).items() if v is not ...}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return hf.model_config(tmp_path)

    return read
