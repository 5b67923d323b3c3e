"""The command `fp8x`, and `python -m fp8x`."""

from fp8x import interrupt


def main() -> None:
    interrupt.install()  # before what takes long to import
    from fp8x.cli import app

    app(prog_name="fp8x")


if __name__ == "__main__":
    main()
