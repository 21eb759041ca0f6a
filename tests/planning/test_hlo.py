"""Collectives read from a program's text."""

import pytest

from textgen_jax.planning import hlo

TEXT = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[], bf16[8,4]) parameter(0)
  %part = bf16[2,4]{1,0} get-tuple-element(%state), index=1
  %all-gather.1 = bf16[8,4]{1,0} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], bf16[8,4]) tuple(%i, %all-gather.1)
}

%unused (p: f32[4]) -> f32[4] {
  ROOT %all-reduce.9 = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main.1_spmd (p: f32[16], q: bf16[2,4]) -> f32[4] {
  %w = (s32[], bf16[8,4]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce.2 = (f32[16]{0}, f32[16]{0}) all-reduce(%p, %p), replica_groups={{0,1},{2,3}}, to_apply=%add
  %ags = (bf16[2,4]{1,0:T(8,128)}, bf16[8,4]{1,0:T(8,128)}) all-gather-start(%q), replica_groups=[2,4]<=[8], dimensions={0}
  %agd = bf16[8,4]{1,0} all-gather-done(%ags)
  ROOT %reduce-scatter.3 = f32[4]{0} reduce-scatter(%p), replica_groups={}, dimensions={0}, to_apply=%add
}
"""


def test_loops_are_counted_as_often_as_they_go_round():
  found = hlo.collectives(TEXT, 8)
  assert found == {
    'all-gather': (4, pytest.approx(4 * 8 * 4 * 2 * 3 / 4)),
    'all-reduce': (1, pytest.approx(2 * 2 * 16 * 4 / 2)),
    'reduce-scatter': (1, pytest.approx(4 * 4 * 7)),
  }


def test_a_program_for_one_device_has_none():
  assert hlo.collectives('ENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n', 1) == {}
