"""Runs of the smoke experiment."""

import json

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides


def build(workdir, cache, *overrides):
    fixed = [f"workdir={workdir}", f"data.cache_dir={cache}"]
    config = apply_overrides(load_config("configs/tiny.py:smoke"), [*fixed, *overrides])
    return build_config(config)


def records(experiment):
    with open(f"{experiment.workdir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]
