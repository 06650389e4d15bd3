"""The paper's tables and figures, computed again: `runner` is the command."""
