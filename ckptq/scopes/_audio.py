"""Audio towers of Qwen's Omni thinkers. Not a scope.

vLLM 0.32.0 builds them without the quantization config: they have no linears that could become quantized.
"""

from types import MappingProxyType

from ckptq.scopes import Tower

_SIZES = MappingProxyType({"audio": "d_model", "audio_mlp": "encoder_ffn_dim", "audio_out": "output_dim", "mel": "num_mel_bins"})
# The encoder's layers in both: transformers 5.17 models/qwen2_5_omni/modeling_qwen2_5_omni.py Qwen2_5OmniAudioEncoderLayer.
_LAYER = MappingProxyType(
    {
        "self_attn.q_proj": ("audio audio", "audio"),
        "self_attn.v_proj": ("audio audio", "audio"),
        "self_attn.out_proj": ("audio audio", "audio"),
        "self_attn_layer_norm": ("audio", "audio"),
        "fc1": ("audio_mlp audio", "audio_mlp"),
        "fc2": ("audio audio_mlp", "audio"),
        "final_layer_norm": ("audio", "audio"),
    }
)


def _named(prefix: str, modules: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Weight and bias of modules, by the dimensions of both."""
    return {
        f"{prefix}.{name}.{kind}": dims
        for name, both in modules.items()
        for kind, dims in zip(("weight", "bias"), both, strict=True)
    }


def _layers(prefix: str) -> dict[str, str]:
    at = f"{prefix}.layers.{{i}}"
    return {**_named(at, dict(_LAYER)), f"{at}.self_attn.k_proj.weight": "audio audio"}


def _tower(prefix: str, section: str, sizes: dict[str, str]) -> Tower:
    # No heads: what the number of ranks does not divide, vLLM repeats on each of them, or always (the Whisper-like one).
    return Tower(prefix, f"{section}.encoder_layers", (), {**_SIZES, **sizes}, heads="")


# transformers 5.17 models/qwen2_5_omni/modeling_qwen2_5_omni.py Qwen2_5OmniAudioEncoder, which vLLM takes as it is.


def qwen2_5(prefix: str, section: str) -> Tower:
    """Qwen2.5-Omni's tower, whose config is at `section` of config.json."""
    return _tower(prefix, section, {})


def qwen2_5_parameters(prefix: str) -> dict[str, str]:
    """Its parameters."""
    modules = {
        "conv1": ("audio mel 3", "audio"),
        "conv2": ("audio audio 3", "audio"),
        "ln_post": ("audio", "audio"),
        "proj": ("audio_out audio", "audio_out"),
    }
    return {**_named(prefix, modules), f"{prefix}.audio_bos_eos_token.weight": "2 audio_out", **_layers(prefix)}


# vLLM 0.32.0 models/qwen3_omni_moe_thinker.py Qwen3OmniMoeAudioEncoder: three convolutions, each of which halves time and bins.


def qwen3(prefix: str, section: str) -> Tower:
    """Qwen3-Omni's tower, whose config is at `section` of config.json."""
    sizes = {"conv": "downsample_hidden_size", "convolved": "downsample_hidden_size * num_mel_bins / 8"}
    return _tower(prefix, section, sizes)


def qwen3_parameters(prefix: str) -> dict[str, str]:
    """Its parameters."""
    modules = {
        "conv2d1": ("conv 1 3 3", "conv"),
        "conv2d2": ("conv conv 3 3", "conv"),
        "conv2d3": ("conv conv 3 3", "conv"),
        "ln_post": ("audio", "audio"),
        "proj1": ("audio audio", "audio"),
        "proj2": ("audio_out audio", "audio_out"),
    }
    names = {**_named(prefix, modules), f"{prefix}.conv_out.weight": "audio convolved", **_layers(prefix)}
    return {**names, f"{prefix}.layers.{{i}}.self_attn.k_proj.bias": "audio"}
