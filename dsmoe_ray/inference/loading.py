"""From an artifact to a model that is ready to run."""

import torch

from dsmoe_ray.artifact.load import Artifact
from dsmoe_ray.model.rope import compute_rotations
from dsmoe_ray.model.transformer import Transformer

# Read in float32 whatever the rest is computed in.
_FLOAT32_WEIGHTS = ("norm.weight", "router.proj.weight")


def load_model(artifact: Artifact, *, device: torch.device | None = None) -> Transformer:
    """Return the artifact's model with its verified weights, for inference.

    It computes in float32 on a CPU, where weights stored so are used in place, and in bfloat16 on a GPU.

    Args:
        artifact: See ``artifact/load.py``.
        device: By default a GPU if there is one.

    Raises:
        ArtifactError: a tensor does not match its digest.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = artifact.model_config
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=dtype)
    state = {
        name: tensor.to(device, torch.float32 if name.endswith(_FLOAT32_WEIGHTS) else dtype)
        for name, tensor in artifact.load_state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    cos, sin = compute_rotations(config.max_seq_len, config.attention.head_dim, config.rope_theta)
    model.cos, model.sin = cos.to(device), sin.to(device)
    return model.eval().requires_grad_(False)
