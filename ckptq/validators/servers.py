"""Versions of vLLM whose rules differ, as data: what a validator's rule has to ask of the version that will serve.

Every field of `Server` is one difference, with the file where it was read; paths are relative to vllm/. What is the same in all
versions below has no field: the order of ModelOpt's exclude list after its expansion (exact, substring, wildcards), the exact
names of native `fp8`, config.json before hf_quant_config.json, how a KV scheme is read and what a missing KV scale does
(utils/torch_utils.py, layers/quantization/kv_cache.py), and that a quantized model's missing tensors go unnoticed.

vLLM 0.11.2 was read too and left out: its ModelOpt knows FP8 and NVFP4 alone, in that spelling, expands no `X*`, matches no
wildcards and takes no KV scheme from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from ckptq.errors import UnsupportedError

Verified = Literal["loaded", "read"]

_ALONE = frozenset({"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4"})
_ALGOS = _ALONE | {"MXFP8", "MIXED_PRECISION"}


@dataclass(frozen=True, slots=True)
class Rules:
    """Whose rules a checkpoint was judged by, for reports. `verified` as in Server."""

    server: str
    version: str
    verified: Verified


OMNI = Rules("vLLM-Omni", "0.30", "loaded")


@dataclass(frozen=True, slots=True)
class Server:
    """One version of vLLM.

    version             as the flag names it: major and minor
    verified            loaded: the whole corpus of the tests was given to this version, and it behaved as the rules say
                        (tests/test_agreement.py). read: its rules were read in its source
    algos               values of ModelOpt's quant_algo, upper case; the case in the file does not matter.
                        model_executor/layers/quantization/modelopt.py QUANT_ALGOS
    algos_alone         those that are recognized in a section without quant_method, as hf_quant_config.json is.
                        transformers_utils/model_arch_config_convertor.py _normalize_quantization_config
    algos_mixed         those that MIXED_PRECISION builds linears in; it leaves a linear of another as it is.
                        modelopt.py ModelOptMixedPrecisionConfig.get_quant_method
    mixed_aliases       MIXED_PRECISION finds a module under a second spelling, too.
                        modelopt.py ModelOptMixedPrecisionConfig._quantized_layer_prefix_candidates
    groups_decide       NVFP4 whose config_groups have no input_activations is taken for W4A16_NVFP4.
                        modelopt.py ModelOptNvFp4Config._from_config
    unset_noticed       ModelOpt's NVFP4 without its local scales is refused; before, they were what the memory held.
                        modelopt.py KNvfp4Static.process
    exclude_keys        keys of the exclude list in config.json's own section; the first that is there counts.
                        modelopt.py ModelOptQuantConfigBase.from_config
    head_quantized      ModelOpt quantizes lm_head where the list does not keep it. modelopt.py get_quant_method
    fused_name_listed   ModelOpt and native fp8: the name of a fused linear counts, not only the names of all its shards.
                        model_executor/layers/quantization/utils/quant_utils.py is_layer_skipped
    fused_regex         compressed-tensors and Quark: a `re:` that matches the fused name counts; for Quark its plain name too.
                        compressed_tensors/utils.py and quark/utils.py should_ignore_layer
    shards_before_class compressed-tensors: a target that names the shards of a fused linear counts before one that names its class;
                        before, after it. compressed_tensors/utils.py find_matched_target
    unreached_refused   compressed-tensors: a linear that no target reaches is refused; since, it is not quantized. As before
    unknown_refused     a tensor of the language model that has no place is refused, not dropped. The vision tower always refuses:
                        by KeyError before, by ValueError since. model_executor/models/qwen2.py and qwen2_5_vl.py load_weights
    attn_kv_names       `self_attn.attn.k_scale` is taken; before, it was dropped.
                        model_executor/model_loader/weight_utils.py maybe_remap_kv_scale_name
    stored_head_counts  a stored lm_head is loaded although the config calls it tied; before, it was passed over.
                        config/model.py maybe_untie_word_embeddings
    nvfp4_any_format    compressed-tensors: NVFP4 with activations is known in every `format`, not only in those that quantize
                        activations. compressed_tensors/compressed_tensors.py _get_scheme_from_parts
    pads_block_rows     FP8_PB_WO takes rows (per rank) that 128 does not divide. modelopt.py _Fp8PbWoPartialBlock
    refines_moe_blocks  native fp8 in blocks: an expert's rows (per rank) that 128 does not divide are taken in finer blocks.
                        model_executor/layers/quantization/fp8.py Fp8MoEMethod
    quark_blocks        Quark's qscheme per_block is known, a list of one spec counts as the spec, and layer_quant_config may be
                        absent. quark/quark.py _is_fp8_w8a8, _unwrap_single_quant_config, get_layer_quant_config_from_name
    quark_expert_parts  a name inside routed experts on Quark's list keeps all of them. quark/utils.py should_ignore_layer
    """

    version: str
    verified: Verified
    algos: frozenset[str]
    algos_alone: frozenset[str]
    algos_mixed: frozenset[str]
    mixed_aliases: bool
    groups_decide: bool
    unset_noticed: bool
    exclude_keys: tuple[str, ...]
    head_quantized: bool
    fused_name_listed: bool
    fused_regex: bool
    shards_before_class: bool
    unreached_refused: bool
    unknown_refused: bool
    attn_kv_names: bool
    stored_head_counts: bool
    nvfp4_any_format: bool
    pads_block_rows: bool
    refines_moe_blocks: bool
    quark_blocks: bool
    quark_expert_parts: bool

    @property
    def rules(self) -> Rules:
        """What reports say of it."""
        return Rules("vLLM", self.version, self.verified)


_V20 = Server(
    version="0.20",
    verified="read",
    algos=_ALGOS,
    algos_alone=_ALONE,
    algos_mixed=frozenset({"FP8", "NVFP4"}),
    mixed_aliases=False,
    groups_decide=False,
    unset_noticed=False,
    exclude_keys=("ignore",),
    head_quantized=False,
    fused_name_listed=False,
    fused_regex=False,
    shards_before_class=False,
    unreached_refused=True,
    unknown_refused=False,
    attn_kv_names=False,
    stored_head_counts=False,
    nvfp4_any_format=False,
    pads_block_rows=False,
    refines_moe_blocks=False,
    quark_blocks=False,
    quark_expert_parts=False,
)
_V26 = replace(
    _V20,
    version="0.26",
    algos=_ALGOS | {"W4A16_NVFP4"},
    algos_mixed=frozenset({"FP8", "NVFP4", "W4A16_NVFP4", "MXFP8"}),
    mixed_aliases=True,
    nvfp4_any_format=True,
    head_quantized=True,
    fused_name_listed=True,
    unreached_refused=False,
    unknown_refused=True,
    attn_kv_names=True,
    quark_expert_parts=True,
)
_V30 = replace(
    _V26,
    version="0.30",
    verified="loaded",
    algos_mixed=_ALONE | {"W4A16_NVFP4", "MXFP8"},
    groups_decide=True,
    unset_noticed=True,
    fused_regex=True,
    shards_before_class=True,
    stored_head_counts=True,
    pads_block_rows=True,
    refines_moe_blocks=True,
    quark_blocks=True,
)
_V32 = replace(_V30, version="0.32")
_V33 = replace(
    _V32,
    version="0.33",
    verified="read",
    algos_alone=_ALONE | {"MIXED_PRECISION"},
    exclude_keys=("ignore", "exclude_modules"),
)

SERVERS: Mapping[str, Server] = MappingProxyType({s.version: s for s in (_V20, _V26, _V30, _V32, _V33)})
DEFAULT = _V32


def find_server(text: str) -> Server:
    """The server of `text`: `0.32`, `v0.32` and `0.32.1` are one. Raises UnsupportedError for a version that was never read."""
    version = minor(text)
    if version in SERVERS:
        return SERVERS[version]
    raise UnsupportedError(
        f"--vllm {text}: the rules of this version are not known; known: {', '.join(SERVERS)}",
        hint="give the known version nearest to yours, and let --load try the folder with the vLLM that will serve it",
    )


def minor(version: str) -> str:
    """`v0.32.1+cpu` -> `0.32`."""
    return ".".join(version.strip().removeprefix("v").split(".")[:2])
