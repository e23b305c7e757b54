"""Bugs of what moves tokens and weights between devices."""

from tests.verification.planting import Mutation

TRANSPORTS = (
    Mutation(
        name="cotangents-times-devices",
        story="what comes back through the exchange is scaled by the number of devices",
        file="parallel/exchange/__init__.py",
        old="travel = [c for c in cotangents if c.dtype != jax.dtypes.float0]",
        new="travel = [\n"
        "        c * lax.axis_size(axis) for c in cotangents if c.dtype != jax.dtypes.float0\n"
        "    ]",
        variant="all_to_all on expert=4",
        caught="gradient embed/embedding",
    ),
    Mutation(
        name="too-few-slots",
        story="slots per pair of devices for balanced traffic only: some rows overflow",
        file="parallel/exchange/two_hop.py",
        old="return min(num_rows, (2 * num_rows + num_devices * (num_devices - 1)) // "
        "(2 * num_devices))",
        new="return -(-num_rows // num_devices)",
        variant="all_to_all on expert=4",
        caught="loss",
    ),
    Mutation(
        name="capacity-without-count",
        story="rows beyond a device's capacity are dropped, and the counter does not see it",
        file="transport/all_to_all.py",
        old="trip = journey(by_expert, split, places, me, num_rows=num_rows)",
        new="trip = journey(by_expert, split, places, me, num_rows=experts.size)",
        variant="all_to_all on expert=4",
        caught="loss",
    ),
    Mutation(
        name="owner-by-remainder",
        story="expert e is looked for on device e mod P, and lies on device e // M",
        file="transport/all_to_all.py",
        old="owner = jnp.arange(num_experts) // num_owned",
        new="owner = jnp.arange(num_experts) % num_devices",
        variant="all_to_all on expert=2 tensor=2",
        caught="loss",
    ),
    Mutation(
        name="one-rank-frozen",
        story="the experts of the last device get no gradient",
        file="transport/all_to_all.py",
        old="        by_expert = sort_slots(experts, num_experts)  # and so by owner\n",
        new="        by_expert = sort_slots(experts, num_experts)  # and so by owner\n"
        "        frozen = lax.axis_index('expert') == num_devices - 1\n"
        "        weights = {\n"
        "            k: jnp.where(frozen, lax.stop_gradient(w), w) for k, w in weights.items()\n"
        "        }\n",
        variant="all_to_all on expert=4",
        caught="gradient layers_0/ffn/experts/down",
    ),
    Mutation(
        name="gate-twice",
        story="rows are weighted where they are computed, and again before they return",
        file="parallel/planned_rows.py",
        old="y = compute(rows, trip.local[:, None], scores[:, None], weights)",
        new="y = compute(rows, trip.local[:, None], scores[:, None], weights) * "
        "scores[:, None].astype(rows.dtype)",
        variant="all_to_all on expert=4",
        caught="loss",
    ),
    Mutation(
        name="gate-without-gradient",
        story="the routing weights travel as constants: the router learns from its losses alone",
        file="parallel/planned_rows.py",
        old="rows = (rows_of_tokens(x, trip.slots), trip.slots.to_rows(gate))",
        new="rows = (rows_of_tokens(x, trip.slots), "
        "trip.slots.to_rows(jax.lax.stop_gradient(gate)))",
        variant="all_to_all on expert=4",
        caught="gradient embed/embedding",
    ),
    Mutation(
        name="combined-in-bfloat16",
        story="results are added across devices in bfloat16, to save bandwidth",
        file="transport/all_gather.py",
        old='y = lax.psum_scatter(y.astype(at_least_f32(y.dtype)), "expert", tiled=True)',
        new='y = lax.psum_scatter(y.astype(jnp.bfloat16), "expert", tiled=True)',
        variant="all_gather on expert=4",
        caught="loss",
    ),
    Mutation(
        name="copies-overwrite",
        story="gradients of an expert's copies overwrite each other where they should be added",
        file="parallel/fetch.py",
        old='t.at[local].add(gradient.astype(t.dtype), mode="drop")',
        new='t.at[local].set(gradient.astype(t.dtype), mode="drop")',
        variant="least_loaded on expert=4",
        caught="gradient layers_0/ffn/experts/down",
    ),
    Mutation(
        name="foreign-gradient-lost",
        story="the gradient of a helped expert stays with the helper",
        file="parallel/fetch.py",
        old="    total = lax.cond(has_foreign, add, nothing, total, foreign, slots)\n",
        new="",
        variant="least_loaded on expert=4",
        caught="gradient layers_0/ffn/experts/down",
    ),
    Mutation(
        name="foreign-slots-mixed",
        story="rows of a helped expert meet the weights in another slot",
        file="parallel/planned_rows.py",
        old='return place.at[slots].set(in_slot, mode="drop")',
        new='return place.at[slots].set(in_slot[::-1], mode="drop")',
        variant="least_loaded on expert=2 tensor=2",
        caught="loss",
    ),
    Mutation(
        name="last-round-lost",
        story="where the rows need several rounds, the last one is not computed",
        file="parallel/rounds.py",
        old="return lax.fori_loop(0, num_rounds, add, compat.zeros(",
        new="return lax.fori_loop(0, num_rounds - 1, add, compat.zeros(",
        variant="least_loaded, in rounds on expert=4",
        caught="loss",
    ),
)
