"""Makes ``python -m dsc_split.cli`` the same as ``dsc-split``."""

from dsc_split.cli.main import main

if __name__ == "__main__":
    main()
