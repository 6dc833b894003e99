"""`python -m crepatrain`, which launchers such as torchrun start."""

from crepatrain.cli import main

main()
