"""AgentSD: agent attention without training, for the self-attention of diffusion U-Nets, on tokens that are merged for the time.

Agent Attention: On the Integration of Softmax and Linear Attention, arXiv 2312.08874, 2023; its matching of tokens is that of
Token Merging for Fast Stable Diffusion, arXiv 2303.17604. Follows the official code (LeapLabTHU/Agent-Attention, agentsd).

    patch = apply_agent_sd(pipe, schedule=published_schedule(0.4))      # a diffusers pipeline, its U-Net, a CompVis model
    image = pipe(prompt).images[0]
    remove_agent_sd(pipe)                                            # everything as it was

Deviations: ratio 0 changes nothing; masks are refused; the sort is stable; diffusers' blocks work; removing restores the attention
too; the random choice has a generator of its own and leaves torch's alone; steps are counted by the timesteps the U-Net gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attention_zoo import ops
from attention_zoo.attention.agent import agent_attention
from attention_zoo.attention.base import check_context, check_grid, check_tokens, merge_heads, resolve_head_dim, split_heads

__all__ = [
    "AgentSDAttention",
    "AgentSDBlock",
    "AgentSDPatch",
    "AgentSDPhase",
    "TokenMatching",
    "apply_agent_sd",
    "match_tokens",
    "published_schedule",
    "remove_agent_sd",
]

SCALE2_POWER, V_SHORTCUT = 0.3, 0.075  # the paper's p_2 and kappa


# --- tokens that are alike --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenMatching:
    """Which tokens become one: every cell of the grid has a destination, all other tokens are sources, the most similar first.

    Attributes:
        destinations: positions of the destinations, (N_d,), row-major.
        sources: positions of the sources, (B, S), by falling similarity to their destination.
        partners: for each of these its destination, (B, S), an index into `destinations`.
        r: number of sources that are merged. 0: nothing is done.
        agent_r: number of sources that are merged to get agents; None: there are no agents.
    """

    destinations: Tensor
    sources: Tensor
    partners: Tensor
    r: int
    agent_r: int | None

    def merge(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> the merged tokens (B, N - r, C), [sources that stay, by similarity | destinations], and the agents."""
        if not self.r:
            return x, None
        return self._merge(x, self.r), None if self.agent_r is None else self._merge(x, self.agent_r)

    def _merge(self, x: Tensor, r: int) -> Tensor:
        sources = x.gather(1, _over_channels(self.sources, x))
        partners = self.partners[:, :r]
        total = x[:, self.destinations].scatter_add(1, _over_channels(partners, x), sources[:, :r])
        counts = torch.ones_like(total[..., 0]).scatter_add(1, partners, torch.ones_like(sources[:, :r, 0]))
        return torch.cat([sources[:, r:], total / counts[..., None]], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, N - r, C) -> (B, N, C): every token back in its place; a merged source gets its destination's row."""
        if not self.r:
            return x
        stay = self.sources.shape[1] - self.r
        rest, destinations = x.tensor_split([stay], dim=1)
        merged = destinations.gather(1, _over_channels(self.partners[:, : self.r], x))
        places = torch.cat([self.sources, self.destinations.expand(x.shape[0], -1)], dim=1)
        rows = torch.cat([merged, rest, destinations], dim=1)
        return torch.zeros_like(rows).scatter(1, _over_channels(places, x), rows)


def _over_channels(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])


@torch.no_grad()
def match_tokens(
    metric: Tensor,
    *,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    agent_r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> TokenMatching:
    """Match the tokens of a grid by cosine similarity, sources to destinations, of which each sy x sx cell has one.

    Args:
        metric: what is compared, (B, h * w, C).
        w, h: width and height of the grid.
        sx, sy: width and height of the cells; in what whole cells do not cover, all tokens are sources.
        r: number of sources to merge, at most all of them; 0 or less: none.
        agent_r: number of sources to merge to get agents. There are agents only if they are fewer than half of the merged tokens.
        no_rand: the destination is the cell's first token; otherwise a random one, the same in all samples.
        generator: of that choice.

    Raises:
        ValueError: a grid that is not the tokens', or cells without tokens.
    """
    check_grid(metric, (h, w))
    if sx < 1 or sy < 1:
        raise ValueError(f"sx and sy are sides of cells, at least 1; got sx={sx}, sy={sy}")
    destinations, sources = _split_grid(w, h, sx, sy, no_rand, generator)
    destinations, sources = destinations.to(metric.device), sources.to(metric.device)
    num_tokens, num_sources = h * w, len(sources)
    if not len(destinations) or r <= 0:  # a grid smaller than a cell has nothing to merge into
        none = sources.new_zeros(metric.shape[0], 0)
        return TokenMatching(destinations, none, none, 0, None)
    metric = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)
    best, partners = (metric[:, sources] @ metric[:, destinations].transpose(1, 2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    r, agent_r = min(r, num_sources), min(agent_r, num_sources)
    has_agents = 2 * (num_tokens - agent_r) < num_tokens - r
    return TokenMatching(destinations, sources[order], partners.gather(1, order), r, agent_r if has_agents else None)


def _split_grid(w: int, h: int, sx: int, sy: int, no_rand: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Positions of the destinations and of the sources, both row-major; on the generator's device."""
    device = "cpu" if generator is None else generator.device
    rows, columns = h // sy, w // sx
    chosen = torch.zeros(rows, columns, dtype=torch.long, device=device)
    if not no_rand:
        chosen = torch.randint(sy * sx, (rows, columns), generator=generator, device=device)
    top = torch.arange(rows, device=device)[:, None] * sy + chosen // sx
    left = torch.arange(columns, device=device) * sx + chosen % sx
    is_source = torch.ones(h * w, dtype=torch.bool, device=device)
    is_source[(top * w + left).flatten()] = False
    return torch.nonzero(~is_source)[:, 0], torch.nonzero(is_source)[:, 0]


# --- modules ----------------------------------------------------------------------------------------------------------------------


class AgentSDAttention(nn.Module):
    """The training-free form of agent attention: agents are rows given from outside, projected as the queries are.

        O = softmax(d^(-p_2 / 2) Q A^T) softmax(d^(-1/2) A K^T) V + kappa V          A = W_q a

    Used only where there are fewer than half as many agents as tokens; otherwise softmax attention, without the last term. Names
    of the parameters are Stable Diffusion's.

    Args:
        dim: channels of the tokens.
        num_heads: number of heads h.
        head_dim: channels d per head; None: dim / num_heads.
        context_dim: channels of `context`; None: dim.
        scale2_power: p_2.
        v_shortcut: kappa.

    Shape: x (B, N, C), agent (B, n, C), context (B, M, context_dim) -> (B, N, C).

    Raises:
        ValueError: heads that do not divide `dim`, agents together with a context.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        scale2_power: float = SCALE2_POWER,
        v_shortcut: float = V_SHORTCUT,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim, self.heads, self.head_dim = dim, num_heads, resolve_head_dim(dim, num_heads, head_dim)
        self.context_dim = dim if context_dim is None else context_dim
        self.scale, self.scale2_power, self.v_shortcut = self.head_dim**-0.5, scale2_power, v_shortcut
        inner = num_heads * self.head_dim
        self.to_q = nn.Linear(dim, inner, bias=False, **factory)
        self.to_k = nn.Linear(self.context_dim, inner, bias=False, **factory)
        self.to_v = nn.Linear(self.context_dim, inner, bias=False, **factory)
        self.to_out = nn.Sequential(nn.Linear(inner, dim, **factory), nn.Dropout(0.0))

    def forward(self, x: Tensor, agent: Tensor | None = None, *, context: Tensor | None = None) -> Tensor:
        check_tokens(x, self.dim)
        check_context(context, self.dim, self.context_dim)
        if agent is not None:
            check_tokens(agent, self.dim, "agent")
            if context is not None:
                raise ValueError("agents belong to self attention, where the values are those of the queries' tokens: no context")
            if 2 * agent.shape[1] < x.shape[1]:
                return _attend_through_agents(self, x, agent, self.scale2_power, self.v_shortcut)
        source = x if context is None else context
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(x), self.to_k(source), self.to_v(source)))
        out = ops.attention(q, k, v, scale=self.scale)
        assert isinstance(out, Tensor)  # no log-normaliser was asked for
        return _output(self, merge_heads(out))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_dim={self.head_dim}, scale2_power={self.scale2_power}, v_shortcut={self.v_shortcut}"


def _attend_through_agents(layer: Any, x: Tensor, agent: Tensor, scale2_power: float, v_shortcut: float) -> Tensor:
    """The equation of `AgentSDAttention` with the projections of any layer that has Stable Diffusion's."""
    q, k, v, agents = (split_heads(t, layer.heads) for t in (layer.to_q(x), layer.to_k(x), layer.to_v(x), layer.to_q(agent)))
    scale = getattr(layer, "scale", None) or q.shape[-1] ** -0.5
    out = agent_attention(q, k, v, agents, scale=scale, query_scale=scale**scale2_power)
    return _output(layer, merge_heads(out + v_shortcut * v))


def _output(layer: Any, x: Tensor) -> Tensor:
    for module in layer.to_out:  # nn.Sequential or nn.ModuleList
        x = module(x)
    return x


class AgentSDBlock(nn.Module):
    """Transformer block of a diffusion U-Net whose self attention runs on merged tokens, through agents where there are few enough.

        x += unmerge(attn1(merge(norm1 x), agents));  x += attn2(norm2 x, context);  x += ff(norm3 x)

    The matching compares the block's input; what is merged is the normalised one.

    Args:
        dim: channels of the tokens.
        num_heads, head_dim: of both attentions, as for `AgentSDAttention`.
        context_dim: channels of the context; None: dim.
        ratio: share of the tokens that is merged.
        agent_ratio: share of the tokens that is merged to get agents.
        sx, sy: width and height of the cells that have a destination each.
        use_rand: destinations are drawn; for batches of an odd size they are not.
        ff_ratio: hidden width of the feed-forward layer over `dim`.
        scale2_power, v_shortcut: as for `AgentSDAttention`.

    Shape: x (B, H * W, C), context (B, M, context_dim) -> (B, H * W, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        context_dim: int | None = None,
        ratio: float = 0.4,
        agent_ratio: float = 0.95,
        sx: int = 4,
        sy: int = 4,
        use_rand: bool = True,
        ff_ratio: float = 2.0,
        scale2_power: float = SCALE2_POWER,
        v_shortcut: float = V_SHORTCUT,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        heads = {"head_dim": head_dim, "scale2_power": scale2_power, "v_shortcut": v_shortcut, **factory}
        self.phase, self.use_rand = AgentSDPhase(0, ratio, agent_ratio, sx, sy), use_rand
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, **factory) for _ in range(3))
        self.attn1 = AgentSDAttention(dim, num_heads, **heads)
        self.attn2 = AgentSDAttention(dim, num_heads, context_dim=context_dim, **heads)
        hidden = int(dim * ff_ratio)
        self.ff = nn.Sequential(nn.Linear(dim, hidden, **factory), nn.GELU(), nn.Linear(hidden, dim, **factory))

    def forward(self, x: Tensor, *, grid_size: tuple[int, int], context: Tensor | None = None) -> Tensor:
        check_tokens(x, self.attn1.dim)
        matching = self.phase.match(x, grid_size, use_rand=self.use_rand)
        tokens, agents = matching.merge(self.norm1(x))
        x = x + matching.unmerge(self.attn1(tokens, agents))
        x = x + self.attn2(self.norm2(x), context=context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


# --- the schedule -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgentSDPhase:
    """How much is merged from a sampling step on.

    Attributes:
        first_step: the first step of the phase, from 0.
        ratio: share of the tokens that is merged; 0: nothing is done.
        agent_ratio: share of the tokens that is merged to get agents.
        sx, sy: width and height of the cells that have a destination each.
    """

    first_step: int = 0
    ratio: float = 0.4
    agent_ratio: float = 0.95
    sx: int = 4
    sy: int = 4

    def match(
        self, metric: Tensor, grid_size: tuple[int, int], *, use_rand: bool = True, generator: torch.Generator | None = None
    ) -> TokenMatching:
        """Match tokens (B, H * W, C). A batch of an odd size cannot pair prompted and unprompted images: no random choice there."""
        height, width = grid_size
        return match_tokens(
            metric,
            w=width,
            h=height,
            sx=self.sx,
            sy=self.sy,
            r=int(metric.shape[1] * self.ratio),
            agent_r=int(metric.shape[1] * self.agent_ratio),
            no_rand=not use_rand or metric.shape[0] % 2 == 1,
            generator=generator,
        )


def published_schedule(ratio: float = 0.4) -> tuple[AgentSDPhase, AgentSDPhase]:
    """The paper's for 50 steps: 20 steps with agents from cells of 4 x 4, then merging alone, from cells of 2 x 2."""
    return AgentSDPhase(0, ratio, 0.95, 4, 4), AgentSDPhase(20, ratio, 0.5, 2, 2)


# --- the tool ---------------------------------------------------------------------------------------------------------------------


class AgentSDPatch:
    """What `apply_agent_sd` keeps: the settings, the step that the sampling is at, and how to undo everything.

    Attributes:
        schedule: phases, by first step.
        step: the present sampling step, from 0. A U-Net call with a smaller timestep is the next step, one with a larger timestep
            begins a new image, one with the same belongs to the same step; without timesteps every call is a step.
        layers: how many layers are patched.
    """

    def __init__(
        self,
        schedule: Sequence[AgentSDPhase],
        *,
        max_downsample: int,
        scale2_power: float,
        v_shortcut: float,
        use_rand: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.schedule = tuple(sorted(schedule, key=lambda phase: phase.first_step))
        self.max_downsample, self.scale2_power, self.v_shortcut, self.use_rand = max_downsample, scale2_power, v_shortcut, use_rand
        self.generator = torch.Generator().manual_seed(torch.initial_seed()) if generator is None else generator
        self.step, self.layers = -1, 0
        self._timestep: float | None = None
        self._size: tuple[int, int] | None = None
        self._undo: list[Any] = []

    @property
    def phase(self) -> AgentSDPhase:
        """The phase of the present step."""
        return [p for p in self.schedule if p.first_step <= max(self.step, 0)][-1]

    def reset(self) -> None:
        """Begin a new image: the next call of the U-Net is step 0."""
        self.step, self._timestep = -1, None

    def install(self, unet: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Patch these blocks of a U-Net."""
        self._undo.append(unet.register_forward_pre_hook(self._begin_step, with_kwargs=True).remove)
        for block in blocks:
            layer = _PatchedLayer(self, block.attn1)  # type: ignore[arg-type]
            self._undo += [block.norm1.register_forward_pre_hook(layer.remember, with_kwargs=True).remove, layer.restore]  # type: ignore[union-attr, operator]
            self.layers += 1

    def remove(self) -> None:
        """Restore every layer. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def _begin_step(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latent = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim == 4), None)
        if latent is None:
            raise ValueError(f"AgentSD finds no latent image (B, C, H, W) among the arguments of {type(unet).__name__}")
        self._size = (latent.shape[-2], latent.shape[-1])
        found = kwargs.get("timestep", kwargs.get("timesteps", args[1] if len(args) > 1 else None))
        timestep = None if found is None else float(torch.as_tensor(found).flatten()[0])
        if timestep is None or self._timestep is None or timestep < self._timestep:
            self.step += 1
        elif timestep > self._timestep:
            self.step = 0
        self._timestep = timestep

    def match(self, x: Tensor) -> TokenMatching | None:
        """The matching for a layer's tokens (B, N, C); None where the layer is left alone."""
        phase = self.phase
        if self._size is None or phase.ratio <= 0:
            return None
        height, width = self._size
        downsample = math.ceil(math.sqrt(height * width // x.shape[1]))
        if downsample > self.max_downsample:
            return None
        grid = (math.ceil(height / downsample), math.ceil(width / downsample))
        return phase.match(x, grid, use_rand=self.use_rand, generator=self.generator)


class _PatchedLayer:
    """Stands in for the forward of a block's self attention; `remember` is a hook of the normalisation before it."""

    def __init__(self, patch: AgentSDPatch, layer: nn.Module) -> None:
        self.patch, self.layer = patch, layer
        self.own_forward = layer.__dict__.get("forward")  # another tool's
        self.metric: Tensor | None = None
        layer.forward = self  # type: ignore[assignment]

    def original(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = (
            self.own_forward(*args, **kwargs) if self.own_forward else type(self.layer).forward(self.layer, *args, **kwargs)
        )
        return out

    def restore(self) -> None:
        del self.layer.forward
        if self.own_forward is not None:
            self.layer.forward = self.own_forward

    def remember(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.metric = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim == 3), None)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        metric, self.metric = self.metric, None
        matching = None if metric is None else self.patch.match(metric)
        if matching is None:
            return self.original(x, *args, **kwargs)
        given = {**dict(zip(("context", "mask"), args, strict=False)), **kwargs}
        if any(given.get(name) is not None for name in ("mask", "attention_mask")):
            raise ValueError("AgentSD takes no attention mask: tokens that a mask tells apart are merged")
        tokens, agents = matching.merge(x)
        if agents is None or any(given.get(name) is not None for name in ("context", "encoder_hidden_states")):
            return matching.unmerge(self.original(tokens, *args, **kwargs))
        if other := sorted(name for name, value in kwargs.items() if value is not None):
            raise ValueError(f"AgentSD does not know these arguments of the attention: {', '.join(other)}")
        out = _attend_through_agents(self.layer, tokens, agents, self.patch.scale2_power, self.patch.v_shortcut)
        return matching.unmerge(out)


def apply_agent_sd(
    model: Any,
    *,
    ratio: float = 0.4,
    agent_ratio: float = 0.95,
    sx: int = 4,
    sy: int = 4,
    schedule: Sequence[AgentSDPhase] | None = None,
    max_downsample: int = 1,
    scale2_power: float = SCALE2_POWER,
    v_shortcut: float = V_SHORTCUT,
    use_rand: bool = True,
    generator: torch.Generator | None = None,
) -> AgentSDPatch:
    """Put AgentSD into the self attention of a diffusion model, in place and without training; a patch that is there is replaced.

    Weights, their names and other hooks stay as they are. Blocks are known by their structure: `norm1`, then `attn1` with `heads`,
    `to_q`, `to_k`, `to_v` and `to_out`, as CompVis' Stable Diffusion and diffusers have them.

    Args:
        model: a diffusers pipeline (its `unet`), a CompVis model (its `model.diffusion_model`), or a U-Net, whose first 4-D
            argument is the latent image.
        ratio, agent_ratio, sx, sy: one phase for all steps, as in `AgentSDPhase`; used without `schedule`.
        schedule: phases, the first of which begins at step 0: `published_schedule()`.
        max_downsample: only layers with at most this downsampling of the latent image are changed.
        scale2_power, v_shortcut: as for `AgentSDAttention`.
        use_rand: destinations are drawn; for batches of an odd size they are not.
        generator: of that choice; None: one of its own, seeded as torch is at the moment.

    Returns: the patch, whose `remove()` undoes it, as `remove_agent_sd(model)` does.

    Raises:
        ValueError: a model without such blocks, a layer that does more than agents can do, or a schedule that begins late. The
            model is then as it was.
    """
    phases = (AgentSDPhase(0, ratio, agent_ratio, sx, sy),) if schedule is None else tuple(schedule)
    if not phases or min(phase.first_step for phase in phases) != 0:
        raise ValueError(f"a schedule's first phase begins at step 0, got first steps {[p.first_step for p in phases]}")
    unet = _find_unet(model)
    blocks = [module for module in unet.modules() if _is_block(module)]
    if not blocks:
        raise ValueError(
            f"{type(unet).__name__} has no transformer blocks with norm1 and an attn1 of heads, to_q, to_k, to_v, to_out"
        )
    for block in blocks:
        _check_layer(block.attn1)
    remove_agent_sd(model)
    patch = AgentSDPatch(
        phases,
        max_downsample=max_downsample,
        scale2_power=scale2_power,
        v_shortcut=v_shortcut,
        use_rand=use_rand,
        generator=generator,
    )
    patch.install(unet, blocks)
    unet.agent_sd_patch = patch  # type: ignore[assignment]
    return patch


def remove_agent_sd(model: Any) -> None:
    """Undo `apply_agent_sd`; a model without a patch is left alone."""
    unet = _find_unet(model)
    patch = unet.__dict__.pop("agent_sd_patch", None)
    if patch is not None:
        patch.remove()


def _find_unet(model: Any) -> nn.Module:
    found = getattr(model, "unet", None)
    if found is None:
        found = getattr(getattr(model, "model", None), "diffusion_model", model)
    if not isinstance(found, nn.Module):
        raise ValueError(f"no U-Net in {type(model).__name__}: expected `unet`, `model.diffusion_model`, or the U-Net itself")
    return found


def _is_block(module: nn.Module) -> bool:
    layer = getattr(module, "attn1", None)
    projections = all(isinstance(getattr(layer, name, None), nn.Module) for name in ("to_q", "to_k", "to_v", "to_out"))
    return projections and isinstance(getattr(layer, "heads", None), int) and isinstance(getattr(module, "norm1", None), nn.Module)


def _check_layer(layer: Any) -> None:
    """Raise ValueError for an attention that does more to its tokens than project, attend and project."""
    extras = [n for n in ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross") if getattr(layer, n, None) is not None]
    extras += ["residual_connection"] if getattr(layer, "residual_connection", False) else []
    extras += ["rescale_output_factor"] if getattr(layer, "rescale_output_factor", 1.0) != 1.0 else []
    if extras:
        raise ValueError(f"{type(layer).__name__} has {', '.join(extras)}, which AgentSD would leave out")
