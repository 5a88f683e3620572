"""The definitions, written straightforwardly in float64: one expert after another, one head after another, no wide
matrices, no shared code with the package. Real layers are held against these.

Two float64 computations of the same sums differ by rounding: about 1e-16 of the terms, over the few thousand operations
of these small shapes up to some 1e-14. ``EXACT`` allows a hundred times that: too little for a wrong term to hide in.

Shape suffixes: T tokens, B sequences, S positions, D model width, E experts, G KV heads, d head_dim.
"""

import math

import numpy as np
import torch

from dsmoe_ray.model.attention import AttentionContext
from dsmoe_ray.model.config import MoaConfig, MoeConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.moa import MixtureOfAttention
from dsmoe_ray.model.moe import MixtureOfExperts

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router_values(kind="linear", **values):
    return {"kind": kind, "d_hidden": 7 if kind == "mlp" else None, **values}


def make_moe(*, activation="gelu", router=None, num_experts=5, d_model=6, d_ff=4, seed=0):
    config = MoeConfig(
        kind="moe", num_experts=num_experts, d_ff=d_ff, activation=activation, router=router or router_values()
    )
    return _fill(MixtureOfExperts(config, d_model=d_model), seed)


def make_moa(*, router=None, num_experts=3, num_kv_heads=2, head_dim=4, d_model=6, seed=0):
    config = MoaConfig(
        kind="moa",
        num_experts=num_experts,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        router=router or router_values(),
    )
    return _fill(MixtureOfAttention(config, d_model=d_model), seed)


def _fill(module, seed):
    module = module.double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=1000 * seed + index))
    return module


def router_probs(router, x_TD):
    """Softmax over a linear map, or over a linear map of silu of a linear map, spelled out."""
    if router.config.kind == "mlp":
        up = x_TD @ router.hidden.weight.T
        x_TD = up / (1 + torch.exp(-up))
    scores_TE = torch.exp(x_TD @ router.proj.weight.T)
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def router_gates(router, x_TD, routing):
    """The dense gates with those of unselected experts set to zero, renormalized if the router says so, scaled."""
    probs_TE = router_probs(router, x_TD)
    mask_TE = torch.from_numpy(select_by_definition(probs_TE.detach().numpy(), routing))
    gates_TE = probs_TE * mask_TE
    if router.config.gates == "renormalized":
        gates_TE = gates_TE / gates_TE.sum(-1, keepdim=True)
    return gates_TE * router.config.gate_scale


def select_by_definition(probs_TE, routing):
    """Each rule as its one sentence says it, token by token; returns a boolean array ``(T, E)``."""
    num_tokens, num_experts = probs_TE.shape
    above_TE = num_experts * probs_TE > (routing.threshold or 0.0)
    # Best first; among equals the lower expert id first.
    orders = [sorted(range(num_experts), key=lambda e: (-probs_TE[t, e], e)) for t in range(num_tokens)]
    counts = [num_experts] * num_tokens
    if routing.mode is RoutingMode.THRESHOLD:
        return above_TE
    if routing.mode is RoutingMode.TOP_K:
        counts = [routing.top_k] * num_tokens
    if routing.mode is RoutingMode.THRESHOLD_TOP_K:
        mean_kept = above_TE.sum() / num_tokens
        counts = [min(max(round(mean_kept), 1), num_experts)] * num_tokens
    if routing.mode is RoutingMode.TOP_P:
        counts = [_fewest_reaching(routing.top_p, probs_TE[t, orders[t]]) for t in range(num_tokens)]
    mask_TE = np.zeros((num_tokens, num_experts), dtype=bool)
    for t in range(num_tokens):
        mask_TE[t, orders[t][: counts[t]]] = True
    return mask_TE


def _fewest_reaching(top_p, probs):
    for count in range(1, len(probs)):
        if math.fsum(probs[:count]) >= top_p:
            return count
    return len(probs)


def activate(up, linear):
    """Exact GeLU, or SwiGLU where a linear branch is given."""
    if linear is None:
        return up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    return up / (1 + torch.exp(-up)) * linear


def sum_of_experts(experts, x_TD, gates_TE):
    """Each expert runs on all tokens; its finished output is weighed by its gate; outputs are added up."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(gates_TE.shape[1]):
        up = x_TD @ experts.w1[expert].T
        linear = None if experts.w3 is None else x_TD @ experts.w3[expert].T
        y_TD = y_TD + gates_TE[:, expert, None] * (activate(up, linear) @ experts.w2[expert])
    return y_TD


def sum_of_attentions(moa, x_BSD, gates_BSE, *, theta=10000.0):
    """Each expert is a separate causal attention over the keys and values that all share, one head at a time."""
    head_dim = moa.config.head_dim
    y_BSD = torch.zeros_like(x_BSD)
    for head in range(moa.config.num_kv_heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        k_BSd = rotate_by_definition(x_BSD @ moa.wk[rows].T, theta)
        v_BSd = x_BSD @ moa.wv[rows].T
        for expert in range(moa.config.num_experts):
            q_BSd = rotate_by_definition(x_BSD @ moa.wq[expert, rows].T, theta)
            out_BSd = causal_attention(q_BSd, k_BSd, v_BSd)
            y_BSD = y_BSD + gates_BSE[:, :, expert, None] * (out_BSd @ moa.wo[expert, rows])
    return y_BSD


def causal_attention(q_BSd, k_BSd, v_BSd):
    scores_BSS = q_BSd @ k_BSd.transpose(1, 2) / math.sqrt(q_BSd.shape[-1])
    weights_BSS = torch.exp(scores_BSS).tril()
    return weights_BSS / weights_BSS.sum(-1, keepdim=True) @ v_BSd


def rotate_by_definition(x_BSd, theta):
    """Multiply pair j, made of entries j and j + d/2, by ``exp(i * position * theta ** (-2 j / d))``."""
    half = x_BSd.shape[-1] // 2
    frequency = theta ** (-2 * torch.arange(half, dtype=torch.float64) / x_BSd.shape[-1])
    angle = torch.arange(x_BSd.shape[1], dtype=torch.float64)[:, None] * frequency
    pairs = torch.complex(x_BSd[..., :half], x_BSd[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def exact_context(num_positions, head_dim, *, theta=10000.0):
    """The context of a forward pass with float64 angles, where the model's own are float32."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    return AttentionContext(angle.cos()[None, :, None], angle.sin()[None, :, None], None)


def assert_same(found, expected, inputs, *, names=None, tolerance=None):
    """Compare two outputs and their gradients with regard to all inputs, for one random direction of the output."""
    tolerance = tolerance or EXACT
    torch.testing.assert_close(found, expected, **tolerance, msg=lambda text: f"forward: {text}")
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(99), dtype=found.dtype)
    of_found = torch.autograd.grad((found * direction).sum(), inputs)
    of_expected = torch.autograd.grad((expected * direction).sum(), inputs)
    for index, (gradient, reference) in enumerate(zip(of_found, of_expected, strict=True)):
        name = names[index] if names else f"input {index}"
        torch.testing.assert_close(
            gradient, reference, **tolerance, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )


def with_parameters(x, module):
    """Inputs and names for ``assert_same``: the tokens and every parameter."""
    named = dict(module.named_parameters())
    return {"inputs": [x, *named.values()], "names": ["x", *named]}


DENSE = RoutingConfig()
