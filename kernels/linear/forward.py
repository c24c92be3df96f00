"""Linear attention forward: states before every chunk, then what the rows of all chunks read."""

from .run import Run, begin
from .tiles import rows_of


def key_states(run: Run):
    """States of keys and values, forward in time."""
    x, heads = run.x, run.x.state_heads
    start = None if x.kv is None else x.kv.contiguous()
    start_z = None if x.z is None else x.z.contiguous()
    return run.scan(
        run.keys, rows_of(x.k, heads), rows_of(x.v, heads), 1, x.v.shape[3],
        start=start, start_z=start_z, z=run.params.normalize,
    )  # fmt: skip


def forward(x, params, out, den, eps):
    """Fill out [B, H, Lq, Dv] and, where normalised, den fp32 [B, H, Lq]; returns the final state fp32 (kv, z).

    den is what out was divided by, negative where it was less than eps.
    """
    run = begin(x, params)
    heads, causal, phi = x.heads, params.causal, params.feature_map
    values = rows_of(x.v, x.state_heads)
    if x.beta is None:
        states = key_states(run)
    else:
        u, states = run.scan_delta(run.inverse(), values, None if x.kv is None else x.kv.contiguous())
        values = rows_of(u, x.state_heads)
    run.read(
        run.queries, rows_of(x.q, heads), rows_of(x.k, x.state_heads), values, (phi, phi, "identity"), heads, 1, run.F,
        x.v.shape[3], out, state=states.before if causal else states.final,
        state_z=states.before_z if causal else states.final_z, pairs=run.pairs(), scale=params.scale, eps=eps, den=den,
    )  # fmt: skip
    return states.final, states.final_z
