"""Held-out loss and bits per byte of a run's newest valid checkpoint, by its own config."""

from __future__ import annotations

import argparse

from moejax.commands import arguments

EXAMPLE = "moejax evaluate runs/tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from moejax.train import processes

    with processes.joined():
        step, values = _evaluate(args)
        if processes.is_first():
            print(f"step {step}")
            for name, value in values.items():
                print(f"  {name.removeprefix('eval/'):20} {value:.5f}")
    return 0


def _evaluate(args: argparse.Namespace) -> tuple[int, dict[str, float]]:
    import jax

    from moejax.train.evaluate import Evaluator
    from moejax.train.loop import prepare_data

    loaded = arguments.load_run(args)
    data = prepare_data(loaded.experiment)
    with jax.set_mesh(loaded.mesh):
        evaluator = Evaluator(loaded.model, loaded.experiment.objective, data, loaded.mesh)
        return loaded.step, evaluator.run(loaded.variables)
