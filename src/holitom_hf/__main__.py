"""`python -m holitom_hf` is `holitom-hf`."""

from .cli import app


if __name__ == "__main__":
    app(prog_name="holitom-hf")
