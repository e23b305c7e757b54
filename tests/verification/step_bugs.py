"""Bugs of microbatches, rematerialisation, scans and padding."""

from tests.verification.planting import Mutation

STEP = (
    Mutation(
        name="mean-of-means",
        story="with microbatches the loss is the mean of their means",
        file="train/step.py",
        old="counts = jax.lax.stop_gradient(own if counts is None else counts)",
        new="means = {name: num_microbatches * count for name, count in own.items()}\n"
        "        counts = jax.lax.stop_gradient(own if counts is None else means)",
        variant="2 microbatches",
        caught="loss",
    ),
    Mutation(
        name="last-microbatch-only",
        story="each microbatch's gradient replaces the one before it",
        file="train/step.py",
        old="add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)",
        new="def add(total, part):\n"
        "            value, gradient, result = one(part)\n"
        "            result = jax.tree.map(jnp.add, total[2], result)\n"
        "            return (total[0] + value, gradient, result), None\n",
        variant="2 microbatches",
        caught="gradient embed/embedding",
    ),
    Mutation(
        name="state-per-microbatch",
        story="the bias of loss-free balancing moves once per microbatch, not once per step",
        file="train/step.py",
        old="advance(state.router_state, result.stats)",
        new="functools.reduce(\n"
        "                lambda old, _: advance(old, result.stats),\n"
        "                range(num_microbatches),\n"
        "                state.router_state,\n"
        "            )",
        variant="2 microbatches",
        config="configs/loss_free.py:smoke",
        caught="router_state layers_0/ffn/balance_0_correction_bias",
    ),
    Mutation(
        name="counts-doubled-by-remat",
        story="statistics count the forward pass and its recomputation",
        file="models/stack.py",
        old="            if new_stats:\n",
        new="            if new_stats and remat != 'none':\n"
        "                new_stats = new_stats | {'load': 2 * new_stats['load']}\n"
        "            if new_stats:\n",
        variant="remat full",
        caught="statistics layers_0/load",
    ),
    Mutation(
        name="aux-lost-in-scan",
        story="the scan over layers returns the last layer's balance loss instead of the sum",
        file="models/stack.py",
        old="_over_layers(segment, told)\n        stats",
        new="_over_layers(segment, told if unroll > 1 else jax.tree.map(lambda t: t[-1:], told))\n"
        "        stats",
        variant="unrolled layers",
        caught="loss",
    ),
    Mutation(
        name="padding-in-load",
        story="padding is routed, and counts in the load of experts",
        file="models/moe.py",
        old="        routing = without_padding(routing, context.token_mask.reshape(-1))\n",
        new="",
        variant="padding",
        caught="loss",
    ),
    Mutation(
        name="padding-in-z-loss",
        story="the mean of the router's z-loss divides by all positions, padding included",
        file="balance/z_loss.py",
        old="mask.sum().astype(square.dtype)",
        new="jnp.asarray(mask.size, square.dtype)",
        variant="padding",
        caught="loss",
    ),
    Mutation(
        name="padding-in-entropy",
        story="the router's entropy is summed over padding too",
        file="models/moe.py",
        old="probs=jnp.where(keep, routing.probs, 0),",
        new="probs=routing.probs,",
        variant="padding",
        caught="statistics layers_0/entropy",
    ),
    Mutation(
        name="padding-multiplied-away",
        story="padding is multiplied by zero where it should be selected: NaN stays NaN",
        file="models/block.py",
        old="jnp.where(context.token_mask[..., None], x, 0)",
        new="x * context.token_mask[..., None]",
        variant="padding",
        caught="gradient embed/embedding",
    ),
    Mutation(
        name="kernel-without-gate-gradient",
        story="the backward pass of expert_mlp gives routing weights no gradient",
        file="kernels/expert_mlp/__init__.py",
        old="return slots.sum_by_token(dx, x.dtype), dw, None, dweights",
        new="return slots.sum_by_token(dx, x.dtype), dw, None, jnp.zeros_like(dweights)",
        variant="experts by definition",
        caught="gradient embed/embedding",
    ),
    Mutation(
        name="attention-without-mean",
        story="the backward pass of attention forgets that its weights sum to one",
        file="kernels/full_attention/softmax.py",
        old="d_logits = weights * (d_weights - mean)",
        new="d_logits = weights * d_weights",
        variant="attention by definition",
        caught="gradient embed/embedding",
    ),
)
