"""The bytes of a program are those that it touches, as often as it does."""

import pytest

from benchmarks.traffic import traffic

# Three layers of a cache: a row is written in place and read in a fusion, in each turn of a loop.
TEXT = """HloModule step, is_scheduled=true

%fused_write (a: bf16[3,8,16], b: bf16[1,1,16], c: s32[]) -> bf16[3,8,16] {
  %a = bf16[3,8,16]{2,1,0} parameter(0)
  %b = bf16[1,1,16]{2,1,0} parameter(1)
  %c = s32[] parameter(2)
  ROOT %written = bf16[3,8,16]{2,1,0} dynamic-update-slice(%a, %b, %c, %c, %c)
}

%laid_out (o: bf16[3,8,16]) -> bf16[3,8,16] {
  %o = bf16[3,8,16]{2,1,0} parameter(0)
  ROOT %other = bf16[3,8,16]{1,2,0} copy(%o)
}

%inner (d: bf16[3,8,16], e: s32[]) -> bf16[8,16] {
  %d = bf16[3,8,16]{2,1,0} parameter(0)
  %e = s32[] parameter(1)
  %same = bf16[3,8,16]{1,2,0} fusion(%d), kind=kLoop, calls=%laid_out
  %layer = bf16[1,8,16]{2,1,0} dynamic-slice(%same, %e, %e, %e), dynamic_slice_sizes={1,8,16}
  ROOT %flat = bf16[8,16]{1,0} bitcast(%layer)
}

%fused_read (f: bf16[3,8,16], g: s32[], h: f32[16]) -> (f32[8], f32[16]) {
  %f = bf16[3,8,16]{2,1,0} parameter(0)
  %g = s32[] parameter(1)
  %h = f32[16]{0} parameter(2)
  %slice = bf16[8,16]{1,0} fusion(%f, %g), kind=kLoop, calls=%inner
  %float = f32[8,16]{1,0} convert(%slice)
  %product = f32[8]{0} dot(%float, %h), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %twice = f32[16]{0} add(%h, %h)
  ROOT %both = (f32[8]{0}, f32[16]{0}) tuple(%product, %twice)
}

%body (carry: (s32[], bf16[3,8,16], f32[16])) -> (s32[], bf16[3,8,16], f32[16]) {
  %carry = (s32[], bf16[3,8,16]{2,1,0}, f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %cache = bf16[3,8,16]{2,1,0} get-tuple-element(%carry), index=1
  %x = f32[16]{0} get-tuple-element(%carry), index=2
  %new = bf16[1,1,16]{2,1,0:T(8,128)(2,1)S(1)} copy(%x)
  %cached = bf16[3,8,16]{2,1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%fused_write
  %pair = (f32[8]{0:T(128)S(1)}, f32[16]{0}) fusion(%cached, %i, %x), kind=kCustom, calls=%fused_read
  %y = f32[16]{0} get-tuple-element(%pair), index=1
  ROOT %out = (s32[], bf16[3,8,16]{2,1,0}, f32[16]{0}) tuple(%i, %cached, %y)
}

%condition (carry.1: (s32[], bf16[3,8,16], f32[16])) -> pred[] {
  %carry.1 = (s32[], bf16[3,8,16]{2,1,0}, f32[16]{0}) parameter(0)
  %j = s32[] get-tuple-element(%carry.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (p: (s32[], bf16[3,8,16], f32[16]), w: s8[64,16]) -> f32[64] {
  %p = (s32[], bf16[3,8,16]{2,1,0}, f32[16]{0}) parameter(0)
  %w = s8[64,16]{1,0} parameter(1)
  %loop = (s32[], bf16[3,8,16]{2,1,0}, /*index=2*/f32[16]{0}) while(%p), condition=%condition, body=%body
  %z = f32[16]{0} get-tuple-element(%loop), index=2
  %start = (s8[64,16]{1,0:S(1)}, s8[64,16]{1,0}, u32[]) copy-start(%w)
  %done = s8[64,16]{1,0:S(1)} copy-done(%start)
  ROOT %r = (f32[64]{0}, s8[4096]{0}) custom-call(%done, %z), custom_call_target="__cublas$gemm"
}
"""  # noqa: E501


def test_what_is_touched_counts():
    found = {one.name: (one.read, one.written, one.times) for one in traffic(TEXT)}
    scalar = 4
    assert found == {
        "new": (3 * 64, 0, 3),  # a copy to the chip
        "cached": (3 * scalar, 3 * 32, 3),  # one row, not the cache
        "pair": (3 * (8 * 16 * 2 + scalar + 64), 3 * 64, 3),  # one layer; x once
        "done": (64 * 16, 0, 1),
        "r": (64, 64 * 4, 1),  # without its room to work in
    }


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="how often the loop loop runs"):
        traffic(TEXT.replace("%three = s32[] constant(3)", "%three = s32[] copy(%j)"))
