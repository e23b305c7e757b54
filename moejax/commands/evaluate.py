"""Held-out loss and bits per byte of a run's newest valid checkpoint, by its own config."""

from __future__ import annotations

import argparse

from moejax.commands import arguments

EXAMPLE = "moejax evaluate runs/tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    loaded = arguments.load_run(args)

    from moejax.train.evaluate import Evaluator

    data = loaded.experiment.prepare_data()
    evaluator = Evaluator(loaded.model, loaded.experiment.objective, data)
    print(f"step {loaded.step}")
    for name, value in evaluator.run(loaded.variables).items():
        print(f"  {name.removeprefix('eval/'):20} {value:.5f}")
    return 0
