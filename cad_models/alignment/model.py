"""The two towers: a point encoder for CAD models, and a head of experts on frozen image embeddings."""

from torch import nn

from cad_models.alignment.model_config import HeadConfig, PointEncoderConfig, point_encoder_config, released_config
from cad_models.alignment.moe import MixtureOfExperts
from cad_models.alignment.point_encoder import PointEncoder, PointFeatures

__all__ = [
    "HeadConfig",
    "MixtureOfExperts",
    "PointEncoder",
    "PointEncoderConfig",
    "PointFeatures",
    "parameter_groups",
    "point_encoder_config",
    "released_config",
]

# Parameters that stand for tokens rather than for weights of a map: shrinking them towards zero has no meaning.
_TOKENS = ("queries", "start_token", "start_position")


def parameter_groups(model: nn.Module, *, lr: float, head_lr: float, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: the experts' (and the loss's) learning rate apart from the encoder's, decay for
    matrices only. The network on pair histograms learns as fast as the experts: it too is a few layers on fixed features.

    Biases, norms, scales, tokens and the temperature get no weight decay. Frozen parameters are left out. Each group
    also has a ``name``: ``encoder``, ``encoder_no_decay``, ``head``, ``head_no_decay``; empty groups are left out,
    and the order depends on the model alone, so an optimizer's state can be loaded again.
    """
    in_encoder = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, PointEncoder)
        for name, parameter in module.named_parameters()
        if not name.startswith("pairs.")
    }
    groups: dict[str, dict] = {
        name + suffix: {"params": [], "lr": group_lr, "weight_decay": decay, "name": name + suffix}
        for name, group_lr in (("encoder", lr), ("head", head_lr))
        for suffix, decay in (("", weight_decay), ("_no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        no_decay = parameter.dim() <= 1 or leaf == "bias" or leaf in _TOKENS
        tower = "encoder" if id(parameter) in in_encoder else "head"
        groups[tower + ("_no_decay" if no_decay else "")]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
