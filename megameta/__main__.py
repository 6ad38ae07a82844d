"""``python -m megameta``: what torchrun, deepspeed and srun start."""

from megameta.cli import main

if __name__ == "__main__":
    main()
