"""Official checkpoints: safe reading of the files, and the mapping of their keys to ours, one file per family."""

from attention_zoo.checkpoints import agent as _agent  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import agent_swin as _agent_swin  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import biformer as _biformer  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import cca as _cca  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import combiner as _combiner  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import diff as _diff  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import gda as _gda  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import halonet as _halonet  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import kdgqa as _kdgqa  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import litv2 as _litv2  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import llama as _llama  # noqa: F401 - registers its converters
from attention_zoo.checkpoints import moh as _moh  # noqa: F401 - registers its converter
from attention_zoo.checkpoints import moh_dit as _moh_dit  # noqa: F401 - registers its converter
from attention_zoo.checkpoints import moh_transnext as _moh_transnext  # noqa: F401 - registers its converters
from attention_zoo.checkpoints.convert import CheckpointError, convert_official_state_dict, rename_keys
from attention_zoo.checkpoints.files import read_checkpoint

__all__ = ["CheckpointError", "convert_official_state_dict", "read_checkpoint", "rename_keys"]
