"""How vLLM-Omni builds linears of denoisers. Not a denoiser: modules beginning with an underscore are none."""

from ckptq.scopes import Fused, Split

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def qkv(attention: str, runtime: str = "to_qkv", shards: tuple[str, ...] = QKV) -> Fused:
    """The three of an attention as one."""
    return Fused(f"{attention}.{runtime}", tuple(f"{attention}.{shard}" for shard in shards), "heads", packed=False)


def fused(runtime: str, *shards: str, split: Split = "rows") -> Fused:
    """Shards relative to the same parent as the whole: `feed_forward.w13` of `w1` and `w3`.

    vLLM-Omni 0.30.0 diffusion/registry.py _prepare_diffusion_quant_config reads packed_modules_mapping of the pipeline's class, and
    none has one: no list of modules may name shards.
    """
    parent = runtime.rpartition(".")[0]
    return Fused(runtime, tuple(f"{parent}.{shard}" for shard in shards), split, packed=False)


def rows(name: str, runtime: str = "") -> Fused:
    """One linear, shared out by rows: ColumnParallelLinear."""
    return Fused(runtime or name, (name,), "rows", packed=False)


def columns(name: str, runtime: str = "") -> Fused:
    """One linear, shared out by columns: RowParallelLinear."""
    return Fused(runtime or name, (name,), "columns", packed=False)


def heads(name: str) -> Fused:
    """One linear, stored as the server fuses it, shared out by heads: QKVParallelLinear."""
    return Fused(name, (name,), "heads", packed=False)


def whole(name: str, runtime: str = "") -> Fused:
    """One linear that every rank has whole: ReplicatedLinear."""
    return Fused(runtime or name, (name,), "none", packed=False)
