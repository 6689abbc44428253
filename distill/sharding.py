"""One draft, split over the processes of a training: its weights, a step's batch, and the looks at blocks.

Weights are split layer by layer with torch's own FSDP2, so each process holds its part of every layer, and the whole
of one layer at a time.  Head and embedding stay whole: the loss reads all of the head at once, the two are often one
tensor, and sending so much for every pass would cost more than it saves.  With one process alone everything here
does nothing.  Knows nothing about jobs.  Called by `distill.tuning`, `distill.factors` and `distill.assignment`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from adapter.contracts import Coupling, VerifiedBlock
from distill.batches import Batch, RowWeights, by_request, collate, num_tokens, plan_batches
from distill.grouping import places_by_request
from distill.packing import use_packed_attention
from distill.ranks import Ranks
from distill.scoring import BATCH_TOKENS, score_blocks

K = TypeVar("K", bound=Hashable)

_LOOK_TOKENS = BATCH_TOKENS // 2  # one forward pass of `score_blocks`, which all ranks must start together


def shard(model: Any, ranks: Ranks) -> None:
    """Split a draft's layers in place (FSDP, arXiv 2304.11277); its parameters are DTensors afterwards.

    Gradients are summed over ranks, not averaged: a batch's weights sum to one over all of them.
    """
    if ranks.size == 1:
        return
    use_packed_attention(model)  # transformers asks for the class, which sharding replaces
    kept = {model.get_output_embeddings().weight, model.get_input_embeddings().weight}
    mesh = init_device_mesh(next(iter(kept)).device.type, (ranks.size,))
    parts = [
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        for part in (*model.model.layers, model.model)
    ]
    for part in parts:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no mean
    for part in parts:  # whole weights that first came to be under inference mode could not be trained with
        part.unshard()
        part.reshard()


def whole(tensors: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
    """Return tensors with all their parts, in one exchange; every rank must ask at once."""
    split = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    if not split:
        return dict(tensors)
    group = next(iter(split.values())).device_mesh.get_group()
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, {name: tensor.to_local().cpu() for name, tensor in split.items()}, group=group)
    joined = {name: torch.cat([part[name] for part in parts]).to(tensor.device) for name, tensor in split.items()}
    return dict(tensors) | joined


def placed(tensor: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a whole tensor, where one of the same shape is split like that."""
    if not isinstance(beside, DTensor) or tensor.shape != beside.shape:
        return tensor
    return distribute_tensor(tensor, beside.device_mesh, beside.placements, src_data_rank=None)


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state as one process would have it; every rank must ask at once."""
    state: dict[str, Any] = optimizer.state_dict()
    values = whole({(i, name): value for i, each in _of(state) for name, value in each.items()})
    return state | {"state": {i: {name: values[i, name] for name in each} for i, each in _of(state)}}


def placed_state(state: dict[str, Any], parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return what an optimizer of split parameters can load of `whole_state`."""
    parts = {i: {name: placed(value, parameters[i]) for name, value in each.items()} for i, each in _of(state)}
    return state | {"state": parts}


def _of(state: dict[str, Any]) -> Any:
    return state["state"].items()


def gradient_norm(parameters: Sequence[torch.Tensor], ranks: Ranks) -> torch.Tensor:
    """Return the norm of the gradient over all parameters and all parts of them, []."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if ranks.size == 1:
        return torch.nn.utils.get_total_norm(grads)
    mine = torch.nn.utils.get_total_norm([grad.to_local() for grad in grads if isinstance(grad, DTensor)])
    [square] = ranks.total(float(mine) ** 2)
    return mine.new_tensor(square).sqrt()


def collate_share(blocks: Sequence[VerifiedBlock], weights: RowWeights, ranks: Ranks) -> tuple[Batch, float, int]:
    """Return this rank's part of a step's blocks, its share of their weight, and the tokens it reads for the step.

    Requests are divided by their tokens.  A rank that gets none reads the shortest one with no weight, which takes
    no longer than what the others read: all must go through every layer together.
    """
    if ranks.size == 1:
        batch = collate(blocks, weights)
        return batch, 1.0, batch.token_ids.numel()
    items = by_request(blocks)
    sizes = [num_tokens(item) for item in items]
    hand = ranks.deal(sizes)[ranks.rank]
    chosen = hand or [sizes.index(min(sizes))]
    batch = collate([block for i in chosen for block in items[i]], weights, part_of=blocks)
    if not hand:
        batch.weights.zero_()
    return batch, float(batch.weights.sum()), batch.token_ids.numel() if hand else 0


def score_together(
    model: Any, head: torch.Tensor, blocks: Sequence[VerifiedBlock], coupling: Coupling,
    allowed: torch.Tensor | None, ranks: Ranks,
) -> list[NDArray[Any]]:  # fmt: skip
    """Return what `score_blocks` does, on every rank, each having scored a part."""
    if ranks.size == 1:
        return score_blocks(model, head, blocks, coupling, allowed)
    requests = places_by_request(blocks)
    turns = plan_batches([num_tokens([blocks[i] for i in group]) for group in requests], _LOOK_TOKENS, "share")
    mine: dict[int, NDArray[Any]] = {}
    for first in range(0, len(turns), ranks.size):
        turn = turns[min(first + ranks.rank, len(turns) - 1)]  # who has none left reads the last one once more
        places = [i for request in turn for i in requests[request]]
        scores = score_blocks(model, head, [blocks[i] for i in places], coupling, allowed)
        mine |= dict(zip(places, scores, strict=True))
    found = {i: scores for part in ranks.gather(mine) for i, scores in part.items()}
    return [found[i] for i in range(len(blocks))]
