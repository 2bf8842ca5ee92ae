"""SGLang's own modules for placement and recording, from its unpacked wheel.

``expert_location.py``, ``expert_location_dispatch.py`` and ``expert_distribution.py`` run
as they are. :class:`SglangCode` gives them the settings of a server. Modules that would
import GPU packages are replaced; what is used of them is taken from their source.
"""

import ast
import contextlib
import enum
import functools
import importlib
import sys
import typing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[2] / "build/engines/sglang/sglang"
# Where a model's get_model_config_for_expert_location is.
_MODEL_SOURCES = {"qwen3_moe": "qwen3_moe.py", "deepseek_v3": "deepseek_v2.py"}


def _definition(source: str, name: str, **names: Any) -> Any:
    """Return a class or function of SGLang, without running the rest of its module."""
    tree = ast.parse((ROOT / "srt" / source).read_text())
    found = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name
    )
    found.decorator_list = []
    scope = dict(names)
    exec(compile(ast.Module([found], []), source, "exec"), scope)
    return scope[name]


def _replace(name: str, **names: Any) -> None:
    sys.modules[f"sglang.srt.{name}"] = module = ModuleType(name)
    vars(module).update(names)


@functools.cache
def _modules() -> SimpleNamespace:
    """Import the modules; ``ForwardMode`` is the type of a batch's mode."""
    sys.path.append(str(ROOT.parent))  # einops is there
    sys.modules["sglang"] = package = ModuleType("sglang")
    package.__path__ = [str(ROOT)]
    forward_mode = _definition(
        "model_executor/forward_batch_info.py",
        "ForwardMode",
        IntEnum=enum.IntEnum,
        auto=enum.auto,
    )
    with_value = _definition(
        "utils/common.py",
        "Withable",
        Generic=typing.Generic,
        T=typing.TypeVar("T"),
        Optional=typing.Optional,
        contextmanager=contextlib.contextmanager,
    )
    _replace("elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
    _replace(
        "model_executor.forward_batch_info", ForwardMode=forward_mode, ForwardBatch=None
    )
    _replace(
        "observability.metrics_collector",
        STAT_LOGGER_ROLE_EXPERT_DISPATCH=None,
        ExpertDispatchCollector=None,
        resolve_collector_class=None,
    )
    _replace("utils", Withable=with_value, get_device=lambda: "cpu", get_int_env_var=None)
    found = SimpleNamespace(
        ForwardMode=forward_mode,
        context=importlib.import_module("sglang.srt.runtime_context"),
        location=importlib.import_module("sglang.srt.eplb.expert_location"),
        dispatch=importlib.import_module("sglang.srt.eplb.expert_location_dispatch"),
        distribution=importlib.import_module("sglang.srt.eplb.expert_distribution"),
    )
    # It imports kernels, only to say whether this is an AMD machine with MegaMoE.
    found.distribution.megamoe_prefill_only_recorder_enabled = lambda: False
    return found


class SglangCode:
    """A server, as far as its placement goes; one at a time.

    Parameters
    ----------
    model
        A folder with the model's config.json.
    num_ranks, num_nodes
        Expert-parallel ranks, and the nodes they are on.
    num_redundant_experts
        ``--ep-num-redundant-experts``.
    """

    def __init__(
        self, model: Path, *, num_ranks: int, num_nodes: int, num_redundant_experts: int
    ) -> None:
        self._modules = _modules()
        self.ForwardMode = self._modules.ForwardMode
        self._moe = SimpleNamespace(
            moe_a2a_backend="deepep",
            deepep_mode="normal",
            ep_dispatch_algorithm="static",
            ep_num_redundant_experts=num_redundant_experts,
            ep_join_mode=None,
            expert_distribution_recorder_buffer_size=-1,
            expert_balancedness_report_mode="off",
        )
        self._resources = SimpleNamespace(expert_location_metadata=None)
        on_cpu = SimpleNamespace(device="cpu")
        settings = {
            "get_exec": SimpleNamespace(
                moe=self._moe, overlap=SimpleNamespace(enable_two_batch_overlap=False)
            ),
            "get_parallel": SimpleNamespace(
                nnodes=num_nodes, ep_size=num_ranks, elastic_ep_initial_size=None
            ),
            "get_device_namespace": on_cpu,
            "get_schedule": SimpleNamespace(chunked_prefill_size=64),
            "get_resources": self._resources,
        }
        location, distribution = self._modules.location, self._modules.distribution
        for module in (
            self._modules.context,
            location,
            self._modules.dispatch,
            distribution,
        ):
            for name, value in settings.items():
                setattr(module, name, lambda value=value: value)
        location.get_device = lambda: on_cpu
        config = AutoConfig.from_pretrained(model)
        of_config = _definition(
            f"models/{_MODEL_SOURCES[config.model_type]}",
            "get_model_config_for_expert_location",
            ModelConfigForExpertLocation=location.ModelConfigForExpertLocation,
        )
        location.ModelConfigForExpertLocation.from_model_config = staticmethod(
            lambda _: of_config(None, config)
        )

    def load(self, map_file: Path, rank: int) -> Any:
        """Return what ``--init-expert-location MAP_FILE`` makes on a rank."""
        self._moe.init_expert_location = str(map_file)
        loaded = self._modules.location.compute_initial_expert_location_metadata(None, rank)
        self._resources.expert_location_metadata = loaded
        return loaded

    def physical(self, layer: int, experts: Any) -> Any:
        """Return where the rank that loaded last sends its tokens' experts ``[T, k]``."""
        info = self._modules.dispatch.ExpertLocationDispatchInfo.init_new(layer)
        return self._modules.dispatch.topk_ids_logical_to_physical(experts, info)

    def recorder(self, mode: str) -> Any:
        """Return the recorder of ``--expert-distribution-recorder-mode MODE``."""
        self._moe.expert_distribution_recorder_mode = mode
        return self._modules.distribution.ExpertDistributionRecorder.init_new(
            self._resources.expert_location_metadata, rank=0
        )
