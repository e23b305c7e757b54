"""Small programs in XLA's text: every spelling of groups, both kinds of loops, both of calls."""

import collections

import numpy as np
import pytest

from moejax.planning import hlo, replica_groups
from moejax.planning.work import SLICE, Exchange, work_of

SIZES = {"data": 2, "expert": 4}


def program(body: str, *computations: str) -> hlo.Module:
    others = "\n\n".join(computations)
    return hlo.read(
        f"HloModule jit_step, is_scheduled=true\n\n{others}\n\n"
        f"ENTRY %main (p: f32[8,16]) -> f32[8,16] {{\n  %p = f32[8,16]{{1,0}} parameter(0)\n"
        f"{body}\n}}\n"
    )


ADD = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}"""


def exchanges(module) -> dict[Exchange, int]:
    return dict(work_of(module, SIZES).exchanges)


@pytest.mark.parametrize(
    ("spelling", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("expert",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{}", ("data", "expert"), 8),
        ("[2,4]<=[8]", ("expert",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "expert"), 8),
        ("mesh['data'=2,'expert'=4] {'expert'}", ("expert",), 4),
        ("mesh['data'=2,'expert'=4] {'expert','data'}", ("data", "expert"), 8),
        ("mesh['axis_0'=8] {'axis_0'}", ("data", "expert"), 8),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",), 2),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}", ("expert",), 4),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
        ("{{0,1},{2,3},{4,5},{6,7}}", ("expert",), 2),  # half of an axis
    ],
)
def test_every_spelling_of_groups(spelling, axes, size):
    module = program(
        f"  ROOT %r = f32[8,16]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={spelling}, "
        "use_global_device_ids=true, to_apply=%add",
        ADD,
    )
    assert exchanges(module) == {Exchange("all-reduce", axes, size, 8 * 16 * 4): 1}


def test_a_range_and_lists_say_the_same():
    ranged = replica_groups.groups("replica_groups=[4,2]<=[2,2,2]T(0,2,1), x", 8)
    np.testing.assert_array_equal(ranged, [[0, 2], [1, 3], [4, 6], [5, 7]])


BAD = "replica_groups=mesh['a'=4], device_ids=(x) {'a'}"


@pytest.mark.parametrize(
    "text", ["replica_groups=@table", "", "replica_groups=mesh['a'=4] {'b'}", BAD]
)
def test_another_spelling_is_an_error(text):
    with pytest.raises(ValueError, match=r"no replica groups|cannot be read"):
        replica_groups.groups(text, 8)


def test_pairs_of_a_permutation():
    module = program(
        "  ROOT %r = f32[8,16]{1,0} collective-permute(%p), "
        "source_target_pairs={{0,1},{1,0},{4,5},{5,4}}"
    )
    assert exchanges(module) == {Exchange("collective-permute", ("expert",), 2, 512): 1}


def test_what_slices_send_each_other_goes_through_the_hosts():
    """And the groups of the other collectives are those of one slice."""
    module = program(
        "  %t = token[] after-all()\n"
        "  %s = (f32[8,16]{1,0}, u32[], token[]) send(%p, %t), channel_id=2, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %d = token[] send-done(%s), channel_id=2, is_host_transfer=true\n"
        "  %r = (f32[8,16]{1,0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  ROOT %x = f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add",
        ADD,
    )
    assert dict(work_of(module, SIZES, num_slices=2).exchanges) == {
        Exchange("all-reduce", (SLICE,), 2, 512): 1,
        Exchange("all-reduce", ("expert",), 4, 512): 1,
    }


GROUPS = "replica_groups=[2,4]<=[8], dimensions={0}"


@pytest.mark.parametrize(
    ("lines", "kind", "num_bytes"),
    [
        (f"  ROOT %g = f32[32,16]{{1,0}} all-gather(%p), {GROUPS}", "all-gather", 2048),
        (
            f"  %g = (f32[8,16]{{1,0}}, f32[32,16]{{1,0}}) all-gather-start(%p), {GROUPS}\n"
            "  ROOT %d = f32[32,16]{1,0} all-gather-done(%g)",
            "all-gather",
            2048,
        ),
        (
            f"  %g = f32[8,16]{{1,0}} all-reduce-start(%p), {GROUPS}, to_apply=%add\n"
            "  ROOT %d = f32[8,16]{1,0} all-reduce-done(%g)",
            "all-reduce",
            512,
        ),
        (f"  ROOT %s = f32[2,16]{{1,0}} reduce-scatter(%p), {GROUPS}", "reduce-scatter", 512),
        (
            "  %c = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[], u32[]) collective-permute-start(%p), "
            "source_target_pairs={{0,1}}\n  ROOT %d = f32[8,16]{1,0} collective-permute-done(%c)",
            "collective-permute",
            512,
        ),
        (
            "  %s = ((f32[8,16]{1,0}), f32[2,16]{1,0}, u32[]) async-start(%p), calls=%inside\n"
            "  %u = ((f32[8,16]{1,0}), f32[2,16]{1,0}, u32[]) async-update(%s), calls=%inside\n"
            "  ROOT %d = f32[2,16]{1,0} async-done(%u), calls=%inside",
            "reduce-scatter",
            512,
        ),
    ],
    ids=["sync", "start and done", "sum", "scatter", "permute", "async"],
)
def test_a_call_counts_once_with_its_whole_array(lines, kind, num_bytes):
    inside = f"""%inside (q: f32[8,16]) -> f32[2,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  ROOT %r = f32[2,16]{{1,0}} reduce-scatter(%q), {GROUPS}, to_apply=%add
}}"""
    found = exchanges(program(lines, ADD, inside))
    assert [(e.kind, e.num_bytes, n) for e, n in found.items()] == [(kind, num_bytes, 1)]


def test_a_sum_of_which_each_takes_its_part_is_a_scatter():
    """As TPUs write it: one fusion."""
    scatter = f"""%all-reduce-scatter (q: f32[8,16]) -> f32[2,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %all = f32[8,16]{{1,0}} all-reduce(%q), {GROUPS}, to_apply=%add
  ROOT %part = f32[2,16]{{1,0}} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={{2,16}}
}}"""
    module = program(
        "  ROOT %f = f32[2,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter",
        ADD,
        scatter,
    )
    assert exchanges(module) == {Exchange("reduce-scatter", ("expert",), 4, 512): 1}


BODY = f"""%body (t: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {{
  %t = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,16]{{1,0}} get-tuple-element(%t), index=1
  %one = s32[] constant(2)
  %next = s32[] add(%i, %one)
  %r = f32[8,16]{{1,0}} all-reduce(%x), {GROUPS}, to_apply=%add
  ROOT %out = (s32[], f32[8,16]{{1,0}}) tuple(%next, %r)
}}"""


def condition(bound: str) -> str:
    return f"""%condition (t: (s32[], f32[8,16])) -> pred[] {{
  %t = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] {bound}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}"""


def looped(first: str, noted: str = "") -> str:
    return (
        f"  %first = s32[] {first}\n"
        "  %start = (s32[], f32[8,16]{1,0}) tuple(%first, %p)\n"
        "  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body"
        f"{noted}\n  ROOT %r = f32[8,16]{{1,0}} get-tuple-element(%loop), index=1"
    )


@pytest.mark.parametrize(
    ("first", "bound", "noted", "count"),
    [
        ("constant(0)", "constant(10)", "", 5),  # in steps of two
        ("constant(4)", "constant(9)", "", 3),
        ("constant(7)", "constant(7)", "", 0),
        ("constant(0)", "constant(9)", ', backend_config={"known_trip_count":{"n":"7"}}', 7),
    ],
)
def test_a_loop_multiplies(first, bound, noted, count):
    work = work_of(program(looped(first, noted), ADD, BODY, condition(bound)), SIZES)
    assert sum(work.exchanges.values()) == count
    assert work.open_loops == 0


@pytest.mark.parametrize(
    ("first", "bound"),
    [("constant(0)", "get-tuple-element(%t), index=0"), ("custom-call()", "constant(3)")],
    ids=["bound", "start"],
)
def test_a_loop_whose_length_depends_on_values_counts_once_and_says_so(first, bound):
    work = work_of(program(looped(first), ADD, BODY, condition(bound)), SIZES)
    assert sum(work.exchanges.values()) == 1
    assert (work.open_loops, work.open_exchanges) == (1, 1)


def test_the_branch_without_collectives_in_loops_counts():
    rounds = f"""%rounds (q: f32[8,16]) -> f32[8,16] {{
  %p = f32[8,16]{{1,0}} parameter(0)
{looped("constant(0)")}
}}"""
    once = f"""%once (q: f32[8,16]) -> f32[8,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  %r = f32[8,16]{{1,0}} all-reduce(%q), {GROUPS}, to_apply=%add
  ROOT %s = f32[8,16]{{1,0}} all-reduce(%r), {GROUPS}, to_apply=%add
}}"""
    body = (
        "  %which = s32[] constant(1)\n  ROOT %c = f32[8,16]{1,0} conditional(%which, %p, %p), "
        "branch_computations={%rounds, %once}"
    )
    module = program(body, ADD, BODY, condition("constant(2)"), rounds, once)
    assert sum(work_of(module, SIZES).exchanges.values()) == 2


def test_products_over_a_batch_count_without_the_gaps_of_their_window():
    """A TPU writes 8 products of [4, 5] and [5, 3] as one convolution over the 8."""
    module = program(
        "  %a = f32[8,4,5]{2,1,0} custom-call()\n  %b = f32[8,5,3]{2,1,0} custom-call()\n"
        "  ROOT %c = f32[8,4,3]{2,1,0} convolution(%a, %b), "
        "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
    )
    assert work_of(module, SIZES).flops == 2 * 8 * 4 * 5 * 3


def test_a_slice_moves_its_own_bytes():
    """Also inside a fusion, and an update in place moves the update."""
    fused = """%fused (s: f32[100,16], i: s32[]) -> f32[1,16] {
  %s = f32[100,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,16]{1,0} dynamic-slice(%s, %i, %zero), dynamic_slice_sizes={1,16}
  ROOT %twice = f32[1,16]{1,0} add(%cut, %cut)
}"""
    module = program(
        "  %stack = f32[100,16]{1,0} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  %f = f32[1,16]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused\n"
        "  ROOT %u = f32[100,16]{1,0} dynamic-update-slice(%stack, %f, %i, %i)",
        fused,
    )
    assert work_of(module, SIZES).traffic == (64 + 4 + 64) + 2 * 64


def test_what_lies_on_the_chip_moves_nothing():
    module = program(
        "  %v = f32[8,16]{1,0:T(8,128)S(1)} negate(%p)\n"
        "  ROOT %r = f32[8,16]{1,0:T(8,128)S(1)} negate(%v)"
    )
    assert work_of(module, SIZES).traffic == 512


def test_kernels_are_counted_by_name():
    module = program('  ROOT %k = f32[8,16]{1,0} custom-call(%p), custom_call_target="grouped"')
    assert work_of(module, SIZES).kernels == collections.Counter(grouped=1)


def test_shapes():
    tupled = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s32[], f8e4m3fn[4], pred[7], u4[3])"
    assert [a.num_bytes for a in hlo.arrays(tupled)] == [12, 4, 4, 7, 2]
    assert [a.memory for a in hlo.arrays(tupled)] == [1, 0, 0, 0, 0]


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("module @jit_step {\n}")
