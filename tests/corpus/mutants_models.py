"""What config.json says of the model itself."""

from __future__ import annotations

from typing import Any

from corpus.edit import both, copy, drop
from corpus.edit_files import config
from corpus.mutants import fault


def text(**values: Any) -> Any:
    """Settings of the language model."""
    return config(lambda c: c.get("text_config", c).update(values))


def tied(data: dict[str, Any], flag: bool = True) -> None:
    data["tie_word_embeddings"] = flag
    data["text_config"]["tie_word_embeddings"] = flag


def untied(data: dict[str, Any]) -> None:
    tied(data, False)


MUTANTS = (
    *fault(
        "layers, of another number",
        bad={
            "vl-modelopt vl-ct-dynamic": {"more": text(num_hidden_layers=3), "fewer": text(num_hidden_layers=1)},
            "moe-modelopt": {"more": text(num_hidden_layers=3), "fewer": text(num_hidden_layers=1)},
            "vl-modelopt": {
                "of the tower, more": config(lambda c: c["vision_config"].update(depth=3)),
                "of the tower, fewer": config(lambda c: c["vision_config"].update(depth=1)),
            },
        },
        near={"vl-modelopt": {"a window for layers that are not there": text(max_window_layers=70)}},
    ),
    *fault(
        "widths and heads",
        bad={
            "vl-modelopt": {
                "more KV heads": text(num_key_value_heads=4),
                "fewer KV heads": text(num_key_value_heads=1),
                "heads of half the width": text(num_attention_heads=8),
                "wider MLP": text(intermediate_size=512),
                "narrower MLP": text(intermediate_size=256),
                "hidden size": text(hidden_size=512),
                "tower": config(lambda c: c["vision_config"].update(intermediate_size=64)),
            },
            "moe-modelopt": {"wider experts": text(moe_intermediate_size=256), "narrower experts": text(moe_intermediate_size=64)},
        },
        near={"vl-modelopt": {"a key of training": text(attention_dropout=0.1)}},
    ),
    *fault(
        "architecture",
        bad={
            "vl-modelopt": {
                "unknown": config(lambda c: c.update(architectures=["Qwen9_VLForConditionalGeneration"])),
                "of the text alone": config(lambda c: c.update(architectures=["Qwen2ForCausalLM"])),
                "none": config(lambda c: c.pop("architectures")),
            },
            "moe-modelopt": {"dense": config(lambda c: c.update(architectures=["Qwen3ForCausalLM"]))},
        },
        near={"vl-modelopt": {"a second one": config(lambda c: c["architectures"].append("Qwen9_VLForConditionalGeneration"))}},
    ),
    *fault(
        "tied embeddings",
        bad={"vl-tied": {"said not to be": config(untied)}},
        near={"vl-modelopt": {"said to be, lm_head stored": config(tied)}},
    ),
    *fault(
        "lm_head dropped, as if it were tied",
        bad={"vl-modelopt": {"config.json agrees": both(config(tied), drop("lm_head.weight"))}},
        near={"vl-tied": {"a head that is the embeddings": copy("model.embed_tokens.weight", "lm_head.weight")}},
        needs="source",
    ),
)
