"""Mistral: a Llama to the server, in the files with the hub's names. Its own `consolidated.safetensors` has others."""

from types import MappingProxyType

from ckptq.scopes import Scope, _decoder

# vLLM 0.32.0 models/mistral.py (MistralForCausalLM derives from LlamaForCausalLM, and reads the same keys of the config).

SCOPE = Scope(
    name="mistral",
    architectures=("MistralForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/mistral.py",
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
    # transformers 5.19.0 models/mistral/configuration_mistral.py.
    assumed=MappingProxyType({"num_key_value_heads": 8}),
)
