"""Package discovery under renamed prefixes: `cli/` is `dnd_sdk.cli`, `integrations/` is `dnd_sdk.integrations`."""

from setuptools import find_packages, setup

TREES = {"dnd_sdk": "dnd_sdk", "dnd_sdk.cli": "cli", "dnd_sdk.integrations": "integrations"}

setup(
    package_dir=TREES,
    packages=[
        name for root, folder in TREES.items() for name in (root, *(f"{root}.{s}" for s in find_packages(folder)))
    ],
)
