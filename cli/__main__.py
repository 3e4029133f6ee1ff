"""`python -m dnd_sdk.cli` is `dnd`."""

from dnd_sdk.cli.main import main

if __name__ == "__main__":
    main()
