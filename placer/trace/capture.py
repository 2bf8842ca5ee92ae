"""Capturing the choices of a transformers model's routers, by forward hooks."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from placer.errors import PlacerError
from placer.model import Architecture, ModelSpec

if TYPE_CHECKING:
    import torch


# Weights nudged by this share of their size separate ties from choices: about a thousand
# times the rounding of float32. An even tie looks like none once in two to the 32.
NUDGE = 1e-4
NUM_NUDGES = 32


class RouterOutput(NamedTuple):
    """The choices of one layer's router for N rows of a batch.

    Attributes
    ----------
    ids
        ``[N, k]`` int64: chosen logical experts, by descending weight.
    weights
        ``[N, k]``: their weights.
    shares
        ``[N, E]`` float32: in which share of ``NUM_NUDGES`` repetitions, with the router's
        weights nudged by as much as rounding may matter, an expert is chosen; ``None`` if
        that was not requested. Where it is neither 0 nor 1 the expert is in a tie.
    """

    ids: "torch.Tensor"
    weights: "torch.Tensor"
    shares: "torch.Tensor | None"


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
    with_ties
        Find out which experts are in a tie, too.

    Raises
    ------
    PlacerError
        If the model has no experts or router where its family says.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        architecture: Architecture,
        spec: ModelSpec,
        *,
        with_ties: bool = False,
    ) -> None:
        layer_ids = spec.layer_ids or ()
        scores = architecture.scores_module
        template = scores or architecture.experts_module
        self._top_k = spec.top_k
        self._paths = [template.format(layer=layer) for layer in layer_ids]
        self._modules = [_submodule(model, path) for path in self._paths]
        self._reads_scores = scores is not None
        self._routers = [
            _submodule(model, architecture.router_module.format(layer=layer))
            for layer in (layer_ids if with_ties else ())
        ]
        self._num_experts = spec.num_experts
        self._nudging = False
        self._chosen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._shares: list[torch.Tensor | None] = []
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
            self._handles.append(router.register_forward_hook(self._shares_hook(position)))
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
        chosen, shares = self._chosen, self._shares
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
            RouterOutput(*by_descending_weight(*calls[0]), shares=share)
            for calls, share in zip(chosen, shares, strict=True)
        ]

    def _clear(self) -> None:
        self._chosen = [[] for _ in self._paths]
        self._shares = [None for _ in self._paths]

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
            if self._nudging:
                return
            # Zero except for the chosen experts, so the largest k are the chosen ones.
            weights, ids = _rows(output[0]).topk(self._top_k, dim=-1)
            self._chosen[position].append((ids, weights))

        return keep

    def _shares_hook(self, position: int) -> Callable[..., None]:
        def keep(module: "torch.nn.Module", inputs: tuple[Any, ...], output: Any) -> None:
            if self._nudging:  # called by itself
                return
            self._nudging = True
            try:
                self._shares[position] = _chosen_when_nudged(
                    module, inputs, self._num_experts[position], self._top_k, position
                )
            finally:
                self._nudging = False

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


def _chosen_when_nudged(
    router: "torch.nn.Module",
    inputs: tuple[Any, ...],
    num_experts: int,
    top_k: int,
    seed: int,
) -> "torch.Tensor":
    """Return ``[N, E]``: in which share of nudges a router chooses an expert.

    The router itself is called, so that its biases, groups and tables count; matrices of
    its weights are nudged by ``NUDGE`` of their root mean square.
    """
    import torch

    matrices = {n: p for n, p in router.named_parameters() if p.ndim > 1}
    chosen = []
    for number in range(NUM_NUDGES):
        generator = torch.Generator().manual_seed(seed * NUM_NUDGES + number)
        nudged = {}
        for name, weight in matrices.items():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            size = float(weight.float().square().mean().sqrt()) or 1.0
            nudged[name] = weight + NUDGE * size * noise
        chosen.append(_ids_of(torch.func.functional_call(router, nudged, inputs), top_k))
    shares = torch.zeros(len(chosen[0]), num_experts, device=chosen[0].device)
    for ids in chosen:
        shares.scatter_add_(
            1, ids.long(), torch.full_like(ids, 1 / NUM_NUDGES, dtype=shares.dtype)
        )
    return shares


def _ids_of(output: Any, top_k: int) -> "torch.Tensor":
    """Return ``[N, k]``: ids that a router returns, or the best by its scores."""
    tensors = output if isinstance(output, tuple) else (output,)
    for tensor in tensors:
        if not tensor.is_floating_point():
            return _rows(tensor)
    return _rows(tensors[0]).topk(top_k, dim=-1).indices


def _submodule(model: "torch.nn.Module", path: str) -> "torch.nn.Module":
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlacerError(
            f"{type(model).__name__} has no module {path}",
            "check that config.json belongs to these weights",
        ) from error


def by_descending_weight(
    ids: "torch.Tensor", weights: "torch.Tensor"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return ids and weights ``[N, k]``, each row the heaviest first."""
    # On a GPU to ask whether they are in order would wait for every layer.
    on_cpu = weights.device.type == "cpu"
    if on_cpu and bool((weights[:, 1:] <= weights[:, :-1]).all()):
        return ids, weights
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), weights.gather(-1, order)
