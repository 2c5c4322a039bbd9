"""State dicts of the release (`model.pth`, a plain state dict of the global model) for `FedAvgNet`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from reprise.errors import CheckpointError


def import_weights(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official names to ours: the MNIST network calls its classifier `linear_2`; all others are equal.

    Raises:
        CheckpointError: keys are left over on either side, or a shape differs.
    """
    own = model.state_dict()
    renamed = {name.replace("linear_2.", "classifier."): value for name, value in state.items()}
    missing, unknown = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(
            f"keys do not match: missing {missing}, left over {unknown}",
            looked_at=f"a state dict with {len(state)} entries",
            next_step="use a model.pth of the FedNTD release and the same paper.model",
        )
    for name, value in renamed.items():
        if value.shape != own[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(value.shape)}, the model {tuple(own[name].shape)}",
                looked_at="the shapes of the state dict",
                next_step="choose the paper.model (and number of classes) that the weights belong to",
            )
    return renamed
