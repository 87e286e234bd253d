"""Original models that cannot be opened: every one is refused in a sentence, before a weight is read."""

from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(name: str) -> Any:
    """Return the config of the model in a directory or on the hub.

    Raises FileNotFoundError if there is none, and ValueError for a model that transformers does not know or
    that is no causal language model.
    """
    fields = _fields(name)
    kind = fields.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in fields:
            raise ValueError(
                f"{name} (model type {kind!r}) has code of its own, which is not run here: load the model in "
                "Python, if you trust its code, and call rana_kernels.compress with `patterns`"
            )
        raise ValueError(
            f"{name} has model type {kind!r}, which transformers {transformers.__version__} does not know: "
            "pip install --upgrade transformers, or load the model in Python and call rana_kernels.compress "
            "with `patterns`"
        )
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        made = ", ".join(getattr(config, "architectures", None) or ["no class"])
        raise ValueError(
            f"{name} is of model type {kind!r} ({made}), wanted a causal language model: encoders, encoders "
            "with a decoder and models of images or sound are not supported"
        )
    return config


def _fields(name: str) -> dict[str, Any]:
    """Return config.json as it is."""
    place = Path(name)
    if place.is_dir() and not (place / "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json, wanted the directory of a model")
    try:
        fields, _ = transformers.PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        if place.is_dir():
            raise ValueError(f"{place / 'config.json'} cannot be read: {first_sentence(error)}") from None
        raise FileNotFoundError(
            f"{name}: there is no such directory, and the hub gives no such model ({first_sentence(error)}): "
            "check the spelling, the connection and, for a model that asks for consent, `hf auth login`"
        ) from None
    return fields


def check_weights(name: str) -> None:
    """Raise ValueError or FileNotFoundError if a directory has no safetensors, or a damaged one."""
    place = Path(name)
    if not place.is_dir():
        return
    files = sorted(place.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in place.glob(pattern))
        if pickles:
            raise ValueError(
                f"{name} has its weights in {pickles[0]} alone, a pickle, which can run code: not read, "
                "wanted safetensors. If you trust it, load it in Python and write it with save_pretrained"
            )
        raise FileNotFoundError(f"{name} has no weights, wanted model.safetensors, or shards and their index")
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged ({error}): copy or download it again") from None


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a message, at most 200 characters."""
    return " ".join(str(error).split()).split(". ")[0][:200]
