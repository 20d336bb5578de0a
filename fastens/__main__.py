"""``python -m fastens``: the command line."""

from fastens.cli import main

if __name__ == "__main__":
    main()
