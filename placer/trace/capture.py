"""Capturing what the routers of a transformers model choose, by forward hooks."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec

if TYPE_CHECKING:
    import torch


class RouterOutput(NamedTuple):
    """What the router of one layer chose for N rows of a batch.

    Attributes
    ----------
    ids
        ``[N, k]`` int64: chosen logical experts, by descending weight.
    weights
        ``[N, k]``: their weights.
    logits
        ``[N, E]``: scores of all experts, from which the router chose, or ``None`` if
        they were not asked for.
    """

    ids: "torch.Tensor"
    weights: "torch.Tensor"
    logits: "torch.Tensor | None"


class RouterCapture:
    """Hooks on the MoE blocks of a loaded model, as a context manager.

    Ids and weights are the very tensors that the experts are called with; nothing is
    derived again from logits, so bias terms, groups and hash tables are in them.

    Parameters
    ----------
    model
        A transformers model.
    architecture
        Its family, which names the modules.
    spec
        Its layers and top-k.
    with_logits
        Keep the router's logits too.

    Raises
    ------
    PlacerError
        If the model has no experts where its family says, or logits are asked for and
        its family names no router.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        architecture: Architecture,
        spec: ModelSpec,
        *,
        with_logits: bool = False,
    ) -> None:
        layer_ids = spec.layer_ids or ()
        scores, router = architecture.scores_module, architecture.router_module
        if with_logits and router is None:
            raise PlacerError(
                f"the data file of {architecture.model_types[0]} names no router",
                "compare tensors only: --max-tokens 0",
            )
        template = scores or architecture.experts_module
        self._top_k = spec.top_k
        self._paths = [template.format(layer=layer) for layer in layer_ids]
        self._modules = [_submodule(model, path) for path in self._paths]
        self._reads_scores = scores is not None
        self._routers = [
            _submodule(model, (router or "").format(layer=layer))
            for layer in (layer_ids if with_logits else ())
        ]
        self._chosen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._logits: list[torch.Tensor | None] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        self._clear()
        for position, module in enumerate(self._modules):
            self._handles.append(
                module.register_forward_hook(self._scores_hook(position))
                if self._reads_scores
                else module.register_forward_pre_hook(self._experts_hook(position))
            )
        for position, router in enumerate(self._routers):
            self._handles.append(router.register_forward_hook(self._logits_hook(position)))
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
        """Return the choices of every MoE layer, in the order of ``layer_ids``.

        Rows are in the order of the flattened batch, padding included, of the one forward
        pass since the last call.

        Raises
        ------
        PlacerError
            If the experts of a layer were not called exactly once.
        """
        chosen, logits = self._chosen, self._logits
        self._clear()
        for path, calls in zip(self._paths, chosen, strict=True):
            if len(calls) != 1:
                raise PlacerError(
                    f"{path} was called {len(calls)} times in one forward pass, "
                    "expected once",
                    "record with a plain forward pass: no gradient checkpointing, no "
                    "replacement of the model's MoE blocks",
                )
        return [
            RouterOutput(*_by_descending_weight(*calls[0]), logits=scores)
            for calls, scores in zip(chosen, logits, strict=True)
        ]

    def _clear(self) -> None:
        self._chosen = [[] for _ in self._paths]
        self._logits = [None for _ in self._paths]

    def _experts_hook(self, position: int) -> Callable[..., None]:
        def keep(module: object, inputs: tuple[Any, ...]) -> None:
            if len(inputs) != 3:
                raise PlacerError(
                    f"{self._paths[position]} is called with {len(inputs)} tensors, "
                    "expected hidden states, ids and weights",
                    "install the transformers that placer is tested with: 5.23",
                )
            _, ids, weights = inputs
            self._chosen[position].append((_rows(ids), _rows(weights)))

        return keep

    def _scores_hook(self, position: int) -> Callable[..., None]:
        def keep(module: object, inputs: object, output: Any) -> None:
            # Zero but for the chosen experts, so the largest k are the chosen ones.
            weights, ids = _rows(output[0]).topk(self._top_k, dim=-1)
            self._chosen[position].append((ids, weights))

        return keep

    def _logits_hook(self, position: int) -> Callable[..., None]:
        def keep(module: object, inputs: object, output: Any) -> None:
            self._logits[position] = _rows(output[0])

        return keep


def to_host(
    outputs: Sequence[RouterOutput],
) -> list[tuple["torch.Tensor", "torch.Tensor"]]:
    """Return ids (int64) and weights (float16) of every layer on the host.

    From a GPU they come through pinned memory and are waited for once, not layer by layer.
    """
    import torch

    def copied(tensor: "torch.Tensor") -> "torch.Tensor":
        if not tensor.is_cuda:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    pairs = [(copied(one.ids), copied(one.weights.to(torch.float16))) for one in outputs]
    for device in {one.ids.device for one in outputs if one.ids.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return pairs


def _rows(tensor: "torch.Tensor") -> "torch.Tensor":
    return tensor.detach().reshape(-1, tensor.shape[-1])


def _submodule(model: "torch.nn.Module", path: str) -> "torch.nn.Module":
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlacerError(
            f"{type(model).__name__} has no module {path}",
            "check that config.json belongs to these weights",
        ) from error


def _by_descending_weight(
    ids: "torch.Tensor", weights: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    if bool((weights[:, 1:] <= weights[:, :-1]).all()):
        return ids, weights
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), weights.gather(-1, order)
