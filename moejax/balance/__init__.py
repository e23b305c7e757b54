"""Load balancing: losses and loss-free rules, one idea per file.

A rule is a frozen dataclass with

    weight                                   factor on its loss term, if it has one
    state(num_experts) -> dict               what it remembers between steps (may be empty)
    selection_bias(state) -> [E] or None     added to the router's scores, for selection only
    terms(routing, context, state) -> Terms  (sum, count) pairs, unweighted
    update(state, stats) -> dict             the next state, from the whole step's statistics

Padding arrives as empty slots with probabilities and logits of 0, and must not be counted.

`update` runs once per optimiser step, outside the gradient, on statistics that were added over
every microbatch and device. `Rule` supplies the neutral version of each.
"""
