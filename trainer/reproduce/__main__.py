"""Starts the command; `deepspeed --module` and torchrun start it here as well."""

from data_pipeline import cli
from trainer.reproduce.runner import main

if __name__ == "__main__":
    cli.run(main)
