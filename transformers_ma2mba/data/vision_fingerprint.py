"""A fingerprint of everything that the features of a frozen vision tower depend on, apart from the film."""

import hashlib
import json

import torch

from ..gradient_checkpointing import is_sharded
from ..modeling_ma2mba import Ma2mbaModel
from ..processing_ma2mba import Ma2mbaProcessor


class VisionFingerprint:
    """A hash of the vision tower's weights, its settings, and the way frames are prepared.

    Copies by pickle or deepcopy keep the last value only.

    Args:
        model ([`Ma2mbaModel`]): its vision tower must be frozen.
        processor ([`Ma2mbaProcessor`]): prepares the frames.

    Attributes:
        value: the last hash, or "".
    """

    def __init__(self, model: Ma2mbaModel, processor: Ma2mbaProcessor):
        self.model, self.processor, self.value, self._versions = model, processor, "", None

    def __getstate__(self) -> dict:
        return {**vars(self), "model": None}

    def update(self) -> str:
        """Return the hash of the present state.

        Raises:
            ValueError: if the vision tower is trained, sharded, offloaded or has adapters.
        """
        tower = self.model.vision_tower
        tensors = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
        self._check(tensors)
        settings = self._settings()
        versions = (settings, _sample(tensors), *((name, _version(t), t.dtype) for name, t in tensors.items()))
        if versions != self._versions:  # hashing the weights takes seconds
            digest = hashlib.sha256(settings.encode())
            for name, tensor in sorted(tower.state_dict().items()):  # with the scales of quantized weights
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._versions, self.value = versions, digest.hexdigest()
        return self.value

    def _check(self, tensors: dict[str, torch.Tensor]):
        tower = self.model.vision_tower
        if any(map(is_sharded, tower.modules())):
            raise ValueError(
                "The vision tower's parameters are sharded (ZeRO-3 or FSDP), so that one process cannot encode a "
                "film: give FrozenVisionFeatures an unsharded copy of the model, or train without it."
            )
        if any(hasattr(module, "merged_adapters") for module in tower.modules()):
            raise ValueError(
                "Features of a vision tower with adapters cannot be kept, because adapters can be switched: merge "
                "them with `merge_and_unload`, or place them elsewhere."
            )
        trained = [name for name, tensor in tensors.items() if tensor.requires_grad]
        if trained:
            raise ValueError(
                f"Features of a vision tower that is trained cannot be kept; its parameter {trained[0]} requires "
                "gradients. Freeze it: model.model.vision_tower.requires_grad_(False)."
            )
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError("The vision tower is offloaded, so that its features cannot be kept: load it as a whole.")

    def _settings(self) -> str:
        config = self.model.config
        frames = self.processor.video_processor.to_dict()
        frames.pop("fps", None)
        vision_config = config.vision_config.to_dict()
        for name in ("dtype", "transformers_version"):  # these may differ between a model and its checkpoint
            vision_config.pop(name, None)
        names = ("vision_feature_layer", "spatial_pool_mode", "spatial_pool_stride", "spatial_pool_rounding")
        settings = {name: getattr(config, name) for name in (*names, "image_mean", "image_std")}
        settings |= {"vision_config": vision_config, "video_processor": frames}
        return json.dumps(settings, sort_keys=True, default=str)


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    """The address and the number of changes of a tensor; PyTorch does not count those of inference tensors."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sample(tensors: dict[str, torch.Tensor]) -> bytes:
    """A few values of a few tensors.

    Writing through `.data` does not count as a change, and new tensors may get the address of earlier ones.
    """
    some = [tensor.detach().flatten() for tensor in list(tensors.values())[:: max(1, len(tensors) // 8)]]
    return torch.cat([values[:: max(1, len(values) // 8)].double() for values in some]).cpu().numpy().tobytes()
