"""Collectives are found in a program's text with their bytes, their groups and how often they
run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmark.collectives import collectives_of
from conlens_jax.config import MeshConfig
from conlens_jax.parallel.mesh import make_mesh

HLO = """
HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %g = bf16[64,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %r = f32[16]{0} reduce-scatter(%x), replica_groups={{0,2},{1,3}}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %a = (f32[4]{0}, f32[6]{0}) all-reduce(%p, %p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}
  %alone = f32[4]{0} all-reduce(%p), replica_groups=[8,1]<=[8], to_apply=%add
  %m = f32[3]{0} all-reduce(%p), replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
  %q = f32[5]{0} all-to-all(%p), replica_groups=mesh['x'=2,'y'=4] {'x','y':(2)2}, dimensions={0}
  %o = f32[9]{0} all-to-all(%p), replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}
  ROOT %c = f32[10]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_bytes_groups_and_times_by_hand():
    everything = collectives_of(HLO)
    found = {each.kind + str(each.times): each for each in reversed(everything)}
    gather = found["all-gather5"]
    assert gather.group == (0, 1, 2, 3) and gather.n_bytes == 64 * 4 * 2 * 3 / 4
    assert gather.total_bytes == 5 * gather.n_bytes
    scatter = found["reduce-scatter5"]
    assert scatter.group == (0, 2) and scatter.n_bytes == 64
    reduced = found["all-reduce1"]
    assert reduced.group == (0, 2, 4, 6) and reduced.n_bytes == 2 * 40 * 3 / 4
    assert found["all-gather1"].n_bytes == 32 * 7 / 8
    assert found["collective-permute1"].n_bytes == 40
    assert [each.group for each in everything if each.n_bytes == 12] == [(0, 4)]
    assert found["all-to-all1"].group == (0, 1, 4, 5)
    # Mesh [[0, 2, 4, 6], [1, 3, 5, 7]].
    assert [each.group for each in everything if each.n_bytes == 18] == [(0, 1)]
    assert len(everything) == 8
    with pytest.raises(ValueError, match="cannot read the groups of devices"):
        collectives_of(HLO.replace("replica_groups={{0,2},{1,3}}", "replica_groups=somehow"))


@pytest.mark.parametrize("fsdp", [2, 8])
def test_a_scan_over_split_layers_gathers_each_of_them(fsdp):
    """Weights [N, D, D] split over fsdp, rows too: each of the 6 layers is gathered once, and what
    a device sends is its share of the layer for all others."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp), jax.devices()[:fsdp])
    lying = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    weights, x = lying((6, 16, 16), P(None, "fsdp")), lying((8, 16), P("fsdp"))

    def run(weights, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(layer, x, weights)[0]

    found = collectives_of(jax.jit(run).lower(weights, x).compile().as_text())
    gathered = [each for each in found if each.kind == "all-gather"]
    assert sum(each.total_bytes for each in gathered) == 6 * 16 * 16 * 4 * (fsdp - 1) / fsdp
    assert {each.group for each in gathered} == {tuple(range(fsdp))}
