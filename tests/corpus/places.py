"""Where mutants strike: names of tensors and modules in the hub's layout, as `fnmatch` patterns."""

L0, L1 = "model.layers.0.", "model.layers.1."
Q, K, V, OUT = (f"{L0}self_attn.{s}_proj" for s in "qkvo")
GATE, UP, DOWN = (f"{L0}mlp.{s}_proj" for s in ("gate", "up", "down"))
TOWER = "visual.blocks.0."
KV = ("*.k_scale", "*.v_scale")
E0 = f"{L0}mlp.experts.0."
"""An expert of the MoE exports."""
