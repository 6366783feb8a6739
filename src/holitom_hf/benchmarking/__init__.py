"""How fast, how large and how far from the limit: what `holitom-hf bench` and `holitom-hf flops` compute."""
