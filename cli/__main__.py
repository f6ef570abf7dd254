"""Run ``dsc-split`` as ``python -m dsc_split.cli``."""

from dsc_split.cli.main import main

if __name__ == "__main__":
    main()
