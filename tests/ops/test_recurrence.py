"""The recurrences against their formulas token by token in float64, whole and in pieces, exported with a dynamic length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewright.ops import DECOMPOSITIONS, recurrence
from edgewright.ops.recurrence import CHUNK

EW = torch.ops.edgewright
B, H, GROUPS, DK, DV, C, N, K = 2, 4, 2, 8, 6, 5, 3, 4


def delta_rule(q, k, v, g, beta, state, scale):
    """One token and one head at a time (arXiv 2412.06464)."""
    out, state = np.zeros(v.shape), state.copy()
    for b, h in np.ndindex(B, H):
        group = h // (H // q.shape[2])
        for t in range(v.shape[1]):
            s = state[b, h] * np.exp(g[b, t, h])
            s = s + np.outer(k[b, t, group], beta[b, t, h] * (v[b, t, h] - s.T @ k[b, t, group]))
            out[b, t, h], state[b, h] = scale * (s.T @ q[b, t, group]), s
    return out, state


def generalized(q, k, v, g, a, b, state):
    """One token and one head at a time (arXiv 2503.14456)."""
    out, state = np.zeros(v.shape), state.copy()
    for row, h in np.ndindex(B, H):
        for t in range(v.shape[1]):
            at = row, t, h
            s = np.diag(np.exp(g[at])) @ state[row, h] + np.outer(b[at], a[at] @ state[row, h]) + np.outer(k[at], v[at])
            out[at], state[row, h] = q[at] @ s, s
    return out, state


def linear(q, k, v, g, state, scale):
    out, state = np.zeros(v.shape), state.copy()
    for b, h in np.ndindex(B, H):
        group = h // (H // q.shape[2])
        for t in range(v.shape[1]):
            s = np.exp(g[b, t, h])[:, None] * state[b, h] + np.outer(k[b, t, group], v[b, t, h])
            out[b, t, h], state[b, h] = scale * (s.T @ q[b, t, group]), s
    return out, state


def scan(x, dt, a, b, c, state):
    out, state = np.zeros(x.shape), state.copy()
    for row, t in np.ndindex(B, x.shape[1]):
        state[row] = np.exp(dt[row, t][:, None] * a) * state[row] + np.outer(dt[row, t] * x[row, t], b[row, t])
        out[row, t] = state[row] @ c[row, t]
    return out, state


def diagonal(decay, value, state):
    out, state = np.zeros(value.shape), state.copy()
    for row, t in np.ndindex(B, value.shape[1]):
        state[row] = decay[row, t] * state[row] + value[row, t]
        out[row, t] = state[row]
    return out, state


def conv(x, weight, bias, state):
    seen = np.concatenate([state.transpose(0, 2, 1), x], 1)
    out = np.stack([(seen[:, t : t + K] * weight.T).sum(1) + bias for t in range(x.shape[1])], 1)
    return out, seen[:, -(K - 1) :].transpose(0, 2, 1)


def case(name: str, length: int, seed: int, decay: float = 1.0):
    """(op, plain restatement, arguments, which of them run along the tokens, index of the state)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape)

    def unit(*shape):
        x = normal(*shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    fade = -decay * np.abs(normal(B, length, H, DK))
    qk = unit(B, length, GROUPS, DK), unit(B, length, GROUPS, DK)
    v, state = normal(B, length, H, DV), normal(B, H, DK, DV)
    if name == "gated_delta_rule":
        beta = 2 / (1 + np.exp(-normal(B, length, H)))  # up to 2: negative eigenvalues
        return EW.gated_delta_rule, delta_rule, [*qk, v, fade[..., 0], beta, state, 0.3], range(5), 5
    if name == "generalized_delta_rule":
        key, rate = unit(B, length, H, DK), 1 / (1 + np.exp(-normal(B, length, H, DK)))
        args = [normal(B, length, H, DK), normal(B, length, H, DK), v, fade, -key, rate * key, state]
        return EW.generalized_delta_rule, generalized, args, range(6), 6
    if name == "linear_attention":
        return EW.linear_attention, linear, [*qk, v, fade[..., :1], state, 0.3], range(4), 4
    if name == "linear_attention_per_key":
        return EW.linear_attention, linear, [*qk, v, fade, state, 0.3], range(4), 4
    if name == "selective_scan":
        dt, a = decay * np.abs(normal(B, length, C)), -np.abs(normal(C, N))
        args = [normal(B, length, C), dt, a, normal(B, length, N), normal(B, length, N), normal(B, C, N)]
        return EW.selective_scan, scan, args, (0, 1, 3, 4), 5
    if name == "diagonal_scan":
        args = [np.exp(-decay * np.abs(normal(B, length, C))), normal(B, length, C), normal(B, C)]
        return EW.diagonal_scan, diagonal, args, (0, 1), 2
    args = [normal(B, length, C), normal(C, K), normal(C), normal(B, C, K - 1)]
    return EW.causal_conv, conv, args, (0,), 3


NAMES = (
    *("gated_delta_rule", "generalized_delta_rule", "linear_attention", "linear_attention_per_key"),
    *("selective_scan", "diagonal_scan", "causal_conv"),
)


def tensors(args):
    return [torch.from_numpy(np.ascontiguousarray(a, np.float32)) if isinstance(a, np.ndarray) else a for a in args]


def close(got: torch.Tensor, want: np.ndarray) -> None:
    assert np.abs(got.numpy() - want).max() <= 2e-5 * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_any_length_is_the_recurrence_token_by_token(name, length):
    op, plain, args, _, _ = case(name, length, length)
    for got, want in zip(op(*tensors(args)), plain(*args), strict=True):
        close(got, want)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_rows_that_take_too_much_memory_together_are_taken_one_by_one(name, monkeypatch):
    op, _, args, _, _ = case(name, CHUNK + 3, 5)
    together = op(*tensors(args))
    called = "linear_attention" if name == "linear_attention_per_key" else name
    reference, rows = getattr(recurrence, called), []

    def seen(x, *rest):
        rows.append(len(x))
        return reference(x, *rest)

    monkeypatch.setattr(recurrence, called, seen)
    monkeypatch.setattr(recurrence, "WORK_BYTES", 1)
    for got, want in zip(op(*tensors(args)), together, strict=True):
        torch.testing.assert_close(got, want)
        assert got.is_contiguous()
    assert rows == [1] * (2 * B)  # two chunks of each row


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.01, 1.0, 300.0]), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_state_carries_from_call_to_call(name, first, second, decay, seed):
    """Also where a token forgets nearly nothing, or everything."""
    op, plain, args, along, at = case(name, first + second, seed, decay)
    want, last = plain(*args)
    whole = tensors(args)
    parts = []
    for piece in (slice(0, first), slice(first, None)):
        out, whole[at] = op(*[a[:, piece] if i in along else a for i, a in enumerate(whole)])
        parts.append(out)
    close(torch.cat(parts, 1), want)
    close(whole[at], last)


def test_the_inverse_is_stable_where_a_power_series_is_not():
    """The same key again and again, nothing forgotten: sums of powers would reach binomials of 64."""
    _, plain, args, _, _ = case("gated_delta_rule", CHUNK, 0)
    args[1] = np.broadcast_to(args[1][:, :1], args[1].shape)
    args[3] = np.zeros_like(args[3])
    args[4] = np.ones_like(args[4])
    for got, want in zip(EW.gated_delta_rule(*tensors(args)), plain(*args), strict=True):
        close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_the_decomposition_exports_with_a_dynamic_length_and_a_constant_one(name):
    op, plain, args, along, _ = case(name, 7, 1)

    class Module(torch.nn.Module):
        def forward(self, *values):
            return op(*values)

    length = torch.export.Dim("length", min=1, max=CHUNK)
    given = tensors(args)
    shapes = [{1: length} if i in along else ({} if isinstance(a, torch.Tensor) else None) for i, a in enumerate(given)]
    program = torch.export.export(Module(), tuple(given), dynamic_shapes=(tuple(shapes),))
    plain_aten = program.run_decompositions(DECOMPOSITIONS)
    assert not [n for n in plain_aten.graph.nodes if "edgewright" in str(n.target)]
    for count in (1, 2, 33, CHUNK):
        _, _, args, _, _ = case(name, count, count)
        for got, want in zip(plain_aten.module(check_guards=False)(*tensors(args)), plain(*args), strict=True):
            close(got, want)
    _, _, args, _, _ = case(name, 1, 5)
    step = torch.export.export(Module(), tuple(tensors(args))).run_decompositions(DECOMPOSITIONS)
    assert len(step.graph.nodes) < len(plain_aten.graph.nodes)
    for got, want in zip(step.module()(*tensors(args)), plain(*args), strict=True):
        close(got, want)
