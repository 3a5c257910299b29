"""Two prompts for an engine of vLLM, of text and of images, and the log-probabilities that it gives. Runs in its interpreter.

What `generate` returns, as JSON:
    text, vocabulary   what it goes on with, greedily; tokens that there are
    prompt             log-probability of each token of PROMPT but the first
    likeliest          the likeliest token after each place of PROMPT
    logprobs           [{token: log-probability}] of the likeliest tokens, and the given one, at each place of prompt and answer
    images             [{text, logprobs}] for two pictures, one after the other; empty where the model takes none
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

PROMPT = "The sea was calm and the sky was clear, so they put the boat into the water and"
QUESTION = "Describe the image."
NEW_TOKENS = 8
SIDE = 224
"""Pixels: a multiple of 28 and 32, few tokens for any processor."""


def generate(llm: Any, config: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=20, prompt_logprobs=1)
    output = llm.generate([PROMPT], settings, use_tqdm=False)[0]
    given = _places((output.prompt_logprobs or [])[1:])
    result: dict[str, Any] = {
        "text": output.outputs[0].text,
        "vocabulary": config.model_config.get_vocab_size(),
        "prompt": [place[token] for place, token in zip(given, map(str, output.prompt_token_ids[1:]), strict=True)],
        "likeliest": [max(place, key=lambda token: -math.inf if math.isnan(place[token]) else place[token]) for place in given],
        "logprobs": [*given, *_places(output.outputs[0].logprobs)],
        "images": [],
    }
    if placeholder := _placeholder(config.model_config):
        settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=20)
        for image in _pictures():
            result["images"].append(_look(llm, settings, placeholder, image))
    return result


def _places(logprobs: Any) -> list[dict[str, float]]:
    """vLLM's log-probabilities, a place after the other: {token: log-probability}."""
    return [{str(token): entry.logprob for token, entry in place.items()} for place in logprobs or []]


def _placeholder(model_config: Any) -> str:
    """What stands for an image in this model's prompts, or "" where it takes none (models/interfaces.py SupportsMultiModal)."""
    from vllm.model_executor.model_loader import get_model_cls

    if not model_config.is_multimodal_model:
        return ""
    try:
        return get_model_cls(model_config).get_placeholder_str("image", 1) or ""
    except ValueError:
        return ""


def _look(llm: Any, settings: Any, placeholder: str, image: Any) -> dict[str, Any]:
    """Through the chat template where there is one."""
    if llm.get_tokenizer().chat_template:
        content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": QUESTION}]
        output = llm.chat([{"role": "user", "content": content}], settings, use_tqdm=False)[0]
    else:
        prompt = {"prompt": f"{placeholder}{QUESTION}", "multi_modal_data": {"image": image}}
        output = llm.generate([prompt], settings, use_tqdm=False)[0]
    return {"text": output.outputs[0].text, "logprobs": _places(output.outputs[0].logprobs)}


def _pictures() -> Iterable[Any]:
    """Two that no working vision tower takes for the same."""
    from PIL import Image, ImageDraw

    red = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(red).ellipse((20, 20, 140, 140), fill="red")
    blue = Image.new("RGB", (SIDE, SIDE), "black")
    ImageDraw.Draw(blue).rectangle((90, 60, 210, 200), fill="blue")
    return red, blue
