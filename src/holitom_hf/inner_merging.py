"""Where `merge_hidden_states` stood in 0.1: `holitom_hf.merging` has them now."""

from .merging import merge_hidden_states


__all__ = ["merge_hidden_states"]
