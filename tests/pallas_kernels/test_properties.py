"""What block-sparse attention promises, proved without a table of expected values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import IMPLEMENTATIONS, BlockSelection, block_sparse_attention, xla
from tests.pallas_kernels import cases, tolerance

SCALE = 0.25
CASE = cases.Case(
    "properties", B=2, T=53, S=53, H=4, G=2, token_mask=True, bias=True, empty=0.2
)
# `test_mosaic_gpu` and `test_triton_gpu` prove what can be proved without float32 operands,
# and without Triton.
every_implementation = pytest.mark.parametrize(
    "implementation", sorted(set(IMPLEMENTATIONS) - {"mosaic_gpu", "triton"})
)
# The Pallas kernels refuse mods that close over arrays.
every_implementation_with_closures = pytest.mark.parametrize(
    "implementation", ["reference", "xla"]
)


def _every_block(B, T, S, G, query_block=16, key_block=16):
    """A selection that lists every key block for every query block."""
    Q, N = -(-T // query_block), -(-S // key_block)
    block_id_BGQJ = jnp.broadcast_to(jnp.arange(N), (B, G, Q, N))
    count_BGQ = jnp.full((B, G, Q), N)
    return BlockSelection(block_id_BGQJ, count_BGQ, None, query_block, key_block)


@every_implementation
def test_all_blocks_selected_is_dense_attention(implementation):
    inputs = cases.make_inputs(CASE)
    out_BTHK, _ = block_sparse_attention(
        *inputs[:3],
        _every_block(CASE.B, CASE.T, CASE.S, CASE.G),
        scale=SCALE,
        implementation=implementation,
    )
    dense_BTHK = jax.nn.dot_product_attention(*inputs[:3], scale=SCALE, is_causal=True)
    tolerance.assert_close(
        out_BTHK, dense_BTHK, dtype="float32", length=CASE.S, name="out"
    )


def test_the_oracle_rounds_gradients_once():
    """Those of keys are sums over a group's heads, in float32 whatever dtype the keys have."""
    inputs = cases.make_inputs(cases.Case("group", T=40, S=40, H=16, G=1))
    arrays = [x.astype(jnp.bfloat16) for x in inputs[:3]]

    def gradients(dtype):
        def attend(*arrays):
            return block_sparse_attention(
                *arrays, inputs.selection, scale=SCALE, implementation="reference"
            )[0]

        out_BTHK, pull = jax.vjp(attend, *(x.astype(dtype) for x in arrays))
        return pull(jnp.ones_like(out_BTHK))

    for rounded, exact in zip(gradients(jnp.bfloat16), gradients(jnp.float32)):
        np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


@every_implementation
def test_future_keys_change_no_bit_of_the_past(implementation):
    inputs, cut = cases.make_inputs(CASE), 29
    future_S = (jnp.arange(CASE.S) > cut)[:, None, None]
    attend = jax.jit(lambda inputs: cases.attend(CASE, inputs, implementation))
    before = attend(inputs)
    after = attend(
        inputs._replace(
            k_BSGK=jnp.where(future_S, 7.0 - inputs.k_BSGK, inputs.k_BSGK),
            v_BSGK=jnp.where(future_S, 1e3, inputs.v_BSGK),
        )
    )
    np.testing.assert_array_equal(before[0][:, : cut + 1], after[0][:, : cut + 1])
    np.testing.assert_array_equal(before[1][..., : cut + 1], after[1][..., : cut + 1])
    assert (before[0][:, cut + 1 :] != after[0][:, cut + 1 :]).any()


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_what_no_token_reads_may_hold_anything(implementation):
    """Blocks that aren't listed for anyone may hold NaN, for kernels that fetch by list."""
    case = cases.Case("unread", T=32, S=96, J=1, dtype="bfloat16", causal=False)
    inputs = cases.make_inputs(case)
    listed_N = np.zeros(6, bool)
    block_id = np.asarray(inputs.selection.block_id_BGQJ)
    listed_N[block_id[block_id >= 0]] = True
    unread_S = ~np.repeat(listed_N, 16)[:, None, None]
    assert unread_S.any()
    spoilt = inputs._replace(
        k_BSGK=jnp.where(unread_S, jnp.nan, inputs.k_BSGK),
        v_BSGK=jnp.where(unread_S, jnp.nan, inputs.v_BSGK),
    )
    attend = jax.jit(lambda inputs: cases.attend(case, inputs, implementation))
    for actual, expected in zip(attend(spoilt), attend(inputs)):
        np.testing.assert_array_equal(actual, expected)


@every_implementation
def test_parts_merge_into_the_whole_by_lse(implementation):
    inputs, cut = cases.make_inputs(CASE), 32

    def attend(keys, first, selection):
        return block_sparse_attention(
            inputs.q_BTHK,
            inputs.k_BSGK[:, keys],
            inputs.v_BSGK[:, keys],
            selection,
            scale=SCALE,
            key_offset=first,
            implementation=implementation,
        )

    sizes = {"B": CASE.B, "T": CASE.T, "G": CASE.G}
    whole, whole_lse = attend(slice(None), 0, _every_block(S=CASE.S, **sizes))
    parts = [
        attend(slice(0, cut), 0, _every_block(S=cut, **sizes)),
        attend(slice(cut, None), cut, _every_block(S=CASE.S - cut, **sizes)),
    ]
    lse_BHT = jnp.logaddexp(parts[0][1], parts[1][1])
    merged_BTHK = sum(
        out * jnp.exp(lse - lse_BHT).swapaxes(1, 2)[..., None] for out, lse in parts
    )
    how = {"dtype": "float32", "length": CASE.S}
    tolerance.assert_close(lse_BHT, whole_lse, name="lse", **how)
    tolerance.assert_close(merged_BTHK, whole, name="out", **how)


@every_implementation
def test_rows_without_keys_have_zero_gradients(implementation):
    case = cases.Case("no_keys", bias=True, empty=1.0)
    inputs = cases.make_inputs(case)

    def attend(*arrays):
        return cases.attend(case, cases.Inputs(*arrays, *inputs[4:]), implementation)

    (out, lse), pull = jax.vjp(attend, *inputs[:4])
    assert not out.any() and (lse == -jnp.inf).all()
    for gradient in pull((jnp.ones_like(out), jnp.ones_like(lse))):
        np.testing.assert_array_equal(gradient, 0.0)


@every_implementation_with_closures
def test_gradients_of_bias_and_closure_match_finite_differences(implementation):
    inputs = cases.make_inputs(CASE)
    rng = np.random.default_rng(0)
    slope_H = jnp.asarray(rng.normal(size=CASE.H), jnp.float32)
    out_cotangent, lse_cotangent = cases.make_cotangents(CASE)

    @jax.jit
    def loss(bias_BGTJ, slope_H):
        out, lse = block_sparse_attention(
            *inputs[:3],
            inputs.selection,
            scale=SCALE,
            bias_BGTJ=bias_BGTJ,
            score_mod=lambda s, b, h, q_id, k_id: s * jnp.exp(0.1 * slope_H[h]),
            implementation=implementation,
        )
        lse = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.vdot(out, out_cotangent) + jnp.vdot(lse, lse_cotangent)

    point = (inputs.bias_BGTJ, slope_H)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*point)
    for index, gradient in enumerate(gradients):
        direction = jnp.asarray(rng.normal(size=gradient.shape), jnp.float32)
        step = 2e-2 / jnp.linalg.norm(direction)
        ahead, behind = (
            loss(
                *(
                    x + sign * step * direction if i == index else x
                    for i, x in enumerate(point)
                )
            )
            for sign in (1.0, -1.0)
        )
        # Float32 rounding of a loss near 30, over the step, outweighs the step's square.
        noise = 30 * jnp.finfo(jnp.float32).eps / step
        expected = jnp.vdot(gradient, direction)
        np.testing.assert_allclose((ahead - behind) / (2 * step), expected, 1e-3, noise)


def test_mods_may_close_over_arrays_of_an_enclosing_scan():
    """Floats get their gradient and integers don't leak, under scan and checkpoint."""
    inputs = cases.make_inputs(CASE)
    document_LS = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, CASE.S)))

    def loss(slope_LH, implementation):
        @jax.checkpoint
        def layer(q_BTHK, arrays):
            slope_H, document_S = arrays
            out_BTHK, _ = block_sparse_attention(
                q_BTHK,
                *inputs[1:3],
                inputs.selection,
                scale=SCALE,
                score_mod=lambda s, b, h, q_id, k_id: s + slope_H[h] * document_S[k_id],
                mask_mod=lambda b, h, q_id, k_id: document_S[q_id] >= document_S[k_id],
                implementation=implementation,
            )
            return out_BTHK, None

        return jnp.sum(jax.lax.scan(layer, inputs.q_BTHK, (slope_LH, document_LS))[0])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    slope_LH = jnp.ones((2, CASE.H))
    tolerance.assert_close(
        gradient(slope_LH, "xla"),
        gradient(slope_LH, "reference"),
        dtype="float32",
        length=CASE.B * CASE.H * CASE.T * CASE.K,
        name="dslope",
    )


@every_implementation
def test_traced_offsets_equal_static_offsets(implementation):
    inputs = cases.make_inputs(CASE)

    def attend(query_offset, key_offset):
        return block_sparse_attention(
            *inputs[:3],
            inputs.selection,
            scale=SCALE,
            query_offset=query_offset,
            key_offset=key_offset,
            implementation=implementation,
        )

    static = jax.jit(lambda: attend(40, 25))()
    traced = jax.jit(attend)(jnp.int32(40), jnp.int32(25))
    how = {"dtype": "float32", "length": CASE.S}
    tolerance.assert_close(traced[0], static[0], name="out", **how)
    tolerance.assert_close(traced[1], static[1], name="lse", **how)


@pytest.mark.parametrize("step_bytes", [xla.STEP_BYTES["cpu"], xla.DEFAULT_STEP_BYTES])
def test_xla_layer_of_32k_tokens_needs_less_than_4_gib(monkeypatch, step_bytes):
    monkeypatch.setitem(xla.STEP_BYTES, jax.default_backend(), step_bytes)
    B, T, H, G, K, J, block = 1, 32768, 8, 2, 64, 63, 16

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    selection = BlockSelection(
        shape(jnp.int32, B, G, T // block, J),
        shape(jnp.int32, B, G, T // block),
        shape(jnp.uint32, B, G, T // block, J),
        block,
        block,
    )

    def loss(q_BTHK, k_BSGK, v_BSGK, bias_BGTJ, selection):
        out_BTHK, lse_BHT = block_sparse_attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            selection,
            scale=K**-0.5,
            bias_BGTJ=bias_BGTJ,
            implementation="xla",
        )
        return jnp.sum(out_BTHK.astype(jnp.float32)) + jnp.sum(lse_BHT)

    memory = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        .lower(
            shape(jnp.bfloat16, B, T, H, K),
            shape(jnp.bfloat16, B, T, G, K),
            shape(jnp.bfloat16, B, T, G, K),
            shape(jnp.float32, B, G, T, J),
            selection,
        )
        .compile()
        .memory_analysis()
    )
    assert 0 < memory.temp_size_in_bytes < 4 * 2**30
