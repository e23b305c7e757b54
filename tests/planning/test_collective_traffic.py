"""What collectives themselves read from and write to main memory, in every spelling of XLA's."""

import pytest

from moejax.planning.work import work_of
from tests.planning.test_hlo import ADD, GROUPS, SIZES, program

PART = 8 * 16 * 4  # of the parameter; four of them are gathered
START_AND_DONE = (
    "  %g = (f32[8,16]{{1,0}}, f32[32,16]{{1,0}}) all-gather-start(%p), {groups}\n"
    "  ROOT %d = f32[32,16]{{1,0}} all-gather-done(%g)"
)
SUM = (
    "  %g = f32[8,16]{{1,0}} all-reduce-start(%p), {groups}, to_apply=%add\n"
    "  ROOT %d = f32[8,16]{{1,0}} all-reduce-done(%g)"
)
SUM_NAMING_BOTH = (
    "  %g = ((f32[8,16]{{1,0}}), f32[8,16]{{1,0}}) all-reduce-start(%p), {groups}, to_apply=%add\n"
    "  ROOT %d = f32[8,16]{{1,0}} all-reduce-done(%g)"
)
PERMUTE = (
    "  %c = (f32[8,16]{{1,0}}, f32[8,16]{{1,0}}, u32[], u32[]) collective-permute-start(%p), "
    "source_target_pairs={{{{0,1}}}}\n"
    "  ROOT %d = f32[8,16]{{1,0}} collective-permute-done(%c)"
)
ASYNC = (
    "  %s = ((f32[8,16]{{1,0}}), f32[2,16]{{1,0}}, u32[]) async-start(%p), calls=%inside\n"
    "  ROOT %d = f32[2,16]{{1,0}} async-done(%s), calls=%inside"
)
FUSED = "  ROOT %f = f32[2,16]{{1,0}} fusion(%p), kind=kCustom, calls=%scatter"
RAGGED = (
    "  %to = f32[64,16]{{1,0}} custom-call()\n  %n = s32[4]{{0}} custom-call()\n"
    "  ROOT %r = f32[64,16]{{1,0}} ragged-all-to-all(%p, %to, %n, %n, %n, %n), {groups}"
)
SENT = (
    "  %t = token[] after-all()\n"
    "  %s = (f32[8,16]{{1,0}}, u32[], token[]) send(%p, %t), channel_id=2, "
    'is_host_transfer=true, frontend_attributes={{_xla_megascale_transfer_type="ALL_REDUCE"}}\n'
    "  ROOT %d = token[] send-done(%s), channel_id=2"
)
INSIDE = f"""%inside (q: f32[8,16]) -> f32[2,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  ROOT %r = f32[2,16]{{1,0}} reduce-scatter(%q), {GROUPS}, to_apply=%add
}}"""
SCATTER = f"""%scatter (q: f32[8,16]) -> f32[2,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %all = f32[8,16]{{1,0}} all-reduce(%q), {GROUPS}, to_apply=%add
  ROOT %part = f32[2,16]{{1,0}} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={{2,16}}
}}"""


@pytest.mark.parametrize(
    ("lines", "moved"),
    [
        ("  ROOT %g = f32[32,16]{{1,0}} all-gather(%p), {groups}", 5 * PART),
        (START_AND_DONE, 5 * PART),
        (SUM, 2 * PART),
        (SUM_NAMING_BOTH, 2 * PART),
        (PERMUTE, 2 * PART),
        (ASYNC, PART + PART / 4),
        (FUSED, PART + PART / 4),
        ("  ROOT %g = f32[32,16]{{1,0:S(1)}} all-gather(%p), {groups}", PART),
        (SENT, 2 * PART),
    ],
    ids=["sync", "start", "sum", "sum, both", "permute", "async", "fused", "on chip", "slices"],
)
def test_each_reads_what_it_sends_and_writes_what_it_returns(lines, moved):
    module = program(lines.format(groups=GROUPS), ADD, INSIDE, SCATTER)
    work = work_of(module, SIZES)
    assert sum(work.exchanges.values()) == 1
    assert work.traffic == moved


def test_a_buffer_that_rows_are_written_to_is_not_read():
    module = program(RAGGED.format(groups=GROUPS))
    buffers = 64 * 16 * 4 + 4 * 4  # what the two custom calls write
    assert work_of(module, SIZES).traffic == buffers + PART + 64 * 16 * 4
