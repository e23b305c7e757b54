"""Checkpoints of other tools, in and out: `hf.load`, `hf.save` and `hf.model_config`."""
