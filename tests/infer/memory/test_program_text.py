"""What is read of a compiled program's text, where every way of writing it down is met."""

import pytest

from tests.support.program_text import collectives, kinds

# Shortened from what XLA:TPU and XLA:CPU write.
TEXT = """\
HloModule jit_step, is_scheduled=true
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%async_collective_fusion.1 (p: bf16[8,1]) -> bf16[8,2] {
  %gather.1 = bf16[8,2]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a'}
}
%async_collective_fusion.2 (p: bf16[8,1]) -> bf16[8,2] {
  %gather.2 = bf16[8,2]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'a'}
}
%inner (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %two = (f32[4]{0}, bf16[2]{0}) all-reduce(%a, %b), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %one = bf16[8,2] fusion(%c), kind=kCustom, calls=%async_collective_fusion.1, metadata={op_name="f"}
  %end = bf16[8,2] fusion(%c), kind=kCustom, calls=%async_collective_fusion.2
}
%fewer (s: (s32[], f32[4])) -> pred[] {
  %count = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i, %count), direction=LT
}
%outer (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %loop = (s32[], f32[4]) while(%t), condition=%fewer, body=%inner
  %sum = f32[3]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}
%more (s: (s32[], f32[4])) -> pred[] {
  ROOT %lt = pred[] fusion(%i), calls=%compared
}
%compared (i: s32[]) -> pred[] {
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]) while(%t), condition=%more, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%p), channel_id=3, replica_groups=mesh['a'=8], device_ids=([2,4]T(1,0)) {'a'}
  %done = f32[32]{0} all-gather-done(%start)
  %loop.2 = (s32[], f32[4]) while(%t), condition=%more, body=%unknown
}
%unknown (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %sent = s8[16]{0} collective-permute(%x), channel_id=5, source_target_pairs={{0,1},{1,0}}
}
"""  # noqa: E501


def test_what_talks_how_often_and_how_much():
    found = {one.kind + str(one.elements): one for one in collectives(TEXT)}
    assert {name: (one.size, one.group, one.looped, one.times) for name, one in found.items()} == {
        "all-gather32": (128, 8, False, 1),  # without the operand that its start lists
        "collective-permute16": (16, 1, True, 1),  # nothing says how often
        "all-reduce3": (12, 2, True, 3),
        "all-reduce4": (16 + 4, 4, True, 3 * 28),  # all of a tuple
        "all-gather16": (32, 2, True, 3 * 28),  # two steps of one channel
    }
    assert found["all-reduce4"].sent == 2 * 3 / 4 * 20 * 84
    assert found["all-gather16"].sent == pytest.approx(1 / 2 * 32 * 84)
    assert found["collective-permute16"].sent == 16
    assert kinds(list(found.values()), False) == {"all-gather": 1}
    assert kinds(list(found.values()), True) == {
        "all-gather": 1,
        "all-reduce": 2,
        "collective-permute": 1,
    }
