"""The engines, one file each. Importing this imports none of their libraries."""

from __future__ import annotations

from attention_zoo.ops.engines.base import GRID_LIMIT, Engine, Signature, Status, describe
from attention_zoo.ops.engines.flash4 import Flash4Engine
from attention_zoo.ops.engines.flash23 import Flash2Engine, Flash3Engine
from attention_zoo.ops.engines.flex import FlexEngine
from attention_zoo.ops.engines.reference import ReferenceEngine
from attention_zoo.ops.engines.sdpa import TorchEngine
from attention_zoo.ops.engines.triton import TritonEngine
from attention_zoo.ops.engines.xformers import XformersEngine

__all__ = ["ENGINES", "GRID_LIMIT", "Engine", "Signature", "Status", "describe"]

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Flash4Engine(),
        Flash3Engine(),
        Flash2Engine(),
        TorchEngine(),
        XformersEngine(),
        FlexEngine(),
        TritonEngine(),
        ReferenceEngine(),
    )
}
