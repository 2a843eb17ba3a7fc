"""What every engine has in common: the classes of calls, its interface, and the joined mask that some engines take."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from attention_zoo.ops._operators import stands_alone
from attention_zoo.ops._problem import Problem
from attention_zoo.ops._reference import visible

__all__ = [
    "FEW_QUERIES",
    "GRID_LIMIT",
    "HALF",
    "Engine",
    "JoinedMask",
    "Signature",
    "Status",
    "compute_capability",
    "describe",
    "flash_limits",
    "is_grouped",
    "join_masks",
    "unusable",
]

HALF = (torch.float16, torch.bfloat16)
GRID_LIMIT = 65_535  # of a CUDA grid's second and third dimension, over which the libraries' kernels spread samples and heads
_FEW_KEYS, _FEW_KEYS_FORWARD = 256, 1024  # with gradients and without: up to there torch's kernels are faster than flash-attn 4
FEW_QUERIES = 8  # of each head: up to there reading the keys is all that takes time
_SHORT = (64, 128)  # sides of the tiles in which a program of ours holds the whole map of a sequence
_MANY = 4096  # sequences times heads from which the kernels of forward and backward take longer than Python does
_HEAVY = 2**28  # bytes of keys and values; half of it where their heads fill a GPU by themselves, so that nothing is merged:
_MANY_READERS = 96  # so many of them, counted over the samples
_LARGE_MAP = 2**24  # entries of the (B, H, N_q, N_k) map from which compiling a kernel is cheaper than forming it


class Signature(NamedTuple):
    """The class that a call belongs to: all that decides which engine serves it. Calls of one class share one decision.

    Attributes:
        lengths: N_q against N_k: "one" (a single query), "few" (2 to 8) to more keys; else "equal", "fewer" or "more" queries.
        left, right: whether the window is bounded on that side; `right` includes causality.
        zero_right: the right bound is 0, as in causal attention.
        mask: "" none, "bool" or "float".
        packed: "" no, "self" (queries and keys share their offsets), "cross".
        grad: q, k or v needs a gradient; map_grad: the bias or a float mask does.
        empty: a size is 0; few_keys: so few that the flash libraries lose to torch; large: the (B, H, N_q, N_k) map is too
            large to form lightly.
        short: side of the tile, 64 or 128, that holds the map of as many queries as keys; 0: it is larger. many: such sequences,
            counted with their heads.
        heavy: so few queries read so many keys and values that this takes longer than Python does.
        watched: a transform, a mode or a class of tensors looks on, which knows torch's operators and may not know ours.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    grouped: bool
    lengths: str
    left: bool
    right: bool
    zero_right: bool
    mask: str
    bias: bool
    packed: str
    softcap: bool
    dropout: bool
    lse: bool
    grad: bool
    map_grad: bool
    empty: bool
    few_keys: bool
    short: int
    many: bool
    large: bool
    heavy: bool
    watched: bool

    @property
    def windowed(self) -> bool:
        """Bounded in a way that is neither full nor plainly causal."""
        return self.left or (self.right and not self.zero_right)

    @property
    def few_queries(self) -> bool:
        """At most 8 queries, of more keys."""
        return self.lengths in ("one", "few")

    @property
    def mapped(self) -> bool:
        """Whether there is a tensor to add to, or cut out of, the logits."""
        return bool(self.mask) or self.bias

    @property
    def half(self) -> bool:
        return self.dtype in HALF


def describe(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Signature:
    """The class of a checked call. Under torch.compile its comparisons become guards, so dynamic sizes stay dynamic."""
    num_queries, num_keys = problem.num_queries, problem.num_keys
    q_shape = q.shape
    mask, bias = problem.attn_mask, problem.bias
    left, right = problem.window
    if problem.cu_seqlens_q is None:
        packed = ""
        lengths = _compare(num_queries, num_keys)
    else:
        packed = "self" if problem.cu_seqlens_q is problem.cu_seqlens_k else "cross"
        lengths = "equal" if packed == "self" else "fewer"
    training = torch.is_grad_enabled()
    map_grad = training and ((bias is not None and bias.requires_grad) or (mask is not None and mask.requires_grad))
    grad = training and (q.requires_grad or k.requires_grad or v.requires_grad)
    size = q_shape[0] * q_shape[1] * num_queries * num_keys
    return Signature(
        q.device,
        q.dtype,
        q_shape[3],
        v.shape[3],
        is_grouped(q, k),
        lengths,
        left is not None,
        right is not None,
        right is not None and right == 0,
        "" if mask is None else "bool" if mask.dtype == torch.bool else "float",
        bias is not None,
        packed,
        problem.softcap is not None,
        problem.dropout_p > 0.0,
        problem.return_lse,
        grad,
        map_grad,
        True if size == 0 or q_shape[3] == 0 or v.shape[3] == 0 else False,  # noqa: SIM210
        True if num_keys <= (_FEW_KEYS if grad else _FEW_KEYS_FORWARD) else False,  # noqa: SIM210
        next((side for side in _SHORT if num_keys <= side), 0) if lengths == "equal" and not packed else 0,
        True if q_shape[0] * q_shape[1] >= _MANY else False,  # noqa: SIM210
        True if size >= _LARGE_MAP else False,  # noqa: SIM210
        True if lengths in ("one", "few") and _is_heavy(k, v) else False,  # noqa: SIM210
        not (torch.compiler.is_compiling() or stands_alone(q)),
    )


def _compare(num_queries: int, num_keys: int) -> str:
    if num_queries == num_keys:
        return "equal"
    if num_queries > num_keys:
        return "more"
    return "one" if num_queries == 1 else "few" if num_queries <= FEW_QUERIES else "fewer"


def _is_heavy(k: Tensor, v: Tensor) -> bool:
    size, readers = (k.numel() + v.numel()) * k.element_size(), k.shape[0] * k.shape[1]
    return size >= _HEAVY or (size >= _HEAVY // 2 and readers >= _MANY_READERS)


def is_grouped(q: Tensor, k: Tensor) -> bool:
    """Whether query heads share key/value heads; a plain bool also where the sizes are symbols."""
    return True if q.shape[1] != k.shape[1] else False  # noqa: SIM210


class Status(NamedTuple):
    """Whether an engine works here: its version ("" when unknown), and the reason why not (None: it does)."""

    version: str
    reason: str | None


class Engine(ABC):
    """One way to compute attention. Engines are stateless but for what they have found out about their library."""

    name: ClassVar[str]
    group: ClassVar[str]  # the `backend=` name that may stand for it
    package: ClassVar[str]  # distribution that it needs, for its version
    module: ClassVar[str] = "torch"  # top-level module that it needs
    _status: Status | None = None

    def status(self) -> Status:
        """Found out once, by importing the library; whatever the import raises is the reason, never an exception."""
        if self._status is None:
            try:
                reason = self.load() if importlib.util.find_spec(self.module) else "not installed"
            except Exception as error:  # a half-installed library may raise anything
                reason = f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._status = Status(_version(self.package), reason)
        return self._status

    def load(self) -> str | None:
        """Import the library. Returns why it cannot serve on this machine, None when it can; may raise."""
        return None

    @abstractmethod
    def can_run(self, signature: Signature) -> str | None:
        """Why this class of calls is not served exactly, None when it is. Does not import the library, and is traced by dynamo."""

    def largest_batch(self, num_heads: int) -> int:
        """How many samples one launch takes on CUDA."""
        return GRID_LIMIT

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
        """(B, H_q, N_q, D_v), and the log-normaliser (B, H_q, N_q), float32 or float64, if it was asked for."""


def flash_limits(s: Signature) -> str | None:
    """What the flash-attn libraries have in common: why a class of calls is beyond all of them, None when it is not."""
    if s.device.type != "cuda":
        return "serves CUDA tensors only"
    if not s.half:
        return "serves float16 and bfloat16 only"
    if s.mapped:
        return "takes no mask or bias tensor"
    if s.empty:
        return "empty sizes are left to the reference"
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@torch.compiler.assume_constant_result
def compute_capability(device: torch.device) -> int:
    """Of a CUDA device, as one number: 90 for 9.0. (Dynamo of torch 2.11 cannot compare tuples that are such constants.)"""
    return _capability(device)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@torch.compiler.assume_constant_result
def unusable(device: torch.device) -> str | None:
    """Why our kernels do not run there; None if they do."""
    if not _has_triton():
        return "Triton is not installed"
    if device.type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "on a CPU the kernels run under TRITON_INTERPRET=1 only"
    if device.type != "cuda":
        return f"the kernels run on CUDA devices, not on {device.type}"
    return None if compute_capability(device) >= 80 else "the kernels need compute capability 8.0 or higher"


@functools.cache
def _has_triton() -> bool:
    """To look it up takes longer than some kernels."""
    return importlib.util.find_spec("triton") is not None


class JoinedMask(NamedTuple):
    """One tensor for engines that take one: boolean, or float in the dtype of q, (B | 1, H | 1, N_q | 1, N_k).

    No row of it is fully masked: such rows are opened, listed in `dead` (..., N_q | 1, 1), and their output must be set to 0. Then
    the incoming gradient of such a row is 0 as well, and all gradients are exact whatever the engine makes of masked rows.
    """

    mask: Tensor | None
    dead: Tensor | None


def join_masks(q: Tensor, problem: Problem) -> JoinedMask:
    """Mask, bias, window, causality and packing of a call in one tensor."""
    allowed = visible(problem, q.device)
    mask, bias = problem.attn_mask, problem.bias
    added = mask if mask is not None and mask.is_floating_point() else None
    if bias is not None:
        added = bias if added is None else added + bias
    if allowed is None and added is None:
        return JoinedMask(None, None)
    can_die = mask is not None or bias is not None or problem.packed or problem.num_queries > problem.num_keys
    if added is None:
        assert allowed is not None
        dead = ~allowed.any(-1, keepdim=True) if can_die else None
        joined = allowed if dead is None else allowed | dead
    else:
        closed = added == -torch.inf
        if allowed is not None:
            closed = closed | ~allowed
        dead = closed.all(-1, keepdim=True)
        joined = _cast_map(added, q.dtype).masked_fill(closed, -torch.inf).masked_fill(dead, 0.0)
    if joined.shape[-1] != problem.num_keys:
        joined = joined.expand(*joined.shape[:-1], problem.num_keys)
    while joined.ndim < 4:
        joined, dead = joined.unsqueeze(0), None if dead is None else dead.unsqueeze(0)
    return JoinedMask(joined, dead)


def _cast_map(added: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in the dtype of q, its finite values kept finite: float32's lowest must not turn into -inf on the way."""
    limit = torch.finfo(dtype)
    if torch.finfo(added.dtype).max <= limit.max:
        return added.to(dtype)
    wide = added.to(torch.promote_types(added.dtype, torch.float32))  # half precision would round the limit beyond itself
    return wide.clamp(limit.min, limit.max).to(dtype).masked_fill(added == -torch.inf, -torch.inf)
