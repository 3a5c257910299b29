"""Llama 2 and 3, and the many models that say they are Llama."""

from ckptq.scopes import Scope, _decoder

# vLLM 0.32.0 models/llama.py (LlamaAttention, LlamaMLP, LlamaDecoderLayer, LlamaForCausalLM).

SCOPE = Scope(
    name="llama",
    architectures=("LlamaForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/llama.py",
    auto_class="AutoModelForCausalLM",
    text_config="",
    generations=(),
    layers="model.layers",
    linears=_decoder.LINEARS,
    kv=_decoder.KV,
    towers=(),
    parameters=_decoder.LLAMA,
    kept=_decoder.KEPT,
    server_prefix=(),
    server_layers="model.layers",
    server_kept=("lm_head",),
    explicit_head_dim=True,
)
