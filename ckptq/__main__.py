"""`python -m ckptq`."""

from ckptq.cli import main

main()
