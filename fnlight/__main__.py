"""``python -m fnlight`` is ``fnlight``."""

from fnlight.cli import main

if __name__ == "__main__":
    main()
