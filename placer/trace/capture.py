"""Capturing what the routers of a transformers model choose, by forward hooks."""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from placer.errors import PlacerError
from placer.model import Architecture

if TYPE_CHECKING:
    import torch


class RouterOutput(NamedTuple):
    """What one router put out for N rows of a batch.

    Attributes
    ----------
    ids
        ``[N, k]`` int64: chosen logical experts, by descending weight.
    weights
        ``[N, k]``: their weights.
    logits
        ``[N, E]``: scores of all experts, from which the router chose.
    """

    ids: "torch.Tensor"
    weights: "torch.Tensor"
    logits: "torch.Tensor"


class RouterCapture:
    """Hooks on the routers of a loaded model, as a context manager.

    The ids and weights are the router's own output, the very tensors that its experts
    are called with; nothing is derived again from logits.

    Parameters
    ----------
    model
        A transformers model.
    architecture
        Its family, which names the router modules.
    layer_ids
        The model's own numbers of its MoE layers.

    Raises
    ------
    PlacerError
        If the model has no router where its family says.
    """

    def __init__(
        self, model: "torch.nn.Module", architecture: Architecture, layer_ids: Sequence[int]
    ) -> None:
        self._paths = [
            architecture.router_module.format(layer=layer) for layer in layer_ids
        ]
        self._routers = [_router(model, path) for path in self._paths]
        self._captured: list[list[RouterOutput]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._captured = [[] for _ in self._routers]
        for position, router in enumerate(self._routers):
            self._handles.append(router.register_forward_hook(self._hook(position)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> list[RouterOutput]:
        """Return the output of every router, in the order of ``layer_ids``.

        Rows are in the order of the flattened batch, padding included, of the one forward
        pass since the last call.

        Raises
        ------
        PlacerError
            If a router was not called exactly once.
        """
        calls = self._captured
        self._captured = [[] for _ in self._routers]
        for path, captured in zip(self._paths, calls, strict=True):
            if len(captured) != 1:
                raise PlacerError(
                    f"router {path} was called {len(captured)} times in one forward pass, "
                    "expected once",
                    "record with a plain forward pass: no gradient checkpointing, no "
                    "replacement of the model's MoE blocks",
                )
        return [_by_descending_weight(captured[0]) for captured in calls]

    def _hook(self, position: int) -> Any:
        def keep(module: object, inputs: object, output: Any) -> None:
            # Routers of transformers 5 return (logits, weights, ids).
            logits, weights, ids = (tensor.detach() for tensor in output)
            self._captured[position].append(RouterOutput(ids, weights, logits))

        return keep


def _router(model: "torch.nn.Module", path: str) -> "torch.nn.Module":
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlacerError(
            f"{type(model).__name__} has no router {path}",
            "check that config.json belongs to these weights",
        ) from error


def _by_descending_weight(output: RouterOutput) -> RouterOutput:
    ids, weights, logits = output
    if bool((weights[:, 1:] <= weights[:, :-1]).all()):
        return output
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return RouterOutput(ids.gather(-1, order), weights.gather(-1, order), logits)
