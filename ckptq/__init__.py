"""ckptq: turns a Hugging Face checkpoint into a quantized one that the server loads, and proves it."""

__version__ = "0.1.0"
