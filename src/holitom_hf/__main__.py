"""`python -m holitom_hf` is `holitom-hf`."""

from .apps.command_line.app import app


if __name__ == "__main__":
    app(prog_name="holitom-hf")
