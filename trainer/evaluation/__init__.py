"""What measures a model, and how what it finds is shown. `trainer.evaluate` is the command."""
