"""One file per architecture, named as the `model_type` of its config.json. No registration."""
