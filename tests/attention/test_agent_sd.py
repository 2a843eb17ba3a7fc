"""AgentSD: the matching and the attention against the official numbers and the formula, and the patch on both kinds of U-Net."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity_case import load_case
from torch import Tensor, nn

from attention_zoo.attention.agent_sd import (
    AgentSDAttention,
    AgentSDBlock,
    AgentSDPhase,
    apply_agent_sd,
    match_tokens,
    published_schedule,
    remove_agent_sd,
)


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- the official numbers ---------------------------------------------------------------------------------------------------------


def test_attention_as_the_official_code() -> None:
    case = load_case("agent/agentsd_attn")
    module = AgentSDAttention(**case.arguments()[1])
    module.load_state_dict(case.group("state"))
    x = case.tensors["input.x"].requires_grad_()
    out = module(x, case.tensors["input.agent"])
    close(out, case.tensors["output.x"], case.tolerance)
    (out * case.tensors["cotangent.x"]).sum().backward()
    close(x.grad, case.tensors["grad.input"], float(case.meta["grad_tolerance"]))


def test_matching_as_the_official_code() -> None:
    case = load_case("agent/agentsd_match_8x6")
    matching = match_tokens(case.tensors["input.metric"], **case.arguments()[1])
    x = case.tensors["input.x"].requires_grad_()
    merged, agent = matching.merge(x)
    outputs = {"merged": merged, "agent": agent, "unmerged": matching.unmerge(merged)}
    for name, got in outputs.items():
        close(got, case.tensors[f"output.{name}"], case.tolerance)
    sum((got * case.tensors[f"cotangent.{name}"]).sum() for name, got in outputs.items()).backward()
    close(x.grad, case.tensors["grad.input"], float(case.meta["grad_tolerance"]))


# --- the matching -----------------------------------------------------------------------------------------------------------------


def by_hand(metric: Tensor, x: Tensor, w: int, h: int, sx: int, sy: int, count: int, places: list[int]) -> tuple[Tensor, Tensor]:
    """One sample: merge the `count` most similar sources; the merged rows, and what unmerging them gives."""
    sources = [i for i in range(w * h) if i not in places]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    similarity = [[float(unit[i] @ unit[j]) for j in places] for i in sources]
    partner = [row.index(max(row)) for row in similarity]
    order = sorted(range(len(sources)), key=lambda i: -max(similarity[i]))
    groups = [[x[place]] for place in places]
    for i in order[:count]:
        groups[partner[i]].append(x[sources[i]])
    means = [torch.stack(group).mean(0) for group in groups]
    merged = torch.stack([*(x[sources[i]] for i in order[count:]), *means])
    unmerged = x.clone()
    for place, mean in zip(places, means, strict=True):
        unmerged[place] = mean
    for i in order[:count]:
        unmerged[sources[i]] = means[partner[i]]
    return merged, unmerged


@given(
    w=st.integers(1, 6),
    h=st.integers(1, 6),
    sx=st.integers(1, 3),
    sy=st.integers(1, 3),
    ratio=st.floats(0.0, 1.0),
    agent_ratio=st.floats(0.0, 1.0),
)
def test_matching_by_hand(w: int, h: int, sx: int, sy: int, ratio: float, agent_ratio: float) -> None:
    n, x = w * h, torch.randn(2, w * h, 3, dtype=torch.float64)
    metric = torch.randn(2, n, 4, dtype=torch.float64)
    r, agent_r = int(n * ratio), int(n * agent_ratio)
    matching = match_tokens(metric, w=w, h=h, sx=sx, sy=sy, r=r, agent_r=agent_r, no_rand=True)
    merged, agents = matching.merge(x)
    places = [i * sy * w + j * sx for i in range(h // sy) for j in range(w // sx)]
    if not places or r == 0:
        assert merged is x
        assert agents is None
        assert matching.unmerge(merged) is merged
        return
    r, agent_r = min(r, n - len(places)), min(agent_r, n - len(places))
    assert (agents is not None) == (r > 0 and 2 * (n - agent_r) < n - r)
    for b in range(2):
        want, back = by_hand(metric[b], x[b], w, h, sx, sy, r, places)
        if r:
            close(merged[b], want, 1e-12)
            close(matching.unmerge(merged)[b], back, 1e-12)
        if agents is not None:
            close(agents[b], by_hand(metric[b], x[b], w, h, sx, sy, agent_r, places)[0], 1e-12)


def test_random_destinations() -> None:
    """One in each whole cell, the same for all samples, from the generator alone."""
    metric = torch.randn(2, 7 * 9, 4)
    state = torch.get_rng_state()
    found = [
        match_tokens(metric, w=9, h=7, sx=2, sy=3, r=10, agent_r=0, generator=torch.Generator().manual_seed(seed)).destinations
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    cells = [(int(i) // 9 // 3, int(i) % 9 // 2) for i in found[2]]
    assert sorted(cells) == [(i, j) for i in range(2) for j in range(4)]


def test_ties_keep_their_order() -> None:
    matching = match_tokens(torch.ones(1, 16, 2), w=4, h=4, sx=2, sy=2, r=4, agent_r=0, no_rand=True)
    assert matching.sources[0].tolist() == [1, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 15]


def test_tokens_of_zeros_and_wrong_grids() -> None:
    matching = match_tokens(torch.zeros(1, 16, 2), w=4, h=4, sx=2, sy=2, r=4, agent_r=0)
    assert matching.merge(torch.ones(1, 16, 3))[0].isfinite().all()
    with pytest.raises(ValueError, match="grid_size"):
        match_tokens(torch.zeros(1, 16, 2), w=4, h=5, sx=2, sy=2, r=4, agent_r=0)
    with pytest.raises(ValueError, match="sx=0"):
        match_tokens(torch.zeros(1, 16, 2), w=4, h=4, sx=0, sy=2, r=4, agent_r=0)


# --- the modules ------------------------------------------------------------------------------------------------------------------


def test_attention_by_hand() -> None:
    module, x, agent = AgentSDAttention(8, 2).double(), torch.randn(2, 9, 8).double(), torch.randn(2, 4, 8).double()
    q, k, v, a = (
        t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (module.to_q(x), module.to_k(x), module.to_v(x), module.to_q(agent))
    )
    maps = (4**-0.15 * q @ a.mT).softmax(-1), (4**-0.5 * a @ k.mT).softmax(-1)
    want = module.to_out((maps[0] @ (maps[1] @ v) + 0.075 * v).transpose(1, 2).flatten(2))
    close(module(x, agent), want, 1e-12)


def test_too_many_agents_are_softmax_attention() -> None:
    module, x = AgentSDAttention(8, 2, context_dim=8), torch.randn(2, 9, 8)
    want = module(x)
    assert torch.equal(module(x, torch.randn(2, 5, 8)), want)
    assert not torch.allclose(module(x, torch.randn(2, 4, 8)), want)
    with pytest.raises(ValueError, match="no context"):
        module(x, torch.randn(2, 4, 8), context=x)


def test_constant_values() -> None:
    module, x = AgentSDAttention(8, 2), torch.randn(2, 9, 8)
    nn.init.zeros_(module.to_v.weight)
    module.to_v.register_parameter("bias", nn.Parameter(torch.randn(8)))
    want = module.to_out((1 + 0.075) * module.to_v.bias)
    close(module(x, torch.randn(2, 4, 8)), want.expand(2, 9, 8))


def test_block_by_hand() -> None:
    block = AgentSDBlock(8, 2, context_dim=5, ratio=0.5, agent_ratio=0.9, sx=2, sy=2, use_rand=False)
    x, context = torch.randn(2, 35, 8), torch.randn(2, 4, 5)
    matching = match_tokens(x, w=7, h=5, sx=2, sy=2, r=17, agent_r=31, no_rand=True)
    tokens, agents = matching.merge(block.norm1(x))
    assert (tokens.shape[1], agents.shape[1]) == (18, 6)
    want = x + matching.unmerge(block.attn1(tokens, agents))
    want = want + block.attn2(block.norm2(want), context=context)
    close(block(x, grid_size=(5, 7), context=context), want + block.ff(block.norm3(want)))
    assert set(dict(block.named_children())) == {"norm1", "attn1", "norm2", "attn2", "norm3", "ff"}
    assert block.norm1.eps == 1e-5


# --- stand-ins for the two kinds of U-Net -----------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """As CompVis has it."""

    def __init__(self, dim: int, context_dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim, dim, bias=False) for _ in range(2))
        self.to_out: Any = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))
        self.calls: list[int] = []

    def attend(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        self.calls.append(x.shape[1])
        source = x if context is None else context
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), self.to_k(source), self.to_v(source)))
        out = ((self.scale * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        for module in self.to_out:
            out = module(out)
        return out

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, context, mask)


class Attention(CrossAttention):
    """As diffusers has it."""

    def __init__(self, dim: int, context_dim: int, heads: int = 2) -> None:
        super().__init__(dim, context_dim, heads)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        return self.attend(hidden_states, encoder_hidden_states, attention_mask)


class BasicTransformerBlock(nn.Module):
    """As CompVis has it."""

    layer: type[CrossAttention] = CrossAttention

    def __init__(self, dim: int = 8, context_dim: int = 6) -> None:
        super().__init__()
        self.attn1, self.attn2 = self.layer(dim, dim), self.layer(dim, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.disable_self_attn = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(x), context=context if self.disable_self_attn else None) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class DiffusersBlock(BasicTransformerBlock):
    """As diffusers has it."""

    layer = Attention
    attention_mask: Tensor | None = None
    extra: Mapping[str, Any] = MappingProxyType({})

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:  # type: ignore[override]
        attn = self.attn1(self.norm1(hidden_states), encoder_hidden_states=None, attention_mask=self.attention_mask, **self.extra)
        hidden_states = attn + hidden_states
        hidden_states = self.attn2(self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


class UNet(nn.Module):
    """Two blocks at full resolution, one at half."""

    def __init__(self, block: type[BasicTransformerBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(3)])

    def forward(self, sample: Tensor, timestep: Any, context: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i == 2:
                sample = nn.functional.avg_pool2d(sample, 2, ceil_mode=True)
            size = sample.shape[2:]
            sample = block(sample.flatten(2).transpose(1, 2), context).transpose(1, 2).unflatten(2, size)
        return sample


KINDS = pytest.mark.parametrize("kind", [BasicTransformerBlock, DiffusersBlock])


def build(kind: type[BasicTransformerBlock]) -> tuple[UNet, tuple[Tensor, int, Tensor]]:
    return UNet(kind).eval(), (torch.randn(2, 8, 7, 9), 981, torch.randn(2, 4, 6))


def attended(unet: UNet) -> list[list[int]]:
    """Numbers of tokens that each block's own self attention saw since the last look."""
    found = [list(block.attn1.calls) for block in unet.blocks]
    for block in unet.blocks:
        block.attn1.calls.clear()
    return found


@KINDS
def test_patched_block_is_the_block_of_the_paper(kind: type[BasicTransformerBlock]) -> None:
    unet, (sample, time, context) = build(kind)
    patch = apply_agent_sd(unet, ratio=0.4, agent_ratio=0.95, sx=3, sy=3, use_rand=False)
    assert patch.layers == 3
    reference = AgentSDBlock(8, 2, context_dim=6, ratio=0.4, agent_ratio=0.95, sx=3, sy=3, use_rand=False)
    reference.load_state_dict(unet.blocks[0].state_dict())
    seen: list[tuple[Tensor, Tensor]] = []
    unet.blocks[0].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    unet(sample, time, context)
    close(seen[0][1], reference(seen[0][0], grid_size=(7, 9), context=context))
    assert attended(unet) == [[], [], [4 * 5]], "agents at full resolution, the original at half"


@KINDS
def test_merging_without_agents(kind: type[BasicTransformerBlock]) -> None:
    unet, inputs = build(kind)
    apply_agent_sd(unet, ratio=0.4, agent_ratio=0.5, sx=2, sy=2)
    unet(*inputs)
    assert attended(unet) == [[63 - 25], [63 - 25], [20]]
    apply_agent_sd(unet, ratio=0.4, agent_ratio=0.5, sx=2, sy=2, max_downsample=2)
    unet(*inputs)
    assert attended(unet) == [[38], [38], [20 - 8]]


@KINDS
def test_removing_and_ratio_zero(kind: type[BasicTransformerBlock]) -> None:
    unet, inputs = build(kind)
    before = {name: dict(module.__dict__) for name, module in unet.named_modules()}
    keys, want = list(unet.state_dict()), unet(*inputs)
    apply_agent_sd(unet, sx=2, sy=2)
    assert list(unet.state_dict()) == keys
    assert not torch.allclose(unet(*inputs), want, atol=1e-4)
    apply_agent_sd(unet, ratio=0.0)
    assert torch.equal(unet(*inputs), want)
    remove_agent_sd(unet)
    remove_agent_sd(unet)
    assert torch.equal(unet(*inputs), want)
    for name, module in unet.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    again = apply_agent_sd(unet, sx=2, sy=2)
    again.remove()
    assert torch.equal(unet(*inputs), want)


def test_another_tools_forward_is_kept() -> None:
    unet, inputs = build(BasicTransformerBlock)
    layer, called = unet.blocks[0].attn1, []
    plain = layer.forward
    layer.forward = theirs = lambda *args, **kwargs: called.append(1) or plain(*args, **kwargs)
    apply_agent_sd(unet, agent_ratio=0.5, sx=2, sy=2)
    unet(*inputs)
    assert called == [1]
    remove_agent_sd(unet)
    assert layer.forward is theirs


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@KINDS
def test_copies_are_patched_by_themselves(kind: type[BasicTransformerBlock], duplicate: Any) -> None:
    unet, inputs = build(kind)
    plain = unet(*inputs)
    apply_agent_sd(unet, sx=3, sy=3, use_rand=False)
    twin = duplicate(unet)
    want = unet(*inputs)
    close(twin(*inputs), want)
    remove_agent_sd(twin)
    close(twin(*inputs), plain)
    close(unet(*inputs), want)


def test_where_the_unet_is_found() -> None:
    unet, _ = build(DiffusersBlock)
    for model in (SimpleNamespace(unet=unet), SimpleNamespace(model=SimpleNamespace(diffusion_model=unet))):
        apply_agent_sd(model, sx=3, sy=3)
        assert hasattr(unet, "agent_sd_patch")
        remove_agent_sd(model)
        assert not hasattr(unet, "agent_sd_patch")
    with pytest.raises(ValueError, match="no U-Net in SimpleNamespace"):
        apply_agent_sd(SimpleNamespace())
    with pytest.raises(ValueError, match="Linear has no transformer blocks"):
        apply_agent_sd(nn.Linear(2, 2))


# --- steps, masks, randomness -----------------------------------------------------------------------------------------------------


def test_schedule() -> None:
    unet, (sample, _, context) = build(BasicTransformerBlock)
    schedule = (AgentSDPhase(0, 0.4, 0.95, 3, 3), AgentSDPhase(2, 0.4, 0.5, 2, 2))
    patch = apply_agent_sd(unet, schedule=schedule[::-1])
    steps, plain = [], []
    for time in (981, 961, 961, 941, 921, 981, torch.tensor([961, 961])):  # PLMS calls twice at its second time; then a new image
        unet(sample, time, context)
        steps.append(patch.step)
        plain.append(len(attended(unet)[0]))
    assert steps == [0, 1, 1, 2, 3, 0, 1]
    assert plain == [0, 0, 0, 1, 1, 0, 0]
    patch.reset()
    for time, step in ((None, 0), (None, 1), (None, 2)):
        unet(sample, time, context)
        assert patch.step == step
    assert published_schedule(0.3) == (AgentSDPhase(0, 0.3, 0.95, 4, 4), AgentSDPhase(20, 0.3, 0.5, 2, 2))
    with pytest.raises(ValueError, match=r"step 0, got first steps \[20\]"):
        apply_agent_sd(unet, schedule=published_schedule()[1:])


def test_what_is_refused() -> None:
    unet, inputs = build(DiffusersBlock)
    apply_agent_sd(unet, sx=3, sy=3)
    unet.blocks[0].attention_mask = torch.ones(2, 63)
    with pytest.raises(ValueError, match="no attention mask"):
        unet(*inputs)
    unet.blocks[0].attention_mask, unet.blocks[0].extra = None, {"scale": 0.5}
    with pytest.raises(ValueError, match="arguments of the attention: scale"):
        unet(*inputs)
    remove_agent_sd(unet)
    unet.blocks[1].attn1.norm_q = nn.LayerNorm(4)
    with pytest.raises(ValueError, match="Attention has norm_q"):
        apply_agent_sd(unet)
    assert not hasattr(unet, "agent_sd_patch")


def test_a_model_without_a_latent_image_is_refused() -> None:
    unet, (sample, time, context) = build(BasicTransformerBlock)
    apply_agent_sd(unet)
    with pytest.raises(ValueError, match=r"no latent image \(B, C, H, W\) among the arguments of UNet"):
        unet(sample[:, :, None], time, context)


def test_named_arguments_of_the_normalisation() -> None:
    unet, inputs = build(BasicTransformerBlock)
    want = apply_agent_sd(unet, sx=3, sy=3, use_rand=False) and unet(*inputs)
    remove_agent_sd(unet)
    for block in unet.blocks:
        norm, block.norm1 = block.norm1, nn.Module()
        block.norm1.forward = lambda input, norm=norm: norm(input)
        block.norm1.register_forward_pre_hook(lambda m, args, kwargs: ((), {"input": args[0]}), with_kwargs=True)
    apply_agent_sd(unet, sx=3, sy=3, use_rand=False)
    close(unet(*inputs), want)


def test_self_attention_that_reads_a_context() -> None:
    """CompVis' blocks can be built without self attention: the queries are merged, agents have no place."""
    unet, (sample, time, context) = build(BasicTransformerBlock)
    unet.blocks[0].attn1, unet.blocks[0].disable_self_attn = CrossAttention(8, 6), True
    apply_agent_sd(unet, sx=3, sy=3)
    unet(sample, time, context)
    assert attended(unet)[0] == [63 - 25]


def test_randomness_is_its_own() -> None:
    unet, (sample, time, context) = build(BasicTransformerBlock)
    state = torch.get_rng_state()
    outputs = []
    for seed in (0, 0, 1):
        apply_agent_sd(unet, sx=3, sy=3, generator=torch.Generator().manual_seed(seed))
        outputs.append(unet(sample, time, context))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    odd = [apply_agent_sd(unet, sx=3, sy=3, use_rand=r) and unet(sample[:1], time, context[:1]) for r in (True, False)]
    assert torch.equal(odd[0], odd[1]), "no random choice in a batch of an odd size"
    assert torch.equal(torch.get_rng_state(), state)
