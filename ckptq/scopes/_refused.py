"""Architectures that were looked at and have no scope, each with the reason. Not a scope."""

from types import MappingProxyType

_TTS = (
    "Qwen3-TTS can be neither calibrated nor checked. transformers 5.17 has no class for it, and its talker reads sums of text and "
    "codec embeddings that vLLM-Omni 0.30.0 alone makes (model_executor/models/qwen3_tts/prompt_embeds_builder.py); vLLM 0.32.0 "
    "has no such architecture to load an output with"
)
REFUSED = MappingProxyType({"Qwen3TTSForConditionalGeneration": _TTS, "Qwen3TTSTalkerForConditionalGeneration": _TTS})
"""{architecture: why}."""
